"""What version 0.1.0 has saved still opens. Truth: the numbers that 0.1.0 computed from the same files, and, of a
checkpoint, those of the run that was not interrupted. `tests/data/make_saved.py` shows how the files were made."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import diffusers_ext
from diffusers_ext import (
    Calibration,
    FlowBridge,
    GaussianBridge,
    MixtureBridge,
    NoiseLevelDiscriminator,
    losses,
)
from diffusers_ext.evaluation import Evaluation

SAVED = Path(__file__).parent / "data" / "saved"
WEIGHTS = "diffusion_pytorch_model.safetensors"

# Another processor rounds float32 otherwise. Numbers here are of the order of 1; under other instruction sets, another
# mode of MKL and other numbers of threads they moved by 2e-5 at most (the score at a face of the reflected box, where
# it is steep), nearly all by less than 1e-6. A wrong weight, level or random number moves them by far more. (Adam
# divides by the size of a gradient; the runs have an epsilon above that of a gradient which is mere rounding.)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- files of one object ----------------------------------------------------------------------------------------------


def of_calibration(folder, guidance_scale=1.0):
    calibration = Calibration.from_pretrained(folder)
    sigma = torch.tensor([0.001, 0.02, 0.5, 3.0, 40.0, 1000.0])
    return {
        "offset": calibration.offset(sigma, calibration.guidance_weights(guidance_scale)),
        "std_error": calibration.std_error,
        "gain": calibration.likelihood_gain(),
    }


def of_guided_calibration(folder):
    return of_calibration(folder, guidance_scale=3.0)


def of_pipeline(folder, kind, **call):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline) is kind
    pipeline.set_progress_bar_config(disable=True)
    seen = []

    def look(pipe, i, t, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    call |= {"num_inference_steps": 3, "generator": seeded(), "output_type": "pt", "callback_on_step_end": look}
    return pipeline, {"images": pipeline(**call).images, "states": torch.stack(seen)}


def of_class_conditional(folder):
    kind = diffusers_ext.ClassConditionalPipeline
    pipeline, numbers = of_pipeline(folder, kind, class_labels=[0, 2, 1], guidance_scale=2.0)
    assert pipeline.config.null_class == 3
    return numbers


def of_calibrated(folder):
    kind = diffusers_ext.ClassConditionalPipeline
    pipeline, numbers = of_pipeline(folder, kind, class_labels=[1, 2], guidance_scale=3.0)
    assert type(pipeline.scheduler) is diffusers_ext.CalibratedDDIMScheduler
    assert pipeline.scheduler.guidance_scale == 3.0
    return numbers


def of_reflected(folder):
    pipeline, numbers = of_pipeline(folder, diffusers_ext.ReflectedPipeline, class_labels=[0, 1])
    assert (pipeline.config.null_class, pipeline.scheduler.config.algorithm_type) == (3, "sde")
    return numbers


def of_short_time(folder):
    pipeline, numbers = of_pipeline(folder, diffusers_ext.ShortTimePipeline, batch_size=2)
    assert type(pipeline.bridge) is GaussianBridge
    assert pipeline.scheduler.config.max_diffusion_time == 0.4
    return numbers


def of_bridge(folder, kind, labels=None):
    bridge = kind.from_pretrained(folder)
    x = bridge.sample(4, seeded(), class_labels=labels)
    return {"sample": x, "log_prob": bridge.log_prob(x, class_labels=labels)}


def of_gaussian(folder):
    return of_bridge(folder, GaussianBridge)


def of_mixture(folder):
    return of_bridge(folder, MixtureBridge, torch.tensor([0, 1, 1, 0]))


def of_flow(folder):
    return of_bridge(folder, FlowBridge)


def of_discriminator(folder):
    judge, x = NoiseLevelDiscriminator.from_pretrained(folder), torch.randn(4, 1, 8, 8, generator=seeded())
    sigma = torch.tensor([0.1, 1.0, 5.0, 50.0])
    return {"logits": judge(x, sigma, sigma / 2, class_labels=torch.tensor([3, 0, 1, 2])).detach()}


NUMBERS = {
    "calibration": of_calibration,
    "guided_calibration": of_guided_calibration,
    "class_conditional": of_class_conditional,
    "calibrated": of_calibrated,
    "reflected": of_reflected,
    "short_time": of_short_time,
    "gaussian": of_gaussian,
    "mixture": of_mixture,
    "flow": of_flow,
    "discriminator": of_discriminator,
}


def assert_as_it_was(name, numbers):
    before = load_file(SAVED / "expected.safetensors")
    expected = {key.split("/")[1]: value for key, value in before.items() if key.split("/")[0] == name}
    assert expected.keys() == numbers.keys()
    for key, value in expected.items():
        torch.testing.assert_close(numbers[key], value, **TOLERANCE, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", NUMBERS)
def test_it_opens_and_gives_the_same_numbers(name):
    assert_as_it_was(name, NUMBERS[name](SAVED / name))


# --- results of an evaluation -----------------------------------------------------------------------------------------


def same(read, written):
    """Whether all that was written is in what was read; numbers that are not finite are written as texts."""
    if isinstance(written, dict):
        return all(name in read and same(read[name], value) for name, value in written.items())
    if isinstance(written, list):
        return len(read) == len(written) and all(map(same, read, written))
    return read == written


def test_results_of_an_evaluation_are_read_whole(tmp_path):
    written = json.loads((SAVED / "results.json").read_text())
    found = Evaluation.load(SAVED / "results.json")
    found.save(tmp_path / "again.json")
    assert same(json.loads((tmp_path / "again.json").read_text()), written)
    assert [cell.model for cell in found.ordered()] == ["first", "first", "second", "second"]
    for cell, stored in zip(found.cells, written["cells"], strict=True):
        assert math.isnan(cell.quality.frechet.estimate)  # of too few images; the file says "nan"
        assert [*found.distance(cell.quality)] == stored["quality"]["kernel"]
    baseline, change = found.change(found.cells[2])
    assert baseline is found.cells[0]
    distances = [cell["quality"]["kernel"][0] for cell in written["cells"]]
    assert change.estimate == pytest.approx(distances[2] - distances[0], rel=1e-9)


# --- checkpoints ------------------------------------------------------------------------------------------------------

TRAINING = [
    *("--model_config_name_or_path", "unet", "--dataset_name", "digits", "--train_batch_size", "4"),
    *("--learning_rate", "0.01", "--lr_warmup_steps", "3", "--adam_epsilon", "0.001", "--checkpointing_steps", "2"),
    *("--max_validation_samples", "8", "--num_validation_images", "0", "--report_to", "none", "--logging_steps", "1"),
]
RUNS = {
    "consistency": ("train_consistency", ["--consistency_fraction", "1", "--sigma_width", "1"]),
    "observation": (
        "train_observation",
        [
            *("--class_conditional", "--projection", "random", "--observation_weight", "0.5", "--no_use_ema"),
            *("--discriminator_channels", "4", "--frechet_samples", "8", "--frechet_steps", "2"),
            *("--validation_steps", "1"),
        ],
    ),
}
STEPS = 4  # of the whole run; the checkpoint is of the second


def arguments_of(name, steps=STEPS):
    """In a folder with the configuration `unet`."""
    return [*TRAINING, *RUNS[name][1], "--max_train_steps", str(steps), "--output_dir", name]


def of_run(folder):
    """What the last two steps were, and what came of them."""
    records = [json.loads(line) for line in (folder / "logs" / "log.jsonl").read_text().splitlines()]
    records = [record for record in records if record["step"] > STEPS - 2]
    trained = [record for record in records if "denoising" in record]
    names = set(trained[0]) - {"step", "images", "images_per_second", "by_sigma"}
    numbers = {name: torch.tensor([record[name] for record in trained]) for name in sorted(names)}
    measured = [record["validation"] for record in records if "validation" in record]
    for name in ("eps_mse", "frechet_distance"):
        if name in measured[0]:
            numbers[name] = torch.tensor([one[name] for one in measured])
    state = load_file(folder / f"checkpoint-{STEPS:08d}" / "state.safetensors")
    for part in ("/model/", "/ema/shadow_params/", "/discriminator/network/"):
        if values := [state[key].flatten() for key in sorted(state) if key.startswith(part)]:
            numbers[part.split("/")[1]] = torch.cat(values)[::7]  # some of them, to keep the record small
    return numbers


def with_the_gradient_of_the_product(denoiser, x, sigma, sigma_next, *, denoised, generator, steps, rollout, **cond):
    """The loss as it was when the runs were recorded: of the same value, with the graphs of both draws."""
    step = losses.ROLLOUTS[rollout]
    assert steps == 1
    draws = [
        step(denoiser, x, sigma, sigma_next, denoised=denoised.detach(), generator=generator).detach() for _ in range(2)
    ]
    first, second = (denoiser(one, sigma_next, **cond) - denoised for one in draws)
    return (first * second).flatten(1).mean(1)


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_goes_on_as_the_run_that_was_not_interrupted(name, load_script, tmp_path, monkeypatch):
    for folder in ("unet", name):
        shutil.copytree(SAVED / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    script = load_script(RUNS[name][0])
    if name == "consistency":
        script.consistency_loss = with_the_gradient_of_the_product
    script.run(*arguments_of(name), "--resume_from_checkpoint", "latest")
    assert_as_it_was(name, of_run(tmp_path / name))
    if name == "observation":  # the nearest pipeline was that of a step before the checkpoint
        nearest, result = (load_file(f / "unet" / WEIGHTS) for f in (SAVED / name / "best", tmp_path / name))
        assert all(torch.equal(result[key], value) for key, value in nearest.items())
