"""What a pipeline trains: the one interface that training, sampling, measuring and saving share.

A **subject** is a small object around a pipeline. It answers what the rest of the package would otherwise ask the
pipeline's class:

    network, name           what is evaluated at each step, and its component's name: `unet` or `transformer`
    autoencoder             what turns images into latents; `None` where the network sees the images themselves
    image_format            channels and resolution of the images that it is trained on
    encode                  images (B, C, H, W) in [-1, 1] -> x0, what the network is trained on
    conditions              labels or captions -> the condition: the keyword arguments of the network's calls
    part, drop              some rows of a condition; a condition with some rows replaced by the null condition
    trainable, state        the parameters that are trained, and all that a checkpoint holds of the network
    call, sample            the arguments of the pipeline's call, and images drawn by it
    with_weights, save      a copy with other weights, and a folder that `DiffusionPipeline.from_pretrained` opens

A condition is a tree: a dict of tensors whose first dimension is B, or of such dicts (Stable Diffusion XL). The null
condition is the one that says nothing: the null class, or the empty prompt. A new kind of pipeline is a new subclass,
and a line in `subject_of`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..conditions import Condition, dropped, each_tensor
from ..errors import InputError
from ..files import replacing_files
from ..networks import unwrap
from .latents import draw, law_of


class NotKept(ValueError):
    """The pipeline's class replaces the scheduler that it is given by one of another class."""


class Rows(Protocol):
    """A batch of the data, from which a subject makes a condition."""

    @property
    def images(self) -> Tensor:
        """(B, C, H, W) in [-1, 1]."""

    @property
    def labels(self) -> Tensor:
        """(B,) integers, -1 where there is no label."""

    @property
    def captions(self) -> Sequence[str] | None:
        """B texts, where the data have captions."""

    @property
    def places(self) -> Tensor | None:
        """(B, 4), the height and width of the original images, and the top and left of the crop; `None` if unknown."""


class ImageFormat(NamedTuple):
    """The channels of the images that a network is trained on, and their height, which is also their width."""

    channels: int
    resolution: int


class Subject:
    """Answers what can be said of every pipeline with a network, its component `name`; see the module's docstring."""

    num_classes: int | None = None
    """The number of classes, the null class not counted; `None` where the network takes no labels."""
    null_class: int | None = None
    """The label that means "no class", where there is one."""
    of_pixels = False
    """Whether the network is a `UNet2DModel` that sees the images themselves."""
    takes_captions = False
    """Whether images come from prompts."""
    is_lora = has_short_time_class = False
    """Whether a LoRA is trained, and not the network itself; whether `on_short_times` has a class for text-to-image."""

    def __init__(self, pipeline: DiffusionPipeline, name: str) -> None:
        self.pipeline, self.name = pipeline, name

    @property
    def network(self) -> Any:
        return getattr(self.pipeline, self.name)

    @property
    def second_network(self) -> Any:
        """Another network beside `network`, which some pipelines evaluate at other noise levels (Wan 2.2)."""
        return getattr(self.pipeline, f"{self.name}_2", None)

    @property
    def autoencoder(self) -> Any:
        return getattr(self.pipeline, "vae", None) or getattr(self.pipeline, "vqvae", None)

    @property
    def bridge(self) -> Any:
        """The model of the diffused data that sampling starts from, where the pipeline has one."""
        return getattr(self.pipeline, "bridge", None)

    @property
    def others(self) -> list[nn.Module]:
        """The networks beside the one that is trained."""
        components = self.pipeline.components.values()
        return [c for c in components if isinstance(c, nn.Module) and c is not self.network]

    @property
    def needs_package(self) -> bool:
        """Whether the saved pipeline opens only after `import diffusers_ext`."""
        return type(self.pipeline).__module__.startswith("diffusers_ext")

    # --- data ---------------------------------------------------------------------------------------------------------

    def image_format(self, resolution: int | None = None) -> ImageFormat:
        """Return the format of the images to train on. This changes nothing.

        Args:
            resolution: the resolution of the training; by default the one that the pipeline samples at.

        Raises:
            InputError: the network does not take images of this size or number of channels.
        """
        raise _unknown(self.pipeline, "trained or evaluated")

    def train_at(self, resolution: int) -> None:
        """Prepare for training at a resolution: a network that can sample at any resolution samples at this one."""

    @contextmanager
    def sampling_at(self, resolution: int | None) -> Iterator[None]:
        """Let the pipeline sample at a resolution for a while, where its network can."""
        yield

    @property
    def factor(self) -> int:
        """How many times fewer rows and columns latents have than images."""
        return 1 if self.autoencoder is None else 2 ** (len(self.autoencoder.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return x0 of images (B, C, H, W): these themselves, or latents drawn from the autoencoder's distribution."""
        autoencoder = self.autoencoder
        return images if autoencoder is None else draw(autoencoder, law_of(autoencoder, images), generator)

    @property
    def channels(self) -> int:
        """The number of channels of x0."""
        return self.network.config.in_channels

    def unpacked(self, x: Tensor) -> Tensor:
        """Return samples as (B, C, H, W), where the network sees them in another form."""
        return x

    # --- conditions ---------------------------------------------------------------------------------------------------

    def conditions(self, rows: Rows) -> Condition:
        """Return the condition of some rows, on the network's device: the keyword arguments of the network's calls.

        Raises:
            InputError: this kind of pipeline is not known.
        """
        raise _unknown(self.pipeline, "conditioned")

    def null_condition(self, resolution: int) -> Condition | None:
        """Return the null condition, with first dimension 1; `None` where there is none."""
        return None

    def part(self, condition: Condition, rows: slice) -> Condition:
        """Return some rows of a condition."""
        return each_tensor(lambda value: value[rows], condition)

    def too_long(self, captions: Sequence[str]) -> str:
        return ""  # how many captions are longer than the text encoder takes, for people

    def tell_guidance(self, scale: float) -> None:
        """Tell the network another guidance scale than that of the pipeline's call, where it is told one (Flux)."""
        raise InputError(f"--guidance_scale: the network of a {type(self.pipeline).__name__} is told no guidance scale")

    def drop(self, condition: Condition, share: float, generator: torch.Generator, resolution: int) -> Condition:
        """Replace each row by the null condition, with probability `share` and independently; return the result."""
        null = self.null_condition(resolution) if condition else None
        return condition if null is None else dropped(condition, null, share, generator)

    # --- training -----------------------------------------------------------------------------------------------------

    def require_trainable(self) -> None:
        """Refuse a pipeline that cannot be trained, by an `InputError` that says which pipelines can."""
        raise _unknown(self.pipeline, "trained")

    def freeze_in(self, dtype: torch.dtype) -> None:
        """Round what is not trained to half precision, where that is meant; elsewhere it stays in float32."""

    def before_training(self) -> None:
        """Switch off what the training loop does instead of the network, such as dropping labels."""

    def trainable(self, network: nn.Module | None = None) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by their names in the state of the network.

        Args:
            network: the subject's network in the form in which it is trained, which may be wrapped and sharded; by
                default the pipeline's component.
        """
        return dict(unwrap(self.network if network is None else network).named_parameters())

    def state(self, network: nn.Module | None = None) -> dict[str, Tensor]:
        """Return all that a checkpoint holds of the network: the parameters that are trained, and the buffers."""
        model = unwrap(self.network if network is None else network)
        frozen = dict(model.named_parameters()).keys() - self.trainable(model).keys()
        return {name: value for name, value in model.state_dict().items() if name not in frozen}

    def with_weights(self, state: Mapping[str, Tensor], average: Sequence[Tensor] | None = None) -> Subject:
        """Return the subject of a copy of the pipeline with these weights in its network.

        The network is built anew: accelerate replaces `forward` of the one it wraps, and a deep copy would keep calling
        that one. The other components are shared, except the scheduler, which is copied.

        Args:
            state: what `state` returned.
            average: values of the trainable parameters; they replace those in `state`.
        """
        network: Any = self.network
        with torch.random.fork_rng(devices=[]):
            trained = type(network).from_config(network.config)
        trained.load_state_dict(network.state_dict() | dict(state))
        trained.to(network.device)
        if average is not None:
            for parameter, averaged in zip(self.trainable(trained).values(), average, strict=True):
                parameter.data.copy_(averaged)
        own = {self.name: trained.eval(), "scheduler": copy.deepcopy(self.pipeline.scheduler)}
        copied = type(self.pipeline)(**self._arguments(**own))
        copied.set_progress_bar_config(disable=True)
        return type(self)(copied, self.name)

    def _arguments(self, **own: Any) -> dict[str, Any]:
        """Return the arguments of the pipeline's class: its components and settings, with some of its own."""
        names, config = inspect.signature(type(self.pipeline).__init__).parameters, self.pipeline.config
        return {name: config[name] for name in names if name in config} | self.pipeline.components | own

    # --- sampling -----------------------------------------------------------------------------------------------------

    def sampler(self) -> DiffusionPipeline:
        """Return the pipeline, or one of the same network that samples rightly with more schedulers."""
        return self.pipeline

    def with_scheduler(self, scheduler: Any) -> DiffusionPipeline:
        """Put a scheduler into the pipeline and return it, or, where its class would replace the scheduler by another,
        return a new pipeline that keeps it.

        Raises:
            NotKept: there is no pipeline that keeps it.
        """
        kept = type(self.pipeline)(**self._arguments(scheduler=copy.copy(scheduler)))
        if type(kept.scheduler) is not type(scheduler):
            return self._keeping(scheduler)
        self.pipeline.scheduler = scheduler
        return self.pipeline

    def _keeping(self, scheduler: Any) -> DiffusionPipeline:
        raise NotKept(f"{type(self.pipeline).__name__} does not keep a {type(scheduler).__name__}")

    def on_short_times(self, scheduler: Any, bridge: Any) -> DiffusionPipeline:
        """Return a pipeline of the same network that starts from the draws of a bridge; refused if there is none."""
        raise InputError(
            f"there is no class of {type(self.pipeline).__name__} that starts from a bridge. Give the pipeline a "
            f"{type(scheduler).__name__}, and call it with latents=bridge.sample(n, generator), x_T: pipelines of "
            f"diffusers multiply latents by the scheduler's init_noise_sigma"
        )

    def refusal_of(self, scheduler: Any) -> str | None:
        """Return why the pipeline samples wrongly with a scheduler; `None` if it does not."""
        return None

    def call(
        self,
        n: int,
        *,
        labels: Sequence[int] | None = None,
        captions: Sequence[str] | None = None,
        guidance_scale: float = 1.0,
        resolution: int | None = None,
    ) -> dict[str, Any]:
        """Return the arguments of the pipeline's call for n images.

        Args:
            labels: the classes of the images; by default 0, 1, 2, ... in turn.
            captions: the prompts of the images; by default empty ones.
            guidance_scale: the scale of classifier-free guidance; 1 is the conditional model.
            resolution: height and width, for pipelines that take them.
        """
        raise _unknown(self.pipeline, "sampled")

    def sample(self, n: int, num_inference_steps: int = 50, seed: int = 0, **rows: Any) -> np.ndarray:
        """Draw images (n, H, W, C) in [0, 1] by the pipeline, without guidance, of labels as for `call`."""
        generator = torch.Generator().manual_seed(seed)
        options = {"num_inference_steps": num_inference_steps, "generator": generator, "output_type": "np"}
        return self.pipeline(**self.call(n, **rows), **options).images

    def unit_range(self, sample: Tensor) -> Tensor:
        """Map the sample of the last step, or what the autoencoder decoded of it, from the data's range to [0, 1].

        Values outside of the range are not clamped.
        """
        own = getattr(self.pipeline, "_in_unit_range", None)
        return sample / 2 + 0.5 if own is None else own(sample)

    def save(self, folder: str | Path) -> None:
        """Save what was trained, written aside and then moved; other files in the folder stay."""
        with replacing_files(folder) as aside:
            self.write(aside)

    def write(self, folder: Path) -> None:
        """Write what was trained into a new folder: the pipeline, by `save_pretrained`."""
        self.pipeline.save_pretrained(folder)


def _unknown(pipeline: DiffusionPipeline, done: str) -> InputError:
    return InputError(
        f"{type(pipeline).__name__} cannot be {done} here: it needs a UNet2DModel (`unet`) or a "
        f"DiTTransformer2DModel (`transformer`), unconditional or conditioned on class labels"
    )
