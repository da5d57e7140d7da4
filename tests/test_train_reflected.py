"""Truth: what the score of a reflected process is at both ends of the noise, and the uninterrupted run."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from test_train_consistency import assert_same_weights, log_of, script, small, weights_of  # noqa: F401

from diffusers_ext import ReflectedPipeline, ReflectedScheduler
from diffusers_ext.commands import parse_arguments
from diffusers_ext.training import TrainingLoop

SCRIPT = Path(__file__).parents[1] / "training" / "train_reflected.py"


@pytest.fixture
def reflected(load_script):
    return load_script("train_reflected")


def test_what_it_trains_opens_and_keeps_to_the_box(reflected, small, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    reflected.run(*small, "--class_conditional", "--sigma_min", 0.01, "--algorithm_type", "heun", "--output_dir", out)
    pipeline = DiffusionPipeline.from_pretrained(out)
    assert isinstance(pipeline, ReflectedPipeline)
    assert pipeline.config.null_class == 10
    config = pipeline.scheduler.config
    assert (config.sigma_min, config.sigma_max, config.algorithm_type) == (0.01, 3.0, "heun")
    assert config.prediction_type == "point"
    assert (config.low, config.high) == (-1, 1)
    seen = []

    def look(pipe, i, t, tensors):
        seen.append(tensors["latents"].abs().max().item())
        return {}

    pipeline([3, 4], num_inference_steps=4, guidance_scale=50.0, callback_on_step_end=look)
    assert len(seen) == 8
    assert max(seen) <= 1
    assert (out / "samples" / "step-00000003.png").is_file()


def test_the_validated_loss_of_a_zero_network_is_the_norm_of_the_score(reflected, small, tmp_path):  # noqa: F811
    """Where sigma is small the kernel is Gaussian, at a face folded in half: sigma^2 |score|^2 has mean 1. At sigma_max
    it is uniform, with score 0."""
    argv = [*map(str, small), "--max_validation_samples", "64", "--output_dir", str(tmp_path / "out")]
    argv += ["--prediction_type", "epsilon"]
    loop = TrainingLoop(parse_arguments(reflected.ReflectedArguments, argv), "test", reflected.PAPER)
    for parameter in loop.pipeline.unet.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    loop.ema.shadow_params = [p.detach().clone() for p in loop.pipeline.unet.parameters()]
    measured = loop.outcome.losses(loop.trained())
    first, last = measured["sigmas"].index(max(measured["sigmas"])), measured["sigmas"].index(min(measured["sigmas"]))
    assert measured["eps_mse"][last] == pytest.approx(1.0, abs=5 * (2 / (64 * 64)) ** 0.5)
    assert measured["eps_mse"][first] < 1e-6


def test_it_resumes_to_the_same_weights(reflected, small, tmp_path):  # noqa: F811
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    argv = [*small, "--max_train_steps", 4, "--checkpointing_steps", 2]
    reflected.run(*argv, "--output_dir", whole)
    reflected.run(*argv, "--output_dir", halves)
    for file in (halves / "checkpoint-00000004").iterdir():
        file.unlink()
    (halves / "checkpoint-00000004").rmdir()
    reflected.run(*argv, "--output_dir", halves, "--resume_from_checkpoint", "latest")
    assert_same_weights(weights_of(whole), weights_of(halves))
    losses = [[r["score_matching"] for r in log_of(f) if "score_matching" in r] for f in (whole, halves)]
    assert losses[0] == losses[1]


def test_its_models_are_fine_tuned_and_others_refused(reflected, script, small, tmp_path, capsys):  # noqa: F811
    first, ordinary = tmp_path / "first", tmp_path / "ordinary"
    data = small[2:]
    reflected.run(*small, "--output_dir", first)
    script.run(*small, "--output_dir", ordinary)
    reflected.run(*data, "--pretrained_model_name_or_path", first, "--output_dir", tmp_path / "second")
    assert any(not torch.equal(a, weights_of(first)[k]) for k, a in weights_of(tmp_path / "second").items())
    for run, argv, message in (
        (reflected.run, ["--pretrained_model_name_or_path", ordinary], "trains models of a ReflectedScheduler"),
        (
            reflected.run,
            ["--pretrained_model_name_or_path", first, "--sigma_min", 0.1],
            "--sigma_min is for training from",
        ),
        (script.run, ["--pretrained_model_name_or_path", first], "train_reflected.py"),
        (reflected.run, [*small[:2], "--scheduler", "DDIMScheduler"], "trains models of a ReflectedScheduler"),
        (reflected.run, [*small[:2], "--sigma_min", 20], "sigma_min < sigma_max"),
        (reflected.run, [*small[:2], "--beta_schedule", "linear"], "without beta_schedule"),
        (reflected.run, [*small[:2], "--algorithm_type", "euler"], "sde, ode, heun"),
        (reflected.run, [*small[:2], "--prediction_type", "v_prediction"], "predicts epsilon"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(*data, *argv, "--output_dir", tmp_path / "refused")
    with pytest.raises(SystemExit):
        reflected.run(*small, "--sigma_log_std", -1, "--output_dir", tmp_path / "refused")
    assert "--sigma_log_std must be above 0" in capsys.readouterr().err


def test_the_box_must_hold_the_data(reflected, small, tmp_path):  # noqa: F811
    reflected.run(*small, "--output_dir", tmp_path / "first")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "first")
    pipeline.scheduler = ReflectedScheduler(low=0.0, high=1.0)
    pipeline.save_pretrained(tmp_path / "unit")
    argv = [*small[2:], "--pretrained_model_name_or_path", tmp_path / "unit", "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit, match="must lie in"):
        reflected.run(*argv)


EPSILON = ("--prediction_type", "epsilon")


@pytest.mark.parametrize(
    ("options", "mean", "std", "sigma_max"),
    [
        ((), -0.218, 0.764, 3),
        (("--purpose", "likelihood"), -1.159, 1.698, 3),
        (("--sigma_log_mean", "-2", "--sigma_log_std", "0.1"), -2, 0.1, 3),
        (EPSILON, -0.80, 1.79, 10),
        ((*EPSILON, "--sigma_log_mean", "-0.7"), -0.70, 1.20, 10),
    ],
)
def test_the_law_of_the_noise_levels(reflected, small, tmp_path, monkeypatch, options, mean, std, sigma_max):  # noqa: F811
    """Log-normal, moved into the bounds: mean and standard deviation by quadrature. For likelihood half of that, half
    log-uniform on [0.005, 3]: mean -2.100, variance 3.410. For epsilon log-uniform on [0.02, 10]: mean ln(0.2)/2,
    standard deviation ln(500)/12^1/2; or log-normal, hardly cut there."""
    drawn, plain = [], reflected.score_matching_loss

    def spy(model, x, x0, sigma, **kwargs):
        drawn.append(sigma)
        # the batch's generator is the source of all: the global state is as the loop has set it
        assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(torch.initial_seed()).get_state())
        return plain(model, x, x0, sigma, **kwargs)

    monkeypatch.setattr(reflected, "score_matching_loss", spy)
    argv = ("--train_batch_size", 1000, "--max_train_steps", 1, "--num_validation_images", 0)
    reflected.run(*small, *argv, *options, "--output_dir", tmp_path / "out")
    (sigma,) = drawn
    assert sigma.min() >= (0.005 if "likelihood" in options else 0.02) * (1 - 1e-6)
    assert sigma.max() <= sigma_max * (1 + 1e-6)
    assert sigma.log().mean().item() == pytest.approx(mean, abs=4 * std / 1000**0.5)
    assert sigma.log().std().item() == pytest.approx(std, rel=0.1)
