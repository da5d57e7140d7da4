"""What `tests/data/saved` holds: files of version 0.1.0, and the numbers that it computes from them.

    PYTHONPATH=tests python tests/data/make_saved.py

It was run at version 0.1.0, once, and is kept so that one can see how the files were made: a later version must open
these files (`tests/test_saved.py`), and not files of its own.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from safetensors.torch import save_file
from test_saved import NUMBERS, RUNS, SAVED, arguments_of, of_run

from diffusers_ext import (
    CalibratedDDIMScheduler,
    ClassConditionalPipeline,
    FlowBridge,
    GaussianBridge,
    MixtureBridge,
    NoiseLevelDiscriminator,
    ReflectedPipeline,
    ReflectedScheduler,
    estimate_calibration,
    short_time_pipeline,
)

CLASSES = 3
NULL = CLASSES


def unet(seed: int, **config) -> UNet2DModel:
    """Random weights: a mean error of any size, and images of about unit size."""
    torch.manual_seed(seed)
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": (2,)}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DModel(**sizes, **blocks, norm_num_groups=1, add_attention=False, **config).eval()


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")


def data(n: int = 240) -> list:
    """Batches of images with two modes in each class."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(n) % CLASSES
    pattern = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    sign = torch.randint(2, (n, 1, 1, 1), generator=generator) * 2 - 1
    noise = torch.randn(n, 1, 8, 8, generator=generator)
    images = 0.6 * sign * (pattern * (labels + 1).reshape(-1, 1, 1, 1)).sin() + 0.1 * noise
    return [(x, {"class_labels": y}) for x, y in zip(images.split(40), labels.split(40), strict=True)]


def run(script: str, *argv: str) -> None:
    path = Path(__file__).parents[2] / "training" / f"{script}.py"
    spec = importlib.util.spec_from_file_location(script, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[script] = module
    spec.loader.exec_module(module)
    sys.argv = [path.name, *argv]
    module.main()


def save_objects(out: Path) -> None:
    plain, conditional = unet(1), unet(2, num_class_embeds=CLASSES + 1)
    bare = [(x, {}) for x, _ in data()]
    note = {"measured_on": {"data": "two modes in each class"}}
    raw = {"control_variate": False, "antithetic": False, "shrink": False}
    estimate_calibration(plain, scheduler(), bare, num_levels=4, **raw, **note).save_pretrained(out / "calibration")
    guided = estimate_calibration(conditional, scheduler(), data(), num_levels=3, null_class=NULL, **note)
    guided.save_pretrained(out / "guided_calibration")
    ClassConditionalPipeline(conditional, scheduler(), NULL).save_pretrained(out / "class_conditional")
    calibrated = CalibratedDDIMScheduler.from_scheduler(scheduler(), guided, guidance_scale=3.0)
    ClassConditionalPipeline(conditional, calibrated, NULL).save_pretrained(out / "calibrated")
    box = ReflectedScheduler(sigma_min=0.05, sigma_max=5.0, algorithm_type="sde")
    ReflectedPipeline(conditional, box, NULL).save_pretrained(out / "reflected")

    gaussian = GaussianBridge.fit(bare, scheduler(), 0.4, rank=6, **note)
    gaussian.save_pretrained(out / "gaussian")
    short_time_pipeline(DDIMPipeline(plain, scheduler()), 0.4, gaussian).save_pretrained(out / "short_time")
    small = {"rank": 4, "latent_rank": 2, **note}
    mixture = MixtureBridge.fit(data(), scheduler(), 0.4, num_components=3, num_classes=CLASSES, **small)
    mixture.save_pretrained(out / "mixture")
    layers = {"transforms": 2, "hidden_features": (8,), "bins": 4}
    FlowBridge.fit(bare, scheduler(), 0.4, max_steps=200, **layers, **small).save_pretrained(out / "flow")
    torch.manual_seed(3)
    NoiseLevelDiscriminator(1, (4, 4), num_class_embeds=CLASSES + 1).save_pretrained(out / "discriminator")


def save_evaluation(out: Path) -> None:
    for name, seed in (("first", 1), ("second", 4)):
        DDIMPipeline(unet(seed), scheduler()).save_pretrained(name)
    models = ("--pretrained_model_name_or_path", "first", "second", "--extractor", "pixels", "--nfe", "1,2")
    images = ("--dataset_name", "digits", "--max_train_samples", "60", "--max_validation_samples", "60")
    likely = ("--likelihood_images", "4", "--likelihood_evaluations", "2", "--ode_images", "0")
    run("evaluate", *models, *images, *likely, "--num_samples", "30", "--output_dir", "evaluation")
    shutil.copy("evaluation/results.json", out / "results.json")


def save_checkpoints(out: Path) -> dict:
    """The numbers are of whole runs; what is saved is of runs that ended at the second step."""
    unet(0).save_config(out / "unet")
    shutil.copytree(out / "unet", "unet")
    numbers = {}
    for name, (script, _) in RUNS.items():
        run(script, *arguments_of(name))
        numbers |= {f"{name}/{key}": value for key, value in of_run(Path(name)).items()}
        shutil.rmtree(name)
        run(script, *arguments_of(name, steps=2))
        shutil.copytree(f"{name}/checkpoint-00000002", out / name / "checkpoint-00000002")
        if Path(name, "best").exists():
            shutil.copytree(f"{name}/best", out / name / "best")
    return numbers


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        out = Path("saved")
        save_objects(out)
        save_evaluation(out)
        numbers = save_checkpoints(out)
        for name, compute in NUMBERS.items():
            numbers |= {f"{name}/{key}": value for key, value in compute(out / name).items()}
        save_file({key: value.contiguous() for key, value in numbers.items()}, out / "expected.safetensors")
        shutil.rmtree(SAVED, ignore_errors=True)
        shutil.copytree(out, SAVED)


if __name__ == "__main__":
    main()
