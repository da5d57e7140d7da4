"""Checkpoints of other code bases with small random networks, and what these networks answer, in float64.

Written from the papers' descriptions and the formats: each forward pass below is one function of named weights, which
are drawn when they are first asked for, so that the pass itself says which tensors the file has. Nothing of the package
is used.

References: Dhariwal, Nichol, 2021, arXiv 2105.05233, appendix B and its published files (ADM); Song et al., 2020, arXiv
2011.13456, appendix H (DDPM++, NCSN++); Karras et al., 2022, arXiv 2206.00364, tables 1, 7 and appendix F (EDM).
"""

import math
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F

ROOT_HALF = math.sqrt(0.5)


class Weights:
    """Named weights in float64, drawn when they are first asked for."""

    def __init__(self, seed=0):
        self.all, self.generator = OrderedDict(), torch.Generator().manual_seed(seed)

    def __call__(self, name, *shape, around=0.0):
        if name not in self.all:
            scale = 0.3 if around or len(shape) == 1 else 1.3 / math.sqrt(math.prod(shape[1:]))
            drawn = around + scale * torch.randn(shape, generator=self.generator)
            self.all[name] = drawn.float().double()  # files hold float32
        return self.all[name]


def linear(w, name, x, n, bias=True):
    out = x @ w(f"{name}.weight", n, x.shape[1]).T
    return out + w(f"{name}.bias", n) if bias else out


def conv(w, name, x, n, k, **options):
    return F.conv2d(x, w(f"{name}.weight", n, x.shape[1], k, k), w(f"{name}.bias", n), **options)


def norm(w, name, x, groups, eps):
    weight = w(f"{name}.weight", x.shape[1], around=1.0)
    return F.group_norm(x, groups, weight, w(f"{name}.bias", x.shape[1]), eps)


def attend(q, k, v):
    """(B, heads, d, L) -> (B, heads, d, L)."""
    scores = torch.einsum("bhdi,bhdj->bhij", q, k) / math.sqrt(q.shape[2])
    return torch.einsum("bhij,bhdj->bhdi", scores.softmax(-1), v)


def waves(t, n, last_included):
    """n/2 frequencies from 1 down to 1/10000, which is the last one, or would come after it."""
    half = n // 2
    step = math.log(10000) / (half - 1 if last_included else half)
    return t[:, None] * torch.exp(-step * torch.arange(half, dtype=torch.float64))


def mean_of_four(x):
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def repeated(x):
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def by_filter(x, taps, up):
    """Filter by an even filter, keeping each second value; or put zeros between the values and filter."""
    taps = torch.tensor(taps, dtype=torch.float64)
    taps, pad = taps / taps.sum(), len(taps) // 2
    if up:
        spread = torch.zeros(*x.shape[:-2], 2 * x.shape[-2], 2 * x.shape[-1], dtype=x.dtype)
        spread[..., ::2, ::2] = 4 * x
        x = F.pad(spread, (pad, pad - 1, pad, pad - 1))
    else:
        x = F.pad(x, (pad - 1, pad - 1, pad - 1, pad - 1))
    n = x.shape[-1] - len(taps) + 1
    for axis in (-1, -2):
        x = sum(tap * x.narrow(axis, i, n) for i, tap in enumerate(taps))
    return x if up else x[..., ::2, ::2]


# --- ADM --------------------------------------------------------------------------------------------------------------


def adm(w, x, t, y=None, *, width=32, mult=(1, 2), n=1, attended=(1,), heads=None, head_dim=16, newer=False,
        residual_resampling=True, scale_shift=True, out_channels=6, classes=None, embedded=None):  # fmt: skip
    embedded = embedded or width
    emb = waves(t, embedded, False)
    emb = linear(w, "time_embed.0", torch.cat([emb.cos(), emb.sin()], 1), 4 * width)
    emb = linear(w, "time_embed.2", F.silu(emb), 4 * width)
    if classes:
        emb = emb + w("label_emb.weight", classes, 4 * width)[y]

    def residual(name, x, channels, resample=None):
        resample = resample or (lambda x: x)
        h = conv(
            w,
            f"{name}.in_layers.2",
            resample(F.silu(norm(w, f"{name}.in_layers.0", x, 32, 1e-5))),
            channels,
            3,
            padding=1,
        )
        e = linear(w, f"{name}.emb_layers.1", F.silu(emb), channels * (1 + scale_shift))[..., None, None]
        if scale_shift:
            h = norm(w, f"{name}.out_layers.0", h, 32, 1e-5) * (1 + e[:, :channels]) + e[:, channels:]
        else:
            h = norm(w, f"{name}.out_layers.0", h + e, 32, 1e-5)
        h = conv(w, f"{name}.out_layers.3", F.silu(h), channels, 3, padding=1)
        x = resample(x)
        return h + (x if x.shape[1] == channels else conv(w, f"{name}.skip_connection", x, channels, 1))

    def attention(name, x):
        b, c, height, wide = x.shape
        count = heads or c // head_dim
        qkv = F.conv1d(
            norm(w, f"{name}.norm", x, 32, 1e-5).flatten(2),
            w(f"{name}.qkv.weight", 3 * c, c, 1),
            w(f"{name}.qkv.bias", 3 * c),
        )
        if newer:
            q, k, v = (part.reshape(b, count, -1, height * wide) for part in qkv.chunk(3, 1))
        else:
            q, k, v = qkv.reshape(b, count, 3, c // count, -1).unbind(2)
        a = attend(q, k, v).reshape(b, c, -1)
        return x + F.conv1d(a, w(f"{name}.proj_out.weight", c, c, 1), w(f"{name}.proj_out.bias", c)).reshape(x.shape)

    i, skips = 0, [conv(w, "input_blocks.0.0", x, int(width * mult[0]), 3, padding=1)]
    for level, m in enumerate(mult):
        for _ in range(n):
            i += 1
            h = residual(f"input_blocks.{i}.0", skips[-1], int(width * m))
            skips.append(attention(f"input_blocks.{i}.1", h) if level in attended else h)
        if level < len(mult) - 1:
            i += 1
            if residual_resampling:
                skips.append(residual(f"input_blocks.{i}.0", skips[-1], int(width * m), mean_of_four))
            else:
                skips.append(conv(w, f"input_blocks.{i}.0.op", skips[-1], int(width * m), 3, stride=2, padding=1))
    h = residual("middle_block.0", skips[-1], skips[-1].shape[1])
    h = residual("middle_block.2", attention("middle_block.1", h), h.shape[1])
    i = 0
    for level in reversed(range(len(mult))):
        for j in range(n + 1):
            h = residual(f"output_blocks.{i}.0", torch.cat([h, skips.pop()], 1), int(width * mult[level]))
            if level in attended:
                h = attention(f"output_blocks.{i}.1", h)
            if j == n and level:
                last = f"output_blocks.{i}.{2 if level in attended else 1}"
                if residual_resampling:
                    h = residual(last, h, h.shape[1], repeated)
                else:
                    h = conv(w, f"{last}.conv", repeated(h), h.shape[1], 3, padding=1)
            i += 1
    return conv(w, "out.2", F.silu(norm(w, "out.0", h, 32, 1e-5)), out_channels, 3, padding=1)


# --- EDM --------------------------------------------------------------------------------------------------------------


def edm_unet(w, x, t, y=None, *, song=True, width=16, mult=(1, 2), n=2, attended=(1,), classes=0, fourier=False,
             taps=(1, 1), residual=False, out_channels=3, prefix="model."):  # fmt: skip
    """y: one-hot labels, or zeros for none."""
    eps, scale = (1e-6, ROOT_HALF) if song else (1e-5, 1.0)
    inner = w

    def w(name, *shape, **options):
        return inner(prefix + name, *shape, **options)

    def groups(c):
        return min(32, c // 4)

    if fourier:
        phase = 2 * math.pi * t[:, None] * w("map_noise.freqs", width)
        emb = torch.cat([phase.sin(), phase.cos()], 1)
    else:
        phase = waves(t, width, song)
        emb = torch.cat([phase.sin(), phase.cos()] if song else [phase.cos(), phase.sin()], 1)
    if song:
        if classes:
            emb = emb + linear(w, "map_label", y * math.sqrt(classes), emb.shape[1])
        emb = F.silu(linear(w, "map_layer1", F.silu(linear(w, "map_layer0", emb, 4 * width)), 4 * width))
    else:
        emb = linear(w, "map_layer1", F.silu(linear(w, "map_layer0", emb, 4 * width)), 4 * width)
        if classes:
            emb = emb + linear(w, "map_label", y, 4 * width, bias=False)
        emb = F.silu(emb)

    def changed(x, up, name):
        w(f"{name}.resample_filter", *[1, 1, len(taps), len(taps)])
        return by_filter(x, taps, up)

    def block(name, x, c, attention=False, up=None):
        h = F.silu(norm(w, f"{name}.norm0", x, groups(x.shape[1]), eps))
        if up is not None:
            h = changed(h, up, f"{name}.conv0")
        h = conv(w, f"{name}.conv0", h, c, 3, padding=1)
        e = linear(w, f"{name}.affine", emb, c if song else 2 * c)[..., None, None]
        if song:
            h = F.silu(norm(w, f"{name}.norm1", h + e, groups(c), eps))
        else:
            h = F.silu(norm(w, f"{name}.norm1", h, groups(c), eps) * (1 + e[:, :c]) + e[:, c:])
        h = conv(w, f"{name}.conv1", h, c, 3, padding=1)
        if up is not None:
            x = changed(x, up, f"{name}.skip")
        if x.shape[1] != c or (song and up is not None):
            x = conv(w, f"{name}.skip", x, c, 1)
        x = (x + h) * scale
        if attention:
            b, _, height, wide = x.shape
            heads = 1 if song else c // 64
            qkv = conv(w, f"{name}.qkv", norm(w, f"{name}.norm2", x, groups(c), eps), 3 * c, 1)
            q, k, v = qkv.reshape(b, heads, c // heads, 3, -1).unbind(3)
            x = (x + conv(w, f"{name}.proj", attend(q, k, v).reshape(b, c, height, wide), c, 1)) * scale
        return x

    size, skips, pyramid = x.shape[-1], [], x
    for level, m in enumerate(mult):
        here = f"enc.{size >> level}x{size >> level}_"
        if level:
            x = block(f"{here}down", x, x.shape[1], up=False)
            if residual:  # 3x3, then the filter; the zeros lie around the input of both
                w(f"{here}aux_residual.resample_filter", 1, 1, len(taps), len(taps))
                pad = len(taps) // 2 - 1
                filtered = conv(w, f"{here}aux_residual", pyramid, x.shape[1], 3, padding=1 + pad)
                if pad:
                    flat = torch.tensor(taps, dtype=torch.float64)
                    kernel = torch.outer(flat, flat)[None, None] / flat.sum() ** 2
                    filtered = F.conv2d(filtered, kernel.expand(x.shape[1], -1, -1, -1), stride=2, groups=x.shape[1])
                else:
                    filtered = mean_of_four(filtered)
                pyramid = x = (x + filtered) * ROOT_HALF
        else:
            x = conv(w, f"{here}conv", x, width if song else width * m, 3, padding=1)
        skips.append(x)
        for j in range(n):
            x = block(f"{here}block{j}", x, width * m, level in attended)
            skips.append(x)
    for level in reversed(range(len(mult))):
        here = f"dec.{size >> level}x{size >> level}_"
        if level == len(mult) - 1:
            x = block(f"{here}in1", block(f"{here}in0", x, x.shape[1], True), x.shape[1])
        else:
            x = block(f"{here}up", x, x.shape[1], up=True)
        for j in range(n + 1):
            x = torch.cat([x, skips.pop()], 1)
            x = block(f"{here}block{j}", x, width * mult[level], level in attended and (not song or j == n))
    last = f"dec.{size}x{size}_aux_" if song else "out_"
    x = F.silu(norm(w, f"{last}norm", x, groups(x.shape[1]), eps))
    return conv(w, f"{last}conv", x, out_channels, 3, padding=1)


class Persistent(torch.nn.Module):
    """A module whose pickle holds its class's source as text, as EDM's do."""

    def __init__(self, class_name, **attributes):
        super().__init__()
        self.class_name, self.attributes = class_name, attributes

    def __reduce__(self):
        state = {k: v for k, v in self.__dict__.items() if k not in ("class_name", "attributes")}
        source = f"open({SOURCE_MARK!r}, 'w').close()\nclass {self.class_name}: ..."
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": self.class_name}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (
            meta | {"state": state | self.attributes},
        )


SOURCE_MARK = "source-was-run"


def edm_file(path, w, precond="EDMPrecond", *, song=True, size=8, classes=0, label_dropout=0.0, attributes=None,
             augmented=False, taps=(1, 1), protocol=4):  # fmt: skip
    """Write network-snapshot-*.pkl of the weights of `edm_unet`."""
    network = Persistent("SongUNet" if song else "DhariwalUNet", label_dropout=label_dropout)
    fields = {"img_resolution": size, "img_channels": 3, "label_dim": classes, "use_fp16": False, "sigma_data": 0.5}
    root = Persistent(precond, **(fields | (attributes or {})))
    root.add_module("model", network)
    if precond == "iDDPMPrecond":
        root.register_buffer("u", torch.zeros(1001))
    tensors = dict(w.all)
    if augmented:
        tensors["model.map_augment.weight"] = torch.randn(tensors["model.map_layer0.weight"].shape[1], 9)
    for name, value in tensors.items():
        *path_, leaf = name.split(".")
        here = root
        for depth, part in enumerate(path_):
            if part not in here._modules:
                child = (
                    torch.nn.ModuleDict()
                    if part in ("enc", "dec")
                    else Persistent(_class_of(path_[: depth + 1], tensors))
                )
                here.add_module(part, child)
            here = here._modules[part]
        if leaf in ("resample_filter", "freqs"):
            if leaf == "resample_filter":
                flat = torch.tensor(taps, dtype=torch.float32)
                value = torch.outer(flat, flat)[None, None] / flat.sum() ** 2
            here.register_buffer(leaf, value.float())
        else:
            here.register_parameter(leaf, torch.nn.Parameter(value.float()))
    for module in network.modules():
        if isinstance(module, Persistent):
            _set_facts(module, song)
    persistence = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("the file's own function was called")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    package = types.ModuleType("torch_utils")
    package.persistence = persistence
    sys.modules |= {"torch_utils": package, "torch_utils.persistence": persistence}
    try:
        content = {
            "ema": root,
            "loss_fn": Persistent("EDMLoss", P_mean=-1.2),
            "augment_pipe": None,
            "dataset_kwargs": {},
        }
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]
    return path


def _class_of(path, tensors):
    name = path[-1]
    if name.startswith("norm") or name.endswith("norm"):
        return "GroupNorm"
    if name.startswith(("map_", "affine")):
        return "Linear"
    inner = ".".join([*path, "norm0.weight"])
    return "UNetBlock" if inner in tensors else "Conv2d"


def _set_facts(module, song):
    if module.class_name == "GroupNorm":
        module.attributes = {"eps": 1e-6 if song else 1e-5, "num_groups": 1}
    if module.class_name == "UNetBlock":
        channels = module._modules["conv1"]._parameters["weight"].shape[0]
        heads = 0 if "qkv" not in module._modules else 1 if song else channels // 64
        module.attributes = {
            "num_heads": heads, "out_channels": channels, "dropout": 0.1, "adaptive_scale": not song,
            "skip_scale": np.sqrt(0.5) if song else 1,
        }  # fmt: skip


# --- score_sde and Reflected-Diffusion --------------------------------------------------------------------------------


def ncsnpp(w, x, t, *, width=16, mult=(1, 2), n=2, attended=(1,), fourier=True, residual_input="filtered", fir=False):
    """t: what the embedding is of, ln(sigma) or a timestep. Without the division by sigma at the end."""
    taps = (1, 3, 3, 1) if fir or residual_input == "filtered" else (1, 1)
    i = iter(range(10_000))

    def name():
        return f"all_modules.{next(i)}"

    def groups(c):
        return min(32, c // 4)

    phase = 2 * math.pi * t[:, None] * w(f"{name()}.W", width) if fourier else waves(t, width, True)
    emb = linear(w, name(), torch.cat([phase.sin(), phase.cos()], 1), 4 * width)
    emb = linear(w, name(), F.silu(emb), 4 * width)

    def residual(x, c, up=None):
        here = name()
        h = F.silu(norm(w, f"{here}.GroupNorm_0", x, groups(x.shape[1]), 1e-6))
        if up is not None:
            h, x = by_filter(h, taps, up), by_filter(x, taps, up)
        h = conv(w, f"{here}.Conv_0", h, c, 3, padding=1)
        h = h + linear(w, f"{here}.Dense_0", F.silu(emb), c)[..., None, None]
        h = conv(w, f"{here}.Conv_1", F.silu(norm(w, f"{here}.GroupNorm_1", h, groups(c), 1e-6)), c, 3, padding=1)
        if up is not None or x.shape[1] != c:
            x = conv(w, f"{here}.Conv_2", x, c, 1)
        return (x + h) * ROOT_HALF

    def attention(x):
        here, c = name(), x.shape[1]
        h = norm(w, f"{here}.GroupNorm_0", x, groups(c), 1e-6).flatten(2)

        def mixed(k, h):
            return torch.einsum("bcl,cd->bdl", h, w(f"{here}.NIN_{k}.W", c, c)) + w(f"{here}.NIN_{k}.b", c)[:, None]

        a = attend(*(mixed(k, h)[:, None] for k in range(3)))[:, 0]
        return (x + mixed(3, a).reshape(x.shape)) * ROOT_HALF

    pyramid, skips = x, [conv(w, name(), x, width, 3, padding=1)]
    for level, m in enumerate(mult):
        for _ in range(n):
            h = residual(skips[-1], width * m)
            skips.append(attention(h) if level in attended else h)
        if level < len(mult) - 1:
            h = residual(skips[-1], width * m, up=False)
            if residual_input == "filtered":  # the filter on two rows of zeros, then a 3x3 with stride 2
                flat = torch.tensor(taps, dtype=torch.float64)
                c = pyramid.shape[1]
                kernel = (torch.outer(flat, flat) / flat.sum() ** 2).expand(c, 1, -1, -1)
                filtered = F.conv2d(pyramid, kernel, padding=2, groups=c)
                pyramid = h = (h + conv(w, f"{name()}.Conv2d_0", filtered, width * m, 3, stride=2)) * ROOT_HALF
            elif residual_input == "strided":
                padded = F.pad(pyramid, (0, 1, 0, 1))
                pyramid = h = (h + conv(w, f"{name()}.Conv_0", padded, width * m, 3, stride=2)) * ROOT_HALF
            skips.append(h)
    h = residual(attention(residual(skips[-1], skips[-1].shape[1])), skips[-1].shape[1])
    for level in reversed(range(len(mult))):
        for _ in range(n + 1):
            h = residual(torch.cat([h, skips.pop()], 1), width * mult[level])
        if level in attended:
            h = attention(h)
        if level:
            h = residual(h, h.shape[1], up=True)
    h = F.silu(norm(w, name(), h, groups(h.shape[1]), 1e-6))
    return conv(w, name(), h, 3, 3, padding=1)


def pth_file(path, w, sigmas=None, reflected=False):
    """Write checkpoint_*.pth: the weights as the average of a model with other ones."""
    average = {name: value.float() for name, value in w.all.items()}
    constant = {
        n for n in average if n.endswith((".resample_filter", ".freqs")) or (n.endswith(".W") and "NIN" not in n)
    }
    for name in average:
        if name.endswith(".resample_filter"):
            average[name] = torch.full((1, 1, 2, 2), 0.25)
    model = OrderedDict() if sigmas is None else OrderedDict(sigmas=sigmas)
    model |= {name: value if name in constant else torch.full_like(value, 7.0) for name, value in average.items()}
    shadow = [value for name, value in average.items() if name not in constant]
    ema = {"decay": 0.999, "num_updates": 3, "shadow_params": shadow}
    groups = [{"lr": np.float64(2e-4) * np.minimum(5 / 5000, 1.0), "step": np.int64(5)}]  # as their warm-up leaves it
    content = {"optimizer": {"state": {}, "param_groups": groups}, "model": model, "ema": ema, "step": 5}
    if reflected:
        content["scaler"] = None
    else:
        content["model"] = OrderedDict((f"module.{name}", value) for name, value in model.items())
    torch.save(content, path)
    return path
