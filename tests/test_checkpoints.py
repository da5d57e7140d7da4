"""Checkpoints of other code bases. Truth: the forward passes of `foreign`, in float64, and the definitions of each
process; of what is harmful, that it is refused by name and leaves no trace."""

import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import warnings
import zipfile
from pathlib import Path

import foreign
import pytest
import stranger
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, UNet2DModel
from hub_server import HubServer
from safetensors.torch import save_file
from torch.nn.functional import one_hot

from diffusers_ext import (
    ClassConditionalPipeline,
    ReflectedPipeline,
    ScoreUNet2DModel,
    bits_per_dim,
    convert_checkpoint,
    denoiser_from,
    log_likelihood,
    noise_schedule,
    score_model_from,
)
from diffusers_ext.checkpoints.edm import convert_edm
from diffusers_ext.checkpoints.pickles import Record, read_pickle
from diffusers_ext.checkpoints.reading import _NAMES, read_checkpoint
from diffusers_ext.errors import InputError

SCRIPT = Path(__file__).parents[1] / "training" / "convert.py"
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
STEPS, TIME = torch.tensor([3.0, 17.0]).double(), torch.tensor([-1.0, 0.9]).double()
LABELS, CLASSES = torch.tensor([1, 4]), 5
EXACT = {"rtol": 0, "atol": 1e-6}  # float32: diffusers' embedding of the time, and weights as files hold them


def answer(unet, x, time, labels=None):
    return unet.double()(x, time, class_labels=labels).sample.detach()


def told(**more):
    return {"resolution": 8, "beta_schedule": "linear", "attention_head_dim": 16} | more


def adm_file(path, **options):
    weights = foreign.Weights()
    output = foreign.adm(weights, X, STEPS, LABELS if "classes" in options else None, **options)
    torch.save({name: value.float() for name, value in weights.all.items()}, path)
    return path, output


def edm_files(path, options, file=None):
    weights = foreign.Weights()
    labels = one_hot(LABELS, CLASSES).double() if "classes" in options else None
    output = foreign.edm_unet(weights, X, TIME, labels, **options)
    shared = {name: options[name] for name in ("song", "classes", "taps") if name in options}
    return foreign.edm_file(path, weights, **shared, **(file or {})), weights, output


def score_sde_file(path, time=TIME, sigmas=None, reflected=False, **options):
    weights = foreign.Weights()
    output = foreign.ncsnpp(weights, X, time, **options)
    return foreign.pth_file(path, weights, sigmas, reflected), weights, output


VE_SIGMAS = torch.exp(torch.linspace(math.log(50), math.log(0.01), 1000))


# --- networks ---------------------------------------------------------------------------------------------------------

ADM = {
    "as published": ({}, {}, UNet2DModel),
    "newer order of attention": ({"newer": True}, {"new_attention_order": True}, UNet2DModel),
    "strided convolutions": ({"residual_resampling": False}, {}, UNet2DModel),
    "classes": ({"classes": CLASSES}, {}, UNet2DModel),
    "a shift alone, no variance": ({"scale_shift": False, "out_channels": 3}, {}, UNet2DModel),
    "four heads everywhere": (
        {"heads": 4, "attended": (0, 1)},
        {"attention_head_dim": None, "num_attention_heads": 4},
        ScoreUNet2DModel,
    ),
    "four heads, strided convolutions": (
        {"heads": 4, "residual_resampling": False, "attended": (0, 1)},
        {"attention_head_dim": None, "num_attention_heads": 4},
        ScoreUNet2DModel,
    ),
    "four heads of one width": ({"heads": 4}, {"attention_head_dim": None, "num_attention_heads": 4}, UNet2DModel),
    "a narrower first level": ({"mult": (0.5, 1, 2), "width": 64, "attended": (1, 2), "n": 2}, {}, ScoreUNet2DModel),
}


@pytest.mark.parametrize(("options", "more", "kind"), ADM.values(), ids=ADM)
def test_a_network_of_adm_answers_as_it_did(options, more, kind, tmp_path):
    path, output = adm_file(tmp_path / "model.pt", **options)
    converted = convert_checkpoint(path, **told(**more))
    assert type(converted.unet) is kind
    labels = LABELS if "classes" in options else None
    torch.testing.assert_close(answer(converted.unet, X, STEPS, labels), output, **EXACT)


NCSNPP = {"fourier": True, "residual": True, "taps": (1, 3, 3, 1)}
ADM_OF_EDM = {"song": False, "width": 64}
EDM = {
    "DDPM++": ({}, {}, ScoreUNet2DModel),
    "DDPM++, classes, augmentation": ({"classes": CLASSES}, {"augmented": True}, ScoreUNet2DModel),
    "DDPM++, older pickle": ({"mult": (1, 2, 2)}, {"protocol": 3}, ScoreUNet2DModel),
    "DDPM++ as published": ({"mult": (2, 2, 2)}, {"augmented": True}, ScoreUNet2DModel),
    "NCSN++ as published": (NCSNPP | {"mult": (2, 2, 2)}, {"augmented": True}, ScoreUNet2DModel),
    "NCSN++": (NCSNPP, {}, ScoreUNet2DModel),
    "NCSN++, classes": (NCSNPP | {"classes": CLASSES}, {}, ScoreUNet2DModel),
    "residual input, box filter": ({"mult": (1, 2, 2), "residual": True}, {}, ScoreUNet2DModel),
    "ADM, two widths of attention": (ADM_OF_EDM | {"attended": (0, 1)}, {}, ScoreUNet2DModel),
    "ADM, classes": ({"song": False, "width": 128, "classes": CLASSES}, {}, UNet2DModel),
}


@pytest.mark.parametrize(("options", "file", "kind"), EDM.values(), ids=EDM)
def test_a_network_of_edm_answers_as_it_did(options, file, kind, tmp_path):
    path, _, output = edm_files(tmp_path / "model.pkl", options, file)
    converted = convert_checkpoint(path)
    assert type(converted.unet) is kind
    assert converted.null_class is None
    assert ("augmentation" in " ".join(converted.dropped)) == ("augmented" in file)
    labels = LABELS if "classes" in options else None
    torch.testing.assert_close(answer(converted.unet, X, TIME, labels), output, **EXACT)


@pytest.mark.parametrize(
    ("depth", "attended", "fir"),
    [((1, 2), (1,), False), ((1, 2, 2), (0, 2), True), ((1, 1, 2), (), False), ((2, 2), (1,), False)],
)
def test_a_network_of_score_sde_answers_as_it_did(depth, attended, fir, tmp_path):
    options = {"fourier": False, "residual_input": None, "mult": depth, "attended": attended, "fir": fir}
    path, _, output = score_sde_file(tmp_path / "model.pth", STEPS, **options)
    converted = convert_checkpoint(path, resolution=8, sde="ddpm", fir=fir or None)
    said = dict(line.split(": ", 1) for line in converted.sentences()[1:])
    filters = {True: ("told", "the filter 1, 3, 3, 1"), False: ("assumed", "means of 2 x 2")}
    assert filters[fir][1] in said[f"Not in the file, and {filters[fir][0]}"]
    torch.testing.assert_close(answer(converted.unet, X, STEPS), output, **EXACT)
    config = converted.scheduler.config  # as score_sde's ancestral sampling has it
    assert (config.beta_schedule, config.variance_type, config.clip_sample) == ("linear", "fixed_large", False)


@pytest.mark.parametrize("song", [True, False])
def test_dropped_labels_of_edm_become_a_null_class(song, tmp_path):
    options = {"classes": CLASSES} | ({} if song else ADM_OF_EDM)
    path, weights, _ = edm_files(tmp_path / "model.pkl", options, {"label_dropout": 0.1})
    converted = convert_checkpoint(path)
    assert converted.pipeline.config.null_class == CLASSES
    assert converted.pipeline.num_classes == CLASSES
    without = foreign.edm_unet(weights, X, TIME, torch.zeros(2, CLASSES).double(), **options)
    null = torch.full((2,), CLASSES)
    torch.testing.assert_close(answer(converted.unet, X, TIME, null), without, **EXACT)


PUBLISHED = {  # million parameters, as papers cite them: of EDM's model of CIFAR-10, and of ADM's of ImageNet 64
    55.7: {"block_out_channels": (256, 256, 256), "first_channels": 128, "embedding_channels": 128},
    295.9: {
        "block_out_channels": (192, 384, 576, 768), "layers_per_block": 3, "attention_levels": (1, 2, 3),
        "num_attention_heads": None, "attention_after_last_up_block": False, "num_class_embeds": 1000,
        "resnet_time_scale_shift": "scale_shift", "resample_shortcut": False,
    },
}  # fmt: skip


@pytest.mark.parametrize(("millions", "options"), PUBLISHED.items(), ids=map(str, PUBLISHED))
def test_networks_of_the_published_size_have_the_published_number_of_parameters(millions, options):
    with torch.device("meta"):
        unet = ScoreUNet2DModel(**options)
    assert round(unet.num_parameters() / 1e6, 1) == millions


def test_the_global_random_state_is_left_alone(tmp_path):
    path, _, _ = edm_files(tmp_path / "model.pkl", NCSNPP)
    before = torch.random.get_rng_state()
    convert_checkpoint(path)
    assert torch.equal(torch.random.get_rng_state(), before)


KEYS = """
    attention_after_last_up_block attention_head_dim attention_levels block_out_channels dropout embedding_channels
    first_channels flip_sin_to_cos freq_shift in_channels labels_before_time_mlp layers_per_block norm_eps
    norm_group_size num_attention_heads num_class_embeds out_channels output_scale_factor resample_filter
    resample_shortcut resample_type residual_input resnet_time_scale_shift sample_size sigma_data time_embedding_dim
    time_embedding_type time_offset time_scale unit_range_input variance_exploding
"""


def test_the_names_of_a_saved_network_stay(tmp_path):
    """They are a file format: what is added later must have a default that means what these mean now."""
    path, _, output = edm_files(tmp_path / "model.pkl", NCSNPP)
    unet = convert_checkpoint(path).unet
    unet.save_pretrained(tmp_path / "unet")
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    assert set(KEYS.split()) <= config.keys()
    old = {key: value for key, value in config.items() if key in KEYS.split() or key.startswith("_")}
    (tmp_path / "unet" / "config.json").write_text(json.dumps(old))
    torch.testing.assert_close(answer(ScoreUNet2DModel.from_pretrained(tmp_path / "unet"), X, TIME), output, **EXACT)
    names = {"time_proj.frequencies", "input_pyramid.0.0.weight", "down_blocks.0.downsamplers.0.conv_shortcut.weight"}
    assert names | {"up_blocks.0.attentions.2.to_q.weight", "conv_in.weight"} <= unet.state_dict().keys()


# --- what the numbers mean: the denoiser at a noise level -------------------------------------------------------------

SIGMA = torch.tensor([0.3, 2.0]).double()
S = SIGMA[:, None, None, None]
NOISY = X + S  # any point will do


def denoised(converted):
    return denoiser_from(converted.unet.double(), converted.scheduler)(NOISY, SIGMA).detach()


def test_edm_preconditioning_is_that_of_the_paper(tmp_path):
    path, weights, _ = edm_files(tmp_path / "model.pkl", {})
    raw = foreign.edm_unet(weights, NOISY / (S**2 + 0.25).sqrt(), SIGMA.log() / 4)
    truth = 0.25 / (S**2 + 0.25) * NOISY + 0.5 * S / (S**2 + 0.25).sqrt() * raw
    torch.testing.assert_close(denoised(convert_checkpoint(path)), truth, **EXACT)


@pytest.mark.parametrize("kind", ["edm", "score_sde"])
def test_variance_exploding_models_see_x_as_it_is(kind, tmp_path):
    if kind == "edm":
        file = {"precond": "VEPrecond", "attributes": {"sigma_min": 0.02, "sigma_max": 100}}
        path, weights, _ = edm_files(tmp_path / "model.pkl", NCSNPP, file)
        raw, converted = foreign.edm_unet(weights, NOISY, (SIGMA / 2).log(), **NCSNPP), convert_checkpoint(path)
    else:
        path, weights, _ = score_sde_file(tmp_path / "model.pth", sigmas=VE_SIGMAS)
        raw, converted = foreign.ncsnpp(weights, NOISY, (SIGMA / 2).log()), convert_checkpoint(path, resolution=8)
    torch.testing.assert_close(denoised(converted), NOISY + S * raw, **EXACT)
    schedule = noise_schedule(converted.scheduler)
    assert [schedule.sigma_min, schedule.sigma_max] == pytest.approx([0.02, 100])  # of data in [-1, 1]


@pytest.mark.parametrize("kind", ["edm", "score_sde"])
def test_variance_preserving_models_are_told_the_time_of_their_sde(kind, tmp_path):
    """abar(t) = exp(-integral of beta), the network told 999 t."""
    times = torch.tensor([20.0, 400.0]).double()
    t = times / 999
    sigma = torch.expm1(0.1 * t + 19.9 * t**2 / 2).sqrt()
    s = sigma[:, None, None, None]
    if kind == "edm":
        file = {"precond": "VPPrecond", "attributes": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000}}
        path, weights, _ = edm_files(tmp_path / "model.pkl", {}, file)
        raw, converted = foreign.edm_unet(weights, X / (1 + s**2).sqrt(), times), convert_checkpoint(path)
    else:
        options = {"fourier": False, "residual_input": None}
        path, weights, _ = score_sde_file(tmp_path / "model.pth", times, **options)
        raw = foreign.ncsnpp(weights, X / (1 + s**2).sqrt(), times, **options)
        converted = convert_checkpoint(path, resolution=8, sde="vp")
    schedule = noise_schedule(converted.scheduler)
    found = schedule.sigma(times)
    torch.testing.assert_close(found, sigma, rtol=2e-4, atol=0)  # diffusers holds abar in float32
    ours = denoiser_from(converted.unet.double(), converted.scheduler)(X, sigma).detach()
    torch.testing.assert_close(ours, X - s * raw, rtol=0, atol=2e-3 * s.max().item())
    whole = torch.arange(1, 1000).double()
    exact = torch.expm1(0.1 * whole / 999 + 19.9 * (whole / 999) ** 2 / 2).sqrt()
    torch.testing.assert_close(schedule.sigma(whole), exact, rtol=1e-3, atol=0)
    assert schedule.sigma_min == pytest.approx(1e-3, rel=0.05)  # t = 1e-5


def test_the_cosine_schedule_of_edm_has_its_noise_levels(tmp_path):
    """u_j of table 1 of the paper, from u_M = 0 up; the network is told M - 1 - j, and its variance is not read."""
    options, m = ADM_OF_EDM | {"out_channels": 6}, 1000
    file = {"precond": "iDDPMPrecond", "attributes": {"C_1": 0.001, "C_2": 0.008, "M": m}}
    path, weights, _ = edm_files(tmp_path / "model.pkl", options, file)
    alpha_bar = [math.sin(math.pi / 2 * j / m / 1.008) ** 2 for j in range(m + 1)]
    u = [0.0]
    for j in range(m, 0, -1):
        u.append(math.sqrt((u[-1] ** 2 + 1) / max(alpha_bar[j - 1] / alpha_bar[j], 0.001) - 1))
    u = torch.tensor(u[1:]).double()  # u_{M-1}, ..., u_0
    converted = convert_checkpoint(path)
    schedule = noise_schedule(converted.scheduler)
    torch.testing.assert_close(schedule.sigma(torch.arange(900).double()), u[:900], rtol=1e-3, atol=0)
    times = torch.tensor([3.0, 17.0]).double()
    s = schedule.sigma(times)
    raw = foreign.edm_unet(weights, X / (1 + s**2).sqrt()[:, None, None, None], times, **options)[:, :3]
    ours = denoiser_from(converted.unet.double(), converted.scheduler)(X, s).detach()
    torch.testing.assert_close(ours, X - s[:, None, None, None] * raw, **EXACT)
    path, _, _ = edm_files(
        tmp_path / "model.pkl", options, file | {"attributes": {"C_1": 0.001, "C_2": 0.008, "M": 4000}}
    )
    refused(path, "not those of the cosine schedule")


@pytest.mark.parametrize("kind", ["NCSN++", "ADM"])
def test_reflected_models_give_the_score_in_the_box(kind, tmp_path):
    """In [0, 1] the file's network over sigma is the score, of x + sigma n; [-1, 1] is twice as wide."""
    x, sigma = torch.rand(2, 3, 8, 8).double() * 2 - 1, SIGMA
    if kind == "NCSN++":
        options, sigmas = {"residual_input": "strided", "mult": (1, 2, 2)}, VE_SIGMAS / 10
        path, weights, _ = score_sde_file(tmp_path / "model.pth", sigmas=sigmas, reflected=True, **options)
        raw = foreign.ncsnpp(weights, x, (sigma / 2).log(), **options)
        converted, labels = convert_checkpoint(path, resolution=8), {}
    else:
        weights, options = foreign.Weights(), ADM_OF_EDM | {"classes": CLASSES}
        raw = foreign.edm_unet(weights, (x + 1) / 2, (sigma / 4).log(), one_hot(LABELS, CLASSES).double(), **options)
        path = foreign.pth_file(tmp_path / "model.pth", weights, reflected=True)
        converted = convert_checkpoint(path, resolution=8, sigma_min=0.001, sigma_max=5.0)
        labels = {"class_labels": LABELS}
        assert converted.pipeline.config.null_class == CLASSES
    assert isinstance(converted.pipeline, ReflectedPipeline)
    score = score_model_from(converted.unet.double(), converted.scheduler).score(x, sigma, **labels).detach()
    in_unit_range = raw / (S / 2)
    torch.testing.assert_close(score, in_unit_range / 2, rtol=0, atol=1e-5)
    schedule = noise_schedule(converted.scheduler)
    assert [schedule.sigma_min, schedule.sigma_max] == pytest.approx([0.002, 10.0], rel=1e-5)


def test_fourier_features_stay_exact_in_half_precision(tmp_path):
    path, _, _ = edm_files(tmp_path / "model.pkl", NCSNPP)
    unet = convert_checkpoint(path).unet
    before = unet.time_proj.frequencies.clone()
    unet.to(torch.bfloat16)
    assert unet.dtype == torch.bfloat16
    assert torch.equal(unet.time_proj.frequencies, before)
    assert unet(X.bfloat16(), TIME.float()).sample.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [NCSNPP, NCSNPP | {"classes": CLASSES}, ADM_OF_EDM], ids=["VE", "classes", "ADM"])
def test_a_network_compiles_whole_reads_no_value_and_has_a_gradient(options, tmp_path):
    file = {"precond": "VEPrecond", "attributes": {"sigma_min": 0.02, "sigma_max": 100}} if options is NCSNPP else {}
    path, _, _ = edm_files(tmp_path / "model.pkl", options, file)
    unet, labels = convert_checkpoint(path).unet, LABELS if "classes" in options else None
    x, time = X.float(), TIME.float()
    whole = torch.compile(unet, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(x, time, class_labels=labels).sample, unet(x, time, class_labels=labels).sample)
    unet.enable_gradient_checkpointing()
    unet.train()(x, time, class_labels=labels).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())
    meta = unet.to("meta")
    on_meta = {"class_labels": None if labels is None else labels.to("meta")}
    assert meta(x.to("meta"), time.to("meta"), **on_meta).sample.shape == x.shape


# --- the command, and what follows it ---------------------------------------------------------------------------------


def vp_file(folder):
    return score_sde_file(folder / "model.pth", STEPS, fourier=False, residual_input=None)[0]


@pytest.fixture
def converted(load_script, tmp_path, request):
    """A folder with the pipeline of a tiny checkpoint, made by the command."""
    kind = request.param
    words = ["--resolution", 8]
    if kind == "edm":
        weights = foreign.Weights()  # of as many classes as there are digits
        foreign.edm_unet(weights, X, TIME, one_hot(LABELS, 10).double(), classes=10)
        path, words = foreign.edm_file(tmp_path / "edm.pkl", weights, classes=10), []
    elif kind == "vp":
        path, words = vp_file(tmp_path), [*words, "--sde", "vp"]
    elif kind == "ve":
        path = score_sde_file(tmp_path / "ve.pth", sigmas=VE_SIGMAS)[0]
    else:
        path = adm_file(tmp_path / "adm.pt")[0]
        words += ["--beta_schedule", "linear", "--attention_head_dim", 16]
    load_script("convert").run(path, "--output_dir", tmp_path / "pipe", "--license", "mit", *words)
    return tmp_path / "pipe"


@pytest.mark.parametrize("converted", ["edm", "vp", "ve", "adm"], indirect=True)
def test_the_saved_pipeline_opens_and_samples(converted):
    pipe = DiffusionPipeline.from_pretrained(converted)
    labels = {} if pipe.unet.config.num_class_embeds is None else {"class_labels": [0, 4]}
    many = labels or {"batch_size": 2}
    options = {"num_inference_steps": 3, "output_type": "np"}
    images = [pipe(**many, generator=torch.Generator().manual_seed(0), **options).images for _ in range(2)]
    assert images[0].shape == (2, 8, 8, 3)
    assert (images[0] == images[1]).all()
    card = (converted / "README.md").read_text()
    assert "license: mit" in card
    assert "Converted from" in card
    (file,) = (path for path in converted.parent.iterdir() if path.is_file())
    assert f"`{file.name}`, SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()}" in card
    (call,) = re.findall(r"images = (pipe\(.*\)).images", card)
    assert len(eval(call, {"pipe": pipe}).images) == 4
    assert not list(converted.rglob("*.bin"))
    assert not list(converted.rglob("*.pkl"))


def test_a_model_that_is_stock_opens_without_this_package(load_script, tmp_path):
    path, output = adm_file(tmp_path / "adm.pt", scale_shift=False, out_channels=3)
    words = ["--resolution", 8, "--beta_schedule", "squaredcos_cap_v2", "--attention_head_dim", 16]
    load_script("convert").run("--file", path, "--output_dir", tmp_path / "pipe", *words)
    assert "diffusers_ext" not in (tmp_path / "pipe" / "model_index.json").read_text()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert type(pipe) is DDPMPipeline
    assert pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    torch.testing.assert_close(answer(pipe.unet, X, STEPS), output, **EXACT)


def test_what_it_pushes_opens_elsewhere(tmp_path):
    path = score_sde_file(tmp_path / "ve.pth", sigmas=VE_SIGMAS)[0]
    with HubServer() as hub:
        words = ("--resolution", 8, "--output_dir", tmp_path / "out", "--push_to_hub", "--hub_model_id", "model")
        done = stranger.run(SCRIPT, path, *words, env=hub.environment(tmp_path / "home"))
        assert done.returncode == 0, done.stderr
        code = "import diffusers_ext, diffusers; pipe = diffusers.DiffusionPipeline.from_pretrained('tester/model'); "
        code += "print(type(pipe.unet).__name__, len(pipe(batch_size=2, num_inference_steps=2).images))"
        opened = stranger.run(code, env=hub.environment(tmp_path / "other", token=None))
        card = hub.files("tester/model")["README.md"].decode()
    assert opened.stdout.split() == ["ScoreUNet2DModel", "2"], opened.stderr
    assert 'from_pretrained("tester/model")' in card
    assert str(tmp_path) not in card


DIGITS = ("--dataset_name", "digits", "--max_train_samples", 150)


@pytest.mark.parametrize("converted", ["edm"], indirect=True)
def test_a_converted_model_is_calibrated(converted, load_script, tmp_path):
    load_script("calibrate").run(
        *("--pretrained_model_name_or_path", converted, "--output_dir", tmp_path / "out", *DIGITS),
        *("--train_batch_size", 32, "--num_levels", 3),
    )
    assert (tmp_path / "out" / "offsets.png").is_file()


@pytest.mark.parametrize("converted", ["vp"], indirect=True)
def test_a_converted_model_gets_a_bridge(converted, load_script, tmp_path):
    load_script("fit_bridge").run(
        *("--pretrained_model_name_or_path", converted, "--output_dir", tmp_path / "out", *DIGITS),
        *("--max_diffusion_time", 0.6, "--bridge", "gaussian"),
    )
    images = DiffusionPipeline.from_pretrained(tmp_path / "out")(batch_size=2, num_inference_steps=2).images
    assert len(images) == 2


@pytest.mark.parametrize("converted", ["edm", "ve"], indirect=True)
def test_a_converted_model_is_fine_tuned(converted, load_script, tmp_path):
    before = DiffusionPipeline.from_pretrained(converted).unet.state_dict()
    load_script("train_consistency").run(
        *("--pretrained_model_name_or_path", converted, "--output_dir", tmp_path / "out", *DIGITS),
        *("--train_batch_size", 8, "--max_train_steps", 2, "--max_validation_samples", 8, "--report_to", "none"),
        *("--num_validation_images", 0, "--consistency_start", 0),
    )
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe) is ClassConditionalPipeline
    assert type(pipe.unet) is ScoreUNet2DModel
    after = pipe.unet.state_dict()
    assert all(v.isfinite().all() for v in after.values())
    assert not torch.equal(after["conv_in.weight"], before["conv_in.weight"])


@pytest.mark.parametrize("converted", ["adm"], indirect=True)
def test_a_converted_model_is_evaluated(converted, load_script, tmp_path):
    load_script("evaluate").run(
        *("--pretrained_model_name_or_path", converted, "--output_dir", tmp_path / "out", *DIGITS),
        *(
            "--max_validation_samples",
            100,
            "--schedulers",
            "DDIM,DDPM",
            "--nfe",
            2,
            "--num_samples",
            64,
            "--extractor",
            "pixels",
        ),
        *("--likelihood_images", 0, "--ode_images", 0),
    )
    assert "DDIM" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize("converted", ["ve"], indirect=True)
def test_a_converted_model_has_a_likelihood(converted):
    """A network of zeros is the denoiser D = x: it moves nothing, so that the density is the prior's, at x."""
    pipe = DiffusionPipeline.from_pretrained(converted)
    for parameter in (pipe.unet.conv_out.weight, pipe.unet.conv_out.bias):
        torch.nn.init.zeros_(parameter)
    x, model = X.float()[:1].clamp(-1, 1), denoiser_from(pipe.unet, pipe.scheduler)
    schedule = noise_schedule(pipe.scheduler)
    probes = {"divergence": "hutchinson", "generator": torch.Generator().manual_seed(0)}
    found = log_likelihood(model, x, schedule.sigma_min, schedule.sigma_max, **probes)
    truth = torch.distributions.Normal(0, schedule.sigma_max).log_prob(x.double()).sum()
    assert bits_per_dim(found, x.shape[1:]).item() == pytest.approx(bits_per_dim(truth, x.shape[1:]).item(), abs=1e-3)


# --- what is missing, or is another thing -----------------------------------------------------------------------------


def refused(path, match, **more):
    with pytest.raises(InputError, match=match):
        convert_checkpoint(path, **more)


def test_what_a_file_does_not_say_is_asked_for(tmp_path):
    path, _ = adm_file(tmp_path / "adm.pt")
    refused(path, "Say --resolution; and --beta_schedule linear or cosine .*; and --attention_head_dim")
    refused(path, "all of its model. Say --attention_head_dim", resolution=8, beta_schedule="linear")
    refused(path, "say the same thing: give one", **told(num_attention_heads=4))
    refused(path, "10 heads do not divide", **told(attention_head_dim=None, num_attention_heads=10))
    refused(path, "--attention_head_dim 7 does not divide 64", **told(attention_head_dim=7))
    refused(path, "is linear or cosine, not sigmoid", **told(beta_schedule="sigmoid"))
    refused(path, "needs no --sde", **told(sde="vp"))
    refused(path, "of 2 levels takes images of a multiple of 2, not of 9", **told(resolution=9))
    path = vp_file(tmp_path)
    refused(path, "say --resolution")
    refused(path, "Say --sde vp .training.continuous = True. or --sde ddpm", resolution=8)
    refused(path, "--sde ve: its network is told timesteps", resolution=8, sde="ve")
    refused(path, "--beta_min 20 must be below --beta_max 0.1", resolution=8, sde="vp", beta_min=20.0, beta_max=0.1)
    refused(path, "--sigma_min and --sigma_max: the variance-preserving", resolution=8, sde="vp", sigma_min=0.01)
    refused(path, "--beta_min and --beta_max: DDPM's discrete", resolution=8, sde="ddpm", beta_min=0.1)
    path = score_sde_file(tmp_path / "ve.pth")[0]
    refused(path, "say --sigma_min and --sigma_max", resolution=8)
    refused(path, "must be below", resolution=8, sigma_min=2.0, sigma_max=1.0)
    refused(path, "--sde vp: it is a network with Fourier features, ve: leave it out", resolution=8, sde="vp")
    refused(path, "--fir: the file shows it", resolution=8, fir=True, sigma_min=0.01, sigma_max=50.0)
    path = score_sde_file(tmp_path / "ve.pth", sigmas=VE_SIGMAS)[0]
    refused(path, "the file says its noise levels, 0.01 to 50: leave them out", resolution=8, sigma_min=0.02)
    path = score_sde_file(tmp_path / "reflected.pth", sigmas=VE_SIGMAS, reflected=True)[0]
    refused(path, "--sde ve: it is a file of Reflected-Diffusion", resolution=8, sde="ve")


def test_another_network_is_refused_with_what_it_is(tmp_path):
    path, _ = adm_file(tmp_path / "adm.pt")
    state = torch.load(path, weights_only=True)
    for name, change, match in (
        ("part", {"extra.weight": torch.zeros(1)}, "extra.weight"),
        ("colours", {"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3), "out.2.weight": torch.zeros(3, 32, 3, 3),
                     "out.2.bias": torch.zeros(3)}, "maps 6 channels to 3"),
        ("shape", {"out.0.weight": torch.zeros(7)}, "do not fit"),
    ):  # fmt: skip
        torch.save(state | change, tmp_path / f"{name}.pt")
        refused(tmp_path / f"{name}.pt", match, **told())
    torch.save({k: v for k, v in state.items() if not k.startswith(("out", "output"))}, tmp_path / "classifier.pt")
    refused(tmp_path / "classifier.pt", "a classifier", **told())
    torch.save({k: v for k, v in state.items() if k != "middle_block.0.in_layers.0.weight"}, tmp_path / "hole.pt")
    refused(tmp_path / "hole.pt", "has no middle_block.0.in_layers.0.weight", **told())
    torch.save({"weights": state}, tmp_path / "other.pt")
    refused(tmp_path / "other.pt", "none of the known kinds .*it has 'weights'")
    flash = {name: v[..., None] for name, v in state.items() if name.endswith(("qkv.weight", "proj_out.weight"))}
    torch.save(state | flash, tmp_path / "consistency.pt")
    refused(tmp_path / "consistency.pt", "openai/consistency_models", **told())
    broken = state["out.2.bias"] * float("nan")
    torch.save(state | {"out.2.bias": broken}, tmp_path / "nan.pt")
    refused(tmp_path / "nan.pt", "1 of its tensors are not finite, among them that of conv_out.bias", **told())
    torch.save({"conv_in.weight": torch.zeros(1)}, tmp_path / "unet.bin")
    refused(tmp_path / "unet.bin", "has the names of diffusers: open it by from_pretrained")
    torch.save(torch.nn.Sequential(torch.nn.SiLU()), tmp_path / "whole.pt")
    refused(tmp_path / "whole.pt", "holds a whole module, with its code; save its state_dict")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    for name, content, words in (
        ("a.safetensors", None, "a safetensors file: a model of diffusers needs no conversion"),
        ("empty.pt", b"", "is empty"),
        ("page.pt", b"<!DOCTYPE html><html>", "is text, perhaps a page or a Git LFS pointer"),
        ("bytes.pt", bytes(range(129, 160)), "neither a file of torch.save nor a pickle"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, words)
    path, _, _ = edm_files(tmp_path / "edm.pkl", {}, {"precond": "OtherPrecond"})
    refused(path, "'OtherPrecond' is not known")
    refused(path, "needs no --resolution", resolution=8)
    path, _, _ = edm_files(tmp_path / "edm.pkl", {}, {"precond": "VPPrecond"})
    refused(path, "looks like one of EDM, and is another: KeyError: 'beta_min'")
    refused(tmp_path / "nothing.pt", "there is no file")
    path, _, _ = score_sde_file(tmp_path / "model.pth", sigmas=VE_SIGMAS)
    content = read_checkpoint(path)
    for part, change in (("GroupNorm_0", "GroupNorm_9"), ("Conv_1", "Conv_9")):  # as with other kinds of blocks
        changed = {name.replace(f"4.{part}.", f"4.{change}."): value for name, value in content["model"].items()}
        torch.save(content | {"model": changed}, tmp_path / "other.pth")
        refused(tmp_path / "other.pth", "has no all_modules|is no residual block", resolution=8)


def test_the_average_is_taken_and_must_fit(tmp_path):
    path, _, _ = score_sde_file(tmp_path / "model.pth", sigmas=VE_SIGMAS)
    content = read_checkpoint(path)
    assert content["optimizer"]["param_groups"] == [{"lr": pytest.approx(2e-7), "step": 5}]  # numbers of numpy's
    assert (content["model"]["module.all_modules.1.weight"] == 7).all()  # the model itself is another one
    for shadow in (content["ema"]["shadow_params"][:-1], content["ema"]["shadow_params"][::-1], None):
        torch.save(content | {"ema": {"shadow_params": shadow}, "optimizer": {}}, tmp_path / "wrong.pth")
        refused(tmp_path / "wrong.pth", "does not hold an average", resolution=8)


# --- harmful files ----------------------------------------------------------------------------------------------------


class Harm:
    """Its pickle calls a function."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def harmful(trace):
    """Objects whose pickles would leave a trace, if they were loaded as usual."""
    command = f"touch {trace}"
    yield Harm(os.system, command), "system"
    yield Harm(eval, f"open({str(trace)!r}, 'w')"), "eval"
    yield Harm(open, str(trace), "w"), "open"
    yield {"ema": [(1, {"deep": Harm(os.system, command)})]}, "system"
    yield Harm(torch.load, str(trace)), "torch.serialization.load"
    yield Harm(getattr, "", "join"), "getattr"


@pytest.mark.parametrize("number", range(6))
def test_no_function_of_a_file_is_called(number, tmp_path):
    trace = tmp_path / "trace"
    content, name = list(harmful(trace))[number]
    for protocol in range(2, 6):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
        refused(tmp_path / "a.pkl", f"names '[\\w.]*{name}'")
    for zipped in (True, False):
        torch.save({"model": content, "ema": {}}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        refused(tmp_path / "a.pth", f"names '[\\w.]*{name}'")
    assert not trace.exists()


def test_the_source_in_a_file_of_edm_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, _, _ = edm_files(tmp_path / "model.pkl", {})
    assert f"open('{foreign.SOURCE_MARK}'" in path.read_bytes().decode("latin-1")
    convert_checkpoint(path)
    assert not (tmp_path / foreign.SOURCE_MARK).exists()


def test_harm_within_a_tensor_s_content_is_refused(tmp_path):
    inner = io.BytesIO()
    torch.save(Harm(os.system, f"touch {tmp_path}/trace"), inner)
    storage = Harm(torch.storage._load_from_bytes, inner.getvalue())
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": storage}))
    refused(tmp_path / "a.pkl", "system")
    assert not (tmp_path / "trace").exists()


def test_every_truncated_file_is_refused(tmp_path):
    path, _, _ = edm_files(tmp_path / "model.pkl", {"n": 1})
    whole, cut = path.read_bytes(), tmp_path / "cut.pkl"
    for end in [*range(1, 400, 7), *range(400, len(whole), len(whole) // 60)]:
        cut.write_bytes(whole[:end])
        refused(cut, "cut off|cannot be read|neither")
    torch.save({"model": {"a": torch.zeros(1000)}, "ema": {}}, tmp_path / "model.pth")
    whole, cut = (tmp_path / "model.pth").read_bytes(), tmp_path / "cut.pth"
    for end in range(1, len(whole) - 1, 97):
        cut.write_bytes(whole[:end])
        refused(cut, "cut off|cannot be read|neither")


def numbers(shape, stride, n=4, offset=0):
    """A pickled tensor of this shape, whose content has n numbers."""
    content = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.save(torch.zeros(n).storage(), content, _use_new_zipfile_serialization=False)
    storage = Harm(torch.storage._load_from_bytes, content.getvalue())
    return Harm(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, {})


HUGE = 1 << 62
PICKLES = {
    "a tensor beyond its content": (pickle.dumps(numbers((2, 2), (2, 9))), "beyond its content"),
    "a tensor before its content": (pickle.dumps(numbers((2,), (1,), offset=-1)), "no shape"),
    "bytes of no length": (b"\x80\x04\x8e" + HUGE.to_bytes(8, "little") + b".", "no complete pickle"),
    "an array of bytes of no length": (b"\x80\x05\x96" + HUGE.to_bytes(8, "little") + b".", "no complete pickle"),
    "a memo of no size": (b"\x80\x04]r\xff\xff\xff\xff.", "has a list"),
    "a number of many digits": (b"\x80\x04I" + b"9" * 10_000 + b"\n.", "no complete pickle"),
    "an extension": (b"\x80\x04\x82\x01.", "EXT1"),
    "a persistent object": (b"\x80\x04\x8c\x01aQ.", "BINPERSID"),
    "an instance": (b"\x80\x04(ios\nsystem\n.", "INST"),
    "no mark": (b"\x80\x04]e.", "no complete pickle"),
    "nothing on the stack": (b"\x80\x04R.", "no complete pickle"),
    "a call of a text": (b"\x80\x04\x8c\x01a)R.", "no complete pickle"),
    "a state for a list": (b"\x80\x04]}b.", "no complete pickle"),
    "a function as a value": (b"\x80\x04\x8c\x08builtins\x8c\x03set\x93}b.", "no complete pickle"),
    "a key that is a list": (b"\x80\x04}]Ns.", "no complete pickle"),
}


@pytest.mark.parametrize(("content", "words"), PICKLES.values(), ids=PICKLES)
def test_a_pickle_that_is_none_is_refused(content, words, tmp_path):
    (tmp_path / "a.pkl").write_bytes(content)
    refused(tmp_path / "a.pkl", words)


def test_tensors_that_would_fill_the_memory_are_refused(tmp_path):
    """One number that is said to be many; a large weight beside others, of which a network would be much larger."""
    path, _ = adm_file(tmp_path / "adm.pt")
    state = torch.load(path, weights_only=True)
    torch.save(state | {"out.2.weight": torch.zeros(1).expand(10**6, 10**6, 3, 3)}, tmp_path / "huge.pt")
    assert (tmp_path / "huge.pt").stat().st_size < 10**7
    refused(tmp_path / "huge.pt", "more than its content", **told())
    wide = {f"input_blocks.{i}.0.in_layers.2.weight": torch.zeros(500_000, 1, 3, 3) for i in (1, 3)}
    torch.save(state | wide, tmp_path / "wide.pt")
    refused(tmp_path / "wide.pt", "do not fit: ", **told())
    weights = foreign.Weights()
    foreign.edm_unet(weights, X, TIME)
    foreign.edm_file(tmp_path / "edm.pkl", weights)
    content = read_checkpoint(tmp_path / "edm.pkl")
    many = read_pickle(io.BytesIO(pickle.dumps(numbers((10**9, 10**9), (0, 0)))), _NAMES)
    content["ema"].state["_modules"]["model"].state["_modules"]["map_layer0"].state["_parameters"]["weight"] = many
    with pytest.raises(InputError, match="more than its content"):
        convert_edm(content)
    with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00." + bytes(10**6))
    refused(tmp_path / "small.pt", "is compressed")


JUNK = [None, "x\x1b[31m", [], {}, -1, 0, 1 << 62, float("nan"), b"", torch.zeros(0), torch.zeros(2, 3), {"a": None}]


def places(value, depth=0):
    """Every dict in a value, with each of its keys."""
    inner = value.state if isinstance(value, Record) else value
    if isinstance(inner, dict) and depth < 12:
        for key, below in inner.items():
            yield inner, key
            yield from places(below, depth + 1)


@pytest.mark.parametrize("kind", ["edm", "adm", "score_sde"])
def test_whatever_a_file_holds_the_end_is_a_message(kind, tmp_path, monkeypatch):
    """One entry after the other is replaced by something else, by chance; nothing but an `InputError` comes out."""
    if kind == "edm":
        path, more = edm_files(tmp_path / "a.pkl", {"n": 1, "classes": CLASSES})[0], {}
    elif kind == "adm":
        path, more = adm_file(tmp_path / "a.pt")[0], told()
    else:
        path, more = score_sde_file(tmp_path / "a.pth", sigmas=VE_SIGMAS, n=1)[0], {"resolution": 8}
    content = read_checkpoint(path)
    monkeypatch.setattr("diffusers_ext.checkpoints.read_checkpoint", lambda _: content)
    chance, found = random.Random(0), list(places(content))
    said = []
    for inner, key in chance.sample(found, min(150, len(found))):
        before = inner[key]
        inner[key] = chance.choice(JUNK)
        try:
            convert_checkpoint(path, **more)
        except InputError as error:
            said.append(str(error))
        inner[key] = before
    assert len(said) > 20
    assert "\x1b" not in "".join(said)  # nothing that a terminal would obey


def test_a_pickle_of_great_depth_or_within_itself_is_refused(tmp_path):
    deep = b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b"."
    (tmp_path / "deep.pkl").write_bytes(deep)
    refused(tmp_path / "deep.pkl", "none of the known kinds")
    root = {}
    root["ema"] = root
    (tmp_path / "loop.pkl").write_bytes(pickle.dumps(root))
    refused(tmp_path / "loop.pkl", "none of the known kinds")
    # A module within itself: once, and twice, which without a bound would never end, and grow.
    for names in (("a",), ("a", "b")):
        path, _, _ = edm_files(tmp_path / "model.pkl", {"n": 1})
        record = read_checkpoint(path)["ema"]
        record.state["_modules"] |= dict.fromkeys(names, record)
        with pytest.raises(InputError, match="within themselves"):
            convert_edm({"ema": record})


def test_a_zip_that_is_no_checkpoint_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("../../outside", b"x")
    refused(tmp_path / "a.pth", "cut off|cannot be read|none of the known kinds")
    (tmp_path / "text.pt").write_text("hello")
    refused(tmp_path / "text.pt", "is text")


def test_the_table_of_names_holds_functions_of_ours_alone():
    assert {function.__module__ for function in _NAMES.values()} == {"diffusers_ext.checkpoints.reading"}
    assert read_pickle(io.BytesIO(pickle.dumps([1, ("a", {2.5: None}), {3}, b"x"], 4)), {}) == [
        1,
        ("a", {2.5: None}),
        {3},
        b"x",
    ]
