"""Text-to-image pipelines: what each family tells its network beside the latents and the time.

The lists hold the families of which the tests have recorded this from a call of the pipeline, argument by argument. Of
other pipelines it is not known: `estimate_calibration` and the losses take conditions as they are.

The null condition is what the pipeline's call takes for the unconditional half of guidance when it names no negative
prompt. It leaves the size and the crop of Stable Diffusion XL as they are.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import Tensor, nn

from ..conditions import Condition, each_tensor
from ..errors import InputError
from ..networks import unwrap
from ..pipelines.short_time_text import STOCK, short_time_text_class
from .base import ImageFormat, Rows, Subject
from .guidance import default_scale
from .latents import draw, law_of
from .lora import Lora, add_lora, config_of, save_lora, trained

logger = logging.get_logger(__name__)

LOOKED_AT = 10_000
"""So many captions are looked at to find those that are too long."""


class TextToImage(Subject):
    """A pipeline with `encode_prompt`; the subclasses know the conditions of their families."""

    takes_captions = True
    lora_config: Any = None
    """PEFT's configuration of the LoRA that is trained; `None` where the whole network is."""
    reload: Callable[[], DiffusionPipeline] | None = None
    """Loads the pipeline as it was before its frozen parts were rounded."""
    rounded = False
    """Whether they are."""
    prompts = 1
    """How many prompts `encode_prompt` takes, for as many text encoders; all get the same."""
    patch = 1
    """How many latents the network takes for one, in height and in width."""
    resolution: int | None = None
    """The resolution of the training; by default the pipeline's."""
    told_guidance: float | None = None
    """The guidance scale that the network is told, where it is told one; by default that of the pipeline's call."""

    def __init__(self, pipeline: DiffusionPipeline, name: str) -> None:
        super().__init__(pipeline, name)
        self._nulls: dict[int, Condition] = {}

    def image_format(self, resolution: int | None = None) -> ImageFormat:
        size = self._latent_size() * self.factor if resolution is None else resolution
        multiple = self.factor * self.patch
        if size % multiple:
            below = size // multiple * multiple
            sizes = f"{below} or {below + multiple}" if below else f"{multiple}"
            raise InputError(f"--resolution {size} does not fit the model: use {sizes}")
        return ImageFormat(self.autoencoder.config.in_channels, size)

    def train_at(self, resolution: int) -> None:
        self.resolution = resolution

    def _latent_size(self) -> int:
        return self.network.config.sample_size

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.drawn(self.law(images), generator).to(images)

    @torch.no_grad()
    def law(self, images: Tensor) -> dict[str, Tensor]:
        """Return the law of the latents of images, see `latents`."""
        return law_of(self.autoencoder, images.to(self.autoencoder.device, self.autoencoder.dtype))

    def drawn(self, law: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Return x0, drawn from what `law` returned, in float32."""
        return draw(self.autoencoder, law, generator).float()

    def conditions(self, rows: Rows) -> Condition:
        prompts = [""] * len(rows.images) if rows.captions is None else list(rows.captions)
        return self._on_device(self._conditions(prompts, rows.images.shape[-1], rows.places))

    def null_condition(self, resolution: int) -> Condition | None:
        if resolution not in self._nulls:  # it does not change: the text encoders are frozen
            self._nulls[resolution] = self._null(resolution)
        return self._on_device(self._nulls[resolution])

    def _null(self, resolution: int) -> Condition:
        return self._conditions([""], resolution)

    def _conditions(self, prompts: list[str], resolution: int, places: Tensor | None = None) -> Condition:
        raise InputError(
            f"the conditions of a {type(self.pipeline).__name__} are not known here, only those of "
            f"{', '.join(FAMILIES)}: measure it with diffusers_ext.estimate_calibration, which takes them as they are"
        )

    def pooled(self, condition: Condition) -> Tensor:
        """Return the pooled embeddings of the prompts, (B, features), of a condition; by default, where the network is
        told none, the mean over the tokens."""
        return condition["encoder_hidden_states"].mean(1)

    def too_long(self, captions: Sequence[str]) -> str:
        looked_at, tokenizer = list(captions[:LOOKED_AT]), self.pipeline.tokenizer
        if not looked_at or tokenizer is None:
            return ""
        takes = inspect.signature(type(self.pipeline).__call__).parameters
        of_t5 = self.prompts == 1 and "max_sequence_length" in takes  # PixArt; the others have CLIP first
        most = self._default("max_sequence_length") if of_t5 else tokenizer.model_max_length
        lengths = [len(ids) for ids in tokenizer(looked_at, verbose=False).input_ids]
        n = sum(length > most for length in lengths)
        said = f"; of {len(looked_at):,} captions {n:,} are longer than the {most} tokens that the text encoder takes: "
        return f"{said}they are cut" if n else ""

    def _on_device(self, condition: Condition) -> Condition:
        """Move a condition to the network's device, and cast it to its dtype."""
        network = self.network
        like = next(parameter for parameter in network.parameters() if parameter.is_floating_point())

        def moved(value: Tensor) -> Tensor:
            return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)

        return each_tensor(moved, condition)

    # --- training -----------------------------------------------------------------------------------------------------

    @property
    def is_lora(self) -> bool:  # type: ignore[override]
        return self.lora_config is not None

    def require_trainable(self) -> None:
        if type(self) is TextToImage:
            raise InputError(
                f"a {type(self.pipeline).__name__} cannot be trained here: of text-to-image pipelines only "
                f"{', '.join(FAMILIES)} can"
            )

    def add_lora(self, lora: Lora, seed: int) -> None:
        """Train a LoRA, and not the network itself.

        Raises:
            InputError: PEFT is not installed, the pipeline has no loader for a LoRA, or its network no such layers.
        """
        self.lora_config = config_of(lora, type(self).__name__)
        add_lora(self.network, self.lora_config, seed)

    def freeze_in(self, dtype: torch.dtype) -> None:
        """Round what is not trained to half precision; an autoencoder that may overflow in float16 stays as it is."""
        self.rounded = True
        for name, part in self.pipeline.components.items():
            overflows = name == "vae" and dtype == torch.float16 and part.config.get("force_upcast", False)
            if isinstance(part, nn.Module) and part is not self.network and not overflows:
                part.to(dtype)
        if self.lora_config is not None:
            for parameter in self.network.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)

    def trainable(self, network: nn.Module | None = None) -> dict[str, nn.Parameter]:
        return trained(unwrap(self.network if network is None else network))

    def state(self, network: nn.Module | None = None) -> dict[str, Tensor]:
        """Return the parameters that are trained, and nothing else."""
        model = unwrap(self.network if network is None else network)
        names = self.trainable(model).keys()
        return {name: value for name, value in model.state_dict().items() if name in names}

    def with_weights(self, state: Mapping[str, Tensor], average: Sequence[Tensor] | None = None) -> Subject:
        """Return the subject of a copy of the pipeline with these weights; frozen ones are shared with the network."""
        network: Any = self.network
        with init_empty_weights(include_buffers=False):
            copied = type(network).from_config(network.config)
            if self.lora_config is not None:
                add_lora(copied, self.lora_config)
        trainable = self.trainable()
        own = dict(state) if average is None else dict(zip(trainable, average, strict=True))
        own = {name: value.detach().to(network.device, copy=True) for name, value in own.items()}
        copied.load_state_dict(network.state_dict() | own, assign=True)
        copied.requires_grad_(False)
        for name, parameter in copied.named_parameters():
            parameter.requires_grad_(name in trainable)
        copied = copied.to(network.device).eval()
        arguments = self._arguments(**{self.name: copied, "scheduler": copy.deepcopy(self.pipeline.scheduler)})
        pipeline = type(self.pipeline)(**arguments)
        pipeline.set_progress_bar_config(disable=True)
        subject = type(self)(pipeline, self.name)
        for setting in ("lora_config", "reload", "rounded", "resolution", "told_guidance"):
            setattr(subject, setting, getattr(self, setting))
        return subject

    def write(self, folder: Path) -> None:
        """Write the LoRA alone, or the stock pipeline, with its frozen parts as they were loaded; if they cannot be
        loaded again, this warns, and they are written in half precision."""
        if self.lora_config is not None:
            save_lora(self.pipeline, self.name, self.network, folder)
            return
        pipeline = self.pipeline
        if self.rounded and self.reload is not None:
            try:
                pipeline = self.reload()
                pipeline.register_modules(**{self.name: self.network})
            except InputError as error:
                logger.warning(f"what is not trained is saved in half precision: {error}")
        pipeline.save_pretrained(folder)

    def sample(self, n: int, num_inference_steps: int = 50, seed: int = 0, **rows: Any) -> np.ndarray:
        """Draw images (n, H, W, C) in [0, 1] of `captions`, in turn, with the guidance that the pipeline's call has by
        default; without captions those of the empty prompt, without guidance."""
        captions = rows.get("captions")
        prompts = None if captions is None else [captions[i % len(captions)] for i in range(n)]
        scale = 1.0 if captions is None else default_scale(self.pipeline)
        generator = torch.Generator().manual_seed(seed)
        options = {"num_inference_steps": num_inference_steps, "generator": generator, "output_type": "np"}
        half = next(c.dtype for n, c in self.pipeline.components.items() if n.startswith("text_enc") and c is not None)
        device, others = self.network.device, self.others
        places = [next(other.parameters()).device for other in others]
        for other in others:
            other.to(device)
        try:
            mixed = self.rounded and not self.is_lora  # the network is in float32, the encoders are not
            with torch.autocast(device.type, half) if mixed else nullcontext():
                call = self.call(n, captions=prompts, guidance_scale=scale, resolution=self.resolution)
                return self.pipeline(**call, **options).images
        finally:
            for other, place in zip(others, places, strict=True):
                other.to(place)

    # --- the pipeline's calls -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _encoded(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Return what `encode_prompt` does in a call without guidance that leaves its arguments at their defaults."""
        encoders = (c for name, c in self.pipeline.components.items() if name.startswith("text_encoder"))
        device = next((encoder.device for encoder in encoders if encoder is not None), None)
        if device is None:
            raise InputError(f"the {type(self.pipeline).__name__} has no text encoder, which the captions need")
        options = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        takes = inspect.signature(self.pipeline.encode_prompt).parameters
        for name in ("max_sequence_length", "clean_caption"):
            if name in takes:
                options[name] = self._default(name)
        given = [prompts, *[None] * (self.prompts - 1)]
        return self.pipeline.encode_prompt(*given, **{name: v for name, v in options.items() if name in takes})

    def _default(self, name: str) -> Any:
        """Return the default of an argument of the pipeline's call."""
        return inspect.signature(type(self.pipeline).__call__).parameters[name].default

    @property
    def has_short_time_class(self) -> bool:  # type: ignore[override]
        """Whether `on_short_times` has a class for the pipeline."""
        return type(self.pipeline).__name__.removeprefix("ShortTime") in STOCK

    def on_short_times(self, scheduler: Any, bridge: Any) -> DiffusionPipeline:
        if not self.has_short_time_class:
            return super().on_short_times(scheduler, bridge)
        name = type(self.pipeline).__name__.removeprefix("ShortTime")
        return short_time_text_class(name)(**self._arguments(scheduler=scheduler, bridge=bridge))

    def call(
        self,
        n: int,
        *,
        labels: Sequence[int] | None = None,
        captions: Sequence[str] | None = None,
        guidance_scale: float = 1.0,
        resolution: int | None = None,
    ) -> dict[str, Any]:
        size = {} if resolution is None else {"height": resolution, "width": resolution}
        if "use_resolution_binning" in inspect.signature(type(self.pipeline).__call__).parameters:
            size["use_resolution_binning"] = False
        return {"prompt": [""] * n if captions is None else list(captions), "guidance_scale": guidance_scale} | size


class StableDiffusion(TextToImage):
    """Stable Diffusion 1 and 2: the condition is the embedding of the prompt."""

    def require_trainable(self) -> None:
        self._refuse_distilled()

    def _conditions(self, prompts: list[str], resolution: int, places: Tensor | None = None) -> Condition:
        self._refuse_distilled()
        embeddings, *_ = self._encoded(prompts)
        return {"encoder_hidden_states": embeddings}

    def _refuse_distilled(self) -> None:
        if self.network.config.time_cond_proj_dim is not None:
            raise InputError(
                "the UNet is told a guidance scale (time_cond_proj_dim), as distilled models are: it has no condition "
                "for training"
            )


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL: the condition adds pooled embeddings, and the size and crop of the image."""

    prompts = 2

    def _conditions(self, prompts: list[str], resolution: int, places: Tensor | None = None) -> Condition:
        self._refuse_distilled()
        embeddings, _, pooled, _ = self._encoded(prompts)
        if places is None:  # as a call that names no original size and no crop
            places = torch.tensor([[resolution, resolution, 0, 0]]).expand(len(prompts), -1)
        times = torch.cat([places, torch.full_like(places[:, :2], resolution)], 1).to(embeddings)
        added = {"text_embeds": pooled, "time_ids": times}
        return {"encoder_hidden_states": embeddings, "added_cond_kwargs": added}

    def pooled(self, condition: Condition) -> Tensor:
        return condition["added_cond_kwargs"]["text_embeds"]

    def _null(self, resolution: int) -> Condition:
        condition = self._conditions([""], resolution)
        del condition["added_cond_kwargs"]["time_ids"]
        zero = self.pipeline.config.force_zeros_for_empty_prompt
        return each_tensor(torch.zeros_like, condition) if zero else condition


class StableDiffusion3(TextToImage):
    """Stable Diffusion 3 and 3.5: the condition adds pooled embeddings."""

    prompts = 3

    @property
    def patch(self) -> int:  # type: ignore[override]
        return self.network.config.patch_size

    def _conditions(self, prompts: list[str], resolution: int, places: Tensor | None = None) -> Condition:
        embeddings, _, pooled, _ = self._encoded(prompts)
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def pooled(self, condition: Condition) -> Tensor:
        return condition["pooled_projections"]


class Flux(TextToImage):
    """Flux: latents are packed, (B, tokens, 4 C); the condition adds pooled embeddings, the places of all tokens, and
    the guidance scale, where the network is told one: by default that of the pipeline's call.

    That scale is no classifier-free guidance, which Flux calls `true_cfg_scale`.
    """

    prompts, patch = 2, 2

    def tell_guidance(self, scale: float) -> None:
        if not self.network.config.guidance_embeds:
            super().tell_guidance(scale)
        self.told_guidance = scale

    def _latent_size(self) -> int:
        return self.pipeline.default_sample_size

    def drawn(self, law: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        latents = super().drawn(law, generator)
        return self.pipeline._pack_latents(latents, *latents.shape)

    @property
    def channels(self) -> int:
        return self.network.config.in_channels // self.patch**2

    def unpacked(self, x: Tensor) -> Tensor:
        side = math.isqrt(x.shape[1]) * self.patch * self.factor  # the images of a training are square
        return self.pipeline._unpack_latents(x, side, side, self.factor)

    def _conditions(self, prompts: list[str], resolution: int, places: Tensor | None = None) -> Condition:
        embeddings, pooled, text_ids = self._encoded(prompts)
        n, side = len(prompts), resolution // self.factor // self.patch
        of_image = self.pipeline._prepare_latent_image_ids(n, side, side, embeddings.device, embeddings.dtype)
        ids = {"txt_ids": text_ids.expand(n, *text_ids.shape), "img_ids": of_image.expand(n, *of_image.shape)}
        condition = {"encoder_hidden_states": embeddings, "pooled_projections": pooled} | ids
        if not self.network.config.guidance_embeds:
            return condition
        scale = self._default("guidance_scale") if self.told_guidance is None else self.told_guidance
        return condition | {"guidance": torch.full((n,), scale, device=embeddings.device)}

    def pooled(self, condition: Condition) -> Tensor:
        return condition["pooled_projections"]

    def call(self, n: int, *, guidance_scale: float = 1.0, **options: Any) -> dict[str, Any]:
        call = super().call(n, **options)
        del call["guidance_scale"]
        if self.told_guidance is not None:
            call["guidance_scale"] = self.told_guidance
        return call | ({"true_cfg_scale": guidance_scale, "negative_prompt": [""] * n} if guidance_scale > 1 else {})


class PixArt(TextToImage):
    """PixArt alpha and sigma: the condition adds the mask of the prompt's tokens, and, in alpha at 1024, the size."""

    @property
    def patch(self) -> int:  # type: ignore[override]
        return self.network.config.patch_size

    def _conditions(self, prompts: list[str], resolution: int, places: Tensor | None = None) -> Condition:
        embeddings, mask, *_ = self._encoded(prompts)
        condition = {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}
        if not self.network.use_additional_conditions:
            return condition
        size = torch.tensor([[resolution, resolution]]).to(embeddings).expand(len(prompts), -1)
        return condition | {"added_cond_kwargs": {"resolution": size, "aspect_ratio": torch.ones_like(size[:, :1])}}

    def pooled(self, condition: Condition) -> Tensor:
        mask = condition["encoder_attention_mask"][:, :, None]
        return (condition["encoder_hidden_states"] * mask).sum(1) / mask.sum(1)


FAMILIES: dict[str, type[TextToImage]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
}
"""The pipelines whose conditions are known, with those derived from them."""
