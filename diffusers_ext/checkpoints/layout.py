"""From the tensors of a checkpoint to a U-Net of diffusers: taking each once, under its name here.

    Tensors       the tensors of a file by their names, each taken once; what is left at the end is an error
    resnet, ...   one block of the file, under the names that diffusers has for its parts
    make_unet     a `UNet2DModel` where it is exactly that network, else a `ScoreUNet2DModel`

Attention keeps its query, key and value in one matrix of 3C rows. Of h heads of d channels each, C = h d, and with j
= 0, 1, 2 for the three, the rows are counted as `order` says: "hjd" (ADM), "jhd" (ADM's newer order), "hdj" (EDM).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ..errors import InputError
from ..score_unet import ScoreUNet2DModel, block_types

State = dict[str, Tensor]


class Tensors:
    """The tensors of a file by name, each of which is taken once.

    Args:
        tensors: what the file holds.

    Raises:
        InputError: one has more numbers than its content, so that a small file would fill the memory.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.left = dict(tensors)
        for name, value in self.left.items():
            if value.numel() * value.itemsize > value.untyped_storage().nbytes():
                raise InputError(f"{name!r:.99} has {value.numel()} numbers, more than its content")

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str) -> Tensor:
        """Return a tensor, and count it as used.

        Raises:
            InputError: there is none of this name.
        """
        if name not in self.left:
            raise InputError(f"the file has no {name}: it is another network than its other parts say")
        return self.left.pop(name)

    def peek(self, name: str) -> Tensor:
        """Return a tensor without taking it. Raises as `take`."""
        tensor = self.left[name] = self.take(name)
        return tensor

    def part(self, prefix: str, names: Mapping[str, str]) -> State:
        """Take the weight and the bias, where there is one, of some parts.

        Args:
            prefix: where they lie.
            names: the names of diffusers -> those of the file, below the prefix.
        """
        found = {}
        for ours, theirs in names.items():
            found[f"{ours}.weight"] = self.take(f"{prefix}{theirs}.weight")
            if f"{prefix}{theirs}.bias" in self:
                found[f"{ours}.bias"] = self.take(f"{prefix}{theirs}.bias")
        return found

    def require_empty(self) -> None:
        """Raise an `InputError` if something was not taken."""
        if self.left:
            some = ", ".join(f"{name!r:.99}" for name in sorted(self.left)[:3])
            raise InputError(
                f"the file has {len(self.left)} tensors that its kind of network does not have, among them {some}"
            )


def resnet(tensors: Tensors, prefix: str, names: Mapping[str, str]) -> State:
    """Take a residual block, with a 1x1 shortcut where it has one.

    Args:
        names: the names of diffusers -> those of the file.
    """
    shortcut = {"conv_shortcut": names["conv_shortcut"]}
    has_shortcut = f"{prefix}{names['conv_shortcut']}.weight" in tensors
    always = {ours: theirs for ours, theirs in names.items() if ours != "conv_shortcut"}
    return tensors.part(prefix, always | (shortcut if has_shortcut else {}))


def attention(tensors: Tensors, prefix: str, names: Mapping[str, str], heads: int, order: str) -> State:
    """Take an attention whose query, key and value are one matrix, of rows in this order (see the module)."""
    found = tensors.part(prefix, {"group_norm": names["norm"], "to_out.0": names["proj"]})
    joint = tensors.part(prefix, {"qkv": names["qkv"]})
    channels = joint["qkv.weight"].shape[1]
    if channels % heads:
        raise InputError(f"{heads} heads do not divide an attention of {channels} channels")
    sizes = {"h": heads, "j": 3, "d": channels // heads}
    for kind in ("weight", "bias"):
        rows = joint[f"qkv.{kind}"].reshape(*(sizes[axis] for axis in order), -1)
        rows = rows.permute(*(order.index(axis) for axis in "jhd"), 3).reshape(3, channels, -1)
        for name, values in zip("qkv", rows, strict=True):
            found[f"to_{name}.{kind}"] = values if kind == "weight" else values[:, 0]
    found["to_out.0.weight"] = found["to_out.0.weight"].reshape(channels, channels)
    return found


def below(prefix: str, part: State) -> State:
    """Return a part with its names below a prefix."""
    return {f"{prefix}.{name}": value for name, value in part.items()}


TIME_MLP = ("time_embedding.linear_1", "time_embedding.linear_2")

_STOCK: dict[str, Any] = {  # the arguments of `ScoreUNet2DModel` that `UNet2DModel` has no other values of
    "attention_after_last_up_block": False,
    "first_channels": None,
    "num_attention_heads": None,
    "output_scale_factor": 1.0,
    "resample_filter": (1, 1),
    "resample_shortcut": False,
    "residual_input": None,
    "time_embedding_type": "positional",
    "time_scale": 1.0,
    "time_offset": 0.0,
    "labels_before_time_mlp": False,
    "variance_exploding": False,
    "unit_range_input": False,
}
_OF_BOTH = (
    *("sample_size", "in_channels", "out_channels", "block_out_channels", "layers_per_block", "dropout", "norm_eps"),
    *("resnet_time_scale_shift", "time_embedding_dim", "flip_sin_to_cos", "freq_shift", "num_class_embeds"),
    "attention_head_dim",
)


def make_unet(description: Mapping[str, Any], state: State) -> UNet2DModel:
    """Return the network with these weights.

    Args:
        description: the arguments of `ScoreUNet2DModel`.
        state: the weights under diffusers' names.

    Raises:
        InputError: the weights do not fit the description.
    """
    defaults = inspect.signature(ScoreUNet2DModel.__init__).parameters.values()
    description = {one.name: one.default for one in defaults if one.name != "self"} | dict(description)
    channels, config = description["block_out_channels"], {}
    size, multiple = description["sample_size"], 2 ** (len(channels) - 1)
    if size is None or size < 1 or size % multiple:
        raise InputError(f"a network of {len(channels)} levels takes images of a multiple of {multiple}, not of {size}")
    if broken := [name for name, value in state.items() if not value.isfinite().all()]:
        raise InputError(f"{len(broken)} of its tensors are not finite, among them that of {broken[0]}")
    is_stock = all(description[name] == value for name, value in _STOCK.items())
    is_stock &= description["embedding_channels"] in (None, channels[0])
    is_stock &= min(channels) // description["norm_group_size"] >= 32
    if is_stock:
        attended = [level in description["attention_levels"] for level in range(len(channels))]
        down, up = block_types(attended, description["resample_type"])
        config = {name: description[name] for name in _OF_BOTH}
        config |= {"down_block_types": down, "up_block_types": up, "attn_norm_num_groups": 32}
        config |= dict.fromkeys(("downsample_type", "upsample_type"), description["resample_type"])
    kind, arguments = (UNet2DModel, config) if is_stock else (ScoreUNet2DModel, description)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # no memory for what does not fit
        needed = {name: value.shape for name, value in kind(**arguments).state_dict().items()}
    found = {name: value.shape for name, value in state.items()}
    if wrong := sorted(name for name in needed.keys() | found.keys() if needed.get(name) != found.get(name)):
        name = wrong[0]
        raise InputError(
            f"{len(wrong)} weights do not fit: {name} would be {_size(needed, name)}, the file has {_size(found, name)}"
        )
    with torch.random.fork_rng(devices=[]):
        unet = kind(**arguments)
    unet.load_state_dict(state)
    return unet.eval()


def _size(shapes: Mapping[str, torch.Size], name: str) -> str:
    return " x ".join(map(str, shapes[name])) if name in shapes else "nothing"
