"""Guidance of a reflected model against an ordinary one that clamps, clips or thresholds: quality, saturation, class.

    python benchmarks/reflected_guidance.py --preset digits --output_dir guidance-digits
    python benchmarks/reflected_guidance.py --preset mnist --output_dir guidance-mnist --dataset_name $MNIST

Both models have the preset's network, data and number of steps; they are trained by the project's scripts into
output_dir, and what is there is not trained, or sampled, again. Varied are the guidance scale (--scales) at
--base_steps, and the number of steps (--steps) at --base_scale. For each cell, over the same classes in turn:

    distance     Frechet distance to held-out images, of the features of a small classifier trained on the spot
    accuracy     share of samples that the classifier gives the class that was asked for
    saturated    share of pixels within 1/128 of a face, beside that of held-out images, which may have many by right
    outside      share of pixels out of [-1, 1] before the last clamp

Writes results.jsonl, table.md and guidance.png.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from torch import Tensor

from diffusers_ext import ReflectedPipeline, ReflectedScheduler
from diffusers_ext.commands import parse_arguments
from diffusers_ext.data.batches import first_images
from diffusers_ext.data.images import Transform
from diffusers_ext.data.sources import load_images, load_validation_images
from diffusers_ext.extractors import Classifier, train_classifier
from diffusers_ext.metrics import frechet_distance
from diffusers_ext.reports.pictures import image_grid
from diffusers_ext.training import TrainingArguments

ROOT = Path(__file__).resolve().parents[1]


def ordinary(kind: type, clamp: bool = False, **settings: Any) -> tuple[str, Callable[[Any], Any], bool]:
    defaults = {"clip_sample": False, "timestep_spacing": "trailing"}
    return "ordinary", lambda scheduler: kind.from_config(scheduler.config, **defaults | settings), clamp


def reflected(algorithm_type: str) -> tuple[str, Callable[[Any], Any], bool]:
    return (
        "reflected",
        lambda scheduler: type(scheduler).from_config(scheduler.config, algorithm_type=algorithm_type),
        False,
    )


# Dynamic thresholding as in Imagen (Saharia et al., 2022, arXiv 2205.11487): x0 is divided by its 99.5% quantile.
_DYNAMIC = {"thresholding": True, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1e6}
METHODS = {
    "reflected sde": reflected("sde"),
    "reflected ode": reflected("ode"),
    "reflected heun, half the steps": reflected("heun"),
    **{
        f"{name}, {treatment}": ordinary(kind, **settings)
        for name, kind in (("DDPM", DDPMScheduler), ("DDIM", DDIMScheduler))
        for treatment, settings in (
            ("nothing", {}),
            ("x_t clamped", {"clamp": True}),
            ("x0 clipped", {"clip_sample": True}),
            ("dynamic thresholding", _DYNAMIC),
        )
    },
    "ordinary model, ReflectedScheduler": ("ordinary", lambda s: ReflectedScheduler.from_config(s.config), False),
    "ordinary model, ReflectedScheduler, x clamped": (
        "ordinary",
        lambda s: ReflectedScheduler.from_config(s.config, boundary="project"),
        False,
    ),
}


def train(script: str, folder: Path, arguments: list[str]) -> None:
    if not (folder / "model_index.json").exists():
        options = ["--class_conditional", "--label_drop", "0.2", "--resume_from_checkpoint", "latest", *arguments]
        command = [sys.executable, str(ROOT / "training" / script), *options, "--output_dir", str(folder)]
        subprocess.run(command, check=True)


@torch.no_grad()
def draw(pipeline: DiffusionPipeline, labels: Tensor, steps: int, scale: float, clamp: bool) -> Tensor:
    """The last samples before anything is clamped to be shown, (n, C, H, W)."""
    last = []

    def after_step(pipe: Any, i: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        x = tensors["latents"].clamp(-1, 1) if clamp else tensors["latents"]
        last[:] = [x]
        return {"latents": x}

    images = []
    for i, part in enumerate(labels.split(100)):
        generator = torch.Generator().manual_seed(i)
        options = {"num_inference_steps": steps, "guidance_scale": scale, "generator": generator, "output_type": "pt"}
        pipeline(part, callback_on_step_end=after_step, **options)
        images += last
    return torch.cat(images)


def measure(x: Tensor, labels: Tensor, classifier: Classifier, real: Tensor) -> dict[str, float]:
    shown = x.clamp(-1, 1)
    return {
        "distance": frechet_distance(classifier.features(shown), real),
        "accuracy": (classifier(shown).argmax(1) == labels).float().mean().item(),
        "saturated": (shown.abs() > 1 - 1 / 128).float().mean().item(),
        "outside": (x.abs() > 1).float().mean().item(),
    }


def plot(rows: list[dict], reference: dict[str, float], base: argparse.Namespace, path: Path) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(18, 8), layout="constrained")
    for line, (axis, fixed) in enumerate(
        (("scale", {"steps": base.base_steps}), ("steps", {"scale": base.base_scale}))
    ):
        for column, name in enumerate(("distance", "accuracy", "saturated")):
            ax = axes[line, column]
            for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
                chosen = [r for r in rows if r["method"] == method and all(r[k] == v for k, v in fixed.items())]
                chosen.sort(key=lambda r: r[axis])
                style = "o-" if "reflected" in method else "s--" if "DDPM" in method else "^:"
                ax.plot(
                    [r[axis] for r in chosen],
                    [r[name] for r in chosen],
                    style,
                    color=plt.get_cmap("tab20")(i % 20),
                    label=method,
                )
            ax.axhline(reference[name], color="grey", linewidth=0.8)
            ax.set(xscale="log", xlabel="guidance scale" if axis == "scale" else "steps", ylabel=name)
            ax.set_yscale("log" if name == "distance" else "linear")
            ax.set_title(", ".join(f"{k} {v:g}" for k, v in fixed.items()))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle("Guidance, reflected and ordinary; the grey line is real held-out images")
    figure.savefig(path, dpi=100)


def table(rows: list[dict], reference: dict[str, float], base: argparse.Namespace) -> str:
    lines = []
    for axis, fixed, values in (
        ("scale", {"steps": base.base_steps}, base.scales),
        ("steps", {"scale": base.base_scale}, base.steps),
    ):
        title = ", ".join(f"{k} {v:g}" for k, v in fixed.items())
        lines += [
            "",
            f"| {title}; distance / accuracy / saturated | " + " | ".join(f"{axis} {v:g}" for v in values) + " |",
        ]
        lines += ["|---" * (len(values) + 1) + "|"]
        for method in dict.fromkeys(row["method"] for row in rows):
            cells = []
            for value in values:
                row = next(r for r in rows if r["method"] == method and r[axis] == value and fixed.items() <= r.items())
                cells.append(f"{row['distance']:.2f} / {row['accuracy']:.2f} / {row['saturated']:.2f}")
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    real = f"{reference['distance']:.2f} / {reference['accuracy']:.2f} / {reference['saturated']:.2f}"
    return "\n".join([f"Real training images: {real} (saturated: of the held-out ones)", *lines]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_samples", type=int, default=500)
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50, 200])
    parser.add_argument("--base_scale", type=float, default=4)
    parser.add_argument("--base_steps", type=int, default=20)
    parser.add_argument("--methods", default="", help="only those with this in their name")
    args, for_training = parser.parse_known_args()
    for_training = ["--preset", args.preset, *for_training]
    data = parse_arguments(TrainingArguments, for_training)

    train("train_reflected.py", args.output_dir / "reflected", for_training)
    train("train_consistency.py", args.output_dir / "ordinary", [*for_training, "--consistency_weight", "0"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipelines = {
        n: DiffusionPipeline.from_pretrained(args.output_dir / n).to(device) for n in ("reflected", "ordinary")
    }
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipelines["reflected"], ReflectedPipeline)
    schedulers = {name: pipeline.scheduler for name, pipeline in pipelines.items()}

    source, held_out = load_images(data, "train"), load_validation_images(data)
    unet = pipelines["reflected"].unet
    transform = Transform(unet.config.sample_size, unet.config.in_channels)
    seen = first_images(source, len(source), transform)
    real = first_images(held_out, len(held_out), transform)
    classes = len(source.class_names)
    classifier = train_classifier(seen.images.to(device), seen.labels.to(device), classes)
    labels = torch.arange(args.num_samples) % classes
    real_features = classifier.features(real.images.to(device))
    some = torch.randperm(len(seen.images), generator=torch.Generator().manual_seed(0))[: args.num_samples]
    reference = measure(seen.images[some].to(device), seen.labels[some].to(device), classifier, real_features)
    reference["saturated"] = (real.images.abs() > 1 - 1 / 128).float().mean().item()
    reference["accuracy"] = (classifier(real.images.to(device)).argmax(1).cpu() == real.labels).float().mean().item()

    file = args.output_dir / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    cells = [(s, args.base_steps) for s in args.scales] + [(args.base_scale, n) for n in args.steps]
    chosen = {name: method for name, method in METHODS.items() if args.methods in name}
    for method, (model, scheduler, clamp) in chosen.items():
        for scale, steps in dict.fromkeys(cells):
            key = {"method": method, "scale": scale, "steps": steps, "num_samples": args.num_samples}
            if any(key.items() <= row.items() for row in rows):
                continue
            pipeline = pipelines[model]
            pipeline.scheduler = scheduler(schedulers[model])
            x = draw(pipeline, labels, steps // 2 if "half" in method else steps, scale, clamp)
            rows.append(key | measure(x, labels.to(device), classifier, real_features))
            with file.open("a") as out:
                out.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), flush=True)
            name = f"{method}-scale{scale:g}-steps{steps}".replace(" ", "_").replace(",", "")
            (args.output_dir / "grids").mkdir(exist_ok=True)
            grid = (x[:40].clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).cpu().numpy()
            image_grid(grid, columns=10, min_size=32).save(args.output_dir / "grids" / f"{name}.png")

    (args.output_dir / "table.md").write_text(table(rows, reference, args))
    plot(rows, reference, args, args.output_dir / "guidance.png")
    print((args.output_dir / "table.md").read_text())


if __name__ == "__main__":
    main()
