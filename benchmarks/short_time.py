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
from itertools import product
from pathlib import Path
from typing import Any

from trained import Line, Row, Study, batches, bridge, load, pivot, plot, train

from diffusers_ext import (
    DiffusionTimeReport,
    FlowBridge,
    GaussianBridge,
    MixtureBridge,
    ShortTimePipeline,
    diffusion_time_report,
)
from diffusers_ext.evaluation import swap_scheduler
from diffusers_ext.evaluation.real_images import rows_of
from diffusers_ext.subjects import subject_of

NORMAL = "N(0, I)"
BRIDGES: dict[str, Any] = {"Gaussian": GaussianBridge, "mixture": MixtureBridge, "flow": FlowBridge}
STYLES = {NORMAL: ":", "Gaussian": "--", "mixture": "-.", "flow": "-"}
SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("ShortTimeDDIM", {}),
    "DPMSolverMultistep": ("ShortTimeDPMSolverMultistep", {}),
    "SDE": ("ShortTimeDPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
}


def table(rows: list[Row], nfe: list[int]) -> str:
    shown = [
        row | {"label": f"{row['start']}, trained on [0, T]" if row["model"] == "short" else row["start"]}
        | {"bound": "" if row["bits"] is None else f"{row['bits']:.3f}"}
        for row in rows
        if row["nfe"] in nfe
    ]  # fmt: skip
    names = {"T": "T", "start": "label", "solver": "solver", "bound, bits/dim": "bound"}
    return pivot(shown, names, "nfe", "NFE", lambda row: f"{row['distance']:.2f}")


def picture(rows: list[Row], file: Path) -> None:
    """A panel for each solver, a line for each T and start."""
    panels = []
    levels, times = sorted({r["nfe"] for r in rows}), sorted({r["T"] for r in rows}, reverse=True)
    for solver in dict.fromkeys(r["solver"] for r in rows):
        lines: dict[str, Line] = {}
        for i, T in enumerate(times):
            chosen = [r for r in rows if (r["solver"], r["model"], r["T"]) == (solver, "full", T)]
            for start in dict.fromkeys(r["start"] for r in chosen):
                x, y = zip(*sorted((r["nfe"], r["distance"]) for r in chosen if r["start"] == start), strict=True)
                style = {"linestyle": STYLES[start], "color": f"C{i}", "lw": 2.5 if T == 1 else 1.2}
                lines[f"{T}, {start}"] = (x, y, style | {"marker": "o", "ms": 3})
        settings = {"title": solver, "xlabel": "evaluations of the network", "yscale": "log"}
        ticks = {"xticks": levels, "xticklabels": [str(n) for n in levels]}
        panels.append((settings | {"ylabel": "Frechet distance of a classifier's features"} | ticks, lines))
    plot(panels, len(panels), file)


def bounds(study: Study, pipeline: Any, bridges: dict[str, dict[float, Any]], times: list[float], n: int) -> Any:
    """The report of the likelihood bound of n held-out images, which is saved, drawn and printed."""
    subject, starts = subject_of(pipeline), {name: list(by_time.values()) for name, by_time in bridges.items()}
    held_out = list(batches(subject, rows_of(study.real.reference, 0, n)))
    report: DiffusionTimeReport = diffusion_time_report(
        subject.network, pipeline.scheduler, held_out, starts, times, levels=256
    )
    report.save(study.folder / "diffusion_time.json")
    report.plot(study.folder / "diffusion_time.png")
    print(report.table())
    return report


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
    for_training, out = ["--preset", args.preset, *for_training], args.output_dir
    full = load(train("train_consistency.py", out / "full", [*for_training, "--consistency_weight", "0"]))
    short_options = ["--max_diffusion_time", str(args.trained_time), "--bridge", "gaussian"]
    short = load(train("train_short_time.py", out / "short", [*for_training, *short_options]))
    study = Study(out, full, for_training, args.num_samples)
    print(f"real: {study.distance(study.real.floor):.2f}")

    images = study.real.training.images
    bridges = {
        name: {T: bridge(kind, out / f"bridge-{name}-{T}", images, full.scheduler, T) for T in args.times if T < 1}
        for name, kind in BRIDGES.items()
    }
    report = bounds(study, full, bridges, args.times, args.report_samples)
    for model, T in [*(("full", T) for T in args.times), ("short", args.trained_time)]:
        network = subject_of(full if model == "full" else short).network
        for start, solver in product((NORMAL, *(BRIDGES if T < 1 else ())), args.solvers):
            bits = report.terms(T, start).bits_per_dim.mean if model == "full" else None
            name, settings = SOLVERS[solver]
            settings = {"max_diffusion_time": T, "timestep_spacing": "trailing", **settings}
            scheduler = swap_scheduler(full, name, **settings)
            pipeline = ShortTimePipeline(network, scheduler, None if start == NORMAL else bridges[start][T])
            pipeline.set_progress_bar_config(disable=True)
            for steps in args.nfe:
                drawing = study.draw(pipeline, scheduler, steps)
                key = {"model": model, "T": T, "start": start, "solver": solver, "nfe": steps}
                measured = {"seconds": drawing.counted(study.drawn).seconds, "distance": study.distance(drawing)}
                study.add(key, bits=bits, **measured)
    study.report(table(study.rows, args.nfe))
    picture(study.rows, out / "quality.png")


if __name__ == "__main__":
    main()
