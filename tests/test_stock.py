"""The lists of diffusers' schedulers. Truth: the schedulers that diffusers has."""

import subprocess
import sys

import diffusers
import pytest

import diffusers_ext
from diffusers_ext.schedulers.scheduling_calibrated import CALIBRATED_SCHEDULERS, calibrated_class
from diffusers_ext.schedulers.scheduling_short_time import SHORT_TIME_SCHEDULERS, short_time_class
from diffusers_ext.stock import EDM_SCHEDULERS, FLOW_SCHEDULERS, NOT_SWAPPED_IN, UNKNOWN, VP_SCHEDULERS


def of_diffusers():
    """The names of all schedulers, also of those that need a library that is not installed."""
    ours = set(diffusers_ext.__all__)
    return {name for name in dir(diffusers) if name.endswith("Scheduler") and name not in ours}


def test_every_scheduler_of_diffusers_is_decided_on_once():
    lists = (VP_SCHEDULERS, FLOW_SCHEDULERS, EDM_SCHEDULERS, frozenset(UNKNOWN))
    assert sum(map(len, lists)) == len(frozenset().union(*lists))
    undecided = of_diffusers() - frozenset().union(*lists)
    assert not undecided, f"put these into the lists of diffusers_ext/stock.py: {sorted(undecided)}"
    assert frozenset().union(*lists) <= of_diffusers()


def test_all_that_pipelines_sample_with_have_subclasses():
    known = VP_SCHEDULERS | FLOW_SCHEDULERS | EDM_SCHEDULERS
    assert {n for n in CALIBRATED_SCHEDULERS if n[:9] != "ShortTime"} == known - NOT_SWAPPED_IN.keys()
    assert set(SHORT_TIME_SCHEDULERS) == VP_SCHEDULERS - NOT_SWAPPED_IN.keys()


def test_a_refusal_says_why():
    with pytest.raises(
        ValueError, match=r"no short-time IPNDMScheduler: it has noise levels, times or steps of its own; there"
    ):
        short_time_class("IPNDMScheduler")
    with pytest.raises(ValueError, match="no calibrated DDIMInverseScheduler: it goes from images to noise; there"):
        calibrated_class("DDIMInverseScheduler")
    with pytest.raises(ValueError, match="no short-time EDMEulerScheduler: it is not variance-preserving; there are"):
        short_time_class("EDMEulerScheduler")


def test_without_an_optional_library_only_its_scheduler_is_missing():
    code = """
import sys
sys.modules["torchsde"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "torchsde" else find(name, *a)
from diffusers_ext.schedulers.scheduling_calibrated import CALIBRATED_SCHEDULERS, calibrated_class
assert "DDIMScheduler" in CALIBRATED_SCHEDULERS and "DPMSolverSDEScheduler" not in CALIBRATED_SCHEDULERS
try:
    calibrated_class("DPMSolverSDEScheduler")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "no calibrated DPMSolverSDEScheduler: install torchsde" in done.stdout, done.stderr
