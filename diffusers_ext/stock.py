"""The schedulers of diffusers: those whose noise levels and times are known, and those that subclasses are made of.

Every scheduler of diffusers is in one of the lists. The tests fail where a new version has one that is in none.
"""

from __future__ import annotations

from typing import Any

import diffusers


def _schedulers(names: str) -> frozenset[str]:
    return frozenset(f"{name}Scheduler" for name in names.split())


VP_SCHEDULERS = _schedulers("""
    CogVideoXDDIM CogVideoXDPM DDIM DDIMInverse DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep
    DPMSolverMultistepInverse DPMSolverSDE DPMSolverSinglestep EulerAncestralDiscrete EulerDiscrete HeunDiscrete
    KDPM2AncestralDiscrete KDPM2Discrete LCM LMSDiscrete PNDM SASolver TCD UniPCMultistep
""")
FLOW_SCHEDULERS = _schedulers("FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM")
EDM_SCHEDULERS = _schedulers("EDMDPMSolverMultistep EDMEuler")

NOT_SWAPPED_IN = _schedulers("DDIMInverse DDIMParallel DDPMParallel DPMSolverMultistepInverse")
"""They go from images to noise, or take all steps at once: only their noise levels are known."""

UNKNOWN = {
    name: reason
    for reason, names in {
        "is of discrete data": "Amused BlockRefinement DiscreteDDIM EntropyBound VQDiffusion",
        "is of distilled models that have no noise to predict": "CMStochasticIterative FlowMapEulerDiscrete Piflow SCM",
        "has times or noise levels of its own": """
            CosineDPMSolverMultistep DDPMWuerstchen IPNDM KarrasVe LTXEulerAncestralRF MiniMaxH3 ScoreSdeVe""",
        "changes the sample between the stages of a call": "Helios HeliosDMD RFD4Proteina RePaint",
        "takes outputs of an unCLIP prior": "UnCLIP",
    }.items()
    for name in sorted(_schedulers(names))
}
"""The other schedulers, with the reason why there is no subclass of them."""


def stock_class(name: str) -> Any:
    """Return a scheduler of diffusers by its name; `None` where a library that it needs is not installed."""
    kind = getattr(diffusers, name)
    return None if "dummy" in type.__getattribute__(kind, "__module__") else kind


def swapped_in(*families: frozenset[str]) -> dict[str, Any]:
    """Return the classes of the families that pipelines sample with and that can be imported, by their names."""
    names = sorted(frozenset().union(*families) - NOT_SWAPPED_IN)
    return {name: kind for name in names if (kind := stock_class(name)) is not None}


def require_known(name: str, made: str, known: dict[str, Any]) -> None:
    """Refuse a scheduler that there is no subclass of.

    Args:
        made: what the subclass would be called, for the message.

    Raises:
        ValueError: the message has the reason, and names those there are.
    """
    if name in known:
        return
    reason = f": it {UNKNOWN[name]}" if name in UNKNOWN else ""
    if name in VP_SCHEDULERS and stock_class(name) is None:
        reason = f": install {'torchsde' if 'SDE' in name else 'scipy'}"
    raise ValueError(f"there is no {made} {name}{reason}; there are those of {', '.join(known)}")
