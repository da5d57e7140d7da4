r"""A discriminator of noise levels: is x_next at sigma_next made from data, or by a model's step down from sigma?

With x_next in the coordinates x = x0 + sigma n, sd the standard deviation of the data and C the number of features,

    y    = x_next / (sd^2 + sigma_next^2)^1/2                        unit variance at every noise level
    phi  = features of y                                             (B, C), residual blocks, mean over the positions
    c    = MLP(Fourier(ln sigma), Fourier(ln sigma_next)) + class    (B, C), or + A prompt

    logit = <phi, c> / C^1/2                                         (B,), positive where it looks real

which is projection conditioning; the unconditional direction that it usually adds is the bias of the MLP's last layer.
The prompt is its pooled embedding, scaled to mean 0 and variance 1 over the features; A is a linear layer.

**Minibatch standard deviation.** Before the last convolution one channel is added, the same number at all positions:
the standard deviation of the features over a group of samples, averaged over features and positions. A group is
`group_size` consecutive samples; those that are left over at the end of a batch see the last `group_size` samples, and
a batch that is smaller is one group (of one sample: 0). Hence a logit depends on the samples of its group and on no
others, and never on those of another process: training is the same on one device as on several wherever the batch of
one process is a multiple of `group_size`. The order of a batch matters only by who is in a group with whom.

There is no normalisation in the network, as in the one that it is modelled on; He's initialisation keeps the variance.

References: Observation-Guided Diffusion Probabilistic Models (Kang, Choi, Choi, Han, CVPR 2024, arXiv 2310.04041);
Analyzing and Improving the Image Quality of StyleGAN (Karras et al., 2019, arXiv 1912.04958), the residual
discriminator; Progressive Growing of GANs (Karras et al., 2017, arXiv 1710.10196), section 3; cGANs with Projection
Discriminator (Miyato, Koyama, 2018, arXiv 1802.05637); Delving Deep into Rectifiers (He et al., 2015, arXiv
1502.01852), the initialisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import GaussianFourierProjection, TimestepEmbedding
from torch import Tensor, nn

from .process import align
from .ranges import require
from .score import edm_epsilon

SLOPE = 0.2  # of the activation at negative values
VARIANCE_FLOOR = 1e-8  # keeps the derivative of a standard deviation finite where all samples of a group agree


class NoiseLevelDiscriminator(ModelMixin, ConfigMixin):
    """A network that gives logits of samples and their noise levels; for images or latents of any size.

    It computes in float32 outside the layers that autocast touches; supports gradient checkpointing, and twice
    differentiation (not through `torch.compile`, which has none).

    Args:
        in_channels: channels of the samples.
        block_out_channels: features at each resolution; the resolution halves (rounded up) from one to the next.
        sigma_data: standard deviation of the data, in their own units.
        num_class_embeds: number of class labels, a null class included if there is one; `None` without labels.
        group_size: samples in a group of the minibatch standard deviation; `None` leaves it out, and samples do not
            see each other.
        num_frequencies: Fourier features of each of the two noise levels.
        fourier_scale: standard deviation of these frequencies, in periods for each factor e of the noise level.
        pooled_dim: features of the pooled embedding of a prompt; `None` without prompts.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        block_out_channels: Sequence[int] = (64, 128, 256, 256),
        sigma_data: float = 0.5,
        num_class_embeds: int | None = None,
        group_size: int | None = 4,
        num_frequencies: int = 64,
        fourier_scale: float = 0.25,
        pooled_dim: int | None = None,
    ) -> None:
        super().__init__()
        if not block_out_channels:
            raise ValueError("block_out_channels must not be empty")
        require("sigma_data", sigma_data, above=0)
        require("fourier_scale", fourier_scale, above=0)
        require("in_channels", in_channels, at_least=1)
        require("num_frequencies", num_frequencies, at_least=1)
        require("block_out_channels", min(block_out_channels), at_least=1)
        require("group_size", group_size, at_least=2)
        require("num_class_embeds", num_class_embeds, at_least=1)
        require("pooled_dim", pooled_dim, at_least=1)
        first, last = block_out_channels[0], block_out_channels[-1]
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(block_out_channels))
        self.conv_out = nn.Conv2d(last + (group_size is not None), last, 3, padding=1)
        self.fourier = GaussianFourierProjection(num_frequencies, scale=fourier_scale, set_W_to_weight=False)
        self.level_embedding = TimestepEmbedding(4 * num_frequencies, last)  # sine and cosine of two levels
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, last)
        self.prompt_embedding = None
        if pooled_dim is not None:
            scaled = nn.LayerNorm(pooled_dim, elementwise_affine=False)
            self.prompt_embedding = nn.Sequential(scaled, nn.Linear(pooled_dim, last, bias=False))
        self.gradient_checkpointing = False
        initialise(self.conv_in, "leaky_relu")
        initialise(self.conv_out, "leaky_relu")

    def forward(
        self,
        x_next: Tensor,
        sigma: Tensor | float,
        sigma_next: Tensor | float,
        class_labels: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        """Return logits, (B,), in float32 at least.

        Args:
            x_next: samples at `sigma_next`, (B, in_channels, H, W).
            sigma: the level that they were made from; a number, () or (B,), positive and finite.
            sigma_next: their own level, likewise.
            class_labels: (B,) of integers, if and only if the discriminator knows classes.
            pooled: pooled embeddings of prompts, (B, pooled_dim), if and only if it knows prompts.

        Raises:
            ValueError: shapes do not fit, or labels or prompts are missing or not expected.
        """
        if x_next.ndim != 4 or x_next.shape[1] != self.config.in_channels:
            raise ValueError(f"x_next has shape {tuple(x_next.shape)}, not (B, {self.config.in_channels}, H, W)")
        c = self.condition(x_next, sigma, sigma_next, class_labels, pooled)
        phi = self.features(self.scale(x_next, sigma_next))
        dtype = torch.promote_types(phi.dtype, torch.float32)
        return (phi.to(dtype) * c.to(dtype)).sum(1) * phi.shape[1] ** -0.5

    def scale(self, x_next: Tensor, sigma_next: Tensor | float) -> Tensor:
        """Return y, which is x_next in the units that the network sees."""
        x_next = x_next.to(torch.promote_types(x_next.dtype, torch.float32))
        return edm_epsilon(align(sigma_next, x_next), self.config.sigma_data).c_in * x_next

    def features(self, y: Tensor) -> Tensor:
        """Return phi, (B, C)."""
        h = activate(self.conv_in(y.to(self.conv_in.weight.dtype)))
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = self._gradient_checkpointing_func(block, h)
            else:
                h = block(h)
        if self.config.group_size is not None:
            deviation = group_deviation(h, self.config.group_size)
            h = torch.cat([h, align(deviation, h).expand_as(h[:, :1])], 1)
        return activate(self.conv_out(h)).mean((2, 3))

    def condition(
        self,
        x_next: Tensor,
        sigma: Tensor | float,
        sigma_next: Tensor | float,
        class_labels: Tensor | None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        """Return c, (B, C)."""
        given = {"class_labels": ("num_class_embeds", class_labels), "pooled": ("pooled_dim", pooled)}
        for name, (size, value) in given.items():
            if (value is None) != (self.config[size] is None):
                state = "missing" if value is None else "given"
                raise ValueError(f"{name} are {state}, with {size}={self.config[size]}")
        like = x_next.new_empty(len(x_next), dtype=torch.promote_types(x_next.dtype, torch.float32))
        levels = [self.fourier(align(s, like).expand_as(like)) for s in (sigma, sigma_next)]
        dtype = self.conv_in.weight.dtype
        c = self.level_embedding(torch.cat(levels, 1).to(dtype))
        if self.class_embedding is not None:
            c = c + self.class_embedding(class_labels)
        return c if pooled is None or self.prompt_embedding is None else c + self.prompt_embedding(pooled.to(dtype))


class ResidualBlock(nn.Module):
    """Two convolutions beside a linear path, (B, in, H, W) -> (B, out, H/2, W/2), rounded up; variance is kept."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.down = Downsample2D(in_channels, use_conv=True, out_channels=out_channels, name="op")
        self.skip = Downsample2D(in_channels, use_conv=True, out_channels=out_channels, name="op")
        initialise(self.conv, "leaky_relu")
        initialise(self.down.conv, "leaky_relu")
        initialise(self.skip.conv, "linear")

    def forward(self, h: Tensor) -> Tensor:
        return (self.skip(h) + activate(self.down(activate(self.conv(h))))) * 2**-0.5


def activate(h: Tensor) -> Tensor:
    return nn.functional.leaky_relu(h, SLOPE)


def initialise(conv: nn.Conv2d, nonlinearity: str) -> None:
    """Set weights that keep the second moment through the convolution and what follows, and a bias of 0."""
    nn.init.kaiming_normal_(conv.weight, SLOPE, nonlinearity=nonlinearity)  # type: ignore[arg-type]
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]


def group_deviation(h: Tensor, group_size: int) -> Tensor:
    """Return the standard deviation of h (B, ...) over each sample's group, averaged over its elements, (B,).

    The module's docstring says what a group is. The variance is that of a population, divided by the size of the group.
    The result is in float32 at least.
    """
    h = h.to(torch.promote_types(h.dtype, torch.float32)).flatten(1)
    n, size = len(h), min(group_size, len(h))
    left = n % size
    deviation = _deviation(h[: n - left].unflatten(0, (-1, size))).repeat_interleave(size)
    return torch.cat([deviation, _deviation(h[None, n - size :]).expand(left)]) if left else deviation


def _deviation(groups: Tensor) -> Tensor:
    """Return the mean standard deviation, (groups,), of (groups, size, elements)."""
    return (groups.var(1, correction=0) + VARIANCE_FLOOR).sqrt().mean(1)
