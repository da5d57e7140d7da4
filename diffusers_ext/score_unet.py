r"""The U-Nets of score-based models that diffusers' `UNet2DModel` is not: DDPM++, NCSN++ and relatives of ADM.

They have the blocks of diffusers, put together in another way. What can differ from `UNet2DModel`, and where:

    a residual block      output (x + h) / s, s = `output_scale_factor`; group norms of `norm_group_size` channels at
                          least; where it changes the resolution, by the filter `resample_filter` and, with
                          `resample_shortcut`, a 1x1 convolution of x
    attention             `attention_levels`; `num_attention_heads`; in the decoder after every block of a level, or
                          after its last one alone (`attention_after_last_up_block`)
    the time              the embedding is that of time_scale t + time_offset, of `embedding_channels`; a label is
                          added to it (`labels_before_time_mlp`), or to what the time's MLP makes of it
    the input             becomes `first_channels`, fewer than the first level has; and it goes down a pyramid of its
                          own, which is added to each level's input (`residual_input`)
    what x is             in the units of data in [0, 1] (`unit_range_input`); `variance_exploding`: see below

**Variance-exploding models.** Such a network F sees x = x0 + sigma n as it is, at the time ln(sigma/2), and gives
sigma score(x) (sigma in units of data in [-1, 1]; the models themselves count in [0, 1], hence the 2). diffusers'
schedulers divide x by a scale. So this network is one of `EDMEulerScheduler`: it gets s = x / r at the time
t = ln(sigma)/4, r^2 = sigma^2 + sigma_data^2, and returns what that scheduler takes for its raw output,

    (D - c_skip x) / c_out = (sigma s + r F(r s)) / sigma_data,      D = x + sigma F(x).

References: Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2020, arXiv
2011.13456), appendix H; Diffusion Models Beat GANs on Image Synthesis (Dhariwal, Nichol, 2021, arXiv 2105.05233);
Karras et al., 2022, arXiv 2206.00364, table 1 and appendix F.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import log, pi, sqrt
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from .process import align


class FourierFeatures(nn.Module):
    """t (B,) -> sin and cos of 2 pi f t, (B, 2 n), of n fixed frequencies f. They stay in float32, as half precision
    would turn the phases of large t into noise.

    Args:
        n: the number of frequencies, drawn from N(0, 16^2).
    """

    frequencies: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 16 * torch.randn(n))

    def forward(self, t: Tensor) -> Tensor:
        phase = 2 * pi * t[:, None] * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], dim=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FourierFeatures:
        exact = self.frequencies
        super()._apply(fn, recurse)
        lower = self.frequencies.dtype.itemsize < exact.dtype.itemsize
        self.frequencies = exact.to(self.frequencies.device) if lower else self.frequencies
        return self


class Resample(nn.Module):
    """(B, C, H, W) with twice or half as many rows and columns, by a separable filter of even length.

    Args:
        taps: the filter; [1, 1] is the mean of 2 x 2 pixels, or repeats each.
        up: twice as many, and not half.
    """

    kernel: Tensor

    def __init__(self, taps: Sequence[float], up: bool) -> None:
        super().__init__()
        kernel = torch.outer(*[torch.tensor(taps, dtype=torch.float32)] * 2)
        gain = 4 if up else 1
        self.register_buffer("kernel", gain * kernel[None, None] / kernel.sum(), persistent=False)
        self.up, self.padding = up, len(taps) // 2 - 1

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.to(x).expand(channels, -1, -1, -1)
        resample: Any = F.conv_transpose2d if self.up else F.conv2d
        return resample(x, kernel, stride=2, padding=self.padding, groups=channels)


def block_types(attended: Sequence[bool], resample_type: str) -> tuple[list[str], list[str]]:
    """Return diffusers' names of the blocks of the levels, down and up.

    Args:
        attended: whether each level has attention, that of the full resolution first.
        resample_type: what changes the resolution, `resnet` or `conv`.
    """
    down, up = {"resnet": ("ResnetDownsample", "ResnetUpsample"), "conv": ("Down", "Up")}[resample_type]
    return (
        [f"{'AttnDown' if has else down}Block2D" for has in attended],
        [f"{'AttnUp' if has else up}Block2D" for has in reversed(attended)],
    )


class ScoreUNet2DModel(UNet2DModel):
    """The U-Nets of score-based models: DDPM++, NCSN++ and relatives of ADM. Arguments that are not listed are those of
    `UNet2DModel`.

    `forward(sample, timestep, class_labels=None)` takes (B, in_channels, H, W), times of shape () or (B,) and labels
    (B,), and returns (B, out_channels, H, W) as `UNet2DOutput.sample`.

    Args:
        first_channels: the channels after the first convolution; by default those of the first level.
        attention_levels: which levels have attention, 0 being that of the full resolution.
        embedding_channels: the channels of the time's embedding; by default those of the first level.
        time_embedding_dim: those that its MLP makes of it; by default four times as many.
        num_attention_heads: of each attention; `None`: one for each `attention_head_dim` channels.
        attention_after_last_up_block: whether a level of the decoder has attention after its last block alone.
        norm_group_size: the least number of channels of a group of a norm, of which there are 32 at most.
        output_scale_factor: residual blocks and attentions divide their sum by it.
        resample_type: what changes the resolution: residual blocks, or convolutions with stride 2 and after repetition.
        resample_filter: the taps of the separable filter with which residual blocks change the resolution.
        resample_shortcut: whether these have a 1x1 convolution on the way around.
        residual_input: how the pyramid's convolutions halve the resolution: `filtered` (3x3, then `resample_filter`) or
            `strided` (3x3 with stride 2, on x with a row and a column of zeros at the end).
        time_scale, time_offset: the embedding is that of time_scale timestep + time_offset.
        labels_before_time_mlp: whether a label is added to the time's embedding, and not to what its MLP makes of it.
        unit_range_input: whether the network sees (x + 1) / 2.
        variance_exploding: whether it sees x without a scale, and is one of `EDMEulerScheduler` all the same: see the
            module's docstring.
        sigma_data: the standard deviation of the data, of `EDMEulerScheduler`, where `variance_exploding`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 256, 256, 256),
        first_channels: int | None = None,
        layers_per_block: int = 4,
        attention_levels: tuple[int, ...] = (1,),
        num_attention_heads: int | None = 1,
        attention_head_dim: int = 64,
        attention_after_last_up_block: bool = True,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
        norm_group_size: int = 4,
        output_scale_factor: float = sqrt(2),
        resnet_time_scale_shift: Literal["default", "scale_shift"] = "default",
        resample_type: Literal["resnet", "conv"] = "resnet",
        resample_filter: tuple[float, ...] = (1, 1),
        resample_shortcut: bool = True,
        residual_input: Literal["filtered", "strided"] | None = None,
        time_embedding_type: Literal["positional", "fourier"] = "positional",
        embedding_channels: int | None = None,
        time_embedding_dim: int | None = None,
        flip_sin_to_cos: bool = False,
        freq_shift: int = 1,
        time_scale: float = 1.0,
        time_offset: float = 0.0,
        num_class_embeds: int | None = None,
        labels_before_time_mlp: bool = False,
        unit_range_input: bool = False,
        variance_exploding: bool = False,
        sigma_data: float = 0.5,
    ) -> None:
        self._make_blocks()
        self._make_embedding()
        if first_channels is not None:
            self.conv_in = nn.Conv2d(in_channels, first_channels, 3, padding=1)
            for block, i in ((self.down_blocks[0], 0), (self.up_blocks[-1], -1)):
                taken = block.resnets[i].in_channels - block_out_channels[0] + first_channels
                block.resnets[i] = self._resnet(taken, block_out_channels[0])
        if attention_after_last_up_block:
            for block in self.up_blocks:
                if hasattr(block, "attentions"):
                    none = [nn.Identity() for _ in block.resnets[1:]]
                    block.attentions = nn.ModuleList([*none, block.attentions[-1]])
        for module in list(self.modules()):
            self._set_apart(module)
        self.input_pyramid = nn.ModuleList()
        if residual_input is not None:
            pairs = pairwise((in_channels, *block_out_channels[:-1]))
            self.input_pyramid.extend(self._pyramid_step(residual_input, *pair) for pair in pairs)

    def _make_blocks(self) -> None:
        """Make a `UNet2DModel` with the blocks of this one."""
        config = self.config  # which `register_to_config` has set before this
        attended = [level in config.attention_levels for level in range(len(config.block_out_channels))]
        down, up = block_types(attended, config.resample_type)
        stock: Any = UNet2DModel.__init__
        stock.__wrapped__(  # below `register_to_config`, so that the configuration has our own arguments alone
            self,
            sample_size=config.sample_size,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            time_embedding_dim=self._widths[1],
            down_block_types=down,
            up_block_types=up,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            mid_block_scale_factor=config.output_scale_factor,
            downsample_type=config.resample_type,
            upsample_type=config.resample_type,
            dropout=config.dropout,
            attention_head_dim=None,
            norm_num_groups=1,
            attn_norm_num_groups=1,
            norm_eps=config.norm_eps,
            resnet_time_scale_shift=config.resnet_time_scale_shift,
            num_class_embeds=config.num_class_embeds,
        )

    def _resnet(self, channels: int, out_channels: int) -> ResnetBlock2D:
        config = self.config
        return ResnetBlock2D(
            in_channels=channels,
            out_channels=out_channels,
            temb_channels=self._widths[1],
            groups=1,
            eps=config.norm_eps,
            dropout=config.dropout,
            time_embedding_norm=config.resnet_time_scale_shift,
        )

    @property
    def _widths(self) -> tuple[int, int]:
        """The channels of the time's embedding, and those that its MLP makes of it."""
        config = self.config
        embedded = config.embedding_channels or config.block_out_channels[0]
        return embedded, config.time_embedding_dim or 4 * embedded

    def _make_embedding(self) -> None:
        """Make the embedding of the time, and that of labels where they come before the time's MLP."""
        config, (embedded, width) = self.config, self._widths
        if config.time_embedding_type == "fourier":
            self.time_proj, embedded = FourierFeatures(embedded), 2 * embedded
        else:
            self.time_proj = Timesteps(embedded, config.flip_sin_to_cos, config.freq_shift)
        self.time_embedding = TimestepEmbedding(embedded, width)
        if config.num_class_embeds is not None and config.labels_before_time_mlp:
            self.class_embedding = nn.Embedding(config.num_class_embeds, embedded)

    def _set_apart(self, module: nn.Module) -> None:
        """Change what is other than in `UNet2DModel` in one of its modules."""
        config = self.config
        if isinstance(module, nn.GroupNorm):
            module.num_groups = min(32, module.num_channels // config.norm_group_size)
        elif isinstance(module, Attention):
            module.rescale_output_factor = config.output_scale_factor
            heads = config.num_attention_heads or module.query_dim // config.attention_head_dim
            module.heads = module.sliceable_head_dim = heads
            module.scale = (module.query_dim // heads) ** -0.5
        elif isinstance(module, ResnetBlock2D):
            module.output_scale_factor = config.output_scale_factor
            if module.up or module.down:
                name = "upsample" if module.up else "downsample"
                setattr(module, name, Resample(config.resample_filter, module.up))
                if config.resample_shortcut:
                    module.conv_shortcut = nn.Conv2d(module.in_channels, module.out_channels, 1)

    def _pyramid_step(self, kind: str, channels: int, out_channels: int) -> nn.Module:
        if kind == "strided":
            return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, out_channels, 3, stride=2))
        filtered = Resample(self.config.resample_filter, up=False)
        convolution = nn.Conv2d(channels, out_channels, 3, padding=1 + filtered.padding)
        filtered.padding = 0  # the zeros lie around the input of both
        return nn.Sequential(convolution, filtered)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        time = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        if self.config.variance_exploding:
            output = self._as_edm(sample, time if time.is_floating_point() else time.float(), class_labels)
        else:
            output = self._score(sample, time, class_labels)
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def _as_edm(self, sample: Tensor, time: Tensor, class_labels: Tensor | None) -> Tensor:
        """Return the raw output that `EDMEulerScheduler` expects; see the module's docstring."""
        sigma, sigma_data = align((4 * time).exp().to(sample.dtype), sample), self.config.sigma_data
        r = (sigma**2 + sigma_data**2).sqrt()
        return (sigma * sample + r * self._score(r * sample, 4 * time - log(2), class_labels)) / sigma_data

    def _score(self, x: Tensor, time: Tensor, class_labels: Tensor | None) -> Tensor:
        x = (x + 1) / 2 if self.config.unit_range_input else x
        emb, pyramid = self._embedding(time, class_labels), x
        x = self.conv_in(x)
        skips = [x]
        for i, block in enumerate(self.down_blocks):
            x, states = block(hidden_states=x, temb=emb)
            if i < len(self.input_pyramid):
                pyramid = x = (x + self.input_pyramid[i](pyramid)) / sqrt(2)
                states = (*states[:-1], x)
            skips += states
        x = self.mid_block(x, emb)
        for block in self.up_blocks:
            n = len(block.resnets)
            x = block(x, tuple(skips[-n:]), emb)
            del skips[-n:]
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))

    def _embedding(self, time: Tensor, class_labels: Tensor | None) -> Tensor:
        embedded = self.time_proj(self.config.time_scale * time + self.config.time_offset).to(self.dtype)
        if (self.class_embedding is None) != (class_labels is None):
            is_are = "takes no" if class_labels is not None else "needs"
            raise ValueError(f"the model {is_are} class_labels")
        if self.class_embedding is None:
            return self.time_embedding(embedded)
        label = self.class_embedding(class_labels).to(self.dtype)
        if self.config.labels_before_time_mlp:
            return self.time_embedding(embedded + label)
        return self.time_embedding(embedded) + label
