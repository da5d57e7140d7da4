r"""Brownian motion in the unit box, reflected at its faces.

Every coordinate moves alone, on [0, 1]. Its path is that of free Brownian motion, folded back:

    x = reflect(x0 + sigma n),        n ~ N(0, 1),        reflect(x) = |x - 2 round(x / 2)|        (period 2, even).

The images of x0 are the points that fold onto it, c = x0 + 2k and c = 2k - x0. Their Gaussians add up to the density:

    p(x | x0) = sum_c N(x; c, sigma^2) = N(x; x0, sigma^2) (1 + sum_{c != x0} exp(e_c)),                       (images)
    e_c = (c - x0) (2x - c - x0) / (2 sigma^2) <= 0,        d e_c / dx = (c - x0) / sigma^2.

Poisson summation turns it into eigenfunctions of the box, with decay r_j = exp(-(j pi sigma)^2 / 2):

    p(x | x0) = 1 + 2 sum_j r_j cos(j pi x) cos(j pi x0) = 1 + sum_j r_j sum_± cos(j pi (x ± x0)).              (waves)

Images serve below sigma = SWITCH, waves above: with five of each, seven in float64, what is left out is less than
rounding. With y = 1 - x and y0 = 1 - x0, the distances to the other face, the exponents are made of what is never
negative, so that nothing cancels, even where two images tie (at a face) or four of them (at opposite corners):

    c        -x0        2 - x0   2 + x0       x0 - 2          -2 - x0            4 - x0
    -e_c     x x0       y y0     y + x0       x + y0          (1 + x)(1 + x0)    (1 + y)(1 + y0)     times 2 / sigma^2
    c - x    -(x + x0)  y + y0   1 + y + x0   -(1 + x + y0)   -(2 + x + x0)      2 + y + y0

and the score is the mean of c - x over the images, x0 with weight 1 among them, divided by sigma^2.

**Backwards from x at sigma to sigma_next < sigma, given x0**, there are two ways. The probability flow of the kernel,

    dx / d ln sigma = -sigma^2 d/dx log p(x | x0),

carries the law at sigma to that at sigma_next (`heat_kernel_flow`; Heun's rule in ln sigma). And a draw of the process
itself at sigma_next, given both ends (`heat_kernel_bridge`), is exact: the free path began in x0 and is, at sigma, at
one of the points c that fold onto x, with probability proportional to exp(-(c - x0)^2 / (2 sigma^2)); between the two,

    x_next = reflect(x0 + r^2 (c - x0) + sigma_next (1 - r^2)^1/2 n),        r = sigma_next / sigma.

Shapes: `x` and `x0` are (B, ...) of any rank, inside the box; `sigma` is a number, () or (B,). Nothing is reduced: the
density of a point of the box is the product over its coordinates. Half precision is computed in float32; what comes
back has the dtype of `x`.

Reference: Reflected Diffusion Models (Lou, Ermon, 2023, arXiv 2304.04740).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import log, pi, sqrt

import torch
from torch import Tensor

from .shapes import align

SWITCH = 0.35
TURNS = 4
"""Images of the bridge on each side, in periods: from sigma = 1.5 on, where x is uniform, others count no longer."""


def reflect(x: Tensor) -> Tensor:
    """Fold the line onto [0, 1]; points of the box stay as they are, to the last bit."""
    return torch.sub(x, torch.round(x / 2), alpha=2).abs()


def heat_kernel_log_prob(x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
    """Return log p(x | x0) of every coordinate, in nats.

    Raises:
        ValueError: `sigma` is a number and not positive, or a tensor of neither shape () nor (B,).
    """
    dtype, (x, x0, sigma) = x.dtype, _prepare(x, x0, sigma)
    others = torch.zeros_like(x)
    for weight, _ in _images(x, x0, sigma):
        others += weight
    near = torch.log1p(others) - ((x - x0) / sigma) ** 2 / 2 - torch.log(sqrt(2 * pi) * sigma)
    return torch.where(sigma < SWITCH, near, torch.log1p(_waves(x, x0, sigma)[0])).to(dtype)


def heat_kernel_score(x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
    """Return d/dx log p(x | x0) of every coordinate; it vanishes at the faces.

    Raises:
        ValueError: `sigma` is a number and not positive, or a tensor of neither shape () nor (B,).
    """
    dtype, (x, x0, sigma) = x.dtype, _prepare(x, x0, sigma)
    waves, slope = _waves(x, x0, sigma)
    weights, pull = torch.ones_like(x), x0 - x
    for weight, gap in _images(x, x0, sigma):
        weights += weight
        pull.addcmul_(weight, gap)
    return torch.where(sigma < SWITCH, pull / weights / sigma**2, slope / (1 + waves)).to(dtype)


def heat_kernel_flow(
    x: Tensor, x0: Tensor, sigma: Tensor | float, sigma_next: Tensor | float, steps: int = 4
) -> Tensor:
    """Return where the probability flow of p(. | x0) takes x, from sigma to sigma_next, in so many steps of Heun."""
    dtype, (x, x0, sigma) = x.dtype, _prepare(x, x0, sigma)
    h = (sigma / align(sigma_next, x)).log() / steps
    for _ in range(steps):
        slope = sigma**2 * heat_kernel_score(x, x0, sigma)
        sigma = sigma * torch.exp(-h)
        ahead = reflect(x + h * slope)
        x = reflect(x + h / 2 * (slope + sigma**2 * heat_kernel_score(ahead, x0, sigma)))
    return x.to(dtype)


def heat_kernel_bridge(
    x: Tensor, x0: Tensor, sigma: Tensor | float, sigma_next: Tensor | float, noise: Tensor, choice: Tensor
) -> Tensor:
    """Return a draw at sigma_next of the process that starts in x0 and is in x at sigma.

    Args:
        noise, choice: independent, of the shape of x: a standard normal draw, and one that is uniform on [0, 1).
    """
    dtype, (x, x0, sigma) = x.dtype, _prepare(x, x0, sigma)
    ratio = (align(sigma_next, x) / sigma) ** 2
    turns = 2 * torch.arange(-TURNS, TURNS + 1, device=x.device, dtype=x.dtype)
    gaps = torch.cat([x[..., None] + turns, turns - x[..., None]], -1) - x0[..., None]
    weights = torch.softmax(-((gaps / sigma[..., None]) ** 2) / 2, -1).cumsum(-1)
    index = (weights < choice[..., None] * weights[..., -1:]).sum(-1, keepdim=True)
    gap = gaps.gather(-1, index)[..., 0]
    return reflect(x0 + ratio * gap + sigma * (ratio * (1 - ratio)).sqrt() * noise).to(dtype)


def _prepare(x: Tensor, x0: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Return all three in one dtype, float32 at least, with `sigma` aligned with `x`."""
    if not isinstance(sigma, Tensor) and not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, x0.dtype), torch.float32)
    return x.to(dtype), x0.to(dtype), align(sigma, x.to(dtype))


def _images(x: Tensor, x0: Tensor, sigma: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield exp(e_c) and c - x of every image except x0."""
    rate = -2 / (log(2) * sigma**2)  # to base 2: on a CPU exp is forty times slower than exp2 where it underflows
    y, y0 = 1 - x, 1 - x0
    up, down = y + x0, x + y0
    yield torch.exp2(rate * x0 * x), -x - x0
    yield torch.exp2(rate * y0 * y), y + y0
    yield torch.exp2(rate * up), 1 + up
    yield torch.exp2(rate * down), -1 - down
    if x.dtype == torch.float64:
        yield torch.exp2(rate * (1 + x0) * (1 + x)), -2 - x - x0
        yield torch.exp2(rate * (1 + y0) * (1 + y)), 2 + y + y0


def _waves(x: Tensor, x0: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return p - 1 and dp/dx from the waves."""
    sigma = sigma.clamp(min=SWITCH)  # below it the cut sum can be 0, and gradients of the unused branch nan
    orders = range(1, 8 if x.dtype == torch.float64 else 6)
    decays = [torch.exp2(-((j * pi * sigma) ** 2) / log(4)) for j in orders]
    slopes = [-j * pi * r for j, r in zip(orders, decays, strict=True)]
    total, slope = torch.zeros_like(x), torch.zeros_like(x)
    for sign in (-1, 1):
        angle = pi * torch.add(x, x0, alpha=sign)
        cos, sin = torch.cos(angle), torch.sin(angle)
        b, after = _clenshaw(decays, cos)
        total.addcmul_(cos, b).sub_(after)
        slope.addcmul_(sin, _clenshaw(slopes, cos)[0])
    return total, slope


def _clenshaw(r: list[Tensor], cos: Tensor) -> tuple[Tensor, Tensor]:
    """Return Clenshaw's b_1 and b_2: sum_j r_j cos(j t) = b_1 cos t - b_2 and sum_j r_j sin(j t) = b_1 sin t."""
    b, after = r[-1], torch.zeros_like(r[-1])
    for r_j in reversed(r[:-1]):
        b, after = torch.addcmul(r_j - after, cos, b, value=2), b
    return b, after
