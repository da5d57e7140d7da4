"""Guidance of a reflected model against an ordinary one that clamps, clips or thresholds: quality, saturation, class.

    python benchmarks/reflected_guidance.py --preset digits --output_dir guidance-digits
    python benchmarks/reflected_guidance.py --preset mnist --output_dir guidance-mnist --dataset_name $MNIST

Both models have the preset's network, data and number of steps; they are trained by the project's scripts into
output_dir, and what is there is not trained, or sampled, again. Varied are the guidance scale (--scales) at
--base_steps, and the number of steps (--steps) at --base_scale. For each cell, over the same classes in turn:

    distance     Frechet distance to held-out images, of the features of a small classifier trained on the spot
    accuracy     share of samples that the classifier gives the class that was asked for
    saturated    share of pixels that are 0 or 255, beside that of held-out images, which may have many by right
    outside      share of pixels out of [-1, 1], by more than half a grey level, before the last clamp

Writes results.jsonl, table.md, guidance.png and grids of samples.
"""

import argparse
import functools
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from trained import Line, Row, Study, load, pivot, plot, train

from diffusers_ext import ReflectedScheduler
from diffusers_ext.evaluation import swap_scheduler
from diffusers_ext.reports.pictures import image_grid

Method = tuple[str, Callable[[DiffusionPipeline], Any]]
"""The name of a model, and what makes a scheduler for it."""
MEASURES = ("distance", "accuracy", "saturated")


def clamped(scheduler: Any) -> Any:
    """The scheduler, with x_t clamped to [-1, 1] after every step."""
    kind = type(scheduler)

    @functools.wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = kind.step(self, *args, **kwargs)
        output[0].clamp_(-1, 1)
        return output

    scheduler.__class__ = type(f"Clamped{kind.__name__}", (kind,), {"step": step})
    return scheduler


def ordinary(name: str, clamp: bool = False, **settings: Any) -> Method:
    settings = {"clip_sample": False, "timestep_spacing": "trailing"} | settings

    def make(pipeline: DiffusionPipeline) -> Any:
        scheduler = swap_scheduler(pipeline, name, **settings)
        return clamped(scheduler) if clamp else scheduler

    return "ordinary", make


def reflected(algorithm_type: str) -> Method:
    return "reflected", lambda pipeline: swap_scheduler(pipeline, "own", algorithm_type=algorithm_type)


def in_the_box(**settings: Any) -> Method:
    """An ordinary model, drawn by the reflected sampler."""
    return "ordinary", lambda pipeline: ReflectedScheduler.from_config(pipeline.scheduler.config, **settings)


# Dynamic thresholding as in Imagen (Saharia et al., 2022, arXiv 2205.11487): x0 is divided by its 99.5% quantile.
_DYNAMIC = {"thresholding": True, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1e6}
TREATMENTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "x_t clamped": {"clamp": True},
    "x0 clipped": {"clip_sample": True},
    "dynamic thresholding": _DYNAMIC,
}
METHODS: dict[str, Method] = {
    "reflected sde": reflected("sde"),
    "reflected ode": reflected("ode"),
    "reflected heun, half the steps": reflected("heun"),
    **{
        f"{name}, {treatment}": ordinary(name, **settings)
        for name, (treatment, settings) in product(("DDPM", "DDIM"), TREATMENTS.items())
    },
    "ordinary model, ReflectedScheduler": in_the_box(),
    "ordinary model, ReflectedScheduler, x clamped": in_the_box(boundary="project"),
}


def measure(study: Study, images: Tensor, labels: Tensor) -> dict[str, float]:
    """What is measured of images (n, C, H, W) in [-1, 1] of 8 bits, beside their distance."""
    device = next(study.classifier.parameters()).device
    found = torch.cat([study.classifier(part.to(device)).argmax(1).cpu() for part in images.split(500)])
    return {
        "accuracy": (found == labels).float().mean().item(),
        "saturated": (images.abs() > 1 - 1 / 255).float().mean().item(),
    }


def texts(row: Row) -> str:
    return " / ".join(f"{row[name]:.2f}" for name in MEASURES)


def table(rows: list[Row], reference: Row, views: dict[str, tuple[Row, list[float]]]) -> str:
    lines = [f"Real training images: {texts(reference)} (saturated: of the held-out ones)"]
    for axis, (fixed, values) in views.items():
        chosen = [row for row in rows if fixed.items() <= row.items() and row[axis] in values]
        title = f"{', '.join(f'{k} {v:g}' for k, v in fixed.items())}; {' / '.join(MEASURES)}"
        lines += ["", pivot(chosen, {title: "method"}, axis, axis, texts)]
    return "\n".join(lines)


def picture(rows: list[Row], reference: Row, views: dict[str, tuple[Row, list[float]]], file: Path) -> None:
    panels = []
    for (axis, (fixed, _)), name in product(views.items(), MEASURES):
        lines: dict[str, Line] = {}
        for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            chosen = sorted((r[axis], r[name]) for r in rows if r["method"] == method and fixed.items() <= r.items())
            style, marker = ("-", "o") if "reflected" in method else ("--", "s") if "DDPM" in method else (":", "^")
            options = {"linestyle": style, "marker": marker, "color": f"C{i % 10}"}
            lines[method] = ([x for x, _ in chosen], [y for _, y in chosen], options)
        ends = [min(r[axis] for r in rows), max(r[axis] for r in rows)]
        lines["real images"] = (ends, [reference[name]] * 2, {"color": "grey", "lw": 0.8})
        settings = {"xlabel": "guidance scale" if axis == "scale" else "steps", "ylabel": name}
        settings |= {"yscale": "log" if name == "distance" else "linear"}
        panels.append((settings | {"title": ", ".join(f"{k} {v:g}" for k, v in fixed.items())}, lines))
    plot(panels, len(MEASURES), file, "Guidance, reflected and ordinary")


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
    for_training, out = ["--preset", args.preset, *for_training], args.output_dir
    common = [*for_training, "--class_conditional", "--label_drop", "0.2"]
    plain = ["--consistency_weight", "0"]
    pipelines = {
        "reflected": load(train("train_reflected.py", out / "reflected", common)),
        "ordinary": load(train("train_consistency.py", out / "ordinary", [*common, *plain])),
    }
    study = Study(out, pipelines["reflected"], for_training, args.num_samples)
    held_out, classes = study.real.reference, range(int(study.real.training.labels.max()) + 1)
    reference = {"distance": study.distance(study.real.floor), **measure(study, held_out.images, held_out.labels)}

    labels = torch.tensor([i % len(classes) for i in range(args.num_samples)])
    cells = dict.fromkeys([(s, args.base_steps) for s in args.scales] + [(args.base_scale, n) for n in args.steps])
    (out / "grids").mkdir(exist_ok=True)
    for (method, (model, make)), (scale, steps) in product(METHODS.items(), cells):
        if args.methods in method:
            options = {"labels": classes, "guidance_scale": scale}
            scheduler = make(pipelines[model])
            drawing = study.draw(pipelines[model], scheduler, steps // 2 if "half" in method else steps, **options)
            images = torch.cat(list(drawing.images(study.drawn))).float() / 127.5 - 1
            key = {"method": method, "scale": scale, "steps": steps, "num_samples": args.num_samples}
            outside = drawing.counted(study.drawn).out_of_range
            study.add(key, distance=study.distance(drawing), **measure(study, images, labels), outside=outside)
            name = f"{method}-scale{scale:g}-steps{steps}".replace(" ", "_").replace(",", "")
            grid = (images[:40] / 2 + 0.5).permute(0, 2, 3, 1).numpy()
            image_grid(grid, columns=10, min_size=32).save(out / "grids" / f"{name}.png")

    views = {"scale": ({"steps": args.base_steps}, args.scales), "steps": ({"scale": args.base_scale}, args.steps)}
    rows = [row for row in study.rows if row["num_samples"] == args.num_samples]
    study.report(table(rows, reference, views))
    picture(rows, reference, views, out / "guidance.png")


if __name__ == "__main__":
    main()
