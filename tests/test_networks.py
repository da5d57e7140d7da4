"""What networks are told. Truth: the source of diffusers' pipelines, and what their scheduler makes of the output."""

import ast
import functools
import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel
from test_calibration import seeded, table
from torch import nn

from diffusers_ext import NetworkConvention, calibrate_denoiser, denoiser_from, estimate_calibration
from diffusers_ext.networks import CONVENTIONS, convention_of

PIPELINES = {  # of each network: the pipeline in whose source its convention is read
    "UNet2DModel": "DDPM",
    "UNet2DConditionModel": "StableDiffusion",
    "UNet3DConditionModel": "TextToVideoSD",
    "UNetControlNetXSModel": "StableDiffusionControlNetXS",
    "UNetMotionModel": "AnimateDiff",
    "DiTTransformer2DModel": "DiT",
    "PixArtTransformer2DModel": "PixArtSigma",
    "SD3Transformer2DModel": "StableDiffusion3",
    "HunyuanDiT2DModel": "HunyuanDiT",
    "AllegroTransformer3DModel": "Allegro",
    "BriaTransformer2DModel": "Bria",
    "CogVideoXTransformer3DModel": "CogVideoX",
    "CogView3PlusTransformer2DModel": "CogView3Plus",
    "CogView4Transformer2DModel": "CogView4",
    "HunyuanVideoTransformer3DModel": "HunyuanVideo",
    "LTXVideoTransformer3DModel": "LTX",
    "LatteTransformer3DModel": "Latte",
    "SkyReelsV2Transformer3DModel": "SkyReelsV2",
    "WanTransformer3DModel": "WanVideoToVideo",
    "AuraFlowTransformer2DModel": "AuraFlow",
    "BriaFibo2Transformer2DModel": "BriaFibo2",
    "ChromaTransformer2DModel": "Chroma",
    "FluxTransformer2DModel": "Flux",
    "Flux2Transformer2DModel": "Flux2",
    "LongCatImageTransformer2DModel": "LongCatImage",
    "OvisImageTransformer2DModel": "OvisImage",
    "QwenImageTransformer2DModel": "QwenImage",
    "Krea2Transformer2DModel": "Krea2",
    "PRXTransformer2DModel": "PRX",
    "NucleusMoEImageTransformer2DModel": "NucleusMoEImage",
    "Lumina2Transformer2DModel": "Lumina2",
}


@functools.cache
def classes_in_source():
    files = (Path(diffusers.__file__).parent / "pipelines").rglob("*.py")
    trees = (ast.parse(file.read_text()) for file in files)
    return {one.name: one for tree in trees for one in tree.body if isinstance(one, ast.ClassDef)}


def arithmetic(expression, call, seen=("t", "self", "latents", "latent_model_input", "decode_timestep")):
    """The operations by which `timestep` is computed from t, through the variables of a call."""
    for node in ast.walk(expression):
        if isinstance(node, ast.BinOp) and not isinstance(node.left, ast.List):
            yield ast.unparse(node)
        if isinstance(node, ast.Name) and node.id not in seen:
            for line in ast.walk(call):
                if isinstance(line, ast.Assign) and any(getattr(x, "id", "") == node.id for x in line.targets):
                    yield from arithmetic(line.value, call, (*seen, node.id))


def convention_in_source(kind, network):
    methods = {m.name: m for m in kind.body if isinstance(m, ast.FunctionDef)}
    (annotation,) = (a for a in methods["__init__"].args.args if a.arg in ("unet", "transformer"))
    assert network in re.findall(r"\w+", ast.unparse(annotation.annotation))
    call, found = methods["__call__"], set()
    for node in ast.walk(call):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("self.unet", "self.transformer"):
            given = [k.value for k in node.keywords if k.arg == "timestep"] or node.args[1:2]
            found.add(" ".join(sorted(set(arithmetic(given[0], call)))))
    (told,) = found
    negations = (n for n in ast.walk(call) if isinstance(n, ast.UnaryOp) and isinstance(n.op, ast.USub))
    sign = -1 if any("noise_pred" in ast.unparse(n) for n in negations) else 1
    share = r"(t|timestep|t\.float\(\)) / self\.scheduler\.config\.num_train_timesteps"
    if not told:
        return NetworkConvention(sign=sign)
    if re.fullmatch(r"(t|timestep|t\.expand\(latents\.shape\[0\]\)) / 1000", told):
        return NetworkConvention(1000, sign=sign)
    if re.fullmatch(share, told):
        return NetworkConvention(None, sign=sign)
    assert re.fullmatch(f"1 - {share} {share}", told), told
    return NetworkConvention(None, from_end=True, sign=sign)


def test_each_network_of_the_list_is_verified():
    assert set(PIPELINES) == set(CONVENTIONS)


@pytest.mark.parametrize("network", PIPELINES)
def test_the_list_is_that_of_the_source(network):
    kind = classes_in_source()[f"{PIPELINES[network]}Pipeline"]
    assert CONVENTIONS[network] == convention_in_source(kind, network)


def stub(name):
    """A network with the name of one of diffusers: it notes the time that it is told."""

    def forward(self, hidden_states, timestep):
        self.told = timestep
        return (torch.sin(hidden_states) * (1 + 0.1 * self.told.reshape(-1, 1, 1, 1).sin()),)

    return type(name, (nn.Module,), {"forward": forward})()


@pytest.mark.parametrize("n", [1000, 500])
@pytest.mark.parametrize(
    ("name", "told", "sign"),
    [
        ("SD3Transformer2DModel", lambda t, n: t, 1),
        ("FluxTransformer2DModel", lambda t, n: t / 1000, 1),
        ("PRXTransformer2DModel", lambda t, n: t / n, 1),
        ("NucleusMoEImageTransformer2DModel", lambda t, n: t / n, -1),
        ("Lumina2Transformer2DModel", lambda t, n: 1 - t / n, -1),
    ],
)
def test_x0_is_what_the_pipeline_computes(name, told, sign, n):
    """Its scheduler takes x0 = sample - t/N output, of the output as the pipeline hands it on; so does the calibrated
    network, whose output loses an offset in the network's own sign."""
    network, scheduler = stub(name), FlowMatchEulerDiscreteScheduler(num_train_timesteps=n)
    t = torch.tensor([0.2, 0.7]) * n
    u, h = (t / n).reshape(-1, 1, 1, 1), torch.randn(2, 3, 4, 4, generator=seeded())
    x, sigma = h / (1 - u), t / (n - t)
    ours = denoiser_from(network, scheduler)(x, sigma)
    torch.testing.assert_close(network.told, told(t, n), rtol=1e-5, atol=1e-5)
    output = sign * network(h, told(t, n))[0]
    torch.testing.assert_close(ours, h - u * output, rtol=0, atol=1e-5)

    calibration = table(scheduler, (3, 4, 4), size=0.3)
    calibrate_denoiser(network, calibration)
    expected = output - calibration.offset(sigma, torch.ones(1))
    assert (expected - output).abs().max() > 0.01
    torch.testing.assert_close(denoiser_from(network, scheduler)(x, sigma), h - u * expected, rtol=0, atol=1e-5)


def test_a_measurement_takes_the_convention_too(tmp_path):
    """A network that is not on the list, against the same one that is told t and not negated."""
    scheduler = FlowMatchEulerDiscreteScheduler()

    class Own(nn.Module):
        def __init__(self, factor, sign):
            super().__init__()
            self.factor, self.sign = factor, sign

        def forward(self, x, time):
            return self.sign * (x.tanh() + 0.3 + (self.factor * time).reshape(-1, 1, 1, 1) / 1000)

    data = [(torch.randn(32, 1, 2, 2, generator=seeded(i)), {}) for i in range(4)]
    measured = {"num_levels": 4, "progress": False}
    own = NetworkConvention(1000, sign=-1)
    plain = estimate_calibration(Own(1, 1), scheduler, data, **measured)
    other = estimate_calibration(
        Own(1000, -1),
        scheduler,
        data,
        convention=own,
        state_path=tmp_path / "sums.safetensors",
        save_every=1,
        **measured,
    )
    assert plain.offsets.abs().max() > 0.05
    torch.testing.assert_close(other.offsets, plain.offsets, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="sums of another run, with other estimator"):
        estimate_calibration(Own(1000, -1), scheduler, data, state_path=tmp_path / "sums.safetensors", **measured)


def test_lumina_2():
    """As Lumina2Pipeline calls it: by a time from the noise's end, and with the output negated."""
    sizes = {"hidden_size": 16, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1}
    sizes |= {"multiple_of": 8, "axes_dim_rope": (2, 2, 4), "axes_lens": (16, 16, 16), "cap_feat_dim": 8}
    network = Lumina2Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, **sizes).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2, generator=seeded())
    cond = {
        "encoder_hidden_states": torch.randn(2, 3, 8, generator=seeded()),
        "encoder_attention_mask": torch.ones(2, 3).bool(),
    }
    u, h = torch.tensor([0.3, 0.8]), torch.randn(2, 4, 8, 8, generator=seeded())
    with torch.no_grad():
        flow = -network(hidden_states=h, timestep=1 - u, return_dict=False, **cond)[0]
        each = u.reshape(-1, 1, 1, 1)
        ours = denoiser_from(network, FlowMatchEulerDiscreteScheduler())(h / (1 - each), u / (1 - u), **cond)
    assert flow.abs().max() > 0.01
    torch.testing.assert_close(ours, h - each * flow, rtol=0, atol=1e-4)


def test_what_is_not_on_the_list_is_refused_with_the_way_out():
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4, "num_cross_attention_heads": 2}
    sizes |= {"cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": 8, "sample_size": 8}
    sana = diffusers.SanaTransformer2DModel(in_channels=4, out_channels=4, **sizes)
    with pytest.raises(ValueError, match=r"what a SanaTransformer2DModel is told .* say it by convention="):
        denoiser_from(sana, FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="say it by convention="):
        calibrate_denoiser(sana, table(FlowMatchEulerDiscreteScheduler(), (4, 8, 8)))
    own = NetworkConvention(1000, sign=-1)
    assert denoiser_from(sana, FlowMatchEulerDiscreteScheduler(), own).network.convention == own

    class Derived(diffusers.UNet2DModel):
        pass

    class Foreign(diffusers.ModelMixin):
        pass

    assert (
        convention_of(
            Derived(
                8,
                1,
                1,
                block_out_channels=(8, 8),
                norm_num_groups=4,
                down_block_types=("DownBlock2D",) * 2,
                up_block_types=("UpBlock2D",) * 2,
            )
        )
        == NetworkConvention()
    )
    assert convention_of(Foreign()) == convention_of(lambda x, t: x) == NetworkConvention()
    with pytest.raises(ValueError, match="it is not known what a SanaTransformer2DModel"):
        denoiser_from(type("Mine", (diffusers.SanaTransformer2DModel,), {})(4, 4, **sizes), DDIMScheduler())
