"""Checkpoints of ADM (guided-diffusion): a state dict in a .pt file.

    time_embed.{0,2}  label_emb  input_blocks.i.{0,1,...}  middle_block.{0,1,2}  output_blocks.i.{0,1,...}  out.{0,2}

A block i is a list of parts: the first convolution, a residual block (`in_layers`), an attention (`qkv`), and where the
resolution changes a convolution (`op`, `conv`) or one more residual block. With L levels of n blocks there are L n + L
input blocks and L (n + 1) output blocks, and L - 1 of the latter end with a change of resolution.

The file says nothing of the width of the heads, the order of the attention's rows, the resolution and the noise levels.

Reference: Diffusion Models Beat GANs on Image Synthesis (Dhariwal, Nichol, 2021, arXiv 2105.05233).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .layout import TIME_MLP, State, Tensors, attention, below, make_unet, resnet
from .model import Converted
from .schedules import ddpm_scheduler

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ATTENTION = {"norm": "norm", "qkv": "qkv", "proj": "proj_out"}


def is_adm(content: Any) -> bool:
    """Return whether the content of a file is a state dict of ADM's."""
    return isinstance(content, dict) and {"time_embed.0.weight", "input_blocks.0.0.weight"} <= content.keys()


def convert_adm(
    content: Mapping[str, Tensor],
    resolution: int | None = None,
    beta_schedule: str | None = None,
    attention_head_dim: int | None = None,
    num_attention_heads: int | None = None,
    new_attention_order: bool = False,
) -> Converted:
    """Return the pipeline of a state dict.

    Args:
        resolution, beta_schedule: of the training; `beta_schedule` is `linear` or `cosine` (`squaredcos_cap_v2`).
        attention_head_dim: the channels of a head, or, instead, `num_attention_heads` of each attention.
        new_attention_order: whether it was trained with `use_new_attention_order`.

    Raises:
        InputError: one of these is needed and missing, or the network is another one.
    """
    if "out.0.weight" not in content:
        raise InputError("it is the first half of a U-Net: a classifier, and no diffusion model")
    if content.get("middle_block.1.qkv.weight", torch.zeros(1, 1, 1)).ndim != 3:
        raise InputError(
            "its attention is not that of guided-diffusion: it may be one of openai/consistency_models, which have the "
            "same names, another order of the rows and EDM's preconditioning, and are not represented"
        )
    _require_told(resolution, beta_schedule, attention_head_dim, num_attention_heads)
    assert resolution is not None
    assert beta_schedule is not None
    tensors = Tensors(content)
    reader = _Reader(tensors, num_attention_heads, attention_head_dim, "jhd" if new_attention_order else "hjd")
    description, weights = reader.read()
    taken, given = description["in_channels"], description["out_channels"]
    if given not in (taken, 2 * taken):
        raise InputError(f"it maps {taken} channels to {given}: a model of superresolution or another task")
    tensors.require_empty()
    description |= {"sample_size": resolution, "norm_eps": 1e-5, "norm_group_size": 1}
    of_heads = f"{attention_head_dim} channels a head" if attention_head_dim else f"{num_attention_heads} heads"
    told = [f"images of {resolution} x {resolution}", f"noise levels {beta_schedule}", of_heads]
    told += ["use_new_attention_order"] if new_attention_order else []
    description |= {"resample_type": "conv" if reader.convolutional else "resnet"}
    if num_attention_heads is not None and len(reader.widths) == 1:  # heads of one width, as UNet2DModel has them
        attention_head_dim, num_attention_heads = reader.widths.pop() // num_attention_heads, None
    description |= {"num_attention_heads": num_attention_heads, "attention_head_dim": attention_head_dim or 64}
    unet = make_unet(description, weights)
    scheduler = ddpm_scheduler({"cosine": "squaredcos_cap_v2"}.get(beta_schedule, beta_schedule), given == 2 * taken)
    assumed = ["1000 timesteps"] + ([] if new_attention_order else ["not trained with use_new_attention_order"])
    return Converted(unet, scheduler, None, "a U-Net of guided-diffusion (ADM)", told=told, assumed=assumed)


def _require_told(resolution: Any, beta_schedule: Any, head_dim: Any, heads: Any) -> None:
    """Check that what the file does not say is told.

    Raises:
        InputError: something is missing, or contradicts another; the message says what to say.
    """
    if beta_schedule not in (None, "linear", "cosine", "squaredcos_cap_v2"):
        raise InputError(f"--beta_schedule is linear or cosine, not {beta_schedule}")
    if head_dim is not None and heads is not None:
        raise InputError("--attention_head_dim and --num_attention_heads say the same thing: give one of them")
    missing = {
        "--resolution": resolution is None,
        "--beta_schedule linear or cosine (its noise_schedule)": beta_schedule is None,
        "--attention_head_dim (its num_head_channels, 64 in most published models) or --num_attention_heads (its "
        "num_heads)": head_dim is None and heads is None,
    }
    if wanted := [text for text, lacks in missing.items() if lacks]:
        raise InputError(
            f"a file of guided-diffusion does not say all of its model. Say {'; and '.join(wanted)}; and "
            f"--new_attention_order if it was trained with use_new_attention_order (ImageNet 64)"
        )


class _Reader:
    """Takes the blocks of a network in turn, and notes what they show."""

    def __init__(self, tensors: Tensors, heads: int | None, head_dim: int | None, order: str) -> None:
        self.tensors, self.heads, self.head_dim, self.order = tensors, heads, head_dim, order
        self.convolutional = False
        self.attended: set[int] = set()
        self.widths: set[int] = set()

    def read(self) -> tuple[dict[str, Any], State]:
        """Return the description of the network, and its weights by diffusers' names."""
        tensors, ends = self.tensors, self._ends()
        levels, total = len(ends) + 1, 1 + self._last("output_blocks")
        if total % levels or 1 + self._last("input_blocks") != total:
            raise InputError("its levels have different numbers of blocks")
        n = total // levels - 1
        weights = tensors.part("", {"conv_in": "input_blocks.0.0"})
        channels = []
        for i in range(1, total):
            level, j = divmod(i - 1, n + 1)
            if j == n:
                weights |= self.resampling(f"input_blocks.{i}.0.", f"down_blocks.{level}.downsamplers.0", "op")
                continue
            weights |= self.block(f"input_blocks.{i}.", f"down_blocks.{level}", j)
            if j == 0:
                channels.append(weights[f"down_blocks.{level}.resnets.0.conv1.weight"].shape[0])
        weights |= below("mid_block.resnets.0", resnet(tensors, "middle_block.0.", RESNET))
        weights |= self.attention("middle_block.1.", "mid_block.attentions.0")
        weights |= below("mid_block.resnets.1", resnet(tensors, "middle_block.2.", RESNET))
        for i in range(total):
            level, j = divmod(i, n + 1)
            weights |= self.block(f"output_blocks.{i}.", f"up_blocks.{level}", j)
            if j == n and level < levels - 1:
                weights |= self.resampling(f"output_blocks.{i}.{ends[i]}.", f"up_blocks.{level}.upsamplers.0", "conv")
        weights |= tensors.part("", {"conv_norm_out": "out.0", "conv_out": "out.2"})
        weights |= tensors.part("", dict(zip(TIME_MLP, ("time_embed.0", "time_embed.2"), strict=True)))
        classes = None
        if "label_emb.weight" in tensors:
            weights["class_embedding.weight"] = tensors.take("label_emb.weight")
            classes = weights["class_embedding.weight"].shape[0]
        first = weights["down_blocks.0.resnets.0.time_emb_proj.weight"].shape[0]
        width, embedded = weights[f"{TIME_MLP[0]}.weight"].shape
        return {
            "in_channels": weights["conv_in.weight"].shape[1],
            "out_channels": weights["conv_out.weight"].shape[0],
            "block_out_channels": tuple(channels),
            "layers_per_block": n,
            "attention_levels": tuple(sorted(self.attended)),
            "attention_after_last_up_block": False,
            "output_scale_factor": 1.0,
            "resample_shortcut": False,
            "resnet_time_scale_shift": "scale_shift" if first == 2 * channels[0] else "default",
            "embedding_channels": embedded,
            "time_embedding_dim": width,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "num_class_embeds": classes,
        }, weights

    def _last(self, kind: str) -> int:
        return max(int(name.split(".")[1]) for name in self.tensors.left if name.startswith(f"{kind}."))

    def _ends(self) -> dict[int, int]:
        """Return which output blocks end with a change of resolution, and which of their parts it is."""
        ends = {}
        for i in range(1 + self._last("output_blocks")):
            for part in (1, 2):
                if any(f"output_blocks.{i}.{part}.{name}.weight" in self.tensors for name in ("conv", "in_layers.0")):
                    ends[i] = part
        return ends

    def block(self, prefix: str, where: str, index: int) -> State:
        """Take a residual block, and its attention where it has one."""
        found = below(f"{where}.resnets.{index}", resnet(self.tensors, f"{prefix}0.", RESNET))
        if f"{prefix}1.qkv.weight" in self.tensors:
            found |= self.attention(f"{prefix}1.", f"{where}.attentions.{index}")
            if where.startswith("down_blocks"):
                self.attended.add(int(where.split(".")[1]))
        return found

    def attention(self, prefix: str, where: str) -> State:
        heads, width = self.heads, self.tensors.peek(f"{prefix}qkv.weight").shape[1]
        self.widths.add(width)
        if heads is None:
            assert self.head_dim is not None
            if width % self.head_dim:
                raise InputError(f"--attention_head_dim {self.head_dim} does not divide {width} channels")
            heads = width // self.head_dim
        return below(where, attention(self.tensors, prefix, ATTENTION, heads, self.order))

    def resampling(self, prefix: str, where: str, convolution: str) -> State:
        """Take what changes the resolution: a convolution of this name, or a residual block."""
        if f"{prefix}{convolution}.weight" in self.tensors:
            self.convolutional = True
            return self.tensors.part(prefix, {f"{where}.conv": convolution})
        return below(where, resnet(self.tensors, prefix, RESNET))
