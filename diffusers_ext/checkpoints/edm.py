"""Checkpoints of EDM and its forks: network-snapshot-*.pkl (Karras et al., 2022, arXiv 2206.00364).

`ema` is a record `...Precond` around a record `SongUNet` (DDPM++, NCSN++) or `DhariwalUNet` (ADM). Both are made of
`enc` and `dec`, whose blocks are called by their resolution, and a block has the same parts in both:

    norm0 conv0 affine norm1 conv1 [skip] [norm2 qkv proj]

The preconditioning says the scheduler: `EDMPrecond` is `EDMEulerScheduler`; `VPPrecond` a variance-preserving one
of the same noise levels, and so is `iDDPMPrecond`, of the cosine schedule; `VEPrecond` is `EDMEulerScheduler`, too (see
`score_unet`).
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .layout import TIME_MLP, State, Tensors, attention, below, make_unet, resnet
from .model import Converted
from .pickles import Record
from .schedules import N, ddpm_scheduler, edm_scheduler, vp_scheduler

RESNET = {
    "norm1": "norm0", "conv1": "conv0", "time_emb_proj": "affine", "norm2": "norm1", "conv2": "conv1",
    "conv_shortcut": "skip",
}  # fmt: skip
ATTENTION = {"norm": "norm2", "qkv": "qkv", "proj": "proj"}
MOST, DEEPEST = 100_000, 20
"""More modules than this, or deeper ones, are no network."""


def is_edm(content: Any) -> bool:
    """Return whether the content of a file is that of EDM's."""
    return isinstance(content, dict) and isinstance(content.get("ema"), Record)


def convert_edm(content: dict[str, Any]) -> Converted:
    """Return the pipeline of the averaged network in the content of a file. Raises `InputError` where there is none."""
    precond = content["ema"]
    modules = _modules(precond)
    network = modules.get("model")
    if network is None or network.name not in ("SongUNet", "DhariwalUNet"):
        found = "none" if network is None else network.name
        raise InputError(f"a network of EDM is a SongUNet or a DhariwalUNet, the file has {found!r}")
    tensors = Tensors(_tensors(modules))
    song, state = network.name == "SongUNet", precond.state
    description, weights = read_unet(tensors, "model.", _block_facts(modules), song)
    dropped = []
    if "model.map_augment.weight" in tensors:
        tensors.take("model.map_augment.weight")
        dropped.append("the weights of augmentation labels, which sampling leaves at 0")
    tensors.require_empty()
    null = None
    if "map_label.weight" in weights:
        classes, dropout = weights["map_label.weight"].shape[1], bool(network.state.get("label_dropout"))
        null = classes if dropout else None
        label_table(weights, sqrt(classes) if song else 1.0, dropout)
        description |= {"num_class_embeds": classes + dropout, "labels_before_time_mlp": song}
    learned = description["out_channels"] == 2 * description["in_channels"]
    scheduler = _scheduler(precond.name, state, learned)
    description["variance_exploding"] = precond.name == "VEPrecond"
    description["sample_size"] = int(state["img_resolution"])
    described = f"a {network.name} of EDM in {precond.name}"
    return Converted(make_unet(description, weights), scheduler, null, described, dropped=dropped)


def _scheduler(precond: str, state: dict[str, Any], learned_variance: bool) -> Any:
    """Return the scheduler of a preconditioning with these settings."""
    if precond == "EDMPrecond":
        return edm_scheduler(0.002, 80.0, float(state["sigma_data"]))
    if precond == "VPPrecond":
        return vp_scheduler(float(state["beta_min"]), float(state["beta_d"]) + float(state["beta_min"]))
    if precond == "VEPrecond":
        return edm_scheduler(float(state["sigma_min"]), float(state["sigma_max"]), 0.5)
    if precond == "iDDPMPrecond":
        if (state["C_1"], state["C_2"], state["M"]) != (0.001, 0.008, N):
            raise InputError("its noise levels are not those of the cosine schedule, of 1000 timesteps")
        return ddpm_scheduler("squaredcos_cap_v2", learned_variance)
    known = "EDMPrecond, VPPrecond, VEPrecond and iDDPMPrecond"
    raise InputError(f"the preconditioning {precond!r} is not known: {known} are")


def _modules(root: Record) -> dict[str, Record]:
    """Return the modules of a network by their paths, that of the root being empty."""
    found, waiting = {}, [("", root)]
    while waiting:
        path, module = waiting.pop()
        found[path] = module
        children = module.state.get("_modules")
        for name, child in children.items() if isinstance(children, dict) else ():
            if isinstance(child, Record) and isinstance(name, str):
                waiting.append((f"{path}.{name}" if path else name, child))
        if path.count(".") > DEEPEST or len(found) + len(waiting) > MOST:
            raise InputError("its modules lie within themselves, or are too many for a network")
    return found


def _tensors(modules: dict[str, Record]) -> dict[str, Tensor]:
    """Return the parameters and buffers of the network's modules by their names in a state dict."""
    return {
        f"{path}.{name}": value
        for path, module in modules.items()
        if path.startswith("model.")
        for kind in ("_parameters", "_buffers")
        for name, value in (module.state.get(kind) or {}).items()
        if isinstance(value, Tensor)
    }


def _block_facts(modules: dict[str, Record]) -> dict[str, Any]:
    """Return what the file says of its blocks, which must be the same for all, as arguments of `ScoreUNet2DModel`."""
    blocks = [module.state for module in modules.values() if module.name == "UNetBlock"]
    norms = [module.state for module in modules.values() if module.name == "GroupNorm"]
    pairs = {(b["num_heads"], b["out_channels"]) for b in blocks if b.get("num_heads")}
    heads, dims = {h for h, _ in pairs}, {c // h for h, c in pairs}
    single: dict[str, set[Any]] = {
        "output_scale_factor": {1 / float(b["skip_scale"]) for b in blocks},
        "resnet_time_scale_shift": {"scale_shift" if b["adaptive_scale"] else "default" for b in blocks},
        "dropout": {float(b["dropout"]) for b in blocks},
        "norm_eps": {float(n["eps"]) for n in norms},
    }
    for name, values in single.items():
        if len(values) != 1:
            raise InputError(f"its blocks have different values of {name}: {sorted(values)}")
    facts = {name: values.pop() for name, values in single.items()}
    if len(dims) == 1 and heads != {1}:
        return facts | {"num_attention_heads": None, "attention_head_dim": dims.pop()}
    if len(heads) > 1:
        raise InputError(f"its attentions have {sorted(heads)} heads, of different widths")
    return facts | {"num_attention_heads": heads.pop() if heads else 1}


def label_table(weights: State, factor: float, with_null: bool) -> None:
    """Turn the linear map of one-hot labels into a table with a row for each, the null class being all zeros."""
    matrix, bias = weights.pop("map_label.weight"), weights.pop("map_label.bias", torch.zeros(()))
    rows = factor * matrix.T
    null = torch.zeros(int(with_null), rows.shape[1])
    weights["class_embedding.weight"] = torch.cat([rows, null]) + bias


def read_unet(tensors: Tensors, prefix: str, facts: dict[str, Any], song: bool) -> tuple[dict[str, Any], State]:
    """Return the description of a network of EDM's blocks, and its weights by diffusers' names.

    Args:
        tensors: those of the file; what belongs to the network, but not labels of augmentation, is taken.
        prefix: where the network lies.
        facts: what the blocks have in common.
        song: whether it is a SongUNet, and not a DhariwalUNet.
    """
    names = {name.removeprefix(prefix).split(".")[1] for name in tensors.left if name.startswith(f"{prefix}enc.")}
    sizes = sorted({int(name.split("x")[0]) for name in names}, reverse=True)
    n = sum(name.startswith(f"{sizes[0]}x{sizes[0]}_block") for name in names)
    reader = _Reader(tensors, prefix, facts, len(sizes))
    weights = tensors.part(f"{prefix}enc.", {"conv_in": f"{sizes[0]}x{sizes[0]}_conv"})
    channels, pyramid = [], None
    for level, size in enumerate(sizes):
        here = f"enc.{size}x{size}_"
        if level:
            weights |= reader.resampling(f"{here}down", f"down_blocks.{level - 1}.downsamplers.0")
            if f"{prefix}{here}aux_residual.weight" in tensors:
                pyramid = "filtered"
                reader.filter(f"{here}aux_residual")
                weights |= tensors.part(prefix, {f"input_pyramid.{level - 1}.0": f"{here}aux_residual"})
        for j in range(n):
            weights |= reader.block(f"{here}block{j}", f"down_blocks.{level}", j)
        channels.append(weights[f"down_blocks.{level}.resnets.0.conv1.weight"].shape[0])
    size = sizes[-1]
    weights |= reader.block(f"dec.{size}x{size}_in0", "mid_block", 0)
    weights |= reader.block(f"dec.{size}x{size}_in1", "mid_block", 1)
    for i, size in enumerate(reversed(sizes)):
        if i:
            weights |= reader.resampling(f"dec.{size}x{size}_up", f"up_blocks.{i - 1}.upsamplers.0")
        for j in range(n + 1):
            weights |= reader.block(f"dec.{size}x{size}_block{j}", f"up_blocks.{i}", j)
    last = f"dec.{sizes[0]}x{sizes[0]}_aux_" if song else "out_"
    weights |= tensors.part(prefix, {"conv_norm_out": f"{last}norm", "conv_out": f"{last}conv"})
    weights |= tensors.part(prefix, dict(zip(TIME_MLP, ("map_layer0", "map_layer1"), strict=True)))
    fourier = f"{prefix}map_noise.freqs" in tensors
    if fourier:
        weights["time_proj.frequencies"] = tensors.take(f"{prefix}map_noise.freqs")
    if f"{prefix}map_label.weight" in tensors:
        weights |= tensors.part(prefix, {"map_label": "map_label"})
    first = weights[f"{TIME_MLP[0]}.weight"]
    description = facts | {
        "in_channels": weights["conv_in.weight"].shape[1],
        "out_channels": weights["conv_out.weight"].shape[0],
        "block_out_channels": tuple(channels),
        "first_channels": None if (stem := weights["conv_in.weight"].shape[0]) == channels[0] else stem,
        "layers_per_block": n,
        "attention_levels": tuple(sorted(reader.attended)),
        "attention_after_last_up_block": song,
        "resample_filter": reader.taps,
        "resample_shortcut": song,
        "residual_input": pyramid,
        "time_embedding_type": "fourier" if fourier else "positional",
        "embedding_channels": first.shape[1] // (2 if fourier else 1),
        "time_embedding_dim": first.shape[0],
        "flip_sin_to_cos": not song,
        "freq_shift": int(song),
    }
    return description, weights


class _Reader:
    """Takes the blocks of a network, and notes what they show."""

    def __init__(self, tensors: Tensors, prefix: str, facts: dict[str, Any], levels: int) -> None:
        self.tensors, self.prefix, self.facts, self.levels = tensors, prefix, facts, levels
        self.attended: set[int] = set()
        self.taps: tuple[float, ...] = (1, 1)

    def block(self, name: str, where: str, index: int) -> State:
        """Take a block, and its attention where it has one."""
        path = f"{self.prefix}{name}."
        found = below(f"{where}.resnets.{index}", resnet(self.tensors, path, RESNET))
        if f"{path}qkv.weight" in self.tensors:
            channels = self.tensors.peek(f"{path}qkv.weight").shape[1]
            heads = self.facts["num_attention_heads"] or channels // self.facts["attention_head_dim"]
            found |= below(f"{where}.attentions.{index}", attention(self.tensors, path, ATTENTION, heads, "hdj"))
            if where.startswith("down_blocks"):
                self.attended.add(int(where.split(".")[1]))
        return found

    def resampling(self, name: str, where: str) -> State:
        """Take a block that changes the resolution."""
        for part in ("conv0", "skip"):
            self.filter(f"{name}.{part}")
        return below(where, resnet(self.tensors, f"{self.prefix}{name}.", RESNET))

    def filter(self, name: str) -> None:
        """Take the filter of a convolution that changes the resolution."""
        rows = self.tensors.take(f"{self.prefix}{name}.resample_filter").sum((0, 1, 2)).tolist()
        self.taps = tuple(round(value / rows[0], 6) for value in rows)
