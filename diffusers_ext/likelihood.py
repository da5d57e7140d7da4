r"""How likely a model finds data: the probability-flow ODE, the variational bound of the SDE, bits per dimension.

In the coordinates x = x0 + sigma n a score s(x, sigma) defines two generative models of p_sigma_min, which are one if s
is exact. Both start from a prior at sigma_max; D is the number of dimensions, all logarithms are natural.

**ODE** (`log_likelihood`). With v its velocity, solved upwards from the point x at sigma_min, in u = ln sigma:

    dx/dsigma = v = -sigma s,      log p(x) = log prior(x_max) + int_{sigma_min}^{sigma_max} div v dsigma.

With Gaussian noise the unknown of the solver is z = x / a, a = (1 + sigma^2)^1/2, which stays of the size of the data,

    dz/du = sigma v / a - (1 - a^-2) z,        the divergence of z in u is that of sigma v less D (1 - a^-2),

so that where x only grows with sigma, beyond the scale of the data, there is next to nothing to solve, and the steps
are long. The divergence is exact (D backward passes) or Hutchinson's p . grad(v . p), whose mean over random signs p is
div v.

**SDE** (`elbo`). Let x_sigma be a draw of the process from the point x at sigma_min: its kernel has the scale
tau = (sigma^2 - sigma_min^2)^1/2. The reverse SDE has no density in closed form, but by Girsanov's theorem and Jensen's
inequality

    log p(x) >= E[log prior(x_max)] - int_{sigma_min}^{sigma_max} sigma E[|s|^2 - 2 s . grad log p(x_sigma | x)] dsigma,

with equality for the exact score. Near tau = 0 the second term is as large as s . n / tau, while its mean is finite.
So the levels are drawn with v uniform, in

    tau = sigma_min sinh v,    sigma = sigma_min cosh v,    dsigma = tau dv,    rate = sigma tau (|s|^2 - 2 s . grad),

uniform in tau up to sigma_min, log-uniform in sigma beyond it; the rate keeps a bounded variance, down to tau = 0. The
integral starts there: nothing is left out, and there is no reconstruction term, as p_sigma_min is a density of its own.

In a box the noise is folded back at the faces (`ReflectedProcess`). The bound holds there as it stands, for the local
time at the faces is that of the data process, too. The flow needs s to have no component normal to the faces (flux),
which the exact score has not; `boundary_flux` measures it. Where a learned s has some, the flow is continued beyond the
face by the mirrored field, v(y) = orientation(y) v(constrain(y)), and log p lacks what flows through.

**Discrete data** (`dequantize`, `bits_per_dim`). The value k of `levels` becomes uniform on the bin of width
w = (high - low) / levels that starts at low + k w. The model's mass of an image's cell is then at least
exp E[log p(x) + D log w], for p = p_sigma_min at any sigma_min.

References: Score-Based Generative Modeling through SDEs (Song et al., 2020, arXiv 2011.13456), section 4.3 (ODE);
Maximum Likelihood Training of Score-Based Diffusion Models (Song, Durkan, Murray, Ermon, 2021, arXiv 2101.09258) and A
Variational Perspective on Diffusion-Based Generative Models (Huang, Lim, Courville, 2021, arXiv 2106.02808) (bound);
Reflected Diffusion Models (Lou, Ermon, 2023, arXiv 2304.04740); FFJORD (Grathwohl et al., 2018, arXiv 1810.01367).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import acosh, isfinite, log, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .process import Process, ReflectedProcess, align
from .randomness import rand, randint, randn_like
from .ranges import require
from .score import ScoreModel

Field = Callable[[Tensor], Tensor]
LogPrior = Callable[[Tensor, float], Tensor]
ADAPTIVE_METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


# the divergence of a field


@torch.enable_grad()
def exact_divergence(function: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the value of a field, (B, ...), and its divergence, (B,), by one backward pass for each dimension.

    The samples of the batch must not influence each other (batch normalisation in training mode makes them).

    Raises:
        ValueError: the value has no graph: it was computed under `no_grad` or detached, or does not depend on x.
    """
    x, value = _with_graph(function, x)
    divergence = torch.zeros_like(value.reshape(len(x), -1)[:, 0])
    for i, column in enumerate(value.reshape(len(x), -1).sum(0)):
        divergence += torch.autograd.grad(column, x, retain_graph=True)[0].reshape(len(x), -1)[:, i]
    return value.detach(), divergence


def hutchinson_divergence(function: Field, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the value of a field, (B, ...), and estimate its divergence, (B,), by one backward pass for each probe.

    Args:
        probes: (n, B, ...), of mean 0 and covariance I, as `rademacher` draws them; the estimate is their mean.

    Raises:
        ValueError: as `exact_divergence`.
    """
    x, value = _with_graph(function, x)
    pulled = [torch.autograd.grad(value, x, probe, retain_graph=True)[0] for probe in probes]
    return value.detach(), _dot(probes.transpose(0, 1), torch.stack(pulled, 1)) / len(probes)


def rademacher(n: int, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw `n` probes of random signs for a batch like x: (n, B, ...)."""
    return 2 * randint(2, (n, *x.shape), generator, device=x.device).to(x) - 1


@torch.enable_grad()
def _with_graph(function: Field, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    value = function(x)
    if not value.requires_grad:
        raise ValueError(
            "the field has no gradient: it was computed under no_grad or inference_mode, was detached, "
            "or does not depend on x"
        )
    return x, value


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products over all dimensions but the first, (B,)."""
    return (a * b).reshape(len(a), -1).sum(1)


# the ODE


@torch.no_grad()
def log_likelihood(
    model: ScoreModel,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    *,
    divergence: str = "exact",
    probes: int = 1,
    generator: torch.Generator | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "dopri5",
    max_steps: int = 1000,
    log_prior: LogPrior | None = None,
    **cond: Any,
) -> Tensor:
    """Return log p_sigma_min(x) of the probability-flow ODE, (B,), in nats; computed in float32 at least. It is NaN for
    a sample for which the model's output is not finite.

    Args:
        x: points at noise level `sigma_min`, (B, ...), with two dimensions at least for the processes' own priors.
        sigma_min, sigma_max: 0 < sigma_min < sigma_max; the model is asked for no level outside.
        divergence: `exact`, with as many backward passes as x has dimensions at each evaluation, or `hutchinson`,
            unbiased, with `probes` of them. The probes are drawn from `generator`, once for the whole solution.
        rtol, atol: tolerances of one step, for the root mean square of z and for log p per dimension, in the worst
            sample of the batch; the error of log p per dimension comes to some times that. Per dimension the rounding
            of float32 (1e-7) stays below any sensible tolerance. That of a network in half precision does not: cast it
            to float32.
        method: an adaptive method of torchdiffeq.
        max_steps: no step is shorter than ln(sigma_max / sigma_min) / max_steps, even where the tolerances ask for it:
            at kinks of the field, as on a face of the box with flux through it.
        log_prior: (x, sigma_max) -> (B,), the log density of x_max; by default `model.process.log_prior`.
        **cond: conditions, which reach the network at every evaluation.

    Raises:
        ValueError: bad noise levels, unknown `divergence` or `method`, probes < 1, x outside the box, or a score
            without a gradient.
        ImportError: torchdiffeq is not installed.
    """
    _check_levels(sigma_min, sigma_max)
    require("max_steps", max_steps, at_least=1)
    require("rtol", rtol, above=0)
    require("atol", atol, above=0)
    if method not in ADAPTIVE_METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(ADAPTIVE_METHODS)}")
    odeint = _odeint()
    process, x = model.process, _prepare(model, x)
    value_and_divergence = _divergence_of(divergence, x, probes, generator)
    dims, lost = prod(x.shape[1:]), torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def scale(sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and 1 - a^-2; in a box, where x does not grow, 1 and 0."""
        s = torch.zeros_like(sigma) if isinstance(process, ReflectedProcess) else sigma
        return (1 + s**2).sqrt().to(x), (s**2 / (1 + s**2)).to(x)

    def velocity(u: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        sigma, z = u.exp(), state[0]
        a, rate = scale(sigma)
        y = a * z
        v, div = value_and_divergence(lambda x: -(sigma**2) * model.score(x, sigma, **cond), process.constrain(y))
        lost.logical_or_(~(v.flatten(1).isfinite().all(1) & div.isfinite()))  # such samples stay where they are
        v, div = v.where(align(lost, v) == 0, 0), div.where(~lost, 0)
        return _orientation(process, y) * v / a - rate * z, div / dims - rate

    u = torch.tensor([sigma_min, sigma_max], dtype=torch.float64, device=x.device).log()
    options = {"norm": _worst_sample, "step_t": u[1:], "min_step": log(sigma_max / sigma_min) / max_steps}
    (first, _), (last, _) = (scale(level) for level in u.exp())
    start = (x / first, x.new_zeros(len(x)))
    z, gain = (v[-1] for v in odeint(velocity, start, u, rtol=rtol, atol=atol, method=method, options=options))
    y, gain = last * z, gain + torch.log(last / first)
    log_prior = process.log_prior if log_prior is None else log_prior
    return (log_prior(process.constrain(y), sigma_max) + dims * gain).where(~lost, torch.nan)


def _divergence_of(
    name: str, x: Tensor, probes: int, generator: torch.Generator | None
) -> Callable[[Field, Tensor], tuple[Tensor, Tensor]]:
    if name == "exact":
        return exact_divergence
    if name != "hutchinson":
        raise ValueError(f"divergence {name!r} is not one of exact, hutchinson")
    require("probes", probes, at_least=1)
    return partial(hutchinson_divergence, probes=rademacher(probes, x, generator))


def _orientation(process: Process, y: Tensor) -> Tensor | float:
    return process.orientation(y) if isinstance(process, ReflectedProcess) else 1.0


def _worst_sample(state: tuple[Tensor, Tensor]) -> Tensor:
    """Return the error norm: the largest over the batch of the root mean square of x and of |log p| per dimension."""
    x, gain = state
    return torch.maximum(x.reshape(len(x), -1).square().mean(1).sqrt(), gain.abs()).max()


def _odeint() -> Callable[..., tuple[Tensor, Tensor]]:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError("log_likelihood needs torchdiffeq: pip install torchdiffeq") from error
    return odeint


# the bound


class Elbo(NamedTuple):
    """The variational bound on log p_sigma_min(x), term by term, each (B,), in nats."""

    prior: Tensor
    """E[log prior(x_max)]."""
    diffusion: Tensor
    """- int sigma E[|s|^2 - 2 s . grad log p(x_sigma | x)] dsigma."""

    @property
    def total(self) -> Tensor:
        """prior + diffusion."""
        return self.prior + self.diffusion


@torch.no_grad()
def elbo(
    model: ScoreModel,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    *,
    n: int = 64,
    generator: torch.Generator | None = None,
    log_prior: LogPrior | None = None,
    **cond: Any,
) -> Elbo:
    """Estimate the bound on log p_sigma_min(x) of the reverse SDE without bias; computed in float32 at least.

    The range [0, V] of v, V = arcosh(sigma_max / sigma_min), is cut into n strata with one level in each: at the
    fraction U ~ U(0, 1), drawn for each sample, or 1 - U in every other one, so that what is linear in v is
    integrated exactly. Noise is drawn anew for each level.

    Args:
        x: points at noise level `sigma_min`, (B, ...), with two dimensions at least for the processes' own priors.
        sigma_min, sigma_max: 0 < sigma_min < sigma_max.
        n: evaluations of the network for each sample.
        log_prior: (x, sigma_max) -> (B,), the log density of x_max; by default `model.process.log_prior`.
        **cond: conditions, which reach the network at every evaluation.

    Raises:
        ValueError: bad noise levels, n < 1, or x outside the box.
    """
    log_prior = model.process.log_prior if log_prior is None else log_prior
    return nested_elbos(model, x, sigma_min, [sigma_max], n=n, generator=generator, log_priors=[log_prior], **cond)[0]


@torch.no_grad()
def nested_elbos(
    model: ScoreModel,
    x: Tensor,
    sigma_min: float,
    sigmas_max: Sequence[float],
    *,
    n: int,
    generator: torch.Generator | None = None,
    log_priors: Sequence[LogPrior],
    **cond: Any,
) -> list[Elbo]:
    """Estimate `elbo` for several levels where the process starts, at the cost of the highest one alone.

    The range of v is cut at each level. The parts between share the n strata by their widths, with one at least; the
    integrals over them add up. The noise of a part's strata gives the points x_max at its end, too.

    Args:
        sigmas_max: increasing.
        log_priors: one for each level, (x, sigma_max) -> (..., B): several priors give `prior` and `total` more rows.
        x, sigma_min, n, **cond: as in `elbo`.

    Raises:
        ValueError: bad noise levels, n below their number, or x outside the box.
    """
    for below, above in pairwise((sigma_min, *sigmas_max)):
        _check_levels(below, above)
    require("n", n, at_least=len(sigmas_max))
    x, cuts = _prepare(model, x), [0.0, *(acosh(sigma_max / sigma_min) for sigma_max in sigmas_max)]
    shared = [round((n - len(sigmas_max)) * cut / cuts[-1]) for cut in cuts]
    offset = rand((len(x),), generator, device=x.device, dtype=x.dtype)
    diffusion, elbos, drawn = torch.zeros_like(offset), [], 0
    for j, (sigma_max, log_prior) in enumerate(zip(sigmas_max, log_priors, strict=True)):
        strata = 1 + shared[j + 1] - shared[j]
        width, tau_max = (cuts[j + 1] - cuts[j]) / strata, (sigma_max**2 - sigma_min**2) ** 0.5
        prior = torch.zeros_like(offset)
        for k in range(strata):
            noise = randn_like(x, generator)
            v = cuts[j] + width * (k + (offset if drawn % 2 else 1 - offset))
            tau = sigma_min * torch.sinh(v)  # never 0
            rate = bound_rate(model, x, tau, sigma_min, noise, **cond)
            diffusion = (diffusion - width * rate).to(x.dtype)
            x_max = model.process.constrain(x + tau_max * noise)
            control = (tau_max / sigma_max) ** 2 / 2 * _excess(model.process, noise)
            prior = (prior + (log_prior(x_max, sigma_max) + control) / strata).to(x.dtype)
            drawn += 1
        elbos.append(Elbo(prior, diffusion))
    return elbos


def bound_rate(
    model: ScoreModel, x: Tensor, tau: Tensor | float, sigma_min: float, noise: Tensor, **cond: Any
) -> Tensor:
    """Return sigma tau (|s|^2 - 2 s . grad log p(x_sigma | x)), (B,), the bound's loss for each unit of v, in nats.

    x_sigma is x + tau noise, folded into the box of a reflected process, and sigma^2 = sigma_min^2 + tau^2. For each
    unit of ln sigma multiply by sigma / tau.

    With Gaussian noise r (2 - r^2) (|noise|^2 - D), r = tau / sigma, is added. Its mean is 0, and it takes away what is
    quadratic in the noise where s = -(x_sigma - x0) / sigma^2: beyond the scale of the data, and, for images, nearly so
    at all levels.

    Args:
        x: points at noise level `sigma_min`, (B, ...).
        tau: the scale of the noise on top of it, positive, () or (B,).
        noise: a standard normal draw, (B, ...).
    """
    sigma = (tau**2 + sigma_min**2) ** 0.5
    x_sigma = model.process.constrain(x + align(tau, x) * noise)
    score = model.score(x_sigma, sigma, **cond)
    target = model.process.target_score(x_sigma, x, tau)
    r = tau / sigma
    return sigma * tau * _dot(score, score - 2 * target) + r * (2 - r**2) * _excess(model.process, noise)


def _excess(process: Process, noise: Tensor) -> Tensor | float:
    """Return |noise|^2 - D, of mean 0; but 0 in a box, where the bound is no longer quadratic in the noise."""
    return 0.0 if isinstance(process, ReflectedProcess) else _dot(noise, noise) - prod(noise.shape[1:])


@torch.no_grad()
def boundary_flux(
    model: ScoreModel, x: Tensor, sigma: Tensor | float, *, generator: torch.Generator | None = None, **cond: Any
) -> Tensor:
    """Return sigma times the score's outward normal component on a face of the box, (B,); 0 for the exact score.

    In each sample one coordinate is moved to its nearest face: one that is drawn among those within sigma of it, or the
    closest where there is none. Faces that the data never come near do not count.

    Args:
        x: points at noise level `sigma`, in the box, (B, ...).

    Raises:
        ValueError: the model's process is not a reflected one, or x is outside the box.
    """
    process = model.process
    if not isinstance(sigma, Tensor) and not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    if not isinstance(process, ReflectedProcess):
        raise ValueError(f"only a reflected model has faces, this one is of a {type(process).__name__}")
    points = _prepare(model, x).reshape(len(x), -1)
    distance = torch.minimum(points - process.low, process.high - points)
    chance = rand(points.shape, generator, device=points.device).to(points)
    coordinate = torch.where(distance <= align(sigma, points), chance, 1 + distance).argmin(1, keepdim=True)
    normal = (2 * points.gather(1, coordinate) > process.low + process.high).to(points) * 2 - 1
    face = torch.full_like(normal, process.high).where(normal > 0, process.low)
    score = model.score(points.scatter(1, coordinate, face).reshape(x.shape), sigma, **cond)
    return (align(sigma, score) * score).reshape(len(x), -1).gather(1, coordinate)[:, 0] * normal[:, 0]


def _check_levels(sigma_min: float, sigma_max: float) -> None:
    if not (0 < sigma_min < sigma_max and isfinite(sigma_max)):
        raise ValueError(f"0 < sigma_min < sigma_max < inf must hold, got sigma_min={sigma_min}, sigma_max={sigma_max}")


def _prepare(model: ScoreModel, x: Tensor) -> Tensor:
    if isinstance(model.process, ReflectedProcess):
        model.process.require_inside(x, "x")
    return x.to(torch.promote_types(x.dtype, torch.float32))


# discrete data


def dequantize(
    images: Tensor,
    generator: torch.Generator | None = None,
    *,
    levels: int = 256,
    low: float = -1.0,
    high: float = 1.0,
) -> Tensor:
    """Draw x = low + (k + u) (high - low) / levels, u ~ U(0, 1), in [low, high), in float32 at least.

    Args:
        images: low + k (high - low) / (levels - 1), k = 0 .. levels - 1: bytes on [low, high], both ends included.

    k is floor((x - low) levels / (high - low)), in the same dtype: u is drawn from the midpoints of equal parts of
    (0, 1), no finer than rounding leaves their bin alone.

    Raises:
        ValueError: images are off these values by a quarter of a step or more, or the dtype is too coarse for `levels`;
            levels is below 2, or the bounds are not low < high, both finite.
    """
    width = _bin_width(levels, low, high)
    require("levels", levels, at_least=2)
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    value = (images - low) / (high - low) * (levels - 1)
    k = value.round().clamp(0, levels - 1)
    if not bool(((value - k).abs() < 0.25).all()):
        raise ValueError(f"images are not on {levels} equidistant levels from {low} to {high}, the ends included")
    parts = int(1 / (4 * levels * torch.finfo(images.dtype).eps))
    if parts < 1:
        raise ValueError(f"{images.dtype} is too coarse for {levels} levels")
    u = (randint(parts, images.shape, generator, device=images.device).to(images) + 0.5) / parts
    return low + (k + u) * width


def bits_per_dim(
    log_prob: Tensor, shape: int | Sequence[int], *, levels: int = 256, low: float = -1.0, high: float = 1.0
) -> Tensor:
    """Return -(log p(x) / D + log w) / log 2, w = (high - low) / levels.

    On average over uniform dequantisation this is an upper bound on the bits for each dimension of the discrete data;
    for the uniform density on [low, high]^D it is log2(levels).

    Args:
        log_prob: log density of dequantised points (`dequantize`, with the same `levels`, `low` and `high`), in nats,
            (B,), for a whole image each.
        shape: of one image, without the batch dimension, or its number of dimensions D.

    Raises:
        ValueError: levels is below 1, or the bounds are not low < high, both finite.
    """
    dims = shape if isinstance(shape, int) else prod(shape)
    return -(log_prob / dims + log(_bin_width(levels, low, high))) / log(2)


def _bin_width(levels: int, low: float, high: float) -> float:
    require("levels", levels, at_least=1)
    require("low", low)
    require("high", high, above=low)
    return (high - low) / levels
