"""Bits per dimension of held-out images under a pixel model, Gaussian or reflected: the bound, and perhaps the ODE.

    python benchmarks/bits_per_dim.py --model reflected-digits --preset digits
    python benchmarks/bits_per_dim.py --model reflected-digits --preset digits --ode 20

Images of 256 levels on [-1, 1] are dequantised uniformly; what is measured is the density at the model's sigma_min. The
unconditional bound of a class-conditional model is that of the null class; with --labels the labels are given.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

import diffusers_ext  # noqa: F401
from diffusers_ext import (
    ReflectedModel,
    bits_per_dim,
    boundary_flux,
    dequantize,
    elbo,
    log_likelihood,
    noise_schedule,
    score_model_from,
)
from diffusers_ext.commands import parse_arguments
from diffusers_ext.data.batches import first_images
from diffusers_ext.data.images import Transform
from diffusers_ext.data.sources import load_images, load_validation_images
from diffusers_ext.subjects import subject_of
from diffusers_ext.training import TrainingArguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--evaluations", type=int, default=32, help="of the network, for each image's bound")
    parser.add_argument("--ode", type=int, default=0, help="so many images also by the probability flow")
    parser.add_argument("--labels", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args, for_data = parser.parse_known_args()

    pipeline = DiffusionPipeline.from_pretrained(args.model).to(args.device)
    network, schedule = pipeline.unet.eval().requires_grad_(False), noise_schedule(pipeline.scheduler)
    model = score_model_from(network, pipeline.scheduler)
    data = parse_arguments(TrainingArguments, for_data)
    source = load_validation_images(data) or load_images(data, data.train_split)
    held_out = first_images(source, len(source), Transform(network.config.sample_size, network.config.in_channels))
    chosen = torch.randperm(len(held_out.images), generator=torch.Generator().manual_seed(0))[: args.num_images]
    x = dequantize(held_out.images[chosen], torch.Generator().manual_seed(0)).to(args.device)
    told = {}
    if subject_of(pipeline).num_classes is not None:
        null_class = subject_of(pipeline).null_class
        labels = held_out.labels[chosen] if args.labels else torch.full((len(x),), null_class)
        told = {"class_labels": labels.to(args.device)}

    sigma_min, sigma_max = schedule.sigma_min, schedule.sigma_max
    generator = torch.Generator().manual_seed(1)

    def report(name: str, log_prob: torch.Tensor) -> None:
        bits = bits_per_dim(log_prob, x[0].shape)
        error = bits.std() / len(bits) ** 0.5
        print(f"{name}: {bits.mean():.4f} bits per dimension (standard error {error:.4f}, {len(bits)} images)")

    parts = zip(x.split(50), *(v.split(50) for v in told.values()), strict=True)
    bounds = [
        elbo(
            model,
            part,
            sigma_min,
            sigma_max,
            n=args.evaluations,
            generator=generator,
            **dict(zip(told, given, strict=True)),
        )
        for part, *given in parts
    ]
    report(f"bound at sigma_min = {sigma_min:.4g}", torch.cat([bound.total for bound in bounds]))
    if args.ode:
        some = {name: value[: args.ode] for name, value in told.items()}
        options = {"divergence": "hutchinson", "generator": generator, "rtol": 1e-4, "atol": 1e-4}
        report("ODE, Hutchinson", log_likelihood(model, x[: args.ode], sigma_min, sigma_max, **options, **some))
    if isinstance(model, ReflectedModel):
        for sigma in (0.05, 0.2, 1.0):
            at = model.process.perturb(x, sigma, generator)
            flux = boundary_flux(model, at, sigma, generator=generator, **told)
            print(f"flux through the faces at sigma = {sigma}: root mean square {flux.square().mean().sqrt():.4f}")


if __name__ == "__main__":
    main()
