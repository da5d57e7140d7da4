"""Does observation guidance help at few steps? A baseline, the baseline trained on, and the one fine-tuned with it.

    python benchmarks/observation_effect.py --output_dir observation-digits --preset digits --tuning_steps 400
    python benchmarks/observation_effect.py --output_dir observation-mnist --preset mnist --dataset_name $MNIST \
        --max_train_steps 1000 --tuning_steps 200 --train_batch_size 64

    baseline      train_consistency.py --consistency_weight 0
    trained on    the same, from the baseline, for the time of the tuned ones: `--tuning_steps` times `--time_ratio`
    <projection>  train_observation.py from the baseline for as many steps, with each of `--projections`; the last
                  pipeline (`--frechet_samples 0`), or with `--choose_best` the best on the run's own held-out images

The learning rate of fine-tuning goes from `--tuning_learning_rate` to 0. Frechet distance, precision and recall (k = 3)
of a small classifier's features to held-out images, the same noise for all; "real" is that of as many training images.
NFE counts evaluations of the network. Writes results.jsonl (what is there is not measured again), table.md and
quality.png.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from matplotlib import pyplot as plt
from torch import Tensor
from trained import Judge, draw, train

from diffusers_ext import ClassConditionalPipeline
from diffusers_ext.training import TrainingArguments, parse_arguments

# Scheduler, its settings, and the steps that make so many evaluations: PNDM without Runge-Kutta repeats the second
# step once, Heun takes two evaluations a step but for the last.
SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DDIM": (DDIMScheduler, {"timestep_spacing": "trailing"}),
    "DPMSolverMultistep": (DPMSolverMultistepScheduler, {"timestep_spacing": "trailing"}),
    "PNDM": (PNDMScheduler, {"timestep_spacing": "trailing", "skip_prk_steps": True}),
    "Heun": (HeunDiscreteScheduler, {"timestep_spacing": "trailing"}),
}
KEYS = ("model", "solver", "nfe")


def steps_for(solver: str, nfe: int) -> int:
    return {"PNDM": nfe - 1, "Heun": (nfe + 1) // 2}.get(solver, nfe)


def measure(images: Tensor, judge: Judge) -> dict[str, float]:
    precision, recall = judge.precision_recall(images)
    return {"distance": judge.distance(images), "precision": precision, "recall": recall}


def sample(pipeline: Any, solver: str, n: int, nfe: int) -> tuple[Tensor, int]:
    """Images, and how often the network was evaluated for each."""
    kind, settings = SOLVERS[solver]
    scheduler = kind.from_config(pipeline.scheduler.config, **settings)
    sampler = ClassConditionalPipeline(pipeline.unet, scheduler)
    sampler.set_progress_bar_config(disable=True)
    evaluated = 0

    def count(*_: Any) -> None:
        nonlocal evaluated
        evaluated += 1

    hook = pipeline.unet.register_forward_pre_hook(count)
    images = draw(sampler, n, steps_for(solver, nfe))
    hook.remove()
    return images, evaluated // -(-n // 100)


def table(rows: list[dict[str, Any]], nfe: list[int]) -> str:
    head = "| solver | model | " + " | ".join(f"NFE {n}" for n in nfe) + " |"
    lines = ["Frechet distance / precision / recall\n", head, "|---" * (2 + len(nfe)) + "|"]
    cells = {tuple(r[k] for k in KEYS): r for r in rows}
    for solver in dict.fromkeys(r["solver"] for r in rows if r["solver"]):
        for model in dict.fromkeys(r["model"] for r in rows if r["solver"] == solver):
            row = [cells[model, solver, n] for n in nfe]
            shown = " | ".join(f"{r['distance']:.2f} / {r['precision']:.2f} / {r['recall']:.2f}" for r in row)
            lines.append(f"| {solver} | {model} | {shown} |")
    real = cells["real", "", 0]
    lines.append(f"\nreal: {real['distance']:.2f} / {real['precision']:.2f} / {real['recall']:.2f}")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    solvers = list(dict.fromkeys(r["solver"] for r in rows if r["solver"]))
    figure, axes = plt.subplots(
        1, len(solvers), figsize=(4.5 * len(solvers), 4), sharey=True, layout="constrained", squeeze=False
    )
    for axis, solver in zip(axes[0], solvers, strict=True):
        chosen = [r for r in rows if r["solver"] == solver]
        for model in dict.fromkeys(r["model"] for r in chosen):
            line = sorted((r["nfe"], r["distance"]) for r in chosen if r["model"] == model)
            axis.plot(*zip(*line, strict=True), marker="o", label=model)
        levels = sorted({r["nfe"] for r in chosen})
        axis.set(title=solver, xlabel="evaluations of the network", xscale="log", yscale="log")
        axis.set_xticks(levels, [str(n) for n in levels])
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("Frechet distance of a classifier's features")
    axes[0][-1].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--tuning_steps", type=int, default=400)
    parser.add_argument("--tuning_learning_rate", type=float, default=2e-4)
    parser.add_argument("--tuning_lr_scheduler", default="cosine", help="constant_with_warmup: the end is noisy")
    parser.add_argument("--time_ratio", type=float, default=1.6, help="of a step; observation_cost.py measures it")
    parser.add_argument("--projections", nargs="+", default=["euler", "random"], choices=["euler", "heun", "random"])
    parser.add_argument("--choose_best", action="store_true")
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=list(SOLVERS))
    parser.add_argument("--num_samples", type=int, default=500)
    parser.add_argument(
        "--observation", nargs="*", default=[], help="NAME=VALUE: more arguments of train_observation.py"
    )
    args, for_training = parser.parse_known_args()
    for_training = ["--preset", args.preset, *for_training]
    out, device = args.output_dir, "cuda" if torch.cuda.is_available() else "cpu"

    train("train_consistency.py", out / "baseline", [*for_training, "--consistency_weight", "0"])
    tuning = [*for_training, "--pretrained_model_name_or_path", str(out / "baseline")]
    tuning += ["--lr_scheduler", args.tuning_lr_scheduler, "--learning_rate", str(args.tuning_learning_rate)]
    as_long = ["--consistency_weight", "0", "--max_train_steps", str(round(args.tuning_steps * args.time_ratio))]
    train("train_consistency.py", out / "trained-on", [*tuning, *as_long])
    tuning += ["--max_train_steps", str(args.tuning_steps)]
    own = [] if args.choose_best else ["--frechet_samples", "0"]
    own += [f"--{option}" for option in args.observation]
    for projection in args.projections:
        train("train_observation.py", out / projection, [*tuning, "--projection", projection, *own])

    models = {"baseline": out / "baseline", "trained on": out / "trained-on"}
    models |= {projection: out / projection for projection in args.projections}
    pipelines = {name: DiffusionPipeline.from_pretrained(folder).to(device) for name, folder in models.items()}
    config = pipelines["baseline"].unet.config
    judge = Judge(parse_arguments(TrainingArguments, for_training), config.sample_size, config.in_channels, device)

    file = out / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wanted(*key: Any) -> bool:
        return not any(tuple(row[k] for k in KEYS) == key for row in rows)

    def write(row: dict[str, Any]) -> None:
        rows.append(row)
        with file.open("a") as written:
            written.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    if wanted("real", "", 0):
        write({"model": "real", "solver": "", "nfe": 0} | measure(judge.seen[: args.num_samples], judge))
    for name, pipeline in pipelines.items():
        pipeline.unet.eval()
        for solver in args.solvers:
            for nfe in args.nfe:
                if wanted(name, solver, nfe):
                    images, evaluated = sample(pipeline, solver, args.num_samples, nfe)
                    key = {"model": name, "solver": solver, "nfe": nfe, "evaluated": evaluated}
                    write(key | measure(images, judge))
    (out / "table.md").write_text(table(rows, args.nfe))
    plot(rows, out / "quality.png")
    print(table(rows, args.nfe))


if __name__ == "__main__":
    main()
