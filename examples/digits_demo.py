"""Train on the embedded digits, load the result with plain diffusers, and look at it. `make demo` runs this.

Writes into --output_dir: model/ (a stock `DDIMPipeline`), samples.png, loss_by_sigma.png and metrics.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.data.batches import first_images
from diffusers_ext.data.images import Transform
from diffusers_ext.data.sources import Digits
from diffusers_ext.figures import agg_figure
from diffusers_ext.metrics import frechet_distance
from diffusers_ext.reports.pictures import image_grid

ROOT = Path(__file__).resolve().parents[1]


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
    sigmas = validation["sigmas"][::-1]
    by_bin = torch.tensor([[float("nan") if v is None else v for v in row] for row in consistency])
    if len(by_bin):
        right.plot(sigmas, by_bin.nanmean(0), "o-", color="tab:orange")
    right.set(xscale="log", xlabel="noise level sigma", ylabel="consistency loss", title="Consistency, training images")
    right.axhline(0, color="grey", linewidth=0.8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo"))
    parser.add_argument("--num_samples", type=int, default=500, help="samples for the Frechet distance")
    args, for_training = parser.parse_known_args()
    model = args.output_dir / "model"
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
    real = first_images(train_source, len(train_source), Transform(16, 1)).images
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
        "held_out_loss_by_sigma": [r["validation"] for r in log if "validation" in r][-1],
    }
    (args.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics["frechet_distance_of_pixels_to_500_held_out_digits"], indent=2))
    for name in ("model", "samples.png", "loss_by_sigma.png", "metrics.json"):
        print(f"wrote {args.output_dir / name}")


if __name__ == "__main__":
    main()
