"""Train on the embedded digits, load the result with plain diffusers, and look at it. `make demo` runs this.

Then one of the methods: the same network on the times [0, 0.6] alone, from a flow of the noisy digits at T = 0.6,
beside it on [0, 1], both with 5 evaluations. Writes into --output_dir: model/ (a stock `DDIMPipeline`), samples.png,
five_evaluations.png, loss_by_sigma.png and metrics.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers_ext import FlowBridge, short_time_pipeline
from diffusers_ext.data.batches import Images, first_images
from diffusers_ext.data.images import Transform
from diffusers_ext.data.sources import Digits
from diffusers_ext.extractors import make_extractor
from diffusers_ext.figures import agg_figure
from diffusers_ext.metrics import frechet_distance
from diffusers_ext.noise_levels import log_linear_sigmas
from diffusers_ext.reports.pictures import image_grid

ROOT = Path(__file__).resolve().parents[1]


T, EVALUATIONS = 0.6, 5


def choose_threads() -> None:
    """Use as many threads as cores are idle, one at least: threads that wait for a busy core make each other wait.
    OMP_NUM_THREADS, if it is set, is left as it is."""
    if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "getloadavg"):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = os.getloadavg()[0]
    threads = max(1, cores - round(busy))
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the training, too
    torch.set_num_threads(threads)
    print(f"{threads} of {cores} cores are used, {busy:.1f} are busy; OMP_NUM_THREADS chooses another number")


def five_evaluations(
    pipeline: DiffusionPipeline, images: Images, held_out: torch.Tensor, path: Path
) -> dict[str, float]:
    """Draw 5 evaluations of DDIM from N(0, I) at T = 1 and from a flow at T = 0.6 into a picture; return the Frechet
    distances of a small classifier's features."""
    bridge = FlowBridge.fit(images.images.split(500), pipeline.scheduler, T, max_steps=1000)
    pipelines = {"from N(0, I), T = 1": pipeline, f"from a flow, T = {T}": short_time_pipeline(pipeline, T, bridge)}
    extractor = make_extractor("classifier", device="cpu", train_images=images.images, train_labels=images.labels)
    real, distances, rows = extractor(held_out), {}, []
    for name, one in pipelines.items():
        generator = torch.Generator().manual_seed(0)
        options = {"batch_size": 500, "generator": generator, "output_type": "np"}
        samples = torch.from_numpy(one(num_inference_steps=EVALUATIONS, **options).images)
        distances[name] = round(frechet_distance(extractor(samples.movedim(3, 1) * 2 - 1), real), 2)
        rows.append(samples[:16])
    image_grid(torch.cat(rows).numpy(), 16, min_size=32).save(path)
    return distances


def train(folder: Path, arguments: list[str]) -> float:
    """Run the training script as a user would; returns the seconds it took."""
    start = time.monotonic()
    script = ROOT / "training" / "train_consistency.py"
    options = ["--preset", "digits", "--consistency_start", "0.5", "--overwrite_output_dir"]
    command = [sys.executable, str(script), *options, "--output_dir", str(folder), *arguments]
    subprocess.run(command, check=True)
    return time.monotonic() - start


def plot_losses(log: list[dict], path: Path) -> None:
    """Held-out denoising loss and training consistency loss by noise level."""
    validation = [r["validation"] for r in log if "validation" in r][-1]
    consistency = [r["by_sigma"]["consistency"] for r in log if "consistency" in r.get("by_sigma", {})]
    figure = agg_figure(10, 4)
    left, right = figure.subplots(1, 2)
    left.loglog(validation["sigmas"], validation["eps_mse"], "o-")
    left.set(xlabel="noise level sigma", ylabel="mean square error of eps")
    left.set_title(f"Denoising, {validation['measured_on']}")
    highest, *_, lowest = validation["sigmas"]
    edges = log_linear_sigmas(len(validation["sigmas"]) + 1, lowest, highest).flip(0)  # of the bins of the training
    middles = (edges[1:] * edges[:-1]).sqrt()
    by_bin = torch.tensor([[float("nan") if v is None else v for v in row] for row in consistency])
    if len(by_bin):
        right.plot(middles, by_bin.nanmean(0), "o-", color="tab:orange")
    right.set(xscale="log", xlabel="noise level sigma", ylabel="consistency loss", title="Consistency, training images")
    right.axhline(0, color="grey", linewidth=0.8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo"))
    parser.add_argument("--num_samples", type=int, default=500, help="samples for the Frechet distance")
    args, for_training = parser.parse_known_args()
    model = args.output_dir / "model"
    choose_threads()
    seconds = train(model, for_training)

    pipeline = DiffusionPipeline.from_pretrained(model)
    generator = torch.Generator().manual_seed(0)
    print(f"sampling {args.num_samples} digits with {type(pipeline).__name__}, 50 steps")
    n = args.num_samples
    samples = pipeline(batch_size=n, num_inference_steps=50, generator=generator, output_type="np").images
    image_grid(samples[:64]).save(args.output_dir / "samples.png")

    log = [json.loads(line) for line in (model / "logs" / "log.jsonl").read_text().splitlines()]
    plot_losses(log, args.output_dir / "loss_by_sigma.png")

    # Pixels as features: both sides in [0, 1]; the floor is the distance of as many training digits.
    held_out = first_images(Digits("test"), 500, Transform(16, 1)).images
    train_source = Digits("train")
    order = torch.randperm(len(train_source), generator=torch.Generator().manual_seed(0))[: args.num_samples]
    training = first_images(train_source, len(train_source), Transform(16, 1))
    real = training.images
    picture = args.output_dir / "five_evaluations.png"
    distances = five_evaluations(pipeline, training, held_out, picture)
    pixels = {
        "samples": torch.from_numpy(samples).flatten(1),
        "training_digits": real[order].flatten(1) / 2 + 0.5,
        "noise": torch.rand(args.num_samples, 256, generator=generator),
    }
    held_out = held_out.flatten(1) / 2 + 0.5
    metrics = {
        "training_seconds": round(seconds, 1),
        "training_images": [r["images"] for r in log if "images" in r][-1],
        "parameters": sum(p.numel() for p in pipeline.unet.parameters()),
        "frechet_distance_of_pixels_to_500_held_out_digits": {
            name: round(frechet_distance(x, held_out), 3) for name, x in pixels.items()
        },
        "frechet_distance_of_a_classifier_with_5_evaluations": distances,
        "held_out_loss_by_sigma": [r["validation"] for r in log if "validation" in r][-1],
    }
    (args.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics["frechet_distance_of_pixels_to_500_held_out_digits"], indent=2))
    above, below = distances.items()
    print(f"{picture}, distances of a classifier's features with {EVALUATIONS} evaluations, less is better:")
    print(f"  above, {above[0]}: {above[1]}\n  below, {below[0]}: {below[1]}")
    for name in ("model", "samples.png", "loss_by_sigma.png", "metrics.json"):
        print(f"wrote {args.output_dir / name}")


if __name__ == "__main__":
    main()
