r"""The bridge whose leading whitened coordinates follow a normalising flow.

An invertible map f, given the class, takes w to u = f(w) ~ N(0, I), so that

    log q(w) = log N(f(w); 0, I) + log |det df/dw|,        w = f^-1(u),

and f maximises the mean of log q(w) over diffused data. f composes transforms by rational-quadratic splines, in each of
which the coordinates, in an order of its own, are divided into `passes` groups: the spline of a coordinate depends on
those in earlier groups. One evaluation of its network judges w; as many as there are groups draw it. Two groups are a
coupling, and l of them, one for each coordinate, are autoregressive: richer, and slow to draw. A new f is the identity,
q = N(0, I): training starts from the Gaussian bridge and never ends with less.

References: A Study on Diffusion Times (arXiv 2206.05173, see the package); Neural Spline Flows (Durkan, Bekasov,
Murray, Papamakarios, 2019, arXiv 1906.04032).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..progress import progress_bar
from ..ranges import require
from .base import Bridge, checked_scheduler, default_latent_rank, require_latent_rank, standard_log_prob
from .held_out import HELD_OUT, Batch, divide, held_out_batch, held_out_loss, warn_gaussian_is_kept
from .moments import DataMoments, data_moments, require_repeatable

TRANSFORMS, PASSES = 4, 4
"""Of a new flow: on digits as likely as an autoregressive one of three, and six times as fast to draw."""
EVALUATE_EVERY = 50
"""A flow is evaluated every so many steps of its training."""


class FlowBridge(Bridge):
    """q is a neural spline flow (zuko's NSF) of the whitened coordinates, given the class.

    Args:
        latent_rank: l, from 1 to r.
        transforms: the number of transforms that are composed.
        hidden_features: widths of the layers of the networks that give the splines of a transform.
        bins: of a spline; beyond 5 standard deviations it is the identity.
        passes: groups of coordinates of a transform, in an order drawn from the seed; `None` is autoregressive, in the
            given and the reversed order in turn.
        seed: the seed of the initial weights.
        shape, max_diffusion_time, scheduler, rank, num_classes, measured_on: as for `Bridge`.

    Attributes:
        flow: `zuko.flows.NSF`, from w to N(0, I).

    Raises:
        ValueError: as `Bridge` does.
        ImportError: zuko is not installed.
    """

    _keep_in_fp32_modules: ClassVar = [*Bridge._keep_in_fp32_modules, "flow"]

    @register_to_config
    def __init__(
        self,
        shape: Sequence[int],
        max_diffusion_time: float,
        scheduler: Mapping[str, Any],
        rank: int,
        latent_rank: int,
        num_classes: int | None = None,
        transforms: int = 3,
        hidden_features: Sequence[int] = (128, 128),
        bins: int = 8,
        seed: int = 0,
        measured_on: Mapping[str, Any] | None = None,
        passes: int | None = None,
    ) -> None:
        require("passes", passes, at_least=2)
        super().__init__(shape, max_diffusion_time, scheduler, rank, num_classes, measured_on)
        require_latent_rank(latent_rank, rank)
        layers, grouped = tuple(hidden_features), {} if passes is None else {"passes": passes, "randperm": True}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the accelerators, too
            self.flow = _flows().NSF(
                latent_rank, num_classes or 0, bins=bins, transforms=transforms, hidden_features=layers, **grouped
            )
        for spline in self.flow.transform.transforms:
            last = spline.hyper[-1].parameters() if hasattr(spline, "hyper") else spline.parameters()
            for parameter in last:
                nn.init.zeros_(parameter)

    @classmethod
    def fit(
        cls,
        batches: Iterable[Any],
        scheduler: Any,
        max_diffusion_time: float,
        *,
        rank: int | None = None,
        latent_rank: int | None = None,
        num_classes: int | None = None,
        shrink: bool = True,
        transforms: int = TRANSFORMS,
        hidden_features: Sequence[int] = (128, 128),
        bins: int = 8,
        passes: int | None = PASSES,
        max_steps: int = 5000,
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        held_out: float = HELD_OUT,
        patience: int = 10,
        seed: int = 0,
        measured_on: Mapping[str, Any] | None = None,
        progress: bool = True,
        moments: DataMoments | None = None,
    ) -> FlowBridge:
        """Estimate the moments, then train the flow on diffused data, with new noise at each step (`train_flow`).

        Args:
            batches: as for `GaussianBridge.fit`; they are read twice. It holds N l numbers.
            rank: r, as for `GaussianBridge.fit`.
            latent_rank: l; LATENT_RANK by default, r at most.
            transforms, hidden_features, bins, passes: as for the class.
            max_steps, learning_rate, patience: as for `train_flow`.
            batch_size: samples of a step.
            held_out: the share of the samples that is kept for evaluation, in (0, 1).
            seed: the seed of initial weights, batches and noise.
            scheduler, max_diffusion_time, num_classes, shrink, measured_on, progress, moments: as for
                `GaussianBridge.fit`.

        Returns:
            The bridge, on the CPU; trained on the device of the data. `measured_on["gain_over_gaussian"]` is the gain
            on held-out data in nats.

        Raises:
            ValueError: a number is out of range, held_out leaves nothing to train or to evaluate on, batches can be
                read once only; or as `GaussianBridge.fit` does.
            ImportError: zuko is not installed.
        """
        _flows()
        counts = {"transforms": transforms, "max_steps": max_steps, "batch_size": batch_size, "patience": patience}
        for name, count in counts.items():
            require(name, count, at_least=1)
        require("bins", bins, at_least=2)
        require("passes", passes, at_least=2)
        require("learning_rate", learning_rate, above=0)
        require("held_out", held_out, above=0, below=1)
        require_repeatable(batches)
        stored, layers = checked_scheduler(scheduler, max_diffusion_time), list(hidden_features)
        data = data_moments(batches, rank, num_classes, progress) if moments is None else moments
        latent_rank = default_latent_rank(data.rank) if latent_rank is None else latent_rank
        sizes = {"transforms": transforms, "hidden_features": layers, "bins": bins, "passes": passes, "seed": seed}
        bridge = cls(data.shape, max_diffusion_time, stored, data.rank, latent_rank, num_classes, **sizes)
        bridge._set_moments(data.laws(shrink))
        latents, generator = bridge._latents(batches, progress), torch.Generator().manual_seed(seed)
        training, evaluated = divide(len(latents.labels), held_out, generator)

        def draw() -> Batch:
            return latents.draw(training[torch.randint(len(training), (batch_size,), generator=generator)], generator)

        steps, gain = train_flow(
            bridge.flow,
            bridge._flow_log_prob,
            draw,
            held_out_batch(latents, evaluated, generator),
            learning_rate,
            max_steps=max_steps,
            patience=patience,
            progress=progress,
        )
        settings = {"shrink": shrink, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed}
        settings |= {"held_out": held_out, "steps": steps, "gain_over_gaussian": gain}
        bridge.register_to_config(measured_on=data.notes(measured_on, settings))
        return bridge.to("cpu").eval()

    def _transform(self, labels: Tensor, like: Tensor) -> Any:
        """Return f given the classes, as zuko's transform."""
        classes = self.config.num_classes
        return self.flow.transform(None if classes is None else nn.functional.one_hot(labels, classes).to(like))

    def _flow_log_prob(self, w: Tensor, labels: Tensor) -> Tensor:
        u, log_determinant = self._transform(labels, w).call_and_ladj(w)
        return standard_log_prob(u) + log_determinant

    def _sample_latent(self, noise: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
        return self._transform(_constant(k, noise), noise).inv(noise)

    def _latent_log_prob(self, w: Tensor, k: int) -> Tensor:
        return self._flow_log_prob(w, _constant(k, w))


def train_flow(
    flow: nn.Module,
    log_prob: Callable[[Tensor, Tensor], Tensor],
    draw: Callable[[], Batch],
    held_out: Batch,
    learning_rate: float,
    *,
    max_steps: int,
    patience: int,
    progress: bool,
) -> tuple[int, float]:
    """Maximise the mean of log q(w) over drawn batches by Adam, and keep the weights that are best on held-out data.

    Training stops after `patience` evaluations without a better one, or at the first that is not finite. The best
    weights may be those it starts from, which are those of a Gaussian; then it warns.

    Args:
        flow: the module that is trained.
        log_prob: returns log q(w), (n,), of w and labels.
        draw: draws a batch.
        held_out: the batch of every evaluation.
        learning_rate: of Adam.
        max_steps: the most steps; EVALUATE_EVERY of them lie between evaluations.
        patience: a number of evaluations.
        progress: whether a progress bar is shown.

    Returns:
        The step of the best weights, and by how much they are better than the first, in nats for each sample.
    """
    optimizer = torch.optim.Adam(flow.parameters(), learning_rate)
    best, best_step, waited = _copy(flow), 0, 0
    start = lowest = held_out_loss(log_prob, held_out)
    bar = progress_bar(range(1, max_steps + 1), "training the flow", shown=progress)
    for step in bar:
        loss = -log_prob(*draw()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVALUATE_EVERY and step != max_steps:
            continue
        found = held_out_loss(log_prob, held_out)
        bar.set_postfix(gain_over_gaussian=start - found)
        if found < lowest:
            best, best_step, lowest, waited = _copy(flow), step, found, 0
            continue
        waited += 1
        if not isfinite(found):
            warnings.warn(f"the flow diverged by step {step}: that of step {best_step} is kept", stacklevel=3)
        if not isfinite(found) or waited == patience:
            break
    bar.close()
    flow.load_state_dict(best)
    if best_step == 0:
        warn_gaussian_is_kept("flow")
    return best_step, start - lowest


def _flows() -> Any:
    try:
        from zuko import flows
    except ImportError as error:
        raise ImportError("FlowBridge needs zuko: pip install zuko") from error
    return flows


def _constant(k: int, like: Tensor) -> Tensor:
    """Return the label k for each row."""
    return torch.full((len(like),), k, device=like.device)


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
