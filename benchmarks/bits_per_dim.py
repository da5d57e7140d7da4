"""Bits per dimension of held-out images under a pixel model, Gaussian or reflected: the bound, and perhaps the ODE.

    python benchmarks/bits_per_dim.py --model reflected-digits --preset digits
    python benchmarks/bits_per_dim.py --model reflected-digits --preset digits --ode 20

Images of 256 levels on [-1, 1] are dequantised uniformly; what is measured is the density at the model's sigma_min. The
unconditional bound of a class-conditional model is that of the null class; with --labels the labels are given.
"""

import argparse
from dataclasses import replace

import torch
from timing import DEVICE
from trained import load, real_images

from diffusers_ext import ReflectedModel, boundary_flux, dequantize, noise_schedule, score_model_from
from diffusers_ext.evaluation import LikelihoodSettings, likelihood
from diffusers_ext.evaluation.real_images import rows_of
from diffusers_ext.reports.tables import interval_text
from diffusers_ext.subjects import subject_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--evaluations", type=int, default=32, help="of the network, for each image's bound")
    parser.add_argument("--ode", type=int, default=0, help="so many images also by the probability flow")
    parser.add_argument("--labels", action="store_true")
    parser.add_argument("--device", default=DEVICE)
    args, for_data = parser.parse_known_args()

    subject = subject_of(load(args.model).to(args.device))
    images = rows_of(real_images(for_data, subject.pipeline).unseen, 0, args.num_images)
    if not args.labels:  # what has no label is of the null class
        images = replace(images, labels=torch.full_like(images.labels, -1))
    found = likelihood(subject, images, LikelihoodSettings(args.num_images, args.evaluations, args.ode), batch_size=50)
    sigma_min = noise_schedule(subject.pipeline.scheduler).sigma_min
    print("bits per dimension, with half of the 95% interval over the images:")
    print(f"bound at sigma_min = {sigma_min:.4g}: {interval_text(found.bound)} ({len(images.images)} images)")
    if found.ode is not None:
        print(f"ODE, Hutchinson: {interval_text(found.ode)} ({min(args.ode, len(images.images))} images)")
    model = score_model_from(subject.network, subject.pipeline.scheduler)
    if isinstance(model, ReflectedModel):
        generator = torch.Generator().manual_seed(1)
        condition = subject.conditions(
            replace(images, labels=images.labels.where(images.labels >= 0, subject.null_class or 0))
        )
        x = dequantize(images.images, generator).to(args.device)
        for sigma in (0.05, 0.2, 1.0):
            flux = boundary_flux(
                model, model.process.perturb(x, sigma, generator), sigma, generator=generator, **condition
            )
            print(f"flux through the faces at sigma = {sigma}: root mean square {flux.square().mean().sqrt():.4f}")


if __name__ == "__main__":
    main()
