"""Short diffusion times: quality by T, start, solver and number of steps, and the likelihood bound by T.

    python benchmarks/short_time.py --output_dir short-digits --preset digits
    python benchmarks/short_time.py --output_dir short-mnist --preset mnist --dataset_name $MNIST \
        --max_train_steps 1000 --train_batch_size 64

One model of all times, sampled on [0, T] from N(0, I) and from each bridge, fitted to the training images; and a model
trained on [0, T] alone for as many steps (T = `--trained_time`). Frechet distance of a small classifier's features to
held-out images, the same noise for all; "real" is that of as many training images. Seconds for an image, drawing the
start included, are those of the machine at that moment: compare within a column of one run only. Writes results.jsonl,
table.md, diffusion_time.json and two pictures.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from matplotlib import pyplot as plt
from trained import Judge, draw, train

from diffusers_ext import (
    FlowBridge,
    GaussianBridge,
    MixtureBridge,
    ShortTimeDDIMScheduler,
    ShortTimeDPMSolverMultistepScheduler,
    ShortTimePipeline,
    diffusion_time_report,
)
from diffusers_ext.commands import parse_arguments
from diffusers_ext.training import TrainingArguments

NORMAL = "N(0, I)"
BRIDGES: dict[str, Any] = {"Gaussian": GaussianBridge, "mixture": MixtureBridge, "flow": FlowBridge}
SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DDIM": (ShortTimeDDIMScheduler, {"timestep_spacing": "trailing"}),
    "DPMSolverMultistep": (ShortTimeDPMSolverMultistepScheduler, {"timestep_spacing": "trailing"}),
    "SDE": (
        ShortTimeDPMSolverMultistepScheduler,
        {"timestep_spacing": "trailing", "algorithm_type": "sde-dpmsolver++", "solver_order": 1},
    ),
}


def measure(pipeline: Any, judge: Judge, n: int, steps: int) -> dict[str, float]:
    start = time.perf_counter()
    images = draw(pipeline, n, steps)
    return {"seconds": (time.perf_counter() - start) / n, "distance": judge.distance(images)}


def table(rows: list[dict[str, Any]], nfe: list[int]) -> str:
    head = "| T | start | solver | bound, bits/dim | " + " | ".join(f"NFE {n}" for n in nfe) + " |"
    lines = [head, "|---" * (4 + len(nfe)) + "|"]
    cells = {(r["model"], r["T"], r["start"], r["solver"], r["nfe"]): r for r in rows}
    for model, T, start, solver in dict.fromkeys(key[:4] for key in cells):
        row = [cells.get((model, T, start, solver, n), {}) for n in nfe]
        bound = next((f"{r['bits']:.3f}" for r in row if r.get("bits") is not None), "")
        label = f"{start}, trained on [0, T]" if model == "short" else start
        distances = " | ".join(f"{r['distance']:.2f}" if r else "" for r in row)
        lines.append(f"| {T} | {label} | {solver} | {bound} | {distances} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    solvers = list(dict.fromkeys(r["solver"] for r in rows))
    figure, axes = plt.subplots(1, len(solvers), figsize=(5.5 * len(solvers), 4.5), sharey=True, layout="constrained")
    for axis, solver in zip(axes, solvers, strict=True):
        chosen = [r for r in rows if r["solver"] == solver and r["model"] == "full"]
        for i, T in enumerate(sorted({r["T"] for r in rows}, reverse=True)):
            for start in dict.fromkeys(r["start"] for r in chosen if r["T"] == T):
                line = sorted((r["nfe"], r["distance"]) for r in chosen if (r["T"], r["start"]) == (T, start))
                style = {NORMAL: ":", "Gaussian": "--", "mixture": "-.", "flow": "-"}[start]
                width = 2.5 if T == 1 else 1.2
                axis.plot(
                    *zip(*line, strict=True), style, color=f"C{i}", lw=width, marker="o", ms=3, label=f"{T}, {start}"
                )
        axis.set(title=solver, xlabel="evaluations of the network", xscale="log", yscale="log")
        axis.set_xticks(levels := sorted({r["nfe"] for r in chosen}), [str(n) for n in levels])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("Frechet distance of a classifier's features")
    figure.legend(*axes[0].get_legend_handles_labels(), title="T, start", fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--times", type=float, nargs="+", default=[1.0, 0.8, 0.6, 0.4, 0.2])
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=list(SOLVERS))
    parser.add_argument("--trained_time", type=float, default=0.6)
    parser.add_argument("--num_samples", type=int, default=500)
    parser.add_argument("--report_samples", type=int, default=200)
    args, for_training = parser.parse_known_args()
    for_training = ["--preset", args.preset, *for_training]
    out, device = args.output_dir, "cuda" if torch.cuda.is_available() else "cpu"
    train("train_consistency.py", out / "full", [*for_training, "--consistency_weight", "0"])
    short_options = ["--max_diffusion_time", str(args.trained_time), "--bridge", "gaussian"]
    train("train_short_time.py", out / "short", [*for_training, *short_options])

    full = DiffusionPipeline.from_pretrained(out / "full").to(device)
    unet, config = full.unet.eval(), full.scheduler.config
    judge = Judge(
        parse_arguments(TrainingArguments, for_training), unet.config.sample_size, unet.config.in_channels, device
    )
    n = args.num_samples
    print(f"real: {judge.distance(judge.seen[:n]):.2f}")

    bridges: dict[str, dict[float, Any]] = {name: {} for name in BRIDGES}
    for T in (T for T in args.times if T < 1):
        for name, kind in BRIDGES.items():
            folder = out / f"bridge-{name}-{T}"
            if not (folder / "config.json").exists():
                fitted = kind.fit(judge.seen.split(500), full.scheduler, T, progress=False)
                fitted.save_pretrained(folder)
            bridges[name][T] = kind.from_pretrained(folder).to(device)
    held_out = [(x, {}) for x in judge.held_out[: args.report_samples].split(50)]
    starts = {name: list(by_time.values()) for name, by_time in bridges.items()}
    report = diffusion_time_report(unet, full.scheduler, held_out, starts, args.times, levels=256)
    report.save(out / "diffusion_time.json")
    report.plot(out / "diffusion_time.png")
    print(report.table())

    file = out / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    models = [("full", unet, T) for T in args.times]
    trained = DiffusionPipeline.from_pretrained(out / "short").unet.to(device).eval()
    models.append(("short", trained, args.trained_time))
    for model, network, T in models:
        for start in (NORMAL, *(BRIDGES if T < 1 else ())):
            bits = report.terms(T, start).bits_per_dim.mean if model == "full" else None
            for solver in args.solvers:
                kind, settings = SOLVERS[solver]
                scheduler = kind.from_config(config, max_diffusion_time=T, **settings)
                pipeline = ShortTimePipeline(network, scheduler, None if start == NORMAL else bridges[start][T])
                pipeline.set_progress_bar_config(disable=True)
                for steps in args.nfe:
                    key = {"model": model, "T": T, "start": start, "solver": solver, "nfe": steps}
                    if not any(key.items() <= row.items() for row in rows):
                        rows.append(key | {"bits": bits} | measure(pipeline, judge, n, steps))
                        with file.open("a") as written:
                            written.write(json.dumps(rows[-1]) + "\n")
                        print(json.dumps(rows[-1]), flush=True)
    (out / "table.md").write_text(table(rows, args.nfe))
    plot(rows, out / "quality.png")
    print(table(rows, args.nfe))


if __name__ == "__main__":
    main()
