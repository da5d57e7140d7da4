"""Bits per dimension of held-out images under a pixel model, Gaussian or reflected: the bound, and perhaps the ODE.

    python benchmarks/bits_per_dim.py --model reflected-digits --preset digits
    python benchmarks/bits_per_dim.py --model reflected-digits --preset digits --ode 20

Images of 256 levels on [-1, 1] are dequantised uniformly; what is measured is the density at the model's sigma_min. The
bound takes `--evaluations` of the network for each image; `--ode` says of how many images the likelihood is also
measured by the probability flow. The unconditional bound of a class-conditional model is that of the null class; with
--labels the labels are given.
"""

from dataclasses import replace

import torch
from bench import DEVICE, flags
from trained import held_out_images, load

from diffusers_ext import ReflectedModel, boundary_flux, dequantize, noise_schedule, score_model_from
from diffusers_ext.evaluation import LikelihoodSettings, likelihood
from diffusers_ext.evaluation.real_images import rows_of
from diffusers_ext.reports.tables import interval_text


def main() -> None:
    args, for_data = flags(
        __doc__, rest=True, model=str, num_images=500, evaluations=32, ode=0, labels=False, device=DEVICE
    )
    subject = load(args.model, args.device)
    images = rows_of(held_out_images(for_data, subject, args.num_images).reference, 0, args.num_images)
    if not args.labels and subject.null_class is not None:
        images = replace(images, labels=torch.full_like(images.labels, subject.null_class))
    count = len(images.images)
    found = likelihood(subject, images, LikelihoodSettings(count, args.evaluations, args.ode), batch_size=50)
    sigma_min = noise_schedule(subject.pipeline.scheduler).sigma_min
    print("bits per dimension, with half of the 95% interval over the images:")
    print(f"bound at sigma_min = {sigma_min:.4g}: {interval_text(found.bound)} ({count} images)")
    if found.ode is not None:
        print(f"ODE, Hutchinson: {interval_text(found.ode)} ({min(args.ode, count)} images)")
    model, generator = score_model_from(subject.network, subject.pipeline.scheduler), torch.Generator().manual_seed(1)
    if isinstance(model, ReflectedModel):
        x, condition = dequantize(images.images, generator).to(args.device), subject.conditions(images)
        for sigma in (0.05, 0.2, 1.0):
            at = model.process.perturb(x, sigma, generator)
            flux = boundary_flux(model, at, sigma, generator=generator, **condition)
            print(f"flux through the faces at sigma = {sigma}: root mean square {flux.square().mean().sqrt():.4f}")


if __name__ == "__main__":
    main()
