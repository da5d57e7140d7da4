"""LoRA by PEFT: small matrices B A of rank r beside some layers of a frozen network,

    W x + (alpha / r) B A x,

of which A and B are trained. The names and the defaults are those of diffusers' training scripts, and the file is the
one that the stock pipeline writes and opens. It holds alpha and the layers, too: without them a LoRA whose alpha is not
r would be another one.

Reference: LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021, arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..errors import InputError

NAME = "default"

_ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
_JOINT = tuple(f"attn.{name}" for name in (*_ATTENTION, "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"))
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
LAYERS = {
    "StableDiffusion": _ATTENTION,
    "StableDiffusionXL": _ATTENTION,
    "StableDiffusion3": _JOINT,
    "Flux": (*_JOINT, *_FEED_FORWARD),
}
"""The layers that get a LoRA by default, by the name of the subject; of others the stock pipeline has no loader."""


class Lora(NamedTuple):
    """The settings of a LoRA.

    Args:
        rank: r.
        alpha: by default r.
        dropout: the probability that an element of x is dropped before A.
        layers: the ends of the names of the layers; by default those of `LAYERS`.
    """

    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    layers: Sequence[str] | None = None


def config_of(lora: Lora, family: str) -> Any:
    """Return the configuration of PEFT.

    Raises:
        InputError: PEFT is not installed, or the stock pipeline has no loader for a LoRA.
    """
    if family not in LAYERS:
        raise InputError(
            f"--rank: the stock pipeline of {family} has no loader for a LoRA; leave --rank out for a full fine-tuning"
        )
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError("--rank needs PEFT: pip install peft") from error
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank if lora.alpha is None else lora.alpha,
        lora_dropout=lora.dropout,
        init_lora_weights="gaussian",
        target_modules=list(LAYERS[family] if lora.layers is None else lora.layers),
    )


def add_lora(network: Any, config: Any, seed: int | None = None) -> None:
    """Freeze a network, and put a LoRA beside its layers, in float32.

    Args:
        seed: that of the first values of A; B begins as zero.

    Raises:
        InputError: the network has no such layers.
    """
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0 if seed is None else seed)
        try:
            network.add_adapter(config, adapter_name=NAME)
        except ValueError as error:
            raise InputError(f"--lora_layers {' '.join(sorted(config.target_modules))}: {error}") from error
    for parameter in trained(network).values():
        parameter.data = parameter.data.float()


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a network that are trained, by name."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def save_lora(pipeline: DiffusionPipeline, name: str, network: Any, folder: Path) -> None:
    """Write the LoRA of a network by the stock pipeline's `save_lora_weights`.

    Args:
        name: the network's component: `unet` or `transformer`.
    """
    from peft import get_peft_model_state_dict

    state: dict[str, Tensor] = get_peft_model_state_dict(network, adapter_name=NAME)
    described = {f"{name}_lora_adapter_metadata": network.peft_config[NAME].to_dict()}
    pipeline.save_lora_weights(folder, **{f"{name}_lora_layers": state}, **described)
