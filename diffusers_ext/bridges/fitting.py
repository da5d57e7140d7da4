"""Fit the bridge that a script asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InputError
from ..fields import arg
from .base import Bridge
from .flow import FlowBridge
from .gaussian import GaussianBridge
from .mixture import MixtureBridge


@dataclass
class BridgeArguments:
    """Arguments of a script that name the bridge and its diffusion time T."""

    max_diffusion_time: float = arg(0.6, "T: the model is used on the diffusion times [0, T] alone.")
    bridge: Literal["gaussian", "mixture", "flow", "none"] = arg(
        "gaussian", "Auxiliary model of the data at T that sampling starts from; none: N(0, I)."
    )
    bridge_rank: int | None = arg(None, "Principal directions that are modelled; by default what suits the bridge.")
    bridge_components: int = arg(16, "Components of a mixture, at most.")
    max_bridge_samples: int = arg(10_000, "Fit the bridge to so many images, drawn at random.")

    def __post_init__(self) -> None:
        getattr(super(), "__post_init__", lambda: None)()
        if not 0 < self.max_diffusion_time <= 1:
            raise InputError(f"--max_diffusion_time must be above 0 and at most 1, got {self.max_diffusion_time}")
        if self.max_bridge_samples < 2:
            raise InputError(f"--max_bridge_samples must be at least 2, got {self.max_bridge_samples}")
        if self.bridge == "mixture" and self.bridge_components < 2:
            raise InputError(f"--bridge_components must be at least 2, got {self.bridge_components}")


def fit_bridge(
    args: BridgeArguments,
    batches: Iterable[Any],
    scheduler: Any,
    *,
    num_classes: int | None,
    seed: int,
    measured_on: Mapping[str, Any],
) -> Bridge | None:
    """Fit the bridge that the arguments ask for, and return `None` if they ask for none.

    `batches`, `scheduler`, `num_classes`, `seed` and `measured_on` are those of `fit` of the bridges.

    Raises:
        InputError: the bridge refuses the data, the scheduler or the arguments.
    """
    if args.bridge == "none":
        return None
    rank = "rank" if args.bridge == "gaussian" else "latent_rank"
    options: dict[str, Any] = {rank: args.bridge_rank, "num_classes": num_classes, "measured_on": measured_on}
    kind: Any = {"gaussian": GaussianBridge, "mixture": MixtureBridge, "flow": FlowBridge}[args.bridge]
    if args.bridge == "mixture":
        options["num_components"] = args.bridge_components
    if args.bridge != "gaussian":
        options["seed"] = seed
    try:
        return kind.fit(batches, scheduler, args.max_diffusion_time, **options)
    except (ImportError, ValueError) as error:
        raise InputError(f"--bridge {args.bridge}: {error}") from error
