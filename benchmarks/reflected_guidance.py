"""Guidance of a reflected model against an ordinary one that clamps, clips or thresholds: quality, saturation, class.

    python benchmarks/reflected_guidance.py --preset digits --output_dir guidance-digits
    python benchmarks/reflected_guidance.py --preset mnist --output_dir guidance-mnist --dataset_name $MNIST

Both models have the preset's network, data and number of steps; they are trained by the project's scripts into
output_dir, and what is there is not trained, or sampled, again. Varied are the guidance scale (--scales) at
--base_steps, and the number of steps (--steps) at --base_scale. For each cell, over the same classes in turn:

    distance     Frechet distance to held-out images, of the features of a small classifier trained on the spot,
                 without its bias
    accuracy     share of samples that the classifier gives the class that was asked for
    saturated    share of pixels that are 0 or 255, beside that of held-out images, which may have many by right
    outside      share of pixels out of [-1, 1], by more than half a grey level, before the last clamp

`--methods` are those with this in their name. Writes results.jsonl, table.md and guidance.png.
"""

import functools
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
from bench import DEVICE, flags
from diffusers import DiffusionPipeline
from torch import Tensor
from trained import held_out_images, load, train

from diffusers_ext import ReflectedScheduler
from diffusers_ext.evaluation import Drawing, Judge, swap_scheduler
from diffusers_ext.extractors import Classifier, Extractor, train_classifier
from diffusers_ext.figures import agg_figure
from diffusers_ext.reports.card import table

Row = dict[str, Any]
MEASURES = ("distance", "accuracy", "saturated")


def scheduler_for(
    pipeline: DiffusionPipeline, name: str, clamp: bool = False, consistent: bool = False, **settings: Any
) -> Any:
    """A scheduler by its name; with `clamp` one that clamps x_t to [-1, 1] after every step, with `consistent` one that
    derives eps from the clipped x0, which DDIM does with `use_clipped_model_output` alone."""
    if name == "Reflected":  # which swap_scheduler refuses to an ordinary model
        return ReflectedScheduler.from_config(pipeline.scheduler.config, **settings)
    scheduler = swap_scheduler(pipeline, name, **settings)
    if clamp or consistent:
        kind, flag = type(scheduler), {"use_clipped_model_output": True} if consistent else {}

        @functools.wraps(kind.step)
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = kind.step(self, *args, **kwargs | flag)
            if clamp:
                output[0].clamp_(-1, 1)
            return output

        scheduler.__class__ = type(f"{'Clamped' if clamp else 'Consistent'}{kind.__name__}", (kind,), {"step": step})
    return scheduler


TREATMENTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "x_t clamped": {"clamp": True},
    "x0 clipped": {"clip_sample": True},
    # As in Imagen (Saharia et al., 2022, arXiv 2205.11487): x0 is divided by its 99.5% quantile.
    "dynamic thresholding": {"thresholding": True, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1e6},
}
ORDINARY = {"clip_sample": False, "timestep_spacing": "trailing"}
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {  # a model, a scheduler and its settings
    "reflected sde": ("reflected", "own", {"algorithm_type": "sde"}),
    "reflected ode": ("reflected", "own", {"algorithm_type": "ode"}),
    "reflected heun, half the steps": ("reflected", "own", {"algorithm_type": "heun"}),
    **{
        f"{name}, {treatment}": ("ordinary", name, ORDINARY | settings)
        for name, (treatment, settings) in product(("DDPM", "DDIM"), TREATMENTS.items())
    },
    **{
        f"DDIM, {treatment}, eps from it": ("ordinary", "DDIM", ORDINARY | TREATMENTS[treatment] | {"consistent": True})
        for treatment in ("x0 clipped", "dynamic thresholding")
    },
    "ordinary model, ReflectedScheduler": ("ordinary", "Reflected", {}),
    "ordinary model, ReflectedScheduler, x clamped": ("ordinary", "Reflected", {"boundary": "project"}),
}


def shares(classifier: Classifier, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy and saturation of images (n, C, H, W) in [-1, 1] of 8 bits."""
    found = torch.cat([classifier(part.to(DEVICE)).argmax(1).cpu() for part in images.split(500)])
    saturated = (images.abs() > 1 - 1 / 255).float().mean().item()
    return {"accuracy": (found == labels).float().mean().item(), "saturated": saturated}


def report(rows: list[Row], reference: Row, views: dict[str, Row], out: Path) -> None:
    """A table and a line of panels for each of the settings that vary."""
    figure, parts = agg_figure(18, 8), []
    for axes, (axis, fixed) in zip(figure.subplots(2, 3), views.items(), strict=True):
        chosen = sorted((row for row in rows if fixed.items() <= row.items()), key=lambda row: row[axis])
        found = {row["method"]: [r for r in chosen if r["method"] == row["method"]] for row in rows}
        values, title = sorted({row[axis] for row in chosen}), ", ".join(f"{k} {v:g}" for k, v in fixed.items())
        found["real images (saturated: held-out ones)"] = [reference | {axis: value} for value in values]
        body = [[m, *(" / ".join(f"{r[name]:.2f}" for name in MEASURES) for r in line)] for m, line in found.items()]
        parts.append(table([f"{title}; {' / '.join(MEASURES)}", *(f"{axis} {value:g}" for value in values)], body))
        for ax, name in zip(axes, MEASURES, strict=True):
            for i, (m, line) in enumerate(found.items()):
                style = "-" if "real" in m else "o-" if "reflected" in m else "s--" if "DDPM" in m else "^:"
                ax.plot([r[axis] for r in line], [r[name] for r in line], style, color=f"C{i % 10}", label=m)
            ax.set(xscale="log", xlabel=axis, ylabel=name, title=title)
        axes[0].set_yscale("symlog", linthresh=1)  # without its bias a distance may be below 0
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(out / "guidance.png", dpi=100)
    (out / "table.md").write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))


def main() -> None:
    args, for_training = flags(
        __doc__, rest=True, preset="digits", output_dir=Path, num_samples=500, scales=[1.0, 2.0, 4.0, 8.0, 16.0],
        steps=[10, 20, 50, 200], base_scale=4.0, base_steps=20, methods="",
    )  # fmt: skip
    for_training, out, n = ["--preset", args.preset, *for_training], args.output_dir, args.num_samples
    common = [*for_training, "--class_conditional", "--label_drop", "0.2"]
    models = {"reflected": load(train("train_reflected.py", out / "reflected", common))}
    common += ["--consistency_weight", "0"]
    models["ordinary"] = load(train("train_consistency.py", out / "ordinary", common))
    real = held_out_images(for_training, models["reflected"], n)
    classes = range(int(real.training.labels.max()) + 1)
    classifier = train_classifier(real.training.images.to(DEVICE), real.training.labels.to(DEVICE), len(classes))
    extractor = Extractor("a small classifier", classifier.features, DEVICE, batch_size=500)
    judge = Judge(real, extractor, n)
    reference = {"distance": judge.floor.frechet.estimate}
    reference |= shares(classifier, real.reference.images, real.reference.labels)

    labels, drawn, rows = torch.tensor([i % len(classes) for i in range(n)]), out / "drawn", []
    cells = dict.fromkeys([(s, args.base_steps) for s in args.scales] + [(args.base_scale, k) for k in args.steps])
    methods = [name for name in METHODS if args.methods in name]
    for method, (scale, steps) in product(methods, cells):
        model, name, settings = METHODS[method]
        pipeline = models[model].pipeline
        scheduler = scheduler_for(pipeline, name, **settings)
        count = steps // 2 if "half" in method else steps
        options = {"batch_size": 100, "labels": classes, "guidance_scale": scale}
        drawing = Drawing.of(pipeline, scheduler, count, n, **options)
        drawing.draw(drawn)
        images = torch.cat(list(drawing.images(drawn))).float() / 127.5 - 1
        distance, low, high = judge.quality(drawing.features(drawn, extractor)).frechet
        row = {"method": method, "scale": scale, "steps": steps, "num_samples": n, "distance": distance}
        row |= {"low": low, "high": high}
        rows.append(row | shares(classifier, images, labels) | {"outside": drawing.counted(drawn).out_of_range})
        print(json.dumps(rows[-1]), flush=True)
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report(rows, reference, {"scale": {"steps": args.base_steps}, "steps": {"scale": args.base_scale}}, out)


if __name__ == "__main__":
    main()
