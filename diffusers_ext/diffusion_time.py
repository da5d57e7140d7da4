r"""How much diffusion time a model needs: its likelihood bound, cut at every T and started from several models of x_T.

A variance-preserving sampler may start at T < 1 from a model nu of the diffused data x_T, a bridge (N(0, I) at T = 1 is
the usual one). In the scheduler's own coordinates x_T = scale_T (x0 + sigma_T n), scale = (1 + sigma^2)^-1/2, for the
data x at sigma_min, of D dimensions, in nats,

    -E log q(x) <= E[-log nu(x_T)] + S(T)                                                        "negative bound"
                =  E[-log p(x)] + G(T) + KL[p_T || nu],        G(T) = int_0^T sigma E|s - grad log p_sigma|^2 dsigma,
    S(T) = int_{sigma_min}^{sigma_T} sigma E[|s|^2 - 2 s . grad log p(x_sigma | x)] dsigma - D log scale_T.

S is the paper's I(s, T) - R(T), what the score costs. Its last part changes the units: x_T has the density nu(x_T)
scale_T^D where x is x0 + sigma n. KL falls with T, and G grows. The integral up to T is part of the one up to T = 1: a
single pass over the levels (`nested_elbos`) serves all T, and all terms come from the same samples and noise. Standard
errors are those of the mean over the held-out samples, for differences those of the paired differences; they include
the noise of the levels. They take the samples for independent: an image that comes twice makes them too small.

**KL.** With U = E[-log N(x_1; 0, I)] + S(1) - S(T), the model's own bound on -E log p_T(x_T) from T to 1,

    E[-log nu(x_T)] - U  =  KL[p_T || nu] - (G(1) - G(T)) - KL[p_1 || N(0, I)]  <=  KL[p_T || nu]:

an unbiased estimate of a lower bound, low by what the score loses between T and 1, and below 0 where nu is the better
model of x_T. It is the difference of two negative bounds, too: what starting at T from nu costs against T = 1. It is
the true KL, but for that of T = 1, where the score is exact, and needs a model that was trained up to T = 1. With
labels it is that of p_T(x_T | y), on average over y. For N(0, I) there is an expansion for long T that knows no score,

    KL[p_T || N(0, I)] = 1/2 scale_T^2 |E x0|^2 + 1/4 scale_T^4 |Cov x0 - I|^2 + O(scale_T^6),

with |E x0|^2 and |Cov x0|^2 estimated without bias, of all classes together. With the moments of x_T, a Gaussian bridge
has neither term.

Shapes: samples (N,) by T and start; tables are (N, times) of S and (N, times, starts) of -log nu.

References: How Much Is Enough? A Study on Diffusion Times in Score-based Generative Models (Franzese, Rossi, Yang,
Finamore, D. Rossi, Filippone, Michiardi, 2022, arXiv 2206.05173); Feature Selection via Dependence Maximization (Song
et al., 2012), equation 5, which is |Cov|^2 for equal linear kernels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import floor, inf, log, log10, prod
from statistics import NormalDist
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .figures import agg_figure
from .files import replacing, write_file
from .interop import VPSchedule, denoiser_from, noise_schedule, require_vp
from .likelihood import Elbo, LogPrior, bits_per_dim, nested_elbos
from .networks import NetworkConvention
from .process import GaussianProcess
from .progress import progress_bar
from .randomness import randn_like
from .ranges import require

STANDARD_NORMAL = "N(0, I)"
MIN_SAMPLES = 4
"""The fewest samples that give |Cov x0|^2 without bias, and a standard error."""
MOMENT_SAMPLES = 2048
"""The moments of x0 are those of so many samples, the first ones, which are kept in memory."""
SIGNIFICANCE = 0.05
"""The probability that a best T is called different from T = 1 where none is, over all cells together."""


class BridgeLike(Protocol):
    """A model of x_T, in the coordinates of the scheduler's samples."""

    @property
    def config(self) -> Any:
        """`config.max_diffusion_time` is its T."""

    def log_prob(self, x: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """log nu(x), (n,), in nats."""

    def check(self, scheduler: Any, *, max_diffusion_time: float | None = None, shape: Sequence[int] | None) -> None:
        """Raise a ValueError if it belongs to another schedule, T or shape of samples."""


class Estimate(NamedTuple):
    """A mean over the held-out samples and its standard error."""

    mean: float
    std_error: float


class Terms(NamedTuple):
    """The terms of the bound for one T and start, in nats for each sample, except `bits_per_dim`."""

    start_term: Estimate
    """E[-log nu(x_T)]."""
    score_term: Estimate
    """S(T)."""
    negative_bound: Estimate
    """Their sum."""
    bits_per_dim: Estimate
    kl: Estimate | None
    """The lower bound on KL[p_T || nu], or the cost compared with T = 1; `None` if T = 1 is not among the times."""
    kl_expansion: float | None
    """The expansion of KL[p_T || N(0, I)]; `None` for other starts."""


Cell = tuple[float, str]

LEGEND = """\
Nats are for a whole image, bits per dimension for one of its values; less is better. *-log start* is what the start
costs, -log nu(x_T), *score* what the network costs below T; their sum is the *bound* of -log p(x0). *KL* is that of the
noisy data at T from the start, estimated from below, *expansion* the same for N(0, I) by its first terms."""


@dataclass(frozen=True, eq=False)
class DiffusionTimeReport:
    """The terms of the bound by T and start; `diffusion_time_report` makes it.

    Args:
        times, timesteps, sigmas: the times T, increasing, the last timestep of each, and sigma_T.
        starts: the names of the starts, `STANDARD_NORMAL` first.
        cells: all pairs (T, start) that were measured.
        shape: the shape of a sample.
        sigma_min, n: the noise level where the bound ends, and the evaluations of the network for each sample.
        start_terms: -log nu(x_T) of each sample, (N, times, starts), NaN where there is no cell; float64.
        score_terms: each sample's part of S(T), (N, times); float64.
        kl_expansion: the expansion of KL[p_T || N(0, I)], for each T.
        bin_width: the distance of the values of discrete data; 1 for the density of the data as they are.
    """

    times: tuple[float, ...]
    timesteps: tuple[int, ...]
    sigmas: tuple[float, ...]
    starts: tuple[str, ...]
    cells: tuple[Cell, ...]
    shape: tuple[int, ...]
    sigma_min: float
    n: int
    start_terms: Tensor
    score_terms: Tensor
    kl_expansion: tuple[float, ...]
    bin_width: float

    @property
    def reference(self) -> Cell | None:
        """The cell (1.0, `STANDARD_NORMAL`), the model as it is usually sampled; `None` if it was not measured."""
        return (1.0, STANDARD_NORMAL) if 1.0 in self.times else None

    @property
    def best(self) -> Cell:
        """The cell with the lowest negative bound."""
        return min(self.cells, key=lambda cell: self._negative_bound(cell).mean().nan_to_num(torch.inf).item())

    def terms(self, T: float, start: str = STANDARD_NORMAL) -> Terms:
        """Return all terms of one T and start.

        Raises:
            KeyError: this cell was not measured.
        """
        i, j = self._index((T, start))
        total, dims = self._negative_bound((T, start)), prod(self.shape)
        bits = bits_per_dim(-total, dims, levels=1, low=0.0, high=self.bin_width)
        return Terms(
            start_term=_estimate(self.start_terms[:, i, j]),
            score_term=_estimate(self.score_terms[:, i]),
            negative_bound=_estimate(total),
            bits_per_dim=_estimate(bits),
            kl=None if self.reference is None else self.difference((T, start), self.reference),
            kl_expansion=self.kl_expansion[i] if start == STANDARD_NORMAL else None,
        )

    def difference(self, cell: Cell, other: Cell) -> Estimate:
        """Return the negative bound of one cell minus that of another, in nats, from paired samples."""
        return _estimate(self._negative_bound(cell) - self._negative_bound(other))

    def verdict(self) -> str:
        """Say which T is best, and whether its difference from T = 1 exceeds the noise of the estimate."""
        best, rivals = self.best, len(self.cells) - 1
        text = f"The best bound is that of T = {best[0]:g}, started from {best[1]}"
        if self.reference is None:
            return f"{text}; T = 1 was not asked for, so there is nothing to compare it with."
        if best == self.reference:
            return f"{text}: no shorter time and no bridge is better."
        gain, error = self.difference(self.reference, best)
        z = NormalDist().inv_cdf(1 - SIGNIFICANCE / (2 * rivals))
        found = "distinguishable" if gain > z * error else "not distinguishable"
        return (
            f"{text}: better than T = 1 from {STANDARD_NORMAL} by {gain:.3g} ± {error:.2g} nats per sample, which is "
            f"{found} from it ({z:.1f} standard errors are needed, for the best of {rivals + 1})."
        )

    def table(self) -> str:
        """Return Markdown with a line for each T and start, the `Terms` as mean ± standard error, and a legend."""
        head = ["T", "timestep", "sigma", "start", "-log start, nats", "score, nats", "bound, nats", "bits/dim"]
        head += ["KL, nats", "expansion, nats"]
        lines = [head, ["---"] * len(head)]
        for T, name in self.cells:
            i, terms = self.times.index(T), self.terms(T, name)
            values = (terms.start_term, terms.score_term, terms.negative_bound, terms.bits_per_dim, terms.kl)
            expansion = "" if terms.kl_expansion is None else f"{terms.kl_expansion:.3g}"
            settings = [f"{T:g}", str(self.timesteps[i]), f"{self.sigmas[i]:.3g}", name]
            lines.append([*settings, *("" if v is None else _shown(v) for v in values), expansion])
        return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", LEGEND])

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers, ready for JSON; an estimate is [mean, standard error]."""
        rows = [
            {"T": T, "timestep": self.timesteps[i], "sigma": self.sigmas[i], "start": name}
            | self.terms(T, name)._asdict()
            for i, T, name in ((self.times.index(T), T, name) for T, name in self.cells)
        ]
        settings = {"shape": self.shape, "sigma_min": self.sigma_min, "n": self.n, "bin_width": self.bin_width}
        best = dict(zip(("T", "start"), self.best, strict=True))
        return {"num_samples": len(self.score_terms), **settings, "best": best, "verdict": self.verdict(), "rows": rows}

    def save(self, path: str | os.PathLike) -> None:
        """Write `to_dict` as JSON; the file is complete or absent."""
        write_file(path, json.dumps(self.to_dict(), indent=1))

    def plot(self, path: str | os.PathLike) -> None:
        """Draw the terms against T, minus those of the longest T and N(0, I), with bars of two standard errors.

        Raises:
            ImportError: matplotlib is not installed.
        """
        start, score = self.start_terms - self.start_terms[:, -1:, :1], self.score_terms - self.score_terms[:, -1:]
        figure = agg_figure(13, 4.2)
        left, middle, right = figure.subplots(1, 3)
        for j, name in enumerate(self.starts):
            rows = [i for i, T in enumerate(self.times) if (T, name) in self.cells]
            for axis, samples in ((left, start[:, rows, j]), (right, (start + score[..., None])[:, rows, j])):
                self._bars(axis, rows, samples, color=f"C{j}", label=name)
        self._bars(middle, range(len(self.times)), score, color="black", label="all starts")
        right.plot(self.times, self.kl_expansion, "x:", color="C0", label=f"{STANDARD_NORMAL}: expansion of KL")
        left.set(
            title="start: E[-log nu($x_T$)]", ylabel=f"nats, minus those of T = {self.times[-1]:g}, {STANDARD_NORMAL}"
        )
        middle.set(title="score: S(T)")
        right.set(title="their sum: what the short time costs", yscale="symlog")
        for axis in (left, middle, right):
            axis.axhline(0, color="grey", lw=0.8)
            axis.set(xlabel="diffusion time T")
            axis.legend(fontsize=8)
        with replacing(path) as aside:
            figure.savefig(aside, dpi=100, format=aside.suffix[1:] or "png")

    def _bars(self, axis: Any, rows: Sequence[int], samples: Tensor, **style: Any) -> None:
        means, errors = zip(*(_estimate(column) for column in samples.T), strict=True)
        axis.errorbar([self.times[i] for i in rows], means, [2 * e for e in errors], fmt="o-", ms=4, capsize=3, **style)

    def _index(self, cell: Cell) -> tuple[int, int]:
        if cell not in self.cells:
            raise KeyError(f"there is no (T, start) = {cell}, only {', '.join(map(str, self.cells))}")
        return self.times.index(cell[0]), self.starts.index(cell[1])

    def _negative_bound(self, cell: Cell) -> Tensor:
        i, j = self._index(cell)
        return self.start_terms[:, i, j] + self.score_terms[:, i]


@torch.no_grad()
def diffusion_time_report(
    model: Any,
    scheduler: Any,
    batches: Iterable[tuple[Tensor, Mapping[str, Tensor]]],
    bridges: Mapping[str, Sequence[BridgeLike]] | None = None,
    times: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 1.0),
    *,
    n: int = 64,
    sigma_min: float | None = None,
    levels: int | None = None,
    low: float = -1.0,
    high: float = 1.0,
    generator: torch.Generator | None = None,
    progress: bool = True,
    convention: NetworkConvention | None = None,
) -> DiffusionTimeReport:
    """Measure the terms of the likelihood bound of a model for every diffusion time T, from N(0, I) and from bridges.

    Args:
        model: a diffusers network in evaluation mode, any prediction type, trained up to the longest T; wrapped or not.
        scheduler: the stock scheduler that belongs to it, of a variance-preserving schedule.
        batches: (x0, conditions) of HELD-OUT data, (B, *shape), scaled as in training, on the model's device; the
            conditions are keyword arguments of the network, and `class_labels`, if any, reach the bridges, too.
        bridges: bridges by the name of their kind, each for another T among `times`; on the device of the data.
        times: the T, in any order; with 1.0 there are KL divergences and a comparison with T = 1.
        n: evaluations of the network for each sample in all, shared among the intervals between the T by their widths.
            A start is evaluated as often as the network is in the interval below its T.
        sigma_min: the level of the density that is bounded; by default the lowest that the network was trained for.
        levels, low, high: those of discrete data, if `dequantize` with the same values made x0. Then x0 itself is the
            point at sigma_min, and the bits per dimension bound those of the discrete data. Without `levels` x is x0 +
            sigma_min n, and they are those of its density.
        generator: the source of all randomness; by default a new one of seed 0, on the device of the data.
        progress: show a progress bar.
        convention: as for `denoiser_from`.

    Raises:
        ValueError: a number is out of range; the schedule is not variance-preserving (reflected models, flow matching,
            EDM); a T is outside (0, 1], not above sigma_min, or has the timestep of another; n is below the number of
            `times`; a bridge has another T, schedule or shape; there are fewer than `MIN_SAMPLES` samples, or they have
            several shapes.
    """
    _check_numbers(sigma_min, levels, low, high)
    schedule, times = require_vp(noise_schedule(scheduler)), tuple(sorted(times))
    timesteps = _timesteps(schedule, times, n)
    given = _by_cell(bridges or {}, times, schedule)
    starts = (STANDARD_NORMAL, *dict.fromkeys(name for _, name in given))
    denoiser, sigmas = denoiser_from(model, scheduler, convention), [schedule.sigmas[t].item() for t in timesteps]
    scales = schedule.scale(torch.tensor(sigmas, dtype=torch.float64)).tolist()
    sigma_min = schedule.sigma_min if sigma_min is None else sigma_min
    laws = [[given.get((T, name)) for name in starts[1:]] for T in times]
    elbos, kept, shape, seen = list[list[Elbo]](), list[Tensor](), torch.Size(), 0
    for x0, cond in _of_one_shape(progress_bar(batches, "bound by diffusion time", shown=progress, unit="batch")):
        if seen == 0:
            shape = x0.shape[1:]
            for (T, _), bridge in given.items():
                bridge.check(scheduler, max_diffusion_time=T, shape=shape)
            generator = torch.Generator(x0.device).manual_seed(0) if generator is None else generator
        x = x0 + sigma_min * randn_like(x0, generator) if levels is None else x0
        starts_of = partial(_log_starts, labels=cond.get("class_labels"))
        options = {"n": n, "generator": generator, "log_priors": list(map(starts_of, scales, laws)), **cond}
        elbos.append(nested_elbos(denoiser, x, sigma_min, sigmas, **options))
        if seen < MOMENT_SAMPLES:
            kept.append(x0.flatten(1)[: MOMENT_SAMPLES - seen])
        seen += len(x0)
    if seen < MIN_SAMPLES:
        raise ValueError(f"{seen} held-out samples are too few: errors and moments need {MIN_SAMPLES}")
    start_terms = -torch.cat([torch.stack([bound.prior for bound in each]) for each in elbos], 2)
    score_terms = -torch.cat([torch.stack([bound.diffusion for bound in each]) for each in elbos], 1)
    square_mean, square_cov = _moments(torch.cat(kept).cpu().double())
    # The bound is in units of x, the start in those of x_T.
    units = prod(shape) * torch.tensor(scales, dtype=torch.float64).log()
    return DiffusionTimeReport(
        times=times,
        timesteps=timesteps,
        sigmas=tuple(sigmas),
        starts=starts,
        cells=tuple((T, name) for T in times for name in starts if (T, name) in given or name == STANDARD_NORMAL),
        shape=tuple(shape),
        sigma_min=sigma_min,
        n=n,
        start_terms=start_terms.cpu().double().permute(2, 0, 1) + units[:, None],
        score_terms=score_terms.cpu().double().T - units,
        kl_expansion=tuple(scale**2 * square_mean / 2 + scale**4 * square_cov / 4 for scale in scales),
        bin_width=1.0 if levels is None else (high - low) / levels,
    )


def _check_numbers(sigma_min: float | None, levels: int | None, low: float, high: float) -> None:
    require("sigma_min", sigma_min, above=0)
    require("levels", levels, at_least=1)
    require("low", low)
    require("high", high, above=low)


def _of_one_shape(batches: Iterable[tuple[Tensor, Any]]) -> Iterator[tuple[Tensor, Any]]:
    """Yield the batches, in float32 at least.

    Raises:
        ValueError: the samples of a batch have another shape than those of the first.
    """
    shape: torch.Size | None = None
    for x0, cond in batches:
        shape = x0.shape[1:] if shape is None else shape
        if x0.shape[1:] != shape:
            raise ValueError(f"all samples must have one shape, got {tuple(shape)} and {tuple(x0.shape[1:])}")
        yield x0.to(torch.promote_types(x0.dtype, torch.float32)), cond


def _timesteps(schedule: VPSchedule, times: Sequence[float], n: int) -> tuple[int, ...]:
    """Return the last timestep of each T."""
    timesteps = tuple(schedule.last_timestep(T) for T in times)
    if not times or len(set(timesteps)) < len(times):
        raise ValueError(f"times must be one or more, of a timestep each: {times} are timesteps {timesteps}")
    if n < len(times):
        raise ValueError(f"n must be at least {len(times)}, the number of times, got {n}")
    return timesteps


def _by_cell(
    bridges: Mapping[str, Sequence[BridgeLike]], times: Sequence[float], schedule: VPSchedule
) -> dict[Cell, BridgeLike]:
    """Return the bridges by cell; the T of a cell is that of `times` with the bridge's timestep."""
    given: dict[Cell, BridgeLike] = {}
    by_timestep = {schedule.last_timestep(T): T for T in times}
    for name, bridge in ((name, bridge) for name, group in bridges.items() for bridge in group):
        own = bridge.config.max_diffusion_time
        T = by_timestep.get(schedule.last_timestep(own))
        if T is None or (T, name) in given or name == STANDARD_NORMAL:
            raise ValueError(
                f"bridge {name!r} of T={own}: its T must be one of {times}, once for a name, which is not "
                f"{STANDARD_NORMAL!r}"
            )
        given[T, name] = bridge
    return given


def _log_starts(scale: float, bridges: Sequence[BridgeLike | None], labels: Tensor | None) -> LogPrior:
    """Return the function (x, sigma) -> log densities of x = x_T / scale by N(0, I) and each bridge, NaN for none."""

    def log_prior(x: Tensor, sigma: float) -> Tensor:
        values = [GaussianProcess().log_prior(scale * x, 1.0)]
        for bridge in bridges:
            missing = torch.full_like(values[0], torch.nan)
            values.append(missing if bridge is None else bridge.log_prob(scale * x, class_labels=labels).to(missing))
        return torch.stack(values) + prod(x.shape[1:]) * log(scale)

    return log_prior


def _moments(x0: Tensor) -> tuple[float, float]:
    """Return |E x0|^2 and |Cov x0 - I|^2 from (N, D), without bias: means over pairs, triples and quadruples."""
    n, gram = len(x0), x0 @ x0.T
    square = gram.diagonal().mean()
    gram = gram - gram.diagonal().diag()
    total, rows = gram.sum(), gram.sum(1)
    square_mean = total / (n * (n - 1))
    pairs = gram.square().sum() + total**2 / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows.square().sum()
    return square_mean.item(), (pairs / (n * (n - 3)) - 2 * (square - square_mean) + x0.shape[1]).item()


def _estimate(samples: Tensor) -> Estimate:
    return Estimate(samples.mean().item(), samples.std().item() / len(samples) ** 0.5)


def _shown(estimate: Estimate) -> str:
    """Return an estimate as text, with two digits of its error."""
    digits = max(0, 1 - floor(log10(estimate.std_error))) if 0 < estimate.std_error < inf else 3
    return f"{estimate.mean:.{digits}f} ± {estimate.std_error:.{digits}f}"
