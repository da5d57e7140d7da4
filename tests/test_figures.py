"""Pictures of reports. Truth: matplotlib's own global state, and the numbers read back from the axes."""

import sys

import matplotlib
import numpy as np
import pytest
import torch
from test_evaluation_report import evaluation

from diffusers_ext import Calibration, DiffusionTimeReport
from diffusers_ext.diffusion_time import STANDARD_NORMAL
from diffusers_ext.reports.calibration_card import offsets_figure, plot
from diffusers_ext.reports.plots import plots


def calibration() -> Calibration:
    """Three levels, the second within the noise."""
    made = Calibration((2, 4, 4), (0.1, 1.0, 10.0))
    made.offsets[:] = torch.randn(made.offsets.shape, generator=torch.Generator().manual_seed(0))
    made.squared_norm[:, 0] = torch.tensor([0.32, 0.02, 0.08])
    made.noise_floor[:, 0] = torch.tensor([0.0032, 0.0032, 0.0002])
    made.shrinkage[:, 0] = torch.tensor([0.9, 0.0, 0.8])
    return made


def diffusion_time_report() -> DiffusionTimeReport:
    terms = torch.randn(5, 2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return DiffusionTimeReport(
        times=(0.5, 1.0),
        timesteps=(499, 999),
        sigmas=(3.5, 157.0),
        starts=(STANDARD_NORMAL,),
        cells=((0.5, STANDARD_NORMAL), (1.0, STANDARD_NORMAL)),
        shape=(1,),
        sigma_min=0.01,
        n=4,
        start_terms=terms,
        score_terms=terms[..., 0],
        kl_expansion=(0.2, 0.01),
        bin_width=1.0,
    )


PICTURES = {
    "calibration": lambda path: plot(calibration(), path),
    "diffusion time": lambda path: diffusion_time_report().plot(path),
    "evaluation": lambda path: path.write_bytes(plots(evaluation())["quality_nfe.png"]),
}


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_a_picture_leaves_the_global_state_of_matplotlib_alone(draw, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "backend", "pdf")
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    settings = dict(matplotlib.rcParams)
    draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules
    assert matplotlib.get_backend() == "pdf"
    assert dict(matplotlib.rcParams) == settings


def test_a_calibration_is_drawn_with_its_numbers() -> None:
    made = calibration()
    curves, *images = offsets_figure(made).axes
    error, floor, hollow = (line.get_xydata() for line in curves.lines)
    np.testing.assert_allclose(error, [[0.1, 0.1], [1.0, 0.025], [10.0, 0.05]], rtol=1e-6)  # (squared norm / 32)^1/2
    np.testing.assert_allclose(floor, [[0.1, 0.01], [1.0, 0.01], [10.0, 0.0025]], rtol=1e-6)
    np.testing.assert_allclose(hollow, [[1.0, 0.025]], rtol=1e-6)
    for level, axis in enumerate(images):
        np.testing.assert_allclose(axis.images[0].get_array(), made.offsets[level, 0].numpy().mean(0), rtol=1e-5)
    assert len(images) == 3
