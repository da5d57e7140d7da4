"""The scripts of short diffusion times, as a user runs them. Truth: the noise levels that are drawn, diffusers' own
loss, the moments of the images, the uninterrupted run."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import stranger
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, PNDMScheduler
from precision import assert_resumed
from test_calibrate_script import captioned, tiny_stable_diffusion  # noqa: F401
from test_models import tiny_unet
from test_train_consistency import assert_same_weights, log_of, small, weights_of  # noqa: F401
from test_wrong_input import KINDS

import diffusers_ext
from diffusers_ext import GaussianBridge, ShortTimePipeline
from diffusers_ext.commands import parse_arguments
from diffusers_ext.training import TrainingLoop
from diffusers_ext.training.checkpoint import load_checkpoint


@pytest.fixture
def short_time(load_script):
    return load_script("train_short_time")


@pytest.fixture
def fit(load_script):
    return load_script("fit_bridge")


ROOT = Path(__file__).resolve().parents[1]
BRIDGE = ("--max_diffusion_time", 0.4, "--max_bridge_samples", 400)


def digits_at_8(n: int) -> torch.Tensor:
    from diffusers_ext.data.batches import first_images
    from diffusers_ext.data.images import Transform
    from diffusers_ext.data.sources import Digits

    return first_images(Digits("train"), n, Transform(8, 1)).images


def test_what_it_trains_starts_from_the_moments_of_the_images(short_time, small, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    argv = [*small, "--max_diffusion_time", 0.4, "--max_bridge_samples", 100_000, "--output_dir", out]
    short_time.run(*argv)
    pipeline = DiffusionPipeline.from_pretrained(out)
    assert isinstance(pipeline, ShortTimePipeline)
    assert pipeline.scheduler.config.max_diffusion_time == 0.4
    alpha = DDIMScheduler().alphas_cumprod[399].sqrt()
    images = digits_at_8(100_000)
    expected = alpha * images.mean(0)
    assert (pipeline.bridge.mean[0] - expected).abs().max() < 0.01  # less than a batch was left out
    x = pipeline.bridge.sample(4000, torch.Generator().manual_seed(0))
    variance = alpha**2 * images.var(0) + 1 - alpha**2
    assert (x.var(0) / variance - 1).abs().max() < 0.15
    assert (out / "samples" / "step-00000003.png").is_file()
    pipeline(batch_size=2, num_inference_steps=3)


def test_noise_levels_are_those_of_the_short_times(short_time, small, tmp_path):  # noqa: F811
    argv = [*map(str, [*small, *BRIDGE]), "--bridge", "none", "--output_dir", str(tmp_path / "out")]
    args = parse_arguments(short_time.ShortTimeArguments, argv)
    loop = TrainingLoop(args, "test", short_time.PAPER)
    abar = DDIMScheduler().alphas_cumprod[399].double()
    assert loop.schedule.sigma_max == pytest.approx(((1 - abar) / abar).sqrt().item())
    assert max(loop.outcome.losses(loop.trained())["sigmas"]) <= loop.schedule.sigma_max * 1.0001
    batch = next(iter(loop))
    generator = torch.Generator().set_state(batch.generator.get_state())
    timesteps = torch.randint(400, (8,), generator=generator)
    sigma = loop.schedule.draw_sigmas(8, batch.generator, "cpu")
    torch.testing.assert_close(loop.schedule.time(sigma), timesteps.float(), rtol=0, atol=1e-3)


def test_it_resumes_to_the_same_weights_and_bridge(short_time, small, tmp_path):  # noqa: F811
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    argv = [*small, *BRIDGE, "--bridge", "mixture", "--bridge_components", 3, "--max_train_steps", 4]
    argv += ["--checkpointing_steps", 2]
    short_time.run(*argv, "--output_dir", whole)
    short_time.run(*argv, "--output_dir", halves)
    shutil.rmtree(halves / "checkpoint-00000004")
    start = load_checkpoint(halves / "checkpoint-00000002")["model"]
    short_time.run(*argv, "--output_dir", halves, "--resume_from_checkpoint", "latest")
    assert_resumed(start, weights_of(whole), weights_of(halves))
    assert_same_weights(weights_of(whole, "bridge"), weights_of(halves, "bridge"))


def test_a_pretrained_pipeline_is_trained_on(short_time, small, tmp_path):  # noqa: F811
    DDIMPipeline(tiny_unet(), DDIMScheduler(prediction_type="v_prediction")).save_pretrained(tmp_path / "model")
    argv = [
        "--pretrained_model_name_or_path",
        tmp_path / "model",
        *small[2:],
        *BRIDGE,
        "--output_dir",
        tmp_path / "out",
    ]
    short_time.run(*argv)
    config = DiffusionPipeline.from_pretrained(tmp_path / "out").scheduler.config
    assert (config.max_diffusion_time, config.prediction_type) == (0.4, "v_prediction")


def test_bad_arguments_end_with_a_message(short_time, fit, small, tmp_path, capsys):  # noqa: F811
    out = ("--output_dir", tmp_path / "out")
    for run, argv, said in (
        (short_time.run, [*small, "--max_diffusion_time", 0], "above 0 and at most 1, got 0.0"),
        (short_time.run, [*small, "--max_diffusion_time", 1.5], "above 0 and at most 1, got 1.5"),
        (short_time.run, [*small, "--bridge", "mixture", "--bridge_components", 1], "at least 2, got 1"),
        (short_time.run, [*small, "--bridge_rank", 100, *BRIDGE], "rank"),
        (short_time.run, [*small, "--max_bridge_samples", 4], "4 images are fewer than a batch of 8"),
        (short_time.run, [*small, "--scheduler", "EDMEulerScheduler"], "no short-time EDMEulerScheduler"),
        (fit.run, ["--dataset_name", "digits"], "name the model"),
        (fit.run, ["--report_times", "0.2,x"], "numbers with commas"),
        (
            fit.run,
            ["--pretrained_model_name_or_path", "x", "--push_to_hub", "--hub_model_id", "a/b/c"],
            "--hub_model_id",
        ),
        (fit.run, ["--report_times", "0.2,1.2"], "at most 1"),
        (fit.run, ["--pretrained_model_name_or_path", "x", "--bridge", "none"], "gaussian, mixture or flow"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(*argv, *out)
        assert said in f"{stopped.value.args[0]} {capsys.readouterr().err}"


def test_a_bridge_is_fitted_to_a_pretrained_pipeline(fit, tmp_path):
    DDIMPipeline(tiny_unet(), DDIMScheduler()).save_pretrained(tmp_path / "model")
    argv = ["--pretrained_model_name_or_path", tmp_path / "model", "--dataset_name", "digits", *BRIDGE]
    argv += ["--num_inference_steps", 3, "--num_validation_images", 4, "--max_validation_samples", 16]
    argv += ["--train_batch_size", 16]
    fit.run(*argv, "--output_dir", tmp_path / "out", "--report", "--report_times", "0.4,1")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipeline, ShortTimePipeline)
    assert_same_weights(weights_of(tmp_path / "model"), weights_of(tmp_path / "out"))
    pipeline(batch_size=1, num_inference_steps=2)
    assert (tmp_path / "out" / "samples" / "samples.png").is_file()
    assert (tmp_path / "out" / "diffusion_time.png").stat().st_size > 5000
    assert json.loads((tmp_path / "out" / "diffusion_time.json").read_text())["num_samples"] == 16
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Which T" in card
    assert str(tmp_path) not in card
    assert str(tmp_path) not in (tmp_path / "out" / "bridge" / "config.json").read_text()


def test_the_bridge_of_a_text_pipeline_gives_its_latents(fit, captioned, tmp_path, monkeypatch):  # noqa: F811
    """The bridge is one of latents, and the pipeline gives a draw of it to the network as it is."""
    tiny_stable_diffusion(tmp_path / "parts").save_pretrained(tmp_path / "model")
    argv = ["--pretrained_model_name_or_path", tmp_path / "model", "--dataset_name", captioned, *BRIDGE]
    fit.run(*argv, "--bridge_rank", 4, "--train_batch_size", 8, "--output_dir", tmp_path / "out")
    bridge = GaussianBridge.from_pretrained(tmp_path / "out")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipe.scheduler = diffusers_ext.ShortTimeDDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    bridge.check(pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe.unet.register_forward_pre_hook(
        lambda m, args, kw: seen.append((args[0].clone(), float(args[1]))), with_kwargs=True
    )
    latents = bridge.sample(2, torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    pipe(["grey 1", "grey 2"], latents=latents, **options)
    torch.testing.assert_close(seen[0][0], latents, rtol=1e-4, atol=1e-4)
    assert seen[0][1] == bridge.timestep == 399
    card = (tmp_path / "out" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(card.split("```python\n")[1].split("```")[0], given := {})
    assert type(given["pipe"]).__name__ == "ShortTimeStableDiffusionPipeline"
    assert type(given["pipe"].scheduler).__name__ == "ShortTimeDDIMScheduler"
    assert given["image"].size == (16, 16)


def test_a_pipeline_gets_the_short_time_class_of_another_scheduler(fit, captioned, tmp_path):  # noqa: F811
    """As the script's own example does; the noise levels stay those of the pipeline."""
    pipe = tiny_stable_diffusion(tmp_path / "parts")
    pipe.scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    pipe.save_pretrained(tmp_path / "model")
    argv = ["--pretrained_model_name_or_path", tmp_path / "model", "--dataset_name", captioned, *BRIDGE]
    argv += ["--scheduler", "DDIMScheduler", "--bridge_rank", 4, "--train_batch_size", 8]
    fit.run(*argv, "--output_dir", tmp_path / "out")
    scheduler = diffusers_ext.ShortTimeDDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    n = len(scheduler.alphas_cumprod)
    assert torch.equal(scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod[:n])
    assert n == round(1000 * scheduler.config.max_diffusion_time) < 1000
    GaussianBridge.from_pretrained(tmp_path / "out").check(scheduler)


def test_two_processes_make_what_one_makes(small, tmp_path):  # noqa: F811
    """With half of the accumulation steps; the bridge is fitted by one of them, and is the same."""
    for world in (1, 2):
        argv = [*small, *BRIDGE, "--max_grad_norm", 1e9, "--gradient_accumulation_steps", 2 // world]
        command = [ROOT / "training" / "train_short_time.py", *argv, "--output_dir", tmp_path / f"{world}"]
        done = stranger.ranks(world, *command)
        assert done.returncode == 0, done.stderr
        assert [r["start"]["processes"] for r in log_of(tmp_path / f"{world}") if "start" in r] == [world]
    assert_same_weights(weights_of(tmp_path / "1", "bridge"), weights_of(tmp_path / "2", "bridge"))
    one, two = (weights_of(tmp_path / name) for name in ("1", "2"))
    assert all((one[k] - two[k]).abs().max() < 1e-5 for k in one)


def test_after_a_fit_it_says_how_to_compare(fit, tmp_path, capsys):
    DDIMPipeline(tiny_unet(), DDIMScheduler()).save_pretrained(tmp_path / "model")
    argv = ["--pretrained_model_name_or_path", tmp_path / "model", "--dataset_name", "digits", *BRIDGE]
    fit.run(*argv, "--num_validation_images", 0, "--output_dir", tmp_path / "out")
    *_, where, opened, compared = capsys.readouterr().out.strip().splitlines()
    assert where == f"the short-time pipeline is in {tmp_path / 'out'}"
    assert f'from_pretrained("{tmp_path / "out"}")' in opened
    words = shlex.split(compared.removeprefix("  compare it:"))
    args = parse_arguments(KINDS["evaluate"], words[2:])
    assert args.pretrained_model_name_or_path == [str(tmp_path / "model"), str(tmp_path / "out")]
    assert args.dataset_name == "digits"
