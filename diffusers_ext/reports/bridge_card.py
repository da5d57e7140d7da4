"""The card of a bridge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import shown
from .card import save_card, shown_command, table


def write_bridge_card(
    folder: Path,
    bridge: Any,
    name: str,
    arguments: Mapping[str, Any],
    command: str,
    report: str | None = None,
    has_class: bool = False,
) -> None:
    """Write `README.md`: what data the bridge models, how to sample from it, and what was measured.

    Args:
        has_class: whether `short_time_pipeline` takes the pipeline that the bridge was fitted for.
    """
    kind, time = type(bridge).__name__, bridge.config.max_diffusion_time
    stock = bridge.config.scheduler["_class_name"].removeprefix("ShortTime")
    model = shown(str(arguments.get("pretrained_model_name_or_path")))
    loaded = f'pipe = DiffusionPipeline.from_pretrained("{model}")'
    bridged = f'bridge = {kind}.from_pretrained("{name}")'
    if (folder / "model_index.json").is_file():
        use = [
            "import diffusers_ext  # makes ShortTimePipeline known to diffusers: import it first",
            "from diffusers import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{name}")',
            "images = pipe(batch_size=4, num_inference_steps=10).images",
        ]
    elif has_class:
        use = [
            "from diffusers import DiffusionPipeline",
            f"from diffusers_ext import {kind}, ShortTime{stock}, short_time_pipeline",
            "",
            loaded,
            bridged,
            f"pipe = short_time_pipeline(pipe, {time:g}, bridge)",
            f'pipe.scheduler = ShortTime{stock}.from_pretrained("{name}", subfolder="scheduler")',
            'image = pipe("a prompt").images[0]  # at the size of the images that it was fitted to',
        ]
    else:
        use = [
            "import torch",
            "from diffusers import DiffusionPipeline",
            f"from diffusers_ext import {kind}, ShortTime{stock}",
            "",
            loaded,
            bridged,
            f'pipe.scheduler = ShortTime{stock}.from_pretrained("{name}", subfolder="scheduler")',
            'image = pipe("a prompt", latents=bridge.sample(1, torch.Generator())).images[0]',
        ]
    grid = folder / "samples" / "samples.png"
    parts = [
        f"A `{kind}` of the data of `{model}`, diffused up to T = {time}, to sample it on "
        f"[short diffusion times](https://arxiv.org/abs/2206.05173).",
        *(["![Samples](samples/samples.png)"] if grid.is_file() else []),
        "## How to use it",
        "```python\n" + "\n".join(use) + "\n```",
        "## How it was made",
        f"```bash\n{shown_command(command)}\n```",
        table(["fitted on", "value"], [[str(k), str(v)] for k, v in (bridge.config.measured_on or {}).items()]),
        *(["## Which T", "![The likelihood bound by T](diffusion_time.png)", report] if report else []),
    ]
    save_card(folder, name, parts, arguments, ["short-diffusion-times", "arxiv:2206.05173"])
