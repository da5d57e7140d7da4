"""Short diffusion times: quality by T, start, solver and number of steps, and the likelihood bound by T.

    python benchmarks/short_time.py --output_dir short-digits --preset digits
    python benchmarks/short_time.py --output_dir short-mnist --preset mnist --dataset_name $MNIST \
        --max_train_steps 1000 --train_batch_size 64

One model of all times, sampled on [0, T] from N(0, I) and from each bridge, fitted to the training images; and a model
trained on [0, T] alone for as many steps (T = `--trained_time`). Frechet distance of a small classifier's features to
held-out images, the same noise for all; "real images" are as many training images. Seconds for an image, drawing the
start included, are those of the machine at that moment: compare within a column of one run only. What a draw of a
bridge costs is printed in evaluations of the network. Writes the evaluation (index.html, table.md, results.json ...),
diffusion_time.json and its picture; what is there is not drawn again.
"""

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from bench import DEVICE, flags, in_turn, ratio
from trained import batches, held_out_images, kept, load, train

from diffusers_ext import FlowBridge, GaussianBridge, MixtureBridge, ShortTimePipeline, diffusion_time_report
from diffusers_ext.evaluation import evaluate, markdown_table, swap_scheduler, write_report
from diffusers_ext.reports.card import table

BRIDGES: dict[str, Any] = {"Gaussian": GaussianBridge, "mixture": MixtureBridge, "flow": FlowBridge}
MULTISTEP = "DPMSolverMultistep:timestep_spacing=trailing"
SOLVERS = {
    "DDIM": "DDIM:timestep_spacing=trailing",
    "DPMSolverMultistep": MULTISTEP,
    "SDE": f"{MULTISTEP}:algorithm_type=sde-dpmsolver++:solver_order=1",
}


@torch.no_grad()
def cost_of_a_draw(bridge: Any, network: Any, n: int) -> tuple[list[float], list[float]]:
    """Seconds of a draw of n starts, in each of several rounds, and of an evaluation of the network for as many."""
    x, time = torch.zeros(n, *bridge.config.shape, device=DEVICE), torch.zeros(n, device=DEVICE)
    times = in_turn({"draw": partial(bridge.to(DEVICE).sample, n), "network": partial(network, x, time)}, 5)
    return times["draw"], times["network"]


def main() -> None:
    args, for_training = flags(
        __doc__, rest=True, choices={"solvers": SOLVERS}, output_dir=Path, preset="digits",
        times=[1.0, 0.8, 0.6, 0.4, 0.2], nfe=[5, 10, 20, 50], solvers=list(SOLVERS), trained_time=0.6, num_samples=500,
        report_samples=200,
    )  # fmt: skip
    for_training, out = ["--preset", args.preset, *for_training], args.output_dir
    full = load(train("train_consistency.py", out / "full", [*for_training, "--consistency_weight", "0"]))
    short_options = ["--max_diffusion_time", str(args.trained_time), "--bridge", "gaussian"]
    short = load(train("train_short_time.py", out / "short", [*for_training, *short_options]))
    real, scheduler = held_out_images(for_training, full, args.num_samples), full.pipeline.scheduler
    images, bridges = real.training.images.split(500), {}
    for (name, kind), T in product(BRIDGES.items(), {*args.times, args.trained_time} - {1.0}):
        bridges[name, T] = kept(kind, out / f"bridge-{name}-{T}", partial(kind.fit, images, scheduler, T))
    starts = {name: [bridges[name, T] for T in args.times if T < 1] for name in BRIDGES}
    held_out = batches(full, real.reference, args.report_samples)
    costs = [
        [f"{n}, T = {T:g}", *(ratio(*cost_of_a_draw(b, full.network, k)) for k in (1, 64))]
        for (n, T), b in bridges.items()
    ]
    print(table(["a draw, in evaluations of the network", "1 image", "64 images"], costs))
    report = diffusion_time_report(full.network, scheduler, held_out, starts, args.times, levels=256)
    report.save(out / "diffusion_time.json")
    report.plot(out / "diffusion_time.png")
    print(report.table())

    models, last = {}, (short.network, args.trained_time, ", trained on [0, T]")
    for network, T, how in [*((full.network, T, "") for T in args.times), last]:
        own = swap_scheduler(full.pipeline, "ShortTimeDDIM", max_diffusion_time=T)
        for start in ("N(0, I)", *(BRIDGES if T < 1 else ())):
            models[f"T = {T:g}, {start}{how}"] = ShortTimePipeline(network, own, bridges.get((start, T)))
    options = {"nfe": args.nfe, "num_samples": args.num_samples, "batch_size": 100, "extractor": "classifier"}
    schedulers = [SOLVERS[name] for name in args.solvers]
    evaluation = evaluate(models, real, out, schedulers=schedulers, likelihood=None, **options)
    write_report(evaluation, out)
    print(markdown_table(evaluation))


if __name__ == "__main__":
    main()
