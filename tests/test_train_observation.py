"""The script as a user runs it. Truth: plain denoising, the uninterrupted run, one process, a game replayed by hand."""

import json
import math
import os
import shutil
import signal

import pytest
import stranger
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMPipeline, DDIMScheduler
from hub_server import HubServer
from precision import REPRODUCIBLE, assert_resumed, assert_same_numbers
from test_loop import stop_at
from test_models import tiny_unet
from test_train_consistency import ROOT, assert_same_weights, log_of, small, weights_of  # noqa: F401

from diffusers_ext import NoiseLevelDiscriminator, files
from diffusers_ext.commands import parse_arguments
from diffusers_ext.extractors import pixel_features
from diffusers_ext.randomness import Seeds, Stream
from diffusers_ext.reports.hub import pushed_files
from diffusers_ext.training import Adversary, Best, TrainingLoop
from diffusers_ext.training.checkpoint import list_checkpoints, load_checkpoint, same_state

SCRIPT = ROOT / "training" / "train_observation.py"
TINY = ("--discriminator_channels", "8,16", "--frechet_samples", 8, "--frechet_steps", 2)
SIGNALS = ("real_logits", "fake_logits", "r1", "discriminator", "discriminator_norm", "generator_norm")


@pytest.fixture
def observation(load_script):
    return load_script("train_observation")


@pytest.fixture
def consistency(load_script):
    return load_script("train_consistency")


def last_state(folder):
    return load_checkpoint(list_checkpoints(folder)[-1])


# --- what is learnt ---------------------------------------------------------------------------------------------------


def test_weight_zero_is_plain_denoising_bit_for_bit(observation, consistency, small, tmp_path):  # noqa: F811
    """With dropout, to which another evaluation of the network would show."""
    tiny_unet(dropout=0.3).save_config(tmp_path / "config")
    argv = [*small, "--checkpointing_steps", 3, "--consistency_weight", 0, "--output_dir"]
    consistency.run(*argv, tmp_path / "plain")
    observation.run(*argv, tmp_path / "zero", "--observation_weight", 0, "--frechet_samples", 0)
    observation.run(*argv, tmp_path / "one", *TINY)
    assert_same_weights(weights_of(tmp_path / "plain"), weights_of(tmp_path / "zero"))
    plain, zero, one = (last_state(tmp_path / name) for name in ("plain", "zero", "one"))
    assert same_state(
        [plain[k] for k in ("model", "ema", "optimizer")], [zero[k] for k in ("model", "ema", "optimizer")]
    )
    assert not same_state(plain["model"], one["model"])
    assert "discriminator" in one
    assert "discriminator" not in zero  # nor does it cost anything


def test_with_consistency_it_is_train_consistency_plus_the_game(observation, consistency, small, tmp_path):  # noqa: F811
    """A weight that vanishes leaves the losses of every step: the game draws after the others."""
    argv = [*small, "--consistency_weight", 10, "--consistency_fraction", 0.5, "--output_dir"]
    consistency.run(*argv, tmp_path / "without")
    observation.run(*argv, tmp_path / "with", *TINY, "--observation_weight", 1e-30)
    losses = [
        [(r["denoising"], r["consistency"]) for r in log_of(tmp_path / name) if "denoising" in r]
        for name in ("without", "with")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


def test_an_optimiser_step_is_the_gradient_of_both_losses_by_hand(observation, small, tmp_path):  # noqa: F811
    """One step, with plain formulas: the Euler step of the network, the hinge losses, R1 of the scaled input."""
    argv = [*small, *TINY, "--max_train_steps", 1, "--checkpointing_steps", 1, "--max_grad_norm", 1e9]
    argv += [
        "--observation_weight",
        0.5,
        "--r1_weight",
        3,
        "--prediction_type",
        "epsilon",
        "--scheduler",
        "DDIMScheduler",
    ]
    argv += ["--discriminator_learning_rate", 1e-3, "--look_ahead", 0.3]
    args = parse_arguments(observation.ObservationArguments, [*map(str, argv), "--output_dir", str(tmp_path / "probe")])
    loop = TrainingLoop(args, "test", observation.PAPER)
    disc = observation.new_discriminator(loop, args.discriminator_channels)
    batch = next(iter(loop))
    generator = torch.Generator().set_state(batch.generator.get_state())
    sigma = loop.schedule.draw_sigmas(8, generator)
    noise = torch.randn(batch.x0.shape, generator=generator)
    u = torch.rand(8, generator=generator)
    low, high = loop.schedule.sigma_min ** (1 / 7), loop.schedule.sigma_max ** (1 / 7)
    sigma_next = (sigma ** (1 / 7) - 0.3 * u * (high - low)).clamp(min=low) ** 7
    s, s_next = (v.reshape(-1, 1, 1, 1) for v in (sigma, sigma_next))
    eps = loop.model((batch.x0 + s * noise) / (1 + s**2).sqrt(), loop.schedule.time(sigma)).sample
    fake, real = batch.x0 + s * noise + (s_next - s) * eps, batch.x0 + s_next * noise
    generator_loss = (eps - noise).square().mean() - 0.5 * disc(fake, sigma, sigma_next).mean()
    expected = torch.autograd.grad(generator_loss, list(loop.model.parameters()))
    y = (real / (0.25 + s_next**2).sqrt()).requires_grad_()
    logits = disc(y * (0.25 + s_next**2).sqrt(), sigma, sigma_next)
    (slope,) = torch.autograd.grad(logits.sum(), y, create_graph=True)
    hinge = (1 - logits).relu() + (1 + disc(fake.detach(), sigma, sigma_next)).relu()
    trained = [p for p in disc.parameters() if p.requires_grad]
    expected_disc = torch.autograd.grad((hinge + 1.5 * slope.square().sum((1, 2, 3))).mean(), trained)

    observation.run(*argv, "--output_dir", tmp_path / "out")
    state = last_state(tmp_path / "out")
    for part, beta, truth in (
        (state["optimizer"], 0.9, expected),
        (state["discriminator"]["optimizer"], 0, expected_disc),
    ):
        moments = [part["state"][i]["exp_avg"] for i in range(len(truth))]
        for moment, gradient in zip(moments, truth, strict=True):
            scale = max(g.abs().max().item() for g in truth)
            torch.testing.assert_close(moment, (1 - beta) * gradient, rtol=1e-3, atol=1e-4 * (1 - beta) * scale)
    start = observation.new_discriminator(loop, args.discriminator_channels).state_dict()
    moved = {k: (v - start[k]).abs().max().item() for k, v in state["discriminator"]["network"].items()}
    assert 0 < max(moved.values()) < 1.1e-3
    assert moved["fourier.weight"] == 0


@pytest.mark.parametrize(
    "options",
    [["--projection", "heun", "--gradient_checkpointing"], ["--projection", "random"], ["--class_conditional"]],
)
def test_every_form_of_it_trains(observation, small, tmp_path, options):  # noqa: F811
    out = tmp_path / "out"
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        observation.run(*small, *TINY, *options, "--mixed_precision", "bf16", "--output_dir", out)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    records = [r for r in log_of(out) if "denoising" in r]
    assert all(math.isfinite(r[name]) for r in records for name in (*SIGNALS, "observation"))
    assert len(records) == 3


def test_fine_tuning_takes_the_papers_other_defaults(observation, tmp_path):
    DDIMPipeline(tiny_unet(), DDIMScheduler()).save_pretrained(tmp_path / "base")
    for options, expected in (
        ([], (0.01, 0.1)),
        (["--pretrained_model_name_or_path", "base"], (0.025, 0.2)),
        (["--pretrained_model_name_or_path", "base", "--projection", "heun"], (0.005, 0.2)),
        (["--projection", "heun"], (0.01, 0.1)),
        (["--pretrained_model_name_or_path", "base", "--observation_weight", "0", "--look_ahead", "0.3"], (0, 0.3)),
    ):
        args = parse_arguments(observation.ObservationArguments, options)
        assert (args.observation_weight, args.look_ahead) == expected


# --- resuming and several processes -----------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_to_the_same_result(observation, small, tmp_path, monkeypatch):  # noqa: F811
    argv = [*small, *TINY, "--max_train_steps", 6, "--gradient_accumulation_steps", 2, "--checkpointing_steps", 6]
    argv += ["--validation_steps", 2, "--projection", "random", "--lr_scheduler", "cosine", "--consistency_weight", 1]
    observation.run(*argv, "--output_dir", tmp_path / "whole")
    go_on = stop_at(monkeypatch, 4)
    with pytest.raises(SystemExit) as stopped:
        observation.run(*argv, "--output_dir", tmp_path / "parts")
    assert stopped.value.code == 128 + signal.SIGTERM
    start = last_state(tmp_path / "parts")
    assert start["best"]["measured"] == 2  # the signal came before the measurement at 4
    go_on()
    observation.run(*argv, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "latest")
    whole, parts = (last_state(tmp_path / name) for name in ("whole", "parts"))
    for get in (lambda state: state["model"], lambda state: state["discriminator"]["network"]):
        assert_resumed(get(start), get(whole), get(parts))
    for name in ("model", "ema", "optimizer", "lr_scheduler", "discriminator", "best"):
        assert same_state(whole[name], parts[name]) or not REPRODUCIBLE, name
    assert parts["discriminator"]["optimizer"]["state"][0]["step"] == 6
    assert_resumed(start["model"], weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))
    distances = [
        [r["validation"]["frechet_distance"] for r in log_of(tmp_path / name) if "validation" in r]
        for name in ("whole", "parts")
    ]
    assert_same_numbers(*distances, rel=1e-2)
    assert len(distances[0]) == 3


def test_two_processes_do_what_one_does(observation, small, tmp_path):  # noqa: F811
    """Two processes against one with two accumulation steps, the same global batch: weights of both networks."""
    argv = [*small, *TINY, "--checkpointing_steps", 3, "--max_grad_norm", 1e9, "--adam_epsilon", 1e-3]
    argv += ["--observation_weight", 0.5, "--validation_steps", 2, "--patience", 9, "--output_dir"]
    observation.run(*argv, tmp_path / "world1", "--gradient_accumulation_steps", 2)
    done = stranger.ranks(2, SCRIPT, *argv, tmp_path / "world2")
    assert done.returncode == 0, done.stderr
    assert log_of(tmp_path / "world2")[0]["start"]["processes"] == 2
    states = [last_state(tmp_path / f"world{world}") for world in (1, 2)]
    one, two = states
    for name in ("fourier.weight", "conv_in.weight", "conv_out.weight"):
        a, b = (state["discriminator"]["network"][name] for state in states)
        assert (a - b).abs().max() < 1e-6
    for a, b in zip(*(s["discriminator"]["optimizer"]["state"].values() for s in states), strict=True):
        scale = a["exp_avg"].abs().max().item()
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-3, atol=1e-4 * scale + 1e-9)
    assert all((one["model"][k] - two["model"][k]).abs().max() < 1e-6 for k in one["model"])
    assert one["best"]["distance"] == pytest.approx(two["best"]["distance"], rel=1e-4)


# --- what is saved ----------------------------------------------------------------------------------------------------


def test_the_pipeline_opens_in_plain_diffusers_and_holds_no_discriminator(observation, small, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    observation.run(*small, *TINY, "--output_dir", out)
    names = {file.as_posix() for file in pushed_files(out)}
    assert not [f for f in out.rglob("*") if "discriminator" in f.name]
    assert {n.split("/")[0] for n in names} == {"model_index.json", "samples", "scheduler", "unet"}
    code = (
        "import sys\nfrom diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(out)!r})\n"
        "images = pipe(batch_size=2, num_inference_steps=2, output_type='np').images\n"
        "print(type(pipe).__name__, images.shape, sorted(pipe.components), 'diffusers_ext' in sys.modules)"
    )
    done = stranger.run(code)
    assert done.stdout.strip() == "DDIMPipeline (2, 8, 8, 1) ['scheduler', 'unet'] False", done.stderr


def test_the_discriminator_is_pushed_if_that_is_asked_for(small, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    argv = [*small, *TINY, "--push_to_hub", "--hub_model_id", "tester/digits", "--push_discriminator"]
    argv += ["--checkpointing_steps", 3, "--hub_timeout", 30, "--output_dir", out]
    with HubServer() as hub:
        done = stranger.run(SCRIPT, *argv, env=hub.environment(tmp_path / "hf-home"))
        assert done.returncode == 0, done.stderr
        files = set(hub.files("tester/digits"))
    assert {"discriminator/config.json", "discriminator/diffusion_pytorch_model.safetensors", "README.md"} <= files
    assert not [f for f in files if f.startswith(("best", "checkpoint"))]
    saved = NoiseLevelDiscriminator.from_pretrained(out / "discriminator").state_dict()
    trained = last_state(out)["discriminator"]["network"]
    assert same_state(dict(saved), trained)
    assert "discriminator" not in json.loads((out / "model_index.json").read_text())
    assert "2310.04041" in (out / "README.md").read_text()


# --- early stopping ---------------------------------------------------------------------------------------------------


def script_distances(monkeypatch, *distances):
    """Let the measurements be these, and see which weights they are of."""
    left, seen = list(distances), []

    def measure(self, subject):
        seen.append({k: v.clone() for k, v in subject.network.state_dict().items()})
        return left.pop(0)

    monkeypatch.setattr(Best, "measure", measure)
    return seen


def test_the_best_pipeline_is_the_result_and_patience_ends_the_run(observation, small, tmp_path, monkeypatch, capsys):  # noqa: F811
    seen = script_distances(monkeypatch, 5.0, 3.0, 4.0, math.inf, 2.0)
    argv = [*small, *TINY, "--max_train_steps", 10, "--validation_steps", 1, "--patience", 2]
    observation.run(*argv, "--checkpointing_steps", 1, "--output_dir", tmp_path / "out")
    assert len(seen) == 4
    assert_same_weights(weights_of(tmp_path / "out"), seen[1])
    assert not torch.equal(seen[1]["conv_in.weight"], seen[3]["conv_in.weight"])
    assert json.loads((tmp_path / "out" / "best" / "best.json").read_text())["frechet_distance"] == 3.0
    assert not (tmp_path / "out" / "best.json").exists()
    printed = capsys.readouterr().out
    assert "training ends at step 4" in printed
    assert "of step 2, the best, is in" in printed
    # Gone on with more patience, the run remembers what was best, and the measurement that its checkpoint has not seen.
    script_distances(monkeypatch, math.inf, 2.9, 3.5, 3.1, 3.2)
    argv = [*argv[:-1], 3, "--resume_from_checkpoint", "latest", "--output_dir", tmp_path / "out"]
    observation.run(*argv)
    assert "of step 5, the best, is in" in capsys.readouterr().out
    described = json.loads((tmp_path / "out" / "best" / "best.json").read_text())
    assert (described["step"], described["frechet_distance"]) == (5, 2.9)


def test_a_validation_is_made_up_for_by_all_processes(observation, small, tmp_path, monkeypatch):  # noqa: F811
    """Those that draw nothing wait with the one that does: a call that they left out would leave it waiting."""
    argv = [*map(str, [*small, *TINY]), "--validation_steps", "2", "--output_dir", str(tmp_path / "out")]
    loop = TrainingLoop(parse_arguments(observation.ObservationArguments, argv), "test", observation.PAPER)
    loop.keep(Best(steps=2, samples=8, patience=None))
    loop.step, calls = 2, []
    monkeypatch.setattr(loop, "trained", lambda: None)  # as on a process that is not the main one
    monkeypatch.setattr(loop.outcome, "on_the_way", lambda trained, push: calls.append((trained, push)))
    assert not loop._catch_up()
    assert calls == [(None, False)]


def test_the_last_pipeline_may_be_the_best(observation, small, tmp_path, monkeypatch):  # noqa: F811
    seen = script_distances(monkeypatch, 5.0, 6.0, 4.0)
    observation.run(*small, *TINY, "--validation_steps", 1, "--output_dir", tmp_path / "out")
    assert_same_weights(weights_of(tmp_path / "out"), seen[2])


def test_a_failed_or_killed_write_leaves_the_last_best(observation, small, tmp_path, monkeypatch, capsys):  # noqa: F811
    script_distances(monkeypatch, 5.0, 4.0, 6.0)
    original, out = os.replace, tmp_path / "out"

    def disk(source, target):
        if str(source).endswith("/.partial-best") and (out / ".partial-old-best").exists():
            raise OSError("no space")
        original(source, target)

    monkeypatch.setattr(files.os, "replace", disk)
    observation.run(*small, *TINY, "--validation_steps", 1, "--output_dir", out)
    assert "of step 2 could not be written: no space" in capsys.readouterr().out
    assert json.loads((out / "best" / "best.json").read_text())["step"] == 1
    (out / "best" / "thesis.txt").write_text("mine")
    os.rename(out / "best", out / ".partial-old-best")  # between the two renames
    (out / ".partial-best").mkdir()
    args = parse_arguments(
        observation.ObservationArguments,
        [*map(str, [*small, *TINY]), "--output_dir", str(out), "--overwrite_output_dir"],
    )
    loop = TrainingLoop(args, "test", observation.PAPER)
    loop.keep(best := Best(steps=2, samples=8, patience=None))
    assert json.loads((out / "best" / "best.json").read_text())["step"] == 1
    monkeypatch.undo()
    best._write(loop.trained(), {"step": 7})
    assert json.loads((out / "best" / "best.json").read_text())["step"] == 7
    assert (out / "best" / "thesis.txt").read_text() == "mine"
    best.install(tmp_path / "result")
    assert (tmp_path / "result" / "model_index.json").exists()
    assert not (tmp_path / "result" / "thesis.txt").exists()


def test_the_distance_is_that_of_the_pixels(observation, small, tmp_path):  # noqa: F811
    """SciPy's matrix square root, images from the pipeline called by hand. A run that an earlier version began goes on
    with the pixels themselves, whose distances it has compared so far."""
    import numpy as np
    import scipy.linalg

    argv = [*small, *TINY, "--max_validation_samples", 200, "--frechet_samples", 100, "--train_batch_size", 100]
    args = parse_arguments(observation.ObservationArguments, [*map(str, argv), "--output_dir", str(tmp_path / "out")])
    loop = TrainingLoop(args, "test", observation.PAPER)
    judge = Best(steps=3, samples=100, patience=None)
    loop.keep(judge)
    trained = loop.trained()
    generator = Seeds(0).generator(Stream.BEST, 0)
    images = trained.pipeline(batch_size=100, num_inference_steps=3, generator=generator, output_type="np").images
    drawn = torch.from_numpy(images).movedim(3, 1) * 2 - 1
    earlier = {name: value for name, value in judge.state_dict().items() if name != "features"}
    for state, features in ((judge.state_dict(), pixel_features), (earlier, lambda x: x.double().flatten(1))):
        judge.load_state_dict(state)
        a, b = (features(one).numpy() for one in (drawn, loop.validation.images))
        root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
        truth = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
        assert judge.measure(trained) == pytest.approx(truth, rel=1e-3)


# --- divergence -------------------------------------------------------------------------------------------------------


def scripted_logits(monkeypatch, observation, values):
    """Let the mean logits of real be these, step by step."""
    original, left = observation.discriminator_loss, list(values)

    def loss(*args, **kwargs):
        judged = original(*args, **kwargs)
        return judged._replace(real_logits=torch.full_like(judged.real_logits, left.pop(0)))

    monkeypatch.setattr(observation, "discriminator_loss", loss)


def test_a_game_that_diverges_stops_the_run_and_keeps_the_best(observation, small, tmp_path, monkeypatch, capsys):  # noqa: F811
    seen = script_distances(monkeypatch, 5.0, 3.0, 4.0, 6.0, 7.0, 8.0)
    scripted_logits(monkeypatch, observation, [1, 101, -200, 2, 500, -101, 300, 1, 1, 1])
    argv = [*small, *TINY, "--max_train_steps", 10, "--validation_steps", 1, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit) as stopped:
        observation.run(*argv)
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert "diverged before step 7: real_logits 300 (beyond its bound in 3 records" in message
    assert "the best pipeline, of step 2, is in" in message
    assert_same_weights(weights_of(tmp_path / "out"), seen[1])


def test_a_discriminator_that_is_not_finite_stops_the_run(observation, small, tmp_path, monkeypatch, capsys):  # noqa: F811
    original, calls = observation.discriminator_loss, []

    def loss(*args, **kwargs):
        calls.append(None)
        judged = original(*args, **kwargs)
        return judged._replace(loss=judged.loss * (math.nan if len(calls) == 2 else 1))

    monkeypatch.setattr(observation, "discriminator_loss", loss)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        observation.run(*small, *TINY, "--checkpointing_steps", 1, "--output_dir", out)
    assert stopped.value.code == 1
    assert "discriminator nan, discriminator_norm nan (not finite)" in capsys.readouterr().err
    assert [f.name for f in list_checkpoints(out)] == ["checkpoint-00000001"]


def test_a_step_that_is_not_finite_is_left_out(observation, small, tmp_path):  # noqa: F811
    argv = [*map(str, small), *map(str, TINY), "--output_dir", str(tmp_path / "out")]
    args = parse_arguments(observation.ObservationArguments, argv)
    loop = TrainingLoop(args, "test", observation.PAPER)
    rates = {"learning_rate": 0.1, "betas": (0.0, 0.99), "max_logit": 1.0}
    adversary = Adversary(observation.new_discriminator(loop, args.discriminator_channels), **rates)
    loop.keep(adversary)
    for batch in loop:
        before = {k: v.clone() for k, v in adversary.network.state_dict().items()}
        observation.step(args, loop, loop.denoiser, adversary, batch)
        after = adversary.network.state_dict()
        assert same_state(before, dict(after)) == (loop.step == 1)
        if loop.step == 0:  # the next gradient is not finite
            adversary.parameters[0].register_hook(lambda g: g * math.nan)
        if loop.step == 1:
            break


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--observation_weight", -1], "--observation_weight must be at least 0, got -1.0"),
        (["--look_ahead", 0], "--look_ahead must be above 0 and at most 1, got 0.0"),
        (["--discriminator_channels", "8,x"], "--discriminator_channels must be like 64,128, got '8,x'"),
        (["--frechet_samples", 1], "a covariance needs 2 at least"),
        (["--patience", 0], "--patience must be at least 1, got 0"),
        (["--projection", "euler_maruyama"], "invalid choice"),
        (["--scheduler", "ReflectedScheduler"], "train_observation needs a denoiser"),
    ],
)
def test_bad_arguments_end_with_a_message(observation, small, tmp_path, options, message, capsys):  # noqa: F811
    with pytest.raises(SystemExit) as stopped:
        observation.run(*small, *TINY, *options, "--output_dir", tmp_path / "out")
    assert message in f"{stopped.value.args[0]}{capsys.readouterr().err}"


def test_another_run_in_the_folder_is_replaced_with_all_its_parts(observation, small, tmp_path):  # noqa: F811
    out = ["--output_dir", tmp_path / "out"]
    observation.run(*small, *TINY, *out, "--push_discriminator")
    assert (tmp_path / "out" / "discriminator").is_dir()
    observation.run(*small, *TINY, *out, "--overwrite_output_dir", "--frechet_samples", 0)
    assert not (tmp_path / "out" / "best").exists()
    assert not (tmp_path / "out" / "discriminator").exists()
    shutil.rmtree(tmp_path / "out")
