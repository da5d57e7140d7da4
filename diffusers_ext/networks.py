"""What a network of diffusers is told at a time of its scheduler, and what its output means.

A pipeline stands between its scheduler and its network. Of a timestep t of N trained ones it may tell the network t
itself, a fraction of it, or the distance from the end, N - t; and it may turn the sign of the network's output. That is
neither in the network nor in the scheduler: `CONVENTIONS` has it for the networks of which the tests have read it in
the source of a pipeline of diffusers. Other networks of diffusers are refused, unless their convention is given:

    denoiser_from(model, scheduler, NetworkConvention(divisor=1000))
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .stock import class_names


class NetworkConvention(NamedTuple):
    """What a pipeline makes of its scheduler's timestep t, and of its network's output.

    Args:
        divisor: the network is told t / divisor; `None` is N, the number of trained timesteps. By default 1.
        from_end: it is told (N - t) / divisor.
        sign: 1, or -1 where the pipeline negates the output.
    """

    divisor: float | None = 1.0
    from_end: bool = False
    sign: int = 1

    def told(self, t: Tensor, num_train_timesteps: int) -> Tensor:
        """Return what the network is told at the timestep t."""
        n = num_train_timesteps
        return (n - t if self.from_end else t) / (n if self.divisor is None else self.divisor)

    def timestep(self, told: Tensor, num_train_timesteps: int) -> Tensor:
        """Return the timestep at which the network is told this: the inverse of `told`."""
        n = num_train_timesteps
        t = told * (n if self.divisor is None else self.divisor)
        return n - t if self.from_end else t


CONVENTIONS = {
    name: convention
    for convention, suffix, names in (
        (NetworkConvention(), "Model", "UNet2D UNet2DCondition UNet3DCondition UNetControlNetXS UNetMotion"),
        (NetworkConvention(), "Transformer2DModel", "Bria CogView3Plus CogView4 DiT PixArt SD3"),
        (NetworkConvention(), "2DModel", "HunyuanDiT"),
        (NetworkConvention(), "Transformer3DModel", "Allegro CogVideoX HunyuanVideo LTXVideo Latte SkyReelsV2 Wan"),
        (
            NetworkConvention(1000),
            "Transformer2DModel",
            "AuraFlow BriaFibo2 Chroma Flux Flux2 LongCatImage OvisImage QwenImage",
        ),
        (NetworkConvention(None), "Transformer2DModel", "Krea2 PRX"),
        (NetworkConvention(None, sign=-1), "Transformer2DModel", "NucleusMoEImage"),
        (NetworkConvention(None, from_end=True, sign=-1), "Transformer2DModel", "Lumina2"),
    )
    for name in class_names(suffix, names)
}
"""The convention of each class of networks that a test has verified.

(Not in it: Sana, whose pipelines differ; ZImage, which takes lists; QwenImage21, which returns the prompt, too.)
"""


def convention_of(model: Any) -> NetworkConvention:
    """Return the convention of a network, wrapped or not: that of its class, or of the nearest one that it is derived
    from. What is not of diffusers is told t, and its output is taken as it is.

    Raises:
        ValueError: it is of diffusers, and its convention is not known.
    """
    kinds = type(unwrap(model)).__mro__
    for kind in kinds:
        if kind.__name__ in CONVENTIONS:
            return CONVENTIONS[kind.__name__]
        if kind.__module__.startswith("diffusers.models."):
            if kind.__name__.endswith("Mixin"):
                break
            raise ValueError(
                f"it is not known what a {kind.__name__} is told at a timestep and what its output means: say it by "
                f"convention=NetworkConvention(divisor=..., from_end=..., sign=...), as its pipeline does; known are "
                f"{', '.join(sorted(CONVENTIONS))}"
            )
    return NetworkConvention()


WITHOUT_BATCH = {"FluxTransformer2DModel": ("txt_ids", "img_ids")}
"""The arguments that a network takes once for a whole batch, as matrices; in a condition they have a batch, too."""


FRAMES_FIRST = frozenset({"CogVideoXTransformer3DModel"})
"""The networks of videos whose samples are (frames, channels, height, width)."""


class Network(nn.Module):
    """One calling convention for diffusers' models: network(model_input, timestep, **cond) -> raw output.

    Takes `UNet2DModel`, `UNet2DConditionModel`, transformers (`hidden_states`, `timestep` by name) and any module or
    function called as (x, t, **cond). The input is cast to the model's dtype, the output back to that of the input;
    the variance channels of a model with learned variance are dropped.

    Args:
        model: the network, wrapped or not.
        num_train_timesteps: N.
        convention: by default that of its class, see `convention_of`.

    Raises:
        ValueError: as `convention_of`; and in a call, where the output is not of the shape of the input.
    """

    def __init__(
        self, model: Any, num_train_timesteps: int = 1000, convention: NetworkConvention | None = None
    ) -> None:
        super().__init__()
        self.model, self.num_train_timesteps = model, num_train_timesteps
        self.convention = convention_of(model) if convention is None else convention
        inner = unwrap(model)
        self._without_batch = WITHOUT_BATCH.get(type(inner).__name__, ())
        parameters = inspect.signature(inner.forward if isinstance(inner, nn.Module) else inner).parameters
        self._sample = next((name for name in ("sample", "hidden_states") if name in parameters), "")
        self._by_name = self._sample != "" and "timestep" in parameters
        self._options = {"return_dict": False} if "return_dict" in parameters else {}

    def forward(self, model_input: Tensor, timestep: Tensor, **cond: Any) -> Tensor:
        time = self.convention.told(timestep, self.num_train_timesteps).expand(len(model_input))
        cond |= {name: cond[name][0] for name in self._without_batch if name in cond and cond[name].ndim == 3}
        cast = model_input.to(_dtype(self.model) or model_input.dtype)
        if self._by_name:
            output = self.model(**{self._sample: cast, "timestep": time}, **cond, **self._options)
        else:
            output = self.model(cast, time, **cond, **self._options)
        output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        channels = model_input.shape[1]
        if output.shape != model_input.shape and output.shape[1] == 2 * channels:
            output = output[:, :channels]
        if output.shape != model_input.shape:
            raise ValueError(
                f"the network maps {tuple(model_input.shape)} to {tuple(output.shape)}: it predicts no noise"
            )
        return output.to(model_input.dtype) * self.convention.sign


def unwrap(model: Any) -> Any:
    """Return the model inside DistributedDataParallel, FSDP, DeepSpeed or torch.compile."""
    while True:
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _dtype(model: Any) -> torch.dtype | None:
    if not isinstance(model, nn.Module):
        return None
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
