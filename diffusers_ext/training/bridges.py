"""Fitting a bridge to images: the arguments of it that scripts share, and the data it sees."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..bridge import Bridge, FlowBridge, GaussianBridge, MixtureBridge
from .arguments import DataArguments, InputError, arg
from .card import save_card, shown, shown_command, table
from .data import Place, micro_batches, seed_for
from .images import HubStream, ImageSource, Transform
from .models import classes_of, encode
from .text import is_text_pipeline

_ENCODE = 6  # stream of `seed_for`


@dataclass
class BridgeArguments:
    """Which auxiliary model of the diffused data, and where it stands."""

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


class EncodedImages:
    """What a network was trained on, batch by batch: (x0, {"class_labels": ...} where it takes them). The same, in the
    same order, whenever it is gone through.

    Args:
        args: the batch size, the seed, and how images are read.
        pipeline: encodes them, if it has an autoencoder.
        source, transform: the images.
        max_samples: so many, drawn at random without repeats; whole batches of them.

    Raises:
        InputError: they are fewer than a batch.
    """

    def __init__(
        self,
        args: DataArguments,
        pipeline: DiffusionPipeline,
        source: ImageSource | HubStream,
        transform: Transform,
        max_samples: int,
        device: torch.device,
    ) -> None:
        self.args, self.pipeline, self.source, self.transform, self.device = args, pipeline, source, transform, device
        n = min(sys.maxsize if isinstance(source, HubStream) else len(source), max_samples)
        n = n if args.max_train_samples is None else min(n, args.max_train_samples)
        self.count = n // args.train_batch_size
        if self.count == 0:
            raise InputError(f"{n} images are fewer than a batch of {args.train_batch_size}")
        self.labelled = not is_text_pipeline(pipeline) and classes_of(pipeline) is not None

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        batches = micro_batches(self.args, self.source, self.transform, 0, 1, self.count, place=Place(0, 0))
        for i, batch in enumerate(batches):
            generator = torch.Generator(self.device).manual_seed(seed_for(self.args.seed, _ENCODE, i))
            x0 = encode(self.pipeline, batch.images.to(self.device, self.pipeline.dtype), generator).float()
            yield x0, {"class_labels": batch.labels.to(self.device)} if self.labelled else {}


def fit_bridge(args: Any, pipeline: DiffusionPipeline, data: EncodedImages) -> Bridge | None:
    """The bridge that the arguments (`BridgeArguments` and `DataArguments`) ask for.

    Raises:
        InputError: the data, the scheduler or the arguments do not suit it.
    """
    if args.bridge == "none":
        return None
    options: dict[str, Any] = {
        "rank" if args.bridge == "gaussian" else "latent_rank": args.bridge_rank,
        "num_classes": classes_of(pipeline) if data.labelled else None,
        "measured_on": {"data": f"{shown(args.dataset_name or args.train_data_dir or '')}, split {args.train_split}"},
    }
    kind: Any = {"gaussian": GaussianBridge, "mixture": MixtureBridge, "flow": FlowBridge}[args.bridge]
    if args.bridge == "mixture":
        options["num_components"] = args.bridge_components
    if args.bridge != "gaussian":
        options["seed"] = args.seed
    try:
        return kind.fit(data, pipeline.scheduler, args.max_diffusion_time, **options)
    except (ImportError, ValueError) as error:
        raise InputError(f"--bridge {args.bridge}: {error}") from error


def write_bridge_card(
    folder: Path, bridge: Any, name: str, arguments: Mapping[str, Any], command: str, report: str | None = None
) -> None:
    """Write `README.md`: of what the bridge is, how to sample from it, and what was measured."""
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
        f"# {name}",
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
    save_card(folder, parts, arguments, ["short-diffusion-times", "arxiv:2206.05173"])
