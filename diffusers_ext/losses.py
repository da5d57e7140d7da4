r"""Training losses: one number for each sample, (B,), the mean over its elements; never reduced over the batch.

**Score matching.** sigma^2 |score(x, sigma) - grad log p(x | x0)|^2 times a weight.

**Consistency.** Let D be a denoiser and x' a draw of the model's own reverse SDE from x at sigma to sigma' < sigma. For
the exact D of any distribution the predictions are a martingale, D(x, sigma) = E[D(x', sigma') | x]. The loss is the
square of the defect, without bias from two independent draws x'_1 and x'_2 of the same x:

    loss = (D(x'_1, sigma') - D(x, sigma)) (D(x'_2, sigma') - D(x, sigma)),

whose expectation given x is |E[D(x', sigma') | x] - D(x, sigma)|^2. (A plain square would punish the variance of D(x'),
which is there by right.) One value may be negative. The gradient does not pass through the draws. With r_1 and r_2 the
two residuals,

    grad loss = 2 r_1 grad r_2,

which has the expectation of r_1 grad r_2 + r_2 grad r_1, as the draws have the same law, and needs the graph of one
draw only: two thirds of the work, and memory for one graph less. (Its gradient with respect to D(x, sigma) must be that
of r_2, too: between near levels grad D(x'_2, sigma') and grad D(x, sigma) nearly cancel.)
The exact denoiser of *another* distribution has loss 0, too: score matching must accompany it.

This is unrelated to the "consistency models" of Song et al. (arXiv 2303.01469), which learn the end point of an ODE.

**Observation.** From the same x = x0 + sigma n, one deterministic step down to sigma' < sigma is made with the model's
x0, and one with the true x0 (any such step is then exact); a discriminator tells them apart:

    fake = step(D; x, sigma, sigma')        real = x0 + sigma' n = x0 + (sigma'/sigma) (x - x0)

    observation loss    = -disc(fake)                                                    trains D, beside score matching
    discriminator loss  = relu(1 - disc(real)) + relu(1 + disc(fake)) + weight/2 |g|^2   trains disc
    g = grad of disc(real) with respect to real / (sd^2 + sigma'^2)^1/2

(sd the standard deviation of the data). |g|^2 is R1, a sum over the elements of a sample, with the half of its paper.
It is taken in units of unit variance, so that it weighs the same at all noise levels: with respect to x' itself, which
is as large as sigma', it would vanish where noise is strong.

The exact D does not pass for real. Given x, real varies and fake does not; with Euler

    Var real = Var fake + (1 - sigma'/sigma)^2 E Var[x0 | x].

That is the solver's own error, of second order in the step. The discriminator punishes it too, by design.

**Ambient.** From images that have noise themselves, x_n = x0 + s_n n, one copy of each and s_n known, the denoiser of
the clean images is learned at all sigma above s_n. With x = x_n + (sigma^2 - s_n^2)^1/2 z, a draw at sigma of the clean
image, and r = s_n^2 / sigma^2, x_n given x and x0 is Gaussian with mean r x + (1 - r) x0, so that

    E[x_n | x] = r x + (1 - r) D(x, sigma),        loss = |r x + (1 - r) D(x, sigma) - x_n|^2 / ((1 - r) sigma^2)

has the exact D as its minimum, and is the score matching loss where s_n = 0. The mean of the square is that of
(1 - r)^2 |D - x0|^2 and a variance of s_n^2 (1 - r): the division leaves both finite where sigma comes near s_n. Below
s_n nothing is learned: a sampler stops there and answers D(x, s_n). Or the model's own samples given x_n, from its
probability flow (`denoised_copies`), stand for clean images there. What is learned from copies is copied: errors grow
with each pass, and the copies lose variety. Their variance is known, Var x0 = Var x_n - s_n^2, so that it can be seen.

References: Consistent Diffusion Models: Mitigating Sampling Drift by Learning to be Consistent (Daras, Dagan, Dimakis,
Daskalakis, 2023, arXiv 2302.09057); Observation-Guided Diffusion Probabilistic Models (Kang, Choi, Choi, Han, CVPR
2024, arXiv 2310.04041); Which Training Methods for GANs do actually Converge? (Mescheder, Geiger, Nowozin, 2018, arXiv
1801.04406), R1; Consistent Diffusion Meets Tweedie (Daras, Dimakis, Daskalakis, 2024, arXiv 2404.10177), the ambient
loss; arXiv 2502.05446, copies that the model has denoised itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .noise_levels import karras_sigmas
from .process import align
from .ranges import require
from .score import Denoiser, ScoreModel, edm_epsilon
from .solvers import Step, euler, euler_maruyama, heun, posterior

ROLLOUTS: dict[str, Step] = {"posterior": posterior, "euler_maruyama": euler_maruyama}
PROJECTIONS: dict[str, Step] = {"euler": euler, "heun": heun}


def score_matching_loss(
    model: ScoreModel,
    x: Tensor,
    x0: Tensor,
    sigma: Tensor | float,
    *,
    prediction: Tensor | None = None,
    weight: Tensor | float | None = None,
    **cond: Any,
) -> Tensor:
    """Return weight sigma^2 |score(x, sigma) - grad log p(x | x0)|^2, (B,).

    Args:
        x: a draw of `model.process.perturb(x0, sigma)`, (B, ...).
        prediction: `model(x, sigma, **cond)`, if the caller has it already.
        weight: a number or (B,); by default `model.output_weight`, the mean square error of the network's own output,
            which the training commands have, too; 1 is the mean square error of eps.

    Raises:
        ValueError: x0 or the prediction is not of the shape of x.
    """
    prediction = model(x, sigma, **cond) if prediction is None else prediction
    _check_shapes(x, x0=x0, prediction=prediction)
    if weight is None:
        weight = model.output_weight(torch.as_tensor(sigma, device=x.device))
    return _mean_of_elements(align(weight, x) * model.score_error(prediction, x, x0, sigma) ** 2)


LEAST = 0.02  # of 1 - r, which the ambient loss divides by


def ambient_loss(
    denoised: Tensor,
    x: Tensor,
    noisy: Tensor,
    data_noise: Tensor | float,
    sigma: Tensor | float,
    *,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """Return the loss of a denoiser of clean images from images with noise, (B,); see the module's docstring.

        x = process.perturb(noisy, (sigma**2 - data_noise**2) ** 0.5, generator)
        loss = ambient_loss(denoiser(x, sigma), x, noisy, data_noise, sigma, weight=denoiser.output_weight(sigma))

    Args:
        denoised: D(x, sigma), (B, ...), with its graph.
        x: see above, (B, ...).
        noisy: the images of the data, x_n, (B, ...): the same noise in an image each time that it is seen.
        data_noise: its standard deviation s_n, a number or (B,), 0 for clean images; at most sigma.
        sigma: a number or (B,). Noise levels should come near data_noise, where the sampler ends.
        weight: as for `score_matching_loss`.

    Raises:
        ValueError: denoised or noisy is not of the shape of x.
    """
    _check_shapes(x, denoised=denoised, noisy=noisy)
    sigma, data_noise = align(sigma, x), align(data_noise, x)
    r = (data_noise / sigma) ** 2
    residual = r * x + (1 - r) * denoised - noisy
    return _mean_of_elements(align(weight, x) * residual**2 / ((1 - r).clamp(min=LEAST) * sigma**2))


@torch.no_grad()
def denoised_copies(
    denoiser: Denoiser, noisy: Tensor, data_noise: Tensor, sigma_min: float, *, steps: int = 5, **cond: Any
) -> tuple[Tensor, Tensor]:
    """Return images without noise that the model makes of images with noise, and how much variance they have kept.

    Euler's steps of the probability flow, log-linear from `data_noise` to `sigma_min`; the last one ends with D there.

    Args:
        denoiser: the model; conditions in `cond` reach every one of its `steps` + 1 evaluations.
        noisy: x_n, (B, ...).
        data_noise: s_n, (B,), above sigma_min.

    Returns:
        The copies, (B, ...), and their variance over that of clean images, Var x_n - s_n^2, (): over the batch, around
        the mean image, mean over the elements. 1 is right; noise of a small batch is in it.
    """
    with _without_dropout(denoiser.network):
        x, ratio = noisy, (sigma_min / data_noise) ** (1 / steps)
        for i in range(steps):
            x = euler(denoiser, x, data_noise * ratio**i, data_noise * ratio ** (i + 1), **cond)
        copies = denoiser(x, torch.full_like(data_noise, sigma_min), **cond)
    clean = noisy.var(0).mean() - (data_noise**2).mean()
    return copies, copies.var(0).mean() / clean


def consistency_loss(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    denoised: Tensor | None = None,
    steps: int = 1,
    rollout: str = "posterior",
    generator: torch.Generator | None = None,
    **cond: Any,
) -> Tensor:
    """Return the product of two independent residuals of the martingale property, (B,); see the module's docstring.

    Args:
        denoiser: the model; conditions in `cond` reach every one of its evaluations.
        x: noisy samples at `sigma`, (B, ...).
        sigma, sigma_next: (B,), 0 < sigma_next <= sigma; a sigma_next above sigma gives NaN.
        denoised: D(x, sigma), with its graph, if the denoising loss has computed it; one rollout step then costs no
            further evaluation beside the two at sigma_next, one of them without a graph. A network with active dropout
            is evaluated here with dropout off, and `denoised` is not used: its mask would be in both residuals and add
            its variance.
        steps: steps of each rollout, on the rho = 7 grid between the two levels. The first reuses D(x, sigma).
        rollout: `posterior` (exact for Gaussian data with any number of steps) or `euler_maruyama` (the paper's, with
            5 steps; with one step it is biased).
        generator: the source of both rollouts' noise.

    Raises:
        ValueError: `rollout` is unknown, `steps` below 1, shapes differ, or dropout meets gradient checkpointing.
    """
    if rollout not in ROLLOUTS:
        raise ValueError(f"rollout {rollout!r} is not one of {', '.join(ROLLOUTS)}")
    require("steps", steps, at_least=1)
    _check_shapes(sigma, sigma_next=sigma_next)
    if denoised is not None:
        _check_shapes(x, denoised=denoised)
    step = ROLLOUTS[rollout]
    between = karras_sigmas(steps + 1, sigma_next, sigma)[1:-1].clamp(sigma_next, sigma)  # rounding may leave the range
    sigmas = [sigma, *between, sigma_next]

    with _without_dropout(denoiser.network) as had_dropout:
        if denoised is None or had_dropout:
            denoised = denoiser(x, sigma, **cond)

        @torch.no_grad()
        def draw() -> Tensor:
            x_next = step(denoiser, x, sigma, sigmas[1], denoised=denoised.detach(), generator=generator)
            for s, s_next in pairwise(sigmas[1:]):
                x_next = step(denoiser, x_next, s, s_next, generator=generator, **cond)
            return x_next

        x_1, x_2 = draw(), draw()
        denoised_2 = denoiser(x_2, sigma_next, **cond)
        with torch.no_grad():
            r_1 = denoiser(x_1, sigma_next, **cond) - denoised
    r_2 = denoised_2 - denoised
    return _mean_of_elements(2 * r_1 * r_2 - (r_1 * r_2).detach())


def observation_loss(
    denoiser: Denoiser,
    discriminator: Callable[..., Tensor],
    x: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    denoised: Tensor | None = None,
    projection: str = "euler",
    discriminator_cond: Mapping[str, Any] | None = None,
    **cond: Any,
) -> Tensor:
    """Return -disc(fake), (B,). Its gradient reaches the denoiser, and not the discriminator's parameters.

    Args:
        denoiser: the model; conditions in `cond` reach it and not the discriminator.
        discriminator: disc(x_next, sigma, sigma_next, **discriminator_cond) -> logits, (B,). Pass the module itself: a
            wrapper for several processes has no gradient to reduce here. It may use gradient checkpointing in parts
            without linear layers (which keep other tensors when frozen), as `NoiseLevelDiscriminator` does.
        x: noisy samples at `sigma`, (B, ...).
        sigma, sigma_next: (B,), 0 < sigma_next <= sigma.
        denoised: D(x, sigma), with its graph, if the denoising loss has computed it: Euler then costs no evaluation of
            the denoiser and Heun one.
        projection: the step, `euler` or `heun`.

    Raises:
        ValueError: `projection` is unknown, or shapes differ.
    """
    step = _projection(projection, x, sigma, sigma_next, denoised)
    fake = step(denoiser, x, sigma, sigma_next, denoised=denoised, **cond)
    with _frozen(discriminator):
        return -discriminator(fake, sigma, sigma_next, **(discriminator_cond or {}))


class DiscriminatorLoss(NamedTuple):
    """The discriminator's loss, and its parts without gradient, for the log; all (B,)."""

    loss: Tensor
    real_logits: Tensor
    fake_logits: Tensor
    r1: Tensor


def discriminator_loss(
    denoiser: Denoiser,
    discriminator: Callable[..., Tensor],
    x: Tensor,
    x0: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    sigma_data: float,
    denoised: Tensor | None = None,
    projection: str = "euler",
    r1_weight: float = 1.0,
    discriminator_cond: Mapping[str, Any] | None = None,
    **cond: Any,
) -> DiscriminatorLoss:
    """Return relu(1 - disc(real)) + relu(1 + disc(fake)) + r1_weight/2 |g|^2; only the discriminator gets a gradient.

    Args:
        denoiser, sigma, sigma_next, denoised, projection: the same values as for `observation_loss`.
        discriminator: as for `observation_loss`, but inside the wrapper for several processes, if there is one.
        x: a draw of x0 + sigma n, (B, ...).
        sigma_data: `discriminator.config.sigma_data`, which sets the unit of g.
        r1_weight: the weight of |g|^2; 0 does not compute it (and needs no second derivatives, which `torch.compile`
            does not support). To add it only every k-th time, use k times the weight then and 0 otherwise. Where the
            logits of a group of samples depend on each other, g is the gradient of their sum.

    Raises:
        ValueError: `projection` is unknown, `r1_weight` negative, `sigma_data` not positive, or shapes differ.
    """
    require("r1_weight", r1_weight, at_least=0)
    require("sigma_data", sigma_data, above=0)
    _check_shapes(x, x0=x0)
    step = _projection(projection, x, sigma, sigma_next, denoised)
    with torch.no_grad():
        fake = step(denoiser, x, sigma, sigma_next, denoised=denoised, **cond)
        real = euler(denoiser, x, sigma, sigma_next, denoised=x0)
    real.requires_grad_(r1_weight > 0)
    condition = discriminator_cond or {}
    real_logits = discriminator(real, sigma, sigma_next, **condition)
    fake_logits = discriminator(fake, sigma, sigma_next, **condition)
    loss, r1 = torch.relu(1 - real_logits) + torch.relu(1 + fake_logits), torch.zeros_like(real_logits)
    if r1_weight > 0:
        (gradient,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
        gradient = gradient / edm_epsilon(align(sigma_next, real), sigma_data).c_in
        r1 = gradient.reshape(len(gradient), -1).square().sum(1)
        loss = loss + r1_weight / 2 * r1
    return DiscriminatorLoss(loss, real_logits.detach(), fake_logits.detach(), r1.detach())


def _projection(name: str, x: Tensor, sigma: Tensor, sigma_next: Tensor, denoised: Tensor | None) -> Step:
    if name not in PROJECTIONS:
        raise ValueError(f"projection {name!r} is not one of {', '.join(PROJECTIONS)}")
    _check_shapes(sigma, sigma_next=sigma_next)
    if denoised is not None:
        _check_shapes(x, denoised=denoised)
    return PROJECTIONS[name]


def _check_shapes(x: Tensor, **others: Tensor) -> None:
    for name, other in others.items():
        if other.shape != x.shape:
            raise ValueError(f"{name} has shape {tuple(other.shape)}, it must be {tuple(x.shape)}")


def _mean_of_elements(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1).mean(1)


@contextmanager
def _frozen(network: object) -> Iterator[None]:
    """A context in which graphs do not contain the network's parameters."""
    parameters = [p for p in network.parameters() if p.requires_grad] if isinstance(network, nn.Module) else []
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


@contextmanager
def _without_dropout(network: object) -> Iterator[bool]:
    """A context in which dropout, of activations and of labels, is off; its value says whether any was active."""
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    active = [m for m in modules if m.training and _drop_probability(m) > 0]
    if active and any(getattr(m, "gradient_checkpointing", False) for m in modules):
        raise ValueError(
            "a network with dropout cannot use gradient checkpointing here: the backward pass would compute its "
            "activations again with dropout on. Switch one of them off"
        )
    for module in active:
        module.training = False
    try:
        yield bool(active)
    finally:
        for module in active:
            module.training = True


def _drop_probability(module: nn.Module) -> float:
    # `dropout_prob` is that of diffusers' LabelEmbedding, which drops class labels at random.
    return module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout_prob", 0.0)
