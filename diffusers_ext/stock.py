"""The schedulers of diffusers: those whose noise levels and times are known, and those that subclasses are made of.

Every scheduler of diffusers is in one of the lists. The tests fail where a new version has one that is in none.
"""

from __future__ import annotations

from typing import Any

import diffusers


def class_names(suffix: str, names: str) -> frozenset[str]:
    """Return the names of classes from a text that leaves their common suffix out."""
    return frozenset(f"{name}{suffix}" for name in names.split())


VP_SCHEDULERS = class_names(
    "Scheduler",
    """
    CogVideoXDDIM CogVideoXDPM DDIM DDIMInverse DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep
    DPMSolverMultistepInverse DPMSolverSDE DPMSolverSinglestep EulerAncestralDiscrete EulerDiscrete HeunDiscrete
    KDPM2AncestralDiscrete KDPM2Discrete LCM LMSDiscrete PNDM SASolver TCD UniPCMultistep
""",
)
FLOW_SCHEDULERS = class_names("Scheduler", "FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM")
EDM_SCHEDULERS = class_names("Scheduler", "EDMDPMSolverMultistep EDMEuler")


def _with_reason(names_by_reason: dict[str, str]) -> dict[str, str]:
    return {name: reason for reason, names in names_by_reason.items() for name in class_names("Scheduler", names)}


NOT_SWAPPED_IN = _with_reason(
    {
        "goes from images to noise": "DDIMInverse DPMSolverMultistepInverse",
        "takes all steps at once": "DDIMParallel DDPMParallel",
    }
)
"""Schedulers of known noise levels that there are no subclasses of, with the reason."""

UNKNOWN = _with_reason(
    {
        "is of discrete data": "Amused BlockRefinement DiscreteDDIM EntropyBound VQDiffusion",
        "is of distilled models": "CMStochasticIterative FlowMapEulerDiscrete HeliosDMD Piflow SCM",
        "has noise levels, times or steps of its own": """
            CosineDPMSolverMultistep DDPMWuerstchen Helios IPNDM KarrasVe LTXEulerAncestralRF MiniMaxH3 RFD4Proteina
            RePaint ScoreSdeVe UnCLIP""",
    }
)
"""The other schedulers, with the reason why their models cannot be used here."""

NEEDS = {"DPMSolverSDEScheduler": "torchsde", "LMSDiscreteScheduler": "scipy"}
"""Libraries without which diffusers has a scheduler by name only."""


def stock_class(name: str) -> Any:
    """Return a scheduler of diffusers by its name; `None` where a library that it needs is not installed."""
    kind = getattr(diffusers, name)
    return None if "dummy" in type.__getattribute__(kind, "__module__") else kind


def swapped_in(*families: frozenset[str]) -> dict[str, Any]:
    """Return the classes of the families that pipelines sample with and that can be imported, by their names."""
    names = sorted(frozenset().union(*families) - NOT_SWAPPED_IN.keys())
    return {name: kind for name in names if (kind := stock_class(name)) is not None}


def require_known(name: str, made: str, known: dict[str, Any]) -> None:
    """Refuse a scheduler that there is no subclass of.

    Args:
        made: the kind of subclass, for the message.
        known: the subclasses by the names of their stock schedulers.

    Raises:
        ValueError: the message has the reason, and names those there are.
    """
    if name in known:
        return
    if name in NEEDS:
        reason = f": install {NEEDS[name]}"
    elif name in FLOW_SCHEDULERS | EDM_SCHEDULERS:
        reason = ": it is not variance-preserving"
    else:
        reason = f": it {why}" if (why := (NOT_SWAPPED_IN | UNKNOWN).get(name)) else ""
    raise ValueError(f"there is no {made} {name}{reason}; there are those of {', '.join(known)}")
