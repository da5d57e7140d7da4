"""The script as a user runs it. Truth: diffusers' own loss, a loop written by hand, what plain diffusers opens."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import stranger
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, DiTPipeline
from PIL import Image
from safetensors.torch import load_file
from test_models import tiny_unet

import diffusers_ext
from diffusers_ext import score_matching_loss
from diffusers_ext.commands import parse_arguments
from diffusers_ext.training import TrainingLoop
from diffusers_ext.training.outcome import Outcome

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "training" / "train_consistency.py"


@pytest.fixture
def script(load_script):
    return load_script("train_consistency")


@pytest.fixture
def small(tmp_path):
    """Arguments of a run of 3 steps of a tiny model on the embedded digits."""
    tiny_unet().save_config(tmp_path / "config")
    return [
        *("--model_config_name_or_path", tmp_path / "config", "--dataset_name", "digits", "--resolution", 8),
        *("--train_batch_size", 8, "--max_train_steps", 3, "--max_validation_samples", 8, "--report_to", "none"),
        *("--num_validation_images", 4, "--num_inference_steps", 3, "--logging_steps", 1),
    ]


def log_of(folder):
    return [json.loads(line) for line in (folder / "logs" / "log.jsonl").read_text().splitlines()]


def weights_of(folder, network="unet"):
    return load_file(folder / network / "diffusion_pytorch_model.safetensors")


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


# --- what is learnt ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_without_the_regulariser_the_loss_is_diffusers_own(script, small, tmp_path, prediction_type):
    """Step 1: noise and timesteps as drawn by the loop, noised and weighted by DDIMScheduler."""
    argv = [*small, "--consistency_weight", 0, "--prediction_type", prediction_type, "--output_dir"]
    args = parse_arguments(script.ConsistencyArguments, [*map(str, argv), str(tmp_path / "probe")])
    loop = TrainingLoop(args, "test", ("A paper", "2302.09057"))
    batch = next(iter(loop))
    generator = torch.Generator().set_state(batch.generator.get_state())
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    timesteps = torch.randint(1000, (8,), generator=generator)
    noise = torch.randn(batch.x0.shape, generator=generator)
    target = {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(batch.x0, noise, timesteps),
        "sample": batch.x0,
    }[prediction_type]
    output = loop.model(scheduler.add_noise(batch.x0, noise, timesteps), timesteps).sample
    expected = (output - target).square().mean().item()
    script.run(*argv, tmp_path / "out")
    assert log_of(tmp_path / "out")[1]["denoising"] == pytest.approx(expected, rel=2e-5)


def test_weight_zero_is_plain_denoising_training_bit_for_bit(script, small, tmp_path):
    script.run(*small, "--consistency_weight", 0, "--output_dir", tmp_path / "zero")
    args = parse_arguments(script.ConsistencyArguments, [*map(str, small), "--output_dir", str(tmp_path / "plain")])
    loop = TrainingLoop(args, "plain", ("A paper", "2302.09057"))
    for batch in loop:
        sigma = loop.schedule.draw_sigmas(len(batch.x0), batch.generator)
        x = loop.denoiser.process.perturb(batch.x0, sigma, batch.generator)
        loss = score_matching_loss(loop.denoiser, x, batch.x0, sigma, weight=loop.weight(sigma))
        loop.update(loss.mean(), sigma=sigma, denoising=loss)
    loop.finish()
    assert_same_weights(weights_of(tmp_path / "zero"), weights_of(tmp_path / "plain"))
    script.run(*small, "--output_dir", tmp_path / "ten")
    ten, zero = weights_of(tmp_path / "ten"), weights_of(tmp_path / "zero")
    assert any(not torch.equal(ten[k], zero[k]) for k in ten)


def test_a_run_is_a_function_of_its_seed(script, small, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(name))  # the state that the process happens to be in does not matter
        torch.rand(ord(name))
        script.run(*small, "--seed", seed, "--output_dir", tmp_path / name)
    assert_same_weights(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    assert not torch.equal(weights_of(tmp_path / "a")["conv_in.weight"], weights_of(tmp_path / "c")["conv_in.weight"])


def test_accumulation_averages_the_gradients_of_its_micro_batches(script, small, tmp_path):
    """AdamW hides the scale of a gradient, so look at the gradients themselves."""
    argv = [*map(str, small), "--consistency_weight", "0", "--max_grad_norm", "1e9", "--max_train_steps", "1"]

    def gradients(accumulate):
        args = [*argv, "--gradient_accumulation_steps", str(accumulate), "--output_dir", str(tmp_path / "x")]
        loop = TrainingLoop(parse_arguments(script.ConsistencyArguments, args), "test", ("A paper", "2302.09057"))
        seen, single = [], []
        original = loop.accelerator.clip_grad_norm_

        def spy(parameters, norm):
            parameters = list(parameters)
            seen.append([p.grad.clone() for p in parameters])
            return original(parameters, norm)

        loop.accelerator.clip_grad_norm_ = spy
        for batch in loop:
            sigma = loop.schedule.draw_sigmas(len(batch.x0), batch.generator)
            x = loop.denoiser.process.perturb(batch.x0, sigma, batch.generator)
            loss = score_matching_loss(loop.denoiser, x, batch.x0, sigma, weight=loop.weight(sigma))
            single.append(torch.autograd.grad(loss.mean(), list(loop.model.parameters()), retain_graph=True))
            loop.update(loss.mean(), sigma=sigma, denoising=loss)
        return seen, single

    seen, single = gradients(3)
    assert (len(seen), len(single)) == (1, 3)
    for accumulated, parts in zip(seen[0], zip(*single, strict=True), strict=True):
        torch.testing.assert_close(accumulated, sum(parts) / 3, rtol=1e-4, atol=1e-7)


def test_ema_is_saved_and_differs_from_the_raw_weights(script, small, tmp_path):
    """With decay 0 the average is the last weights."""
    for name, options in (("raw", ["--no_use_ema"]), ("zero", ["--ema_decay", 0]), ("ema", [])):
        script.run(*small, *options, "--output_dir", tmp_path / name)
    raw, zero, ema = (weights_of(tmp_path / n) for n in ("raw", "zero", "ema"))
    assert_same_weights(raw, zero)
    assert not torch.equal(raw["conv_in.weight"], ema["conv_in.weight"])


# --- what is saved ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ([], "DDIMPipeline"),
        (["--scheduler", "FlowMatchEulerDiscreteScheduler"], "DDPMPipeline"),
        (["--scheduler", "EDMEulerScheduler", "--rollout", "euler_maruyama", "--rollout_steps", 2], None),
        (["--class_conditional"], None),
    ],
)
def test_the_result_opens_with_plain_diffusers_where_stock_classes_suffice(script, small, tmp_path, options, kind):
    out = tmp_path / "out"
    script.run(*small, *options, "--consistency_fraction", 0.5, "--output_dir", out)
    start, *records = log_of(out)
    assert start["start"]["images_per_step"] == 8
    assert [r["step"] for r in records] == [1, 2, 3, 3]
    assert all(np.isfinite([r["denoising"], r["consistency"], r["images_per_second"]]).all() for r in records[:3])
    assert [len(r["by_sigma"]["denoising"]) for r in records[:3]] == [10] * 3
    assert Image.open(out / "samples" / "step-00000003.png").size == (128, 128)
    code = (
        f"{'' if kind else 'import diffusers_ext'}\nimport sys\nfrom diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(out)!r})\n"
        f"images = pipe({'class_labels=[1, 2]' if 'class' in str(options) else 'batch_size=2'}, num_inference_steps=2,"
        f" output_type='np').images\n"
        f"print(type(pipe).__name__, images.shape, 'diffusers_ext' in sys.modules)"
    )
    done = stranger.run(code)
    assert done.stdout.strip() == f"{kind or 'ClassConditionalPipeline'} (2, 8, 8, 1) {kind is None}", done.stderr


def test_fine_tuning_keeps_pipeline_scheduler_and_prediction_type(script, small, tmp_path):
    scheduler = DDPMScheduler(prediction_type="sample", beta_schedule="squaredcos_cap_v2", clip_sample_range=2.0)
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path / "base")
    argv = [a for a in small if a not in ("--model_config_name_or_path", tmp_path / "config")]
    script.run(*argv, "--pretrained_model_name_or_path", tmp_path / "base", "--output_dir", tmp_path / "out")
    tuned = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(tuned) is DDPMPipeline
    assert type(tuned.scheduler) is DDPMScheduler
    assert torch.equal(tuned.scheduler.alphas_cumprod, scheduler.alphas_cumprod)
    assert (tuned.scheduler.config.prediction_type, tuned.scheduler.config.clip_sample_range) == ("sample", 2.0)
    base, after = weights_of(tmp_path / "base"), weights_of(tmp_path / "out")
    assert 0 < max((base[k] - after[k]).abs().max().item() for k in base) < 0.1
    base = ("--pretrained_model_name_or_path", tmp_path / "base", "--output_dir", tmp_path / "other")
    for option in (["--class_conditional"], ["--scheduler", "DDIMScheduler"], ["--prediction_type", "epsilon"]):
        with pytest.raises(SystemExit, match=f"error: {option[0]} is for training from scratch"):
            script.run(*argv, *base, *option)


def test_fine_tuning_a_latent_class_conditional_transformer(script, small, tmp_path):
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks)
    transformer = DiTTransformer2DModel(
        2, 4, in_channels=4, out_channels=8, num_layers=1, norm_num_groups=4, sample_size=8, num_embeds_ada_norm=10
    )
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(tmp_path / "base")
    argv = [*small[2:], "--resolution", 16, "--output_dir", tmp_path / "out"]
    script.run(*argv, "--pretrained_model_name_or_path", tmp_path / "base")
    tuned = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(tuned) is DiTPipeline
    base, after = (weights_of(tmp_path / n, "transformer") for n in ("base", "out"))
    assert any(not torch.equal(base[k], after[k]) for k in base)
    assert_same_weights(weights_of(tmp_path / "base", "vae"), weights_of(tmp_path / "out", "vae"))


def test_every_evaluation_of_a_sample_sees_the_same_label(script, small, tmp_path, monkeypatch):
    seen = []
    original = diffusers_ext.interop.Network.forward

    def spy(self, model_input, time, **cond):
        seen.append(cond.get("class_labels"))
        return original(self, model_input, time, **cond)

    monkeypatch.setattr(diffusers_ext.interop.Network, "forward", spy)
    options = ["--class_conditional", "--label_drop", 0.5, "--consistency_fraction", 1, "--rollout_steps", 2]
    monkeypatch.setattr(Outcome, "validate", lambda self, trained: {})
    script.run(*small, *options, "--output_dir", tmp_path / "out")
    steps = [seen[1 + 5 * i : 6 + 5 * i] for i in range(3)]  # the first is the probe of the image size
    for labels in steps:
        assert len(labels) == 5  # 1 for denoising, 1 more for each of two rollouts of 2 steps, 2 residuals
        assert all(torch.equal(labels[0], other) for other in labels)
    assert 5 < sum((labels[0] == 10).sum().item() for labels in steps) < 19


# --- the command line -------------------------------------------------------------------------------------------------


def test_accelerate_launch_and_yaml(small, tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rate: 2e-3\nmax_train_steps: 9\nconsistency_weight: 1\n")
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1"]
    argv = [
        *launch,
        SCRIPT,
        "--config",
        tmp_path / "run.yaml",
        *small,
        "--report_to",
        "tensorboard",
        "--output_dir",
        out,
    ]
    subprocess.run([str(a) for a in argv], check=True, capture_output=True)
    records = log_of(out)
    assert (records[-1]["step"], records[1]["lr"]) == (3, 2e-3)
    assert any((out / "logs" / "train_consistency").rglob("events.out.tfevents*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset_name", "no/such-data"], "error: the data set 'no/such-data'"),
        (["--resolution", 9], "error: --resolution 9 does not fit the model: use 8 or 10"),
        (["--scheduler", "UnCLIPScheduler"], "error: UnCLIPScheduler cannot be written"),
        (["--train_data_dir", "."], "error: --train_data_dir and --dataset_name both name the data"),
    ],
)
def test_mistakes_end_with_a_message_and_no_traceback(script, small, tmp_path, options, message):
    with pytest.raises(SystemExit) as error:
        script.run(*small, *options, "--output_dir", tmp_path / "out")
    assert str(error.value).startswith(message)


def test_unreadable_images_are_skipped_counted_and_named(script, small, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        Image.new("RGBA" if i % 2 else "P", (20, 16), i).save(folder / f"{i}.png")
    (folder / "bad.png").write_bytes(b"not a picture")
    argv = [a for a in small if a not in ("--dataset_name", "digits")]
    script.run(*argv, "--train_data_dir", folder, "--train_batch_size", 4, "--output_dir", tmp_path / "out")
    printed = capsys.readouterr()
    assert printed.out.count("bad.png): Unidentified") == 1
    assert "unreadable images skipped: 1;" in printed.out
    assert ["bad.png" in r["unreadable"] for r in log_of(tmp_path / "out") if "unreadable" in r] == [True]


@pytest.mark.parametrize(
    ("channels", "size", "said"),
    [
        (3, 32, "for grey images of 16 x 16, and .* is a model of 32 x 32, RGB"),
        (1, 32, "for grey images of 16 x 16, and .* is a model of 32 x 32, grey"),
        (3, 16, "for grey images of 16 x 16, and .* is a model of 16 x 16, RGB"),
    ],
)
def test_a_preset_is_refused_to_a_model_of_other_images(script, tmp_path, capsys, channels, size, said):
    unet = tiny_unet(sample_size=size, in_channels=channels, out_channels=channels)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "base")
    argv = ["--preset", "digits", "--pretrained_model_name_or_path", tmp_path / "base", "--max_train_steps", 1]
    with pytest.raises(SystemExit) as stopped:
        script.run(*argv, "--output_dir", tmp_path / "out")
    assert re.search(said, f"{stopped.value.args[0]} {capsys.readouterr().err}")
    assert not (tmp_path / "out" / "logs").exists()
