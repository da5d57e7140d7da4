"""Fit the bridge that a script asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InputError
from ..fields import Ranged, arg
from .base import Bridge
from .flow import FlowBridge
from .gaussian import GaussianBridge
from .mixture import MixtureBridge
from .moments import DataMoments, data_moments


@dataclass
class BridgeArguments(Ranged):
    """Arguments of a script that name the bridge and its diffusion time T."""

    max_diffusion_time: float = arg(
        0.6, "T: the model is used on the diffusion times [0, T] alone.", above=0, at_most=1
    )
    bridge: Literal["gaussian", "mixture", "flow", "none"] = arg(
        "gaussian", "Auxiliary model of the data at T that sampling starts from; none: N(0, I)."
    )
    bridge_rank: int | None = arg(
        None, "Principal directions that are modelled; by default what suits the bridge.", at_least=1
    )
    bridge_components: int = arg(16, "Components of a mixture, at most.", at_least=2)
    max_bridge_samples: int = arg(10_000, "Fit the bridge to so many images, drawn at random.", at_least=2)


def fit_bridge(
    args: BridgeArguments,
    batches: Iterable[Any],
    scheduler: Any,
    *,
    num_classes: int | None,
    seed: int,
    measured_on: Mapping[str, Any],
    moments: DataMoments | None = None,
) -> Bridge | None:
    """Fit the bridge that the arguments ask for, and return `None` if they ask for none.

    `batches`, `scheduler`, `num_classes`, `seed`, `measured_on` and `moments` are those of `fit` of the bridges.

    Raises:
        InputError: the bridge refuses the data, the scheduler or the arguments.
    """
    if args.bridge == "none":
        return None
    rank = "rank" if args.bridge == "gaussian" else "latent_rank"
    options: dict[str, Any] = {rank: args.bridge_rank, "num_classes": num_classes, "measured_on": measured_on}
    options["moments"] = moments
    kind: Any = {"gaussian": GaussianBridge, "mixture": MixtureBridge, "flow": FlowBridge}[args.bridge]
    if args.bridge == "mixture":
        options["num_components"] = args.bridge_components
    if args.bridge != "gaussian":
        options["seed"] = seed
    try:
        return kind.fit(batches, scheduler, args.max_diffusion_time, **options)
    except (ImportError, ValueError) as error:
        raise InputError(f"--bridge {args.bridge}: {error}") from error


def shared_moments(args: BridgeArguments, batches: Any, num_classes: int | None) -> DataMoments:
    """Return the moments that bridges of these arguments have in common, at whatever T.

    Raises:
        InputError: the data are refused.
    """
    try:
        return data_moments(batches, args.bridge_rank if args.bridge == "gaussian" else None, num_classes, True)
    except ValueError as error:
        raise InputError(f"--bridge {args.bridge}: {error}") from error
