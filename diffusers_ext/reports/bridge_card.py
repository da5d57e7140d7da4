"""The card of a bridge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import shown
from .card import save_card, shown_command, table


def write_bridge_card(
    folder: Path, bridge: Any, name: str, arguments: Mapping[str, Any], command: str, report: str | None = None
) -> None:
    """Write `README.md`: what data the bridge models, how to sample from it, and what was measured."""
    kind, time = type(bridge).__name__, bridge.config.max_diffusion_time
    stock = bridge.config.scheduler["_class_name"].removeprefix("ShortTime")
    alone = not (folder / "model_index.json").is_file()
    use = [
        *([f"from diffusers_ext import {kind}, ShortTime{stock}", ""] if alone else []),
        *([f'bridge = {kind}.from_pretrained("{name}")'] if alone else []),
        *([f'pipe.scheduler = ShortTime{stock}.from_pretrained("{name}", subfolder="scheduler")'] if alone else []),
        *(["image = pipe(prompt, latents=bridge.sample(1, generator)).images[0]"] if alone else []),
    ] or [
        "import diffusers_ext  # makes ShortTimePipeline known to diffusers: import it first",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{name}")',
        "images = pipe(batch_size=4, num_inference_steps=10).images",
    ]
    grid = folder / "samples" / "samples.png"
    model = shown(str(arguments.get("pretrained_model_name_or_path")))
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
