r"""What a network means: `ScoreModel` and, for Gaussian noise, `Denoiser`.

A network F and the preconditioning of its schedule give the denoiser

    D(x, sigma) = c_skip x + c_out F(c_in x, time)  ~  E[x0 | x],

and with it, by Tweedie's formula, eps = (x - D) / sigma and score = grad_x log p_sigma(x) = (D - x) / sigma^2. The
coefficients, as functions of s = sigma (sd = the standard deviation of the data):

    F predicts               c_in               c_skip              c_out
    epsilon                  (1+s^2)^-1/2       1                   -s
    sample                   (1+s^2)^-1/2       0                   1
    v_prediction             (1+s^2)^-1/2       1/(1+s^2)           -s/(1+s^2)^1/2
    flow_prediction          1/(1+s)            1/(1+s)             -s/(1+s)
    EDM, epsilon             (s^2+sd^2)^-1/2    sd^2/(s^2+sd^2)     s sd/(s^2+sd^2)^1/2
    EDM, v_prediction        (s^2+sd^2)^-1/2    sd^2/(s^2+sd^2)     -s sd/(s^2+sd^2)^1/2

`x0` exists for Gaussian noise only; the score is what every process has. On a reflected process, with the box [-1, 1]
as unit and k(x, x0, sigma) = grad_x log p(x | x0), a network predicts

    epsilon            eps := F(x, time) = -sigma score, which is what epsilon is in the Gaussian case, or
    point              P = clamp(c_skip x + c_out F(x, time), -1, 1), of v_prediction;    score = k(x, P, sigma).

(F is given x as it is: in a box it has the scale of the data at every level.) In each coordinate every score of a
reflected process is k at exactly one point of the box, so that nothing is lost, and it has no flux through the faces by
itself. At small sigma P is the ordinary denoiser; at large sigma the score vanishes whatever the network says.

References: Karras et al., 2022, arXiv 2206.00364, table 1 (EDM); Progressive Distillation (Salimans, Ho, 2022, arXiv
2202.00512), section 4 (v = alpha eps - sigma x0); Flow Matching (Lipman et al., 2022, arXiv 2210.02747), flow =
noise - x0; Reflected Diffusion Models (Lou, Ermon, 2023, arXiv 2304.04740).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import pi
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .process import GaussianProcess, Process, ReflectedProcess, align

WEIGHT_FLOOR = 0.01
"""Of b^2, in the weight of a reflected model: bounds it where there is next to nothing to learn."""


class Coefficients(NamedTuple):
    """The coefficients of D = c_skip x + c_out F(c_in x, time), each of the shape of sigma."""

    c_in: Tensor
    c_skip: Tensor
    c_out: Tensor


def vp_epsilon(sigma: Tensor) -> Coefficients:
    return Coefficients((1 + sigma**2) ** -0.5, torch.ones_like(sigma), -sigma)


def vp_sample(sigma: Tensor) -> Coefficients:
    return Coefficients((1 + sigma**2) ** -0.5, torch.zeros_like(sigma), torch.ones_like(sigma))


def vp_v_prediction(sigma: Tensor) -> Coefficients:
    alpha = (1 + sigma**2) ** -0.5
    return Coefficients(alpha, alpha**2, -sigma * alpha)


def flow_prediction(sigma: Tensor) -> Coefficients:
    return Coefficients(1 / (1 + sigma), 1 / (1 + sigma), -sigma / (1 + sigma))


def edm_epsilon(sigma: Tensor, sigma_data: float) -> Coefficients:
    variance = sigma**2 + sigma_data**2
    return Coefficients(variance**-0.5, sigma_data**2 / variance, sigma * sigma_data * variance**-0.5)


def edm_v_prediction(sigma: Tensor, sigma_data: float) -> Coefficients:
    c_in, c_skip, c_out = edm_epsilon(sigma, sigma_data)
    return Coefficients(c_in, c_skip, -c_out)


def preconditioning(prediction_type: str, sigma_data: float | None = None) -> Callable[[Tensor], Coefficients]:
    """Return the row of the table for a diffusers `prediction_type`; with `sigma_data`, the row of the EDM schedulers.

    Raises:
        ValueError: the table has no such row.
    """
    rows: dict[str, Callable[..., Coefficients]]
    if sigma_data is None:
        rows = {
            "epsilon": vp_epsilon,
            "sample": vp_sample,
            "v_prediction": vp_v_prediction,
            "flow_prediction": flow_prediction,
        }
    else:
        rows = {
            "epsilon": partial(edm_epsilon, sigma_data=sigma_data),
            "v_prediction": partial(edm_v_prediction, sigma_data=sigma_data),
        }
    if prediction_type not in rows:
        raise ValueError(f"prediction_type {prediction_type!r} is not one of {', '.join(rows)}")
    return rows[prediction_type]


class ScoreModel(ABC):
    """A network trained on the noise of a process: whatever it predicts, this gives its score."""

    process: Process

    @abstractmethod
    def __call__(self, x: Tensor, sigma: Tensor | float, **cond: Any) -> Tensor:
        """Return the model's own prediction, (B, ...): x0 for a `Denoiser`. `cond` reaches the network unchanged."""

    @abstractmethod
    def score(self, x: Tensor, sigma: Tensor | float, **cond: Any) -> Tensor:
        """Return grad_x log p_sigma(x), (B, ...)."""

    @abstractmethod
    def score_error(self, prediction: Tensor, x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
        """Return sigma (score - grad_x log p(x | x0)) of a prediction at (x, sigma), (B, ...)."""

    @abstractmethod
    def output_weight(self, sigma: Tensor) -> Tensor:
        """Return the weight of the score-matching loss that makes it the mean square error of the network's output."""


@dataclass(frozen=True)
class Denoiser(ScoreModel):
    """D(x, sigma, **cond) = E[x0 | x] of a network trained on Gaussian noise; computed in float32 at least.

    Args:
        network: F(model_input, time, **cond) -> raw output; `model_input` and the output are (B, ...).
        coefficients: sigma -> `Coefficients`, a row of the table above.
        time: sigma -> what the network is given as its time, of the shape of sigma.
    """

    network: Callable[..., Tensor]
    coefficients: Callable[[Tensor], Coefficients]
    time: Callable[[Tensor], Tensor]
    process: GaussianProcess = field(default=GaussianProcess(), init=False)

    def __call__(self, x: Tensor, sigma: Tensor | float, **cond: Any) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        sigma = align(sigma, x)
        c_in, c_skip, c_out = self.coefficients(sigma)
        return c_skip * x + c_out * self.network(c_in * x, self.time(sigma.flatten()), **cond)

    def eps(self, x: Tensor, sigma: Tensor | float, **cond: Any) -> Tensor:
        """Return the predicted noise, (x - D) / sigma."""
        denoised = self(x, sigma, **cond)
        return (x - denoised) / align(sigma, denoised)

    def score(self, x: Tensor, sigma: Tensor | float, **cond: Any) -> Tensor:
        denoised = self(x, sigma, **cond)
        return (denoised - x) / align(sigma, denoised) ** 2

    def score_error(self, prediction: Tensor, x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
        return (prediction - x0) / align(sigma, prediction)

    def output_weight(self, sigma: Tensor) -> Tensor:
        """Return 1 for epsilon, 1 + sigma^2 for v, and for an EDM network the weighting of Karras et al."""
        return (sigma / self.coefficients(sigma).c_out) ** 2


REFLECTED_PREDICTIONS = ("epsilon", "point")


def reflected_point(process: ReflectedProcess, output: Tensor, x: Tensor, sigma: Tensor | float) -> Tensor:
    """Return P, (B, ...), from the output of a network that predicts a point."""
    skip, c_out = _in_half_widths(process, x, sigma)
    # Clamped and never folded: a network overshoots the face that it means.
    return process.centre + process.width / 2 * (skip + c_out * output).clamp(-1, 1)


def reflected_output(process: ReflectedProcess, point: Tensor, x: Tensor, sigma: Tensor | float) -> Tensor:
    """Return the output of a network that predicts this point, (B, ...): the inverse of `reflected_point`."""
    skip, c_out = _in_half_widths(process, x, sigma)
    return ((point - process.centre) / (process.width / 2) - skip) / c_out


def _in_half_widths(process: ReflectedProcess, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return c_skip x and c_out where the box is [-1, 1]."""
    half = process.width / 2
    _, c_skip, c_out = vp_v_prediction(align(sigma, x) / half)
    return c_skip * (x - process.centre) / half, c_out


def reflected_eps(
    process: ReflectedProcess, prediction_type: str, output: Tensor, x: Tensor, sigma: Tensor | float
) -> Tensor:
    """Return eps = -sigma score, (B, ...), from a network's output, of either prediction."""
    if prediction_type == "epsilon":
        return output
    return -align(sigma, x) * process.target_score(x, reflected_point(process, output, x, sigma), sigma)


@dataclass(frozen=True)
class ReflectedModel(ScoreModel):
    """eps(x, sigma, **cond) = -sigma score of a network trained on a reflected process; in float32 at least.

    Args:
        network: F(x, time, **cond), see the table above; x and the output are (B, ...).
        time: sigma -> what the network is given as its time, of the shape of sigma.
        process: the box.
        prediction_type: `epsilon` or `point`.
    """

    network: Callable[..., Tensor]
    time: Callable[[Tensor], Tensor]
    process: ReflectedProcess = field(default=ReflectedProcess())
    prediction_type: str = "epsilon"

    def __call__(self, x: Tensor, sigma: Tensor | float, **cond: Any) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        output = self.network(x, self.time(align(sigma, x).flatten()), **cond).to(x.dtype)
        return reflected_eps(self.process, self.prediction_type, output, x, sigma)

    def score(self, x: Tensor, sigma: Tensor | float, **cond: Any) -> Tensor:
        eps = self(x, sigma, **cond)
        return -eps / align(sigma, eps)

    def score_error(self, prediction: Tensor, x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
        return -prediction - align(sigma, x) * self.process.target_score(x, x0, sigma)

    def output_weight(self, sigma: Tensor) -> Tensor:
        """Return 1 for epsilon. For a point 1/(b^2 + 0.01): b^2 = q/(e^q - 1), q = (pi sigma/width)^2, follows the mean
        square of eps itself, which vanishes where the law becomes uniform."""
        if self.prediction_type == "epsilon":
            return torch.ones_like(sigma)
        q = (pi * sigma / self.process.width) ** 2
        return 1 / (q / torch.expm1(q) + WEIGHT_FLOOR)
