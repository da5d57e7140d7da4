"""The card of a calibration: what it says about a model, in words, numbers and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isnan, prod
from pathlib import Path
from typing import Any

from ..calibration import PER_CHANNEL, Calibration
from ..figures import agg_figure
from ..files import replacing, shown
from .card import save_card, shown_command, table

# A gain below the first, in bits per dimension, from offsets below the second, in eps, makes no visible difference.
_SMALL_GAIN, _SMALL_OFFSET = 1e-3, 3e-3


def summary(calibration: Calibration) -> dict[str, Any]:
    """Return numbers by row and level, ready for JSON; offsets are root mean squares over the coordinates, in eps."""
    rms = (calibration.table("squared_norm").clamp(min=0) / prod(calibration.config.shape)).sqrt()
    kept = calibration.kept_per_channel().tolist() if calibration.config.has_channels else []
    return {
        "sigma": list(calibration.config.sigmas),
        "rows": list(calibration.config.rows),
        "per": calibration.config.per,
        "share_kept_per_channel": [None if isnan(share) else share for share in kept],
        "mean_error": rms.T.tolist(),
        "standard_error": calibration.std_error.T.tolist(),
        "used_share": calibration.table("shrinkage").T.tolist(),
        "num_samples": calibration.num_samples.T.tolist(),
        "likelihood_gain_in_bits_per_dimension": calibration.likelihood_gain().tolist(),
    }


def verdict(calibration: Calibration) -> str:
    """Say in words whether calibration is worth using for this model."""
    numbers, lines = summary(calibration), []
    for i, row in enumerate(numbers["rows"]):
        used = [level for level, share in enumerate(numbers["used_share"][i]) if share > 0]
        gain = numbers["likelihood_gain_in_bits_per_dimension"][i]
        if not used:
            error = max(numbers["standard_error"][i])
            lines.append(
                f"- `{row}`: no mean error found. It is within the noise of the measurement (standard error at most "
                f"{error:.2g}, where eps has 1) at every level, so nothing is subtracted."
            )
            continue
        largest = max(used, key=lambda level: numbers["mean_error"][i][level])
        size, sigma = numbers["mean_error"][i][largest], numbers["sigma"][largest]
        if gain <= 0:
            advice = "not worth using"
        elif size < _SMALL_OFFSET and gain < _SMALL_GAIN:
            advice = "too small to make a difference one would see"
        else:
            advice = "worth trying"
        lines.append(
            f"- `{row}`: a mean error at {len(used)} of {len(numbers['sigma'])} levels, the largest {size:.2g} at "
            f"sigma = {sigma:.3g}; without it the likelihood bound gains {gain:.2g} bits per dimension: {advice}."
        )
    if calibration.config.has_channels:
        lines.append(_sizes(numbers, calibration.config.shape))
    measured_on = calibration.config.measured_on or {}
    if measured_on.get("shrink") is False:
        lines.append("- this is a plain average: nothing was tested, and its noise is subtracted, too.")
    tolerance = measured_on.get("tolerance")
    if tolerance is not None and (missed := int((calibration.std_error > tolerance).any(1).sum())):
        lines.append(
            f"- the data ended before the tolerance of {tolerance:.2g} was reached at {missed} of "
            f"{len(numbers['sigma'])} levels; the largest standard error is {calibration.std_error.max():.2g}."
        )
    advice = (
        "Strong models often gain nothing. Of models of pixels that were trained briefly, samples gained where the "
        "solver clips x0, which is worth more by itself: `clip_sample` of DDIM and DDPM, `thresholding` of DPMSolver "
        "and UniPC. Before you keep it, compare samples of the solver that you use: `diffusers-ext evaluate ... "
        "--schedulers DPMSolverMultistep:thresholding=true,CalibratedDPMSolverMultistep:thresholding=true` (of latents "
        "without thresholding), whose page begins with the verdict."
    )
    return "\n".join([*lines, "", advice])


def _sizes(numbers: dict[str, Any], shape: Sequence[int]) -> str:
    """Say which offsets are used at which size, and what share of the mean error they keep."""
    shares = ", ".join(
        f"{'nothing to keep' if share is None else f'{share:.0%}'} of `{row}`"
        for row, share in zip(numbers["rows"], numbers["share_kept_per_channel"], strict=True)
    )
    one_each = f"one offset for each channel, which keeps this share of the squared mean error: {shares}"
    size = " x ".join(map(str, shape))
    if numbers["per"] == PER_CHANNEL:
        return f"- at every size: {one_each}."
    return f"- at the measured size, {size}: one offset for each position, which keeps all; at other sizes: {one_each}."


def plot(calibration: Calibration, path: Path) -> None:
    """Write `offsets_figure` to a file. Without matplotlib print a line that says that there is no picture."""
    try:
        figure = offsets_figure(calibration)
    except ImportError:
        print("no picture of the offsets: it needs matplotlib (pip install matplotlib)")
        return
    with replacing(path) as aside:
        figure.savefig(aside, dpi=100, format="png")


def offsets_figure(calibration: Calibration) -> Any:
    """Draw the mean error by noise level with its noise floor, and the offsets of some levels as pictures."""
    numbers = summary(calibration)
    sigma, n_rows = numbers["sigma"], len(numbers["rows"])
    picture = calibration.offsets.ndim == 5
    shown = sorted({round(i * (len(sigma) - 1) / 5) for i in range(6)}) if picture else []
    figure = agg_figure(11, 4 + (2.2 if picture else 0))
    grid = figure.add_gridspec(2 if picture else 1, 6, height_ratios=[4, 2] if picture else [1])
    axis = figure.add_subplot(grid[0, :])
    for i, row in enumerate(numbers["rows"][:6]):
        color = f"C{i}"
        axis.loglog(sigma, [max(v, 1e-9) for v in numbers["mean_error"][i]], "o-", color=color, label=row)
        axis.loglog(sigma, numbers["standard_error"][i], ":", color=color, label=f"{row}: standard error")
        hollow = [k for k, share in enumerate(numbers["used_share"][i]) if share == 0]
        values = [max(numbers["mean_error"][i][k], 1e-9) for k in hollow]
        axis.plot([sigma[k] for k in hollow], values, "o", color="white", markeredgecolor=color)
    lowest = min(min(errors) for errors in numbers["standard_error"])
    axis.set(xlabel="noise level sigma", ylabel="root mean square, in eps", ylim=(max(lowest / 3, 1e-8), None))
    axis.set_title("Mean error by noise level; hollow: within the noise, not subtracted")
    axis.legend(fontsize=7, ncols=2 if n_rows > 1 else 1)
    for column, level in enumerate(shown):
        axis = figure.add_subplot(grid[1, column])
        image = calibration.offsets[level, 0].float().mean(0)  # per position, whatever is used
        bound = image.abs().max().item() or 1.0
        axis.imshow(image, cmap="RdBu", vmin=-bound, vmax=bound)
        axis.set_title(f"sigma {sigma[level]:.2g}, ±{bound:.1g}", fontsize=8)
        axis.axis("off")
    return figure


def example(name: str, line: str, arguments: Mapping[str, Any]) -> str:
    """Return the code that loads the pipeline and the calibration, and subtracts it.

    Args:
        name: the calibration's folder or repository.
        line: the line that calibrates the pipeline, see `calibrating_line`.
        arguments: those of the measurement: the pipeline's name, revision, variant and LoRA.
    """
    options = "".join(f", {key}={json.dumps(arguments[key])}" for key in ("revision", "variant") if arguments.get(key))
    model, lora = json.dumps(arguments["pretrained_model_name_or_path"]), arguments.get("lora_weights")
    return "\n".join(
        [
            "from diffusers import DiffusionPipeline",
            "from diffusers_ext import Calibration, calibrate_pipeline\n",
            f"pipe = DiffusionPipeline.from_pretrained({model}{options})",
            *([f"pipe.load_lora_weights({json.dumps(lora)})"] if lora else []),
            f"calibration = Calibration.from_pretrained({json.dumps(name)})",
            line,
        ]
    )


def write_calibration_card(
    folder: Path, calibration: Calibration, name: str, arguments: Mapping[str, Any], command: str, line: str
) -> None:
    """Write `README.md`: what was measured, whether it is worth using, how to use it.

    Args:
        line: the line that calibrates the pipeline, see `calibrating_line`.
    """
    measured, numbers = calibration.config.measured_on, summary(calibration)
    names = ("pretrained_model_name_or_path", "lora_weights")
    public = {**arguments, **{name: shown(arguments[name]) for name in names if arguments.get(name)}}
    rows = tuple(calibration.config.rows)
    kinds = ("mean_error", "standard_error", "used_share")
    columns = ["sigma", *(f"{what.replace('_', ' ')}, {row}" for row in rows for what in kinds)]
    lines = [
        [f"{sigma:.3g}", *(f"{numbers[what][i][j]:.2g}" for i in range(len(rows)) for what in kinds)]
        for j, sigma in enumerate(numbers["sigma"])
    ]
    parts = [
        f"The mean error of `{measured['model']}` ({measured['data']}; {measured['num_samples']} samples, seed "
        f"{measured['seed']}), for [calibrated schedulers](https://arxiv.org/abs/2302.10688).",
        *(["![Mean error by noise level](offsets.png)"] if (folder / "offsets.png").is_file() else []),
        "## Is it worth using?",
        verdict(calibration),
        "## How to use it",
        f"```python\n{example(name, line, public)}\n```",
        "## How it was measured",
        f"```bash\n{shown_command(command)}\n```",
        table(columns, lines),
    ]
    save_card(folder, name, parts, arguments, ["calibration", "arxiv:2302.10688"])
