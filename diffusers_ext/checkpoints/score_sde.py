"""Checkpoints of score_sde_pytorch and Reflected-Diffusion: a dict of `model`, `ema` and more in a .pth file.

`model` is a state dict. That of NCSN++ and DDPM++ is a list `all_modules.i` in the order of the evaluation:

    [Fourier features W]  linear, linear  3x3  L levels down  residual, attention, residual  L levels up  norm, 3x3

    a level down  n times (residual, [attention]), and but for the last level: residual that halves, [3x3 of the input]
    a level up    n + 1 times residual, [attention], and but for the last level: residual that doubles

Only a residual block that changes the resolution has a shortcut between equal numbers of channels, which tells L and n.
Reflected-Diffusion has this network with Fourier features, and EDM's DhariwalUNet at the time ln(sigma/2), of images in
[0, 1]; both give -eps. `ema` is a list of averaged parameters in the order of the model's, without names.

References: Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2020, arXiv
2011.13456); Reflected Diffusion Models (Lou, Ermon, 2023, arXiv 2304.04740).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import log
from typing import Any

from torch import Tensor

from ..errors import InputError
from .edm import label_table, read_unet
from .layout import TIME_MLP, State, Tensors, below, make_unet, resnet
from .model import Converted
from .schedules import N, ddpm_scheduler, edm_scheduler, reflected_scheduler, vp_scheduler

RESNET = {
    "norm1": "GroupNorm_0", "conv1": "Conv_0", "time_emb_proj": "Dense_0", "norm2": "GroupNorm_1", "conv2": "Conv_1",
    "conv_shortcut": "Conv_2",
}  # fmt: skip
FILTERS = {False: ((1, 1), "means of 2 x 2"), True: ((1, 3, 3, 1), "the filter 1, 3, 3, 1")}
SDES = {
    "vp": "the variance-preserving SDE",
    "ddpm": "DDPM's discrete times",
    "ve": "the variance-exploding SDE",
    "reflected": "a reflected SDE",
}


def is_score_sde(content: Any) -> bool:
    """Return whether the content of a file is that of one of these code bases."""
    return isinstance(content, dict) and {"model", "ema"} <= content.keys() and isinstance(content["model"], dict)


def convert_score_sde(
    content: Mapping[str, Any],
    sde: str | None = None,
    resolution: int | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    beta_min: float | None = None,
    beta_max: float | None = None,
    fir: bool | None = None,
) -> Converted:
    """Return the pipeline of the averaged network.

    Args:
        sde: `vp` (`training.continuous = True`), `ddpm` (False), `ve` or `reflected`; needed where the network does not
            tell.
        resolution: of the training; needed.
        sigma_min, sigma_max: of `ve` and `reflected`, of data in [0, 1]; needed where the file does not say them.
        beta_min, beta_max: of `vp`, by default 0.1 and 20.
        fir: whether residual blocks change the resolution by the filter (1, 3, 3, 1), as its configuration says; needed
            where no pyramid of the input shows it.

    Raises:
        InputError: something is needed and missing, or the network is another one.
    """
    if resolution is None:
        raise InputError("the file does not say the size of its images: say --resolution")
    tensors, described = Tensors(_averaged(content)), "a DDPM++"
    if "cond_map.0.weight" in tensors:
        raise InputError("it is the network of VDM, all at one resolution, which is no U-Net of diffusers")
    levels = tensors.take("sigmas") if "sigmas" in tensors else None
    null, shift = None, 0.0
    told, assumed = [f"images of {resolution} x {resolution}"], list[str]()
    if "model.map_layer0.weight" in tensors:
        described, shift = "a DhariwalUNet", log(2)
        description, weights, null = _dhariwal(tensors)
        if sde not in (None, "reflected"):
            raise InputError(f"--sde {sde}: a DhariwalUNet in such a file is one of reflected")
        process = "reflected"
    else:
        description, weights = _Reader(tensors).read()
        assumed.append("residual blocks divided by the square root of 2 (skip_rescale)")
        if description["residual_input"] is None:
            description["resample_filter"], how = FILTERS[bool(fir)]
            (assumed if fir is None else told).append(f"resolutions changed by {how} (fir)")
        elif fir is not None:
            raise InputError("--fir: the file shows it, by its pyramid of the input: leave it out")
        fourier = description["time_embedding_type"] == "fourier"
        process = _process(sde, fourier, "scaler" in content)
        described = "an NCSN++" if fourier else described
    _require_of(process, {"beta": (beta_min, beta_max), "sigma": (sigma_min, sigma_max)})
    tensors.require_empty()
    description["sample_size"] = resolution
    if process == "vp":
        low, high = _betas(beta_min, beta_max)
        (told if (beta_min, beta_max) != (None, None) else assumed).append(f"beta from {low:g} to {high:g}")
        scheduler: Any = vp_scheduler(low, high)
    elif process == "ddpm":
        scheduler = ddpm_scheduler("linear", clip=False)
        assumed.append("betas from 0.0001 to 0.02")
    else:
        low, high = _range(levels, sigma_min, sigma_max)
        told += [] if levels is not None else [f"noise levels from {low:.4g} to {high:.4g}"]
        assumed.append("noise levels that count in units of data in [0, 1] (not centered)")
        if process == "ve":
            scheduler = edm_scheduler(2 * low, 2 * high, 0.5)
            description["variance_exploding"] = True
        else:
            scheduler = reflected_scheduler(2 * low, 2 * high)
            description |= {"time_scale": log(high / low) / (N - 1), "time_offset": log(low) - shift}
            for kind in ("weight", "bias"):
                weights[f"conv_out.{kind}"] = -weights[f"conv_out.{kind}"]
    unet = make_unet(description, weights)
    return Converted(unet, scheduler, null, f"{described} of {SDES[process]}", told=told, assumed=assumed)


def _dhariwal(tensors: Tensors) -> tuple[dict[str, Any], State, int | None]:
    """Return the description of Reflected-Diffusion's DhariwalUNet, its weights, and its null class: no label."""
    facts = {"output_scale_factor": 1.0, "resnet_time_scale_shift": "scale_shift", "norm_eps": 1e-5}
    facts |= {"num_attention_heads": None, "attention_head_dim": 64}
    description, weights = read_unet(tensors, "model.", facts, song=False)
    description["unit_range_input"] = True
    if "map_label.weight" not in weights:
        return description, weights, None
    null = weights["map_label.weight"].shape[1]
    label_table(weights, 1.0, with_null=True)
    return description | {"num_class_embeds": null + 1}, weights, null


def _process(sde: str | None, fourier: bool, with_scaler: bool) -> str:
    """Return the process of an NCSN++ or DDPM++: the one that is told, or the one that the file shows.

    Args:
        fourier: whether its time is embedded by Fourier features.
        with_scaler: whether the file has a `scaler`, as those of Reflected-Diffusion have.
    """
    if fourier and sde is None:
        return "reflected" if with_scaler else "ve"
    if not fourier and sde not in ("vp", "ddpm"):
        wrong = "" if sde is None else f"--sde {sde}: its network is told timesteps. "
        raise InputError(f"{wrong}Say --sde vp (training.continuous = True) or --sde ddpm (False)")
    if fourier and (sde in ("vp", "ddpm") or (sde == "ve" and with_scaler)):
        kind = "a file of Reflected-Diffusion, reflected" if with_scaler else "a network with Fourier features, ve"
        raise InputError(f"--sde {sde}: it is {kind}: leave it out")
    assert sde is not None
    return sde


def _require_of(process: str, told: Mapping[str, tuple[float | None, float | None]]) -> None:
    """Refuse numbers of another process than this one, which is `vp` of `beta`, `ve` and `reflected` of `sigma`."""
    takes = {"vp": "beta", "ve": "sigma", "reflected": "sigma"}.get(process)
    for name, numbers in told.items():
        if name != takes and numbers != (None, None):
            raise InputError(f"--{name}_min and --{name}_max: {SDES[process]} has none: leave them out")


def _betas(low: float | None, high: float | None) -> tuple[float, float]:
    """Return beta_min and beta_max: those that are told, else those of the paper."""
    low, high = 0.1 if low is None else low, 20.0 if high is None else high
    if not low < high:
        raise InputError(f"--beta_min {low:g} must be below --beta_max {high:g}")
    return low, high


def _range(levels: Tensor | None, low: float | None, high: float | None) -> tuple[float, float]:
    """Return sigma_min and sigma_max: those that are given, else those of the file."""
    if levels is not None:
        if (low, high) != (None, None):
            ends = f"{levels.min():.4g} to {levels.max():.4g}"
            raise InputError(f"--sigma_min and --sigma_max: the file says its noise levels, {ends}: leave them out")
        low, high = levels.min().item(), levels.max().item()
    if low is None or high is None:
        raise InputError(
            "the file does not say its noise levels: say --sigma_min and --sigma_max, of data in [0, 1] (0.01 and 5 in "
            "the configurations of Reflected-Diffusion, 0.01 and 50 in those of score_sde for CIFAR-10)"
        )
    if not low < high:
        raise InputError(f"--sigma_min {low} must be below --sigma_max {high}")
    return low, high


def _averaged(content: Mapping[str, Any]) -> State:
    """Return the model's state with the averaged parameters in the place of its own."""
    model = {name.removeprefix("module."): value for name, value in content["model"].items()}
    if not all(isinstance(value, Tensor) for value in model.values()):
        raise InputError("`model` is no state dict of tensors")
    ema = content["ema"]
    average = ema.get("shadow_params") if isinstance(ema, dict) else None
    constant = re.compile(r"(^|\.)(sigmas|W|freqs|resample_filter)$")
    names = [name for name in model if not constant.search(name) or "NIN" in name]
    if not isinstance(average, list) or [value.shape for value in average] != [model[name].shape for name in names]:
        raise InputError("`ema` does not hold an average of each parameter of `model`, in this order")
    return model | dict(zip(names, average, strict=True))


class _Reader:
    """Takes the modules of the list one after the other."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors, self.i = tensors, 0
        if "all_modules.0.weight" not in tensors and "all_modules.0.W" not in tensors:
            raise InputError("`model` is neither an NCSN++ or DDPM++ (all_modules.0) nor a DhariwalUNet (model.enc)")

    def has(self, name: str) -> bool:
        """Return whether the next module has this part."""
        return f"all_modules.{self.i}.{name}" in self.tensors

    def next(self) -> str:
        """Return the prefix of the next module, and go on."""
        self.i += 1
        return f"all_modules.{self.i - 1}."

    def read(self) -> tuple[dict[str, Any], State]:
        """Return the description of the network, and its weights by diffusers' names."""
        weights: State = {}
        if fourier := self.has("W"):
            weights["time_proj.frequencies"] = self.tensors.take(f"{self.next()}W")
        for name in (*TIME_MLP, "conv_in"):
            weights |= self.single(name)
        levels, n = self._counts()
        channels, attended, pyramid = [], set(), None
        for level in range(levels):
            for j in range(n):
                weights |= below(f"down_blocks.{level}.resnets.{j}", self.resnet())
                if self.has("NIN_3.W"):
                    attended.add(level)
                    weights |= self.attention(f"down_blocks.{level}.attentions.{j}")
            channels.append(weights[f"down_blocks.{level}.resnets.0.conv1.weight"].shape[0])
            if level < levels - 1:
                weights |= below(f"down_blocks.{level}.downsamplers.0", self.resnet())
                for theirs, kind, ours in (("Conv2d_0", "filtered", 0), ("Conv_0", "strided", 1)):
                    if self.has(f"{theirs}.weight") and not self.has("GroupNorm_0.weight") and self.is_3x3(theirs):
                        pyramid = kind
                        weights |= self.tensors.part(self.next(), {f"input_pyramid.{level}.{ours}": theirs})
        weights |= below("mid_block.resnets.0", self.resnet())
        weights |= self.attention("mid_block.attentions.0")
        weights |= below("mid_block.resnets.1", self.resnet())
        for level in range(levels):
            for j in range(n + 1):
                weights |= below(f"up_blocks.{level}.resnets.{j}", self.resnet())
            if self.has("NIN_3.W"):
                weights |= self.attention(f"up_blocks.{level}.attentions.{n}")
            if level < levels - 1:
                weights |= below(f"up_blocks.{level}.upsamplers.0", self.resnet())
        weights |= self.single("conv_norm_out") | self.single("conv_out")
        first = weights[f"{TIME_MLP[0]}.weight"]
        return {
            "in_channels": weights["conv_in.weight"].shape[1],
            "out_channels": weights["conv_out.weight"].shape[0],
            "block_out_channels": tuple(channels),
            "first_channels": None if (stem := weights["conv_in.weight"].shape[0]) == channels[0] else stem,
            "layers_per_block": n,
            "attention_levels": tuple(sorted(attended)),
            "residual_input": pyramid,
            "resample_filter": (1, 3, 3, 1) if pyramid == "filtered" else (1, 1),
            "time_embedding_type": "fourier" if fourier else "positional",
            "embedding_channels": first.shape[1] // (2 if fourier else 1),
            "time_embedding_dim": first.shape[0],
        }, weights

    def is_3x3(self, name: str) -> bool:
        return self.tensors.peek(f"all_modules.{self.i}.{name}.weight").shape[2:] == (3, 3)

    def _counts(self) -> tuple[int, int]:
        """Return the numbers of levels and of residual blocks in each."""
        blocks, resampling = 0, 0
        for name in self.tensors.left:
            if name.endswith(".GroupNorm_1.weight"):
                shortcut = self.tensors.left.get(name.replace("GroupNorm_1", "Conv_2"))
                same = shortcut is not None and shortcut.shape[0] == shortcut.shape[1]
                blocks, resampling = blocks + (not same), resampling + same
        levels, odd = divmod(resampling, 2)
        levels += 1
        n, rest = divmod(blocks - levels - 2, 2 * levels)
        if odd or rest or n < 1:
            raise InputError(
                f"its {blocks} residual blocks, and {resampling} that change the resolution, are not those of an "
                f"NCSN++ or DDPM++ with the residual blocks of BigGAN"
            )
        return levels, n

    def single(self, ours: str) -> State:
        """Take a convolution, a linear map or a norm."""
        return self.tensors.part("", {ours: self.next().removesuffix(".")})

    def resnet(self) -> State:
        if not self.has("Conv_1.weight"):
            raise InputError(
                f"all_modules.{self.i} is no residual block, where one should be: of NCSN++ and DDPM++ those with "
                f"BigGAN's residual blocks, and a residual pyramid or none, can be represented (not output_skip or "
                f"input_skip)"
            )
        return resnet(self.tensors, self.next(), RESNET)

    def attention(self, where: str) -> State:
        prefix = self.next()
        found = self.tensors.part(prefix, {"group_norm": "GroupNorm_0"})
        for k, name in enumerate(("to_q", "to_k", "to_v", "to_out.0")):
            found[f"{name}.weight"] = self.tensors.take(f"{prefix}NIN_{k}.W").T
            found[f"{name}.bias"] = self.tensors.take(f"{prefix}NIN_{k}.b")
        return below(where, found)
