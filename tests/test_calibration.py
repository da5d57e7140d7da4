"""`calibration`. Truth: the definitions of what each network predicts (`oracles.raw_target`), a table interpolated by
numpy in float64, trajectories of stock schedulers with the perfect network, and networks called by hand."""

import copy
from math import log

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from oracles import along, host_units, image_mixture, network_of, raw_target
from torch import Tensor, nn

from diffusers_ext import Calibration, ReflectedScheduler, calibrate_denoiser, denoiser_from, noise_schedule
from diffusers_ext.calibration import stop_calibrating, subtract

SHAPE = (2, 3, 4)
FINE = {"clip_sample": False, "timestep_spacing": "trailing"}
HOSTS = {
    "epsilon": DDIMScheduler(**FINE),
    "v": DDIMScheduler(prediction_type="v_prediction", **FINE),
    "sample": DDIMScheduler(prediction_type="sample", **FINE),
    "flow": FlowMatchEulerDiscreteScheduler(),
    "edm": EDMEulerScheduler(),
    "edm v": EDMEulerScheduler(prediction_type="v_prediction", sigma_data=0.8),
}
# What an error o of eps is in the network's output, by hand: D = x - sigma eps goes down by sigma o.
IN_OUTPUT = {
    "epsilon": lambda s: 1,
    "v": lambda s: (1 + s**2) ** 0.5,
    "sample": lambda s: -s,
    "flow": lambda s: 1 + s,
    "edm": lambda s: -((s**2 + 0.25) ** 0.5) / 0.5,
    "edm v": lambda s: (s**2 + 0.64) ** 0.5 / 0.8,
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stored(scheduler) -> dict:
    return {"_class_name": type(scheduler).__name__, **{k: v for k, v in scheduler.config.items() if k[0] != "_"}}


def table(
    scheduler, shape=SHAPE, rows=("all",), offset=None, levels: int = 9, size: float = 1.0, **config
) -> Calibration:
    """A calibration of the model of `scheduler`: random offsets of its output of a given size, or offset(ln sigma)."""
    schedule = noise_schedule(scheduler)
    u = torch.linspace(0, 1, levels, dtype=torch.float64) ** 1.3  # not equidistant
    ends = log(schedule.sigma_min), log(schedule.sigma_max)
    log_sigmas = ends[0] + u * (ends[1] - ends[0])
    made = Calibration(list(shape), log_sigmas.exp().tolist(), rows, stored(scheduler), **config)
    units = torch.tensor([IN_OUTPUT[view_of(scheduler)](s) for s in made.config.sigmas])
    made.offsets.copy_(size * torch.randn(made.offsets.shape, generator=seeded()) / along(units, made.offsets))
    if offset is not None:
        made.offsets.copy_(torch.stack([offset(v) for v in log_sigmas])[:, None])
    made.shrinkage.fill_(1.0)
    return made


def looked_up(calibration: Calibration, sigma: float, row: int = 0) -> np.ndarray:
    """The offset of eps by numpy, in float64; held at the ends."""
    nodes = np.log(calibration.config.sigmas)
    shrinkage = calibration.shrinkage.double()[(...,) + (None,) * (calibration.offsets.ndim - 2)]
    values = calibration.offsets.double() * shrinkage
    flat = values[:, row].reshape(len(nodes), -1).numpy()
    at = np.clip(np.log(sigma), nodes[0], nodes[-1])
    return np.stack([np.interp(at, nodes, column) for column in flat.T]).reshape(calibration.config.shape)


class OracleNetwork(diffusers.ModelMixin, ConfigMixin):
    """The perfect network of a scheduler plus an error o(sigma, labels) of its eps, called as a UNet is."""

    @register_to_config
    def __init__(self, sample_size: int = 4) -> None:
        super().__init__()
        self.dummy = nn.Parameter(torch.zeros(()))

    def tell(self, law, scheduler, error=None) -> "OracleNetwork":
        self.law, self.scheduler, self.error, self.perfect = law, scheduler, error, network_of(law, scheduler)
        return self

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = True):
        time = torch.as_tensor(timestep).double().expand(len(sample))
        a, b = (along(v, sample) for v in host_units(self.scheduler, time))
        raw = self.perfect(sample, time)
        if self.error is not None:
            zero = torch.zeros(len(sample), *sample.shape[1:], dtype=torch.float64)
            o = self.error(b / a, class_labels) + zero
            raw = raw + raw_target(self.scheduler, -b / a * o, o, time) - raw_target(self.scheduler, zero, zero, time)
        return UNet2DOutput(sample=raw) if return_dict else (raw,)


# the table


@pytest.mark.parametrize("name", HOSTS)
def test_between_nodes_the_offset_is_linear_in_the_log_of_sigma_and_in_the_networks_units(name) -> None:
    start, slope = torch.randn(2, *SHAPE, dtype=torch.float64, generator=seeded())
    calibration = table(HOSTS[name], offset=lambda u: start + slope * u)
    schedule = noise_schedule(HOSTS[name])
    u = torch.linspace(log(schedule.sigma_min), log(schedule.sigma_max), 57, dtype=torch.float64)
    given = calibration.offset(u.exp(), torch.ones(1)).double()
    expected = (start + along(u, given) * slope) * along(torch.tensor([IN_OUTPUT[name](s) for s in u.exp()]), given)
    error = (given - expected).abs() / expected.abs().amax((1, 2, 3), keepdim=True)
    assert error.max() < 1e-5


@pytest.mark.parametrize("name", HOSTS)
def test_at_nodes_it_is_the_table_and_beyond_them_the_output_of_the_end_is_held(name) -> None:
    calibration = table(HOSTS[name])
    sigmas = torch.tensor(calibration.config.sigmas)
    at_nodes = calibration.offset(sigmas, torch.ones(1))
    scales = torch.tensor([IN_OUTPUT[name](s.item()) for s in sigmas])
    torch.testing.assert_close(at_nodes, calibration.offsets[:, 0] * along(scales, at_nodes).float())
    beyond = torch.stack([sigmas[0] / 10, sigmas[0] * 0, sigmas[-1] * 7, sigmas[-1] / 0])
    outside = calibration.offset(beyond, torch.ones(1))
    assert outside.isfinite().all()
    assert torch.equal(outside, at_nodes[[0, 0, -1, -1]])


def test_between_two_nodes_the_rows_and_their_shrinkage_are_mixed() -> None:
    calibration = table(DDIMScheduler(), rows=("conditional", "unconditional"))
    calibration.shrinkage.copy_(torch.rand(calibration.shrinkage.shape, generator=seeded()))
    sigmas = torch.tensor([0.02, 0.3, 5.0, 80.0])
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [7.5, -6.5], [0.3, 0.7]])
    for each, w, s in zip(calibration.offset(sigmas, weights), weights, sigmas, strict=True):
        expected = sum(w[r].item() * looked_up(calibration, s.item(), r) for r in (0, 1))
        torch.testing.assert_close(each.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HOSTS)
def test_one_error_seen_through_every_prediction_gives_the_perfect_denoiser(name) -> None:
    scheduler, law = HOSTS[name], image_mixture(*SHAPE)
    start, slope = torch.randn(2, *SHAPE, dtype=torch.float64, generator=seeded(3))
    network = OracleNetwork().tell(law, scheduler, lambda sigma, _: start + slope * sigma.log())
    denoiser = denoiser_from(network, scheduler)
    sigma = noise_schedule(scheduler).sigma(torch.tensor([20.0, 400.0, 900.0]).double()) if "edm" not in name else None
    sigma = torch.tensor([0.01, 0.8, 30.0]).double() if sigma is None else sigma
    x = (1 + along(sigma, torch.ones(1, 1, 1, 1))) * torch.randn(3, *SHAPE, dtype=torch.float64, generator=seeded(4))
    before = (denoiser(x, sigma) - law.denoiser(x, sigma)).abs()
    calibrate_denoiser(network, table(scheduler, offset=lambda u: start + slope * u))
    after = (denoiser(x, sigma) - law.denoiser(x, sigma)).abs()
    for each, other, s in zip(after, before, sigma, strict=True):
        assert each.max() < 1e-5 * (1 + s)
        assert other.max() > 0.1 * s


def test_the_gain_in_likelihood_is_the_papers_sum_over_the_trained_timesteps() -> None:
    scheduler = DDPMScheduler()
    calibration = table(scheduler, rows=("conditional", "unconditional"), levels=200)
    norm = {0: lambda s: 0.3 * s / (1 + s**2), 1: lambda s: 0.02 * s}  # |o|^2, small where the sum is coarse
    sigmas = torch.tensor(calibration.config.sigmas)
    calibration.squared_norm.copy_(torch.stack([norm[0](sigmas), norm[1](sigmas)], 1))
    abar = scheduler.alphas_cumprod.double()
    snr = abar / (1 - abar)
    ratio, between = snr[:-1] / snr[1:] - 1, snr[1:].rsqrt()
    for row, gain in enumerate(calibration.likelihood_gain()):
        nats = 0.5 * (ratio * norm[row](between)).sum().item()
        assert gain.item() == pytest.approx(nats / (24 * log(2)), rel=0.02)


def test_the_standard_error_is_a_root_mean_square_over_coordinates() -> None:
    calibration = table(DDIMScheduler())
    calibration.noise_floor.fill_(24 * 0.03**2)
    torch.testing.assert_close(calibration.std_error, torch.full((9, 1), 0.03))


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 1.0], [2.0, 1.0], [0.0, 1.0], [-1.0, 1.0]], ids=str)
def test_levels_that_make_no_table_are_refused(sigmas) -> None:
    with pytest.raises(ValueError, match="at least two, positive and increasing"):
        Calibration([1], sigmas)


# whose it is


SAME_MODEL = [
    EulerDiscreteScheduler(use_karras_sigmas=True),
    diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True),
    diffusers.PNDMScheduler(skip_prk_steps=True),
    diffusers.UniPCMultistepScheduler(timestep_spacing="trailing"),
    diffusers.HeunDiscreteScheduler(),
]


@pytest.mark.parametrize("other", SAME_MODEL, ids=lambda s: type(s).__name__)
def test_it_serves_every_sampler_of_its_model(other) -> None:
    own = type(other)(beta_start=other.config.beta_start, beta_end=other.config.beta_end)
    table(own).check(noise_schedule(other), SHAPE)


@pytest.mark.parametrize(
    ("other", "shape", "said", "unsaid"),
    [
        (DDIMScheduler(prediction_type="v_prediction"), SHAPE, ["prediction_type is 'v_prediction'"], ["betas"]),
        (DDIMScheduler(beta_schedule="scaled_linear"), SHAPE, ["the noise schedule"], ["shape", "prediction"]),
        (DDIMScheduler(rescale_betas_zero_snr=True), SHAPE, ["the noise schedule"], ["shape", "prediction"]),
        (DDIMScheduler(num_train_timesteps=500), SHAPE, ["num_train_timesteps is 500"], ["prediction"]),
        (DDIMScheduler(), (1, 8, 8), ["shape (1, 8, 8)", "(2, 3, 4)"], ["betas", "prediction"]),
        (FlowMatchEulerDiscreteScheduler(), None, ["family is 'flow'", "flow_prediction"], ["shape"]),
        (EDMEulerScheduler(), None, ["family is 'edm'", "sigma_data is 0.5"], ["shape"]),
        (
            DDIMScheduler(prediction_type="sample", beta_schedule="scaled_linear"),
            (1,),
            ["prediction_type is 'sample'", "the noise schedule", "shape (1,)"],
            ["family"],
        ),
    ],
    ids=["prediction", "betas", "zero snr", "steps", "shape", "flow", "edm", "all"],
)
def test_another_model_is_refused_with_what_differs(other, shape, said, unsaid) -> None:
    with pytest.raises(ValueError, match="belongs to another model or setting") as refused:
        table(DDIMScheduler()).check(noise_schedule(other), shape)
    assert [v for v in said if v not in str(refused.value)] == []
    assert [v for v in unsaid if v in str(refused.value)] == []


def test_a_reflected_process_has_no_mean_error() -> None:
    with pytest.raises(ValueError, match="reflected process"):
        table(DDIMScheduler()).check(noise_schedule(ReflectedScheduler()))
    with pytest.raises(ValueError, match="reflected process"):
        _ = Calibration([1], [1.0, 2.0], scheduler=stored(ReflectedScheduler())).schedule
    with pytest.raises(ValueError, match="which scheduler"):
        _ = Calibration([1], [1.0, 2.0]).schedule


# which rows


def test_guidance_weighs_the_two_rows_as_it_weighs_the_two_outputs() -> None:
    both, single = table(DDIMScheduler(), rows=("conditional", "unconditional")), table(DDIMScheduler())
    classes = table(DDIMScheduler(), rows=("0", "1", "unconditional"))
    assert both.guidance_weights(7.5).tolist() == [7.5, -6.5]
    assert both.guidance_weights(1.0).tolist() == [1.0, 0.0]
    assert both.guidance_weights(0.0).tolist() == [0.0, 1.0]
    assert single.guidance_weights(1.0).tolist() == [1.0]
    for refused, scale in ((single, 2.0), (classes, 1.0), (classes, 2.0)):
        with pytest.raises(ValueError, match=r"measure both .*use calibrate_denoiser"):
            refused.guidance_weights(scale)


def test_each_sample_has_the_row_of_its_condition() -> None:
    labels, first = torch.tensor([2, 0, 3]), torch.tensor([True, False, False])

    def rows(names, *args, **config) -> list[int]:
        return table(DDIMScheduler(), rows=names, **config).row_weights(3, *args).argmax(1).tolist()

    assert rows(("all",), labels) == [0, 0, 0]
    assert rows(("conditional", "unconditional")) == [0, 0, 0]
    assert rows(("conditional", "unconditional"), None, first) == [1, 0, 0]
    assert rows(("conditional", "unconditional"), labels, null_class=3) == [0, 0, 1]
    assert rows(("0", "1", "2", "3"), labels) == [2, 0, 3]
    assert rows(("0", "1", "2", "unconditional"), labels, null_class=3) == [2, 0, 3]
    assert rows(("0", "1", "2", "3", "4", "unconditional"), labels, null_class=3) == [2, 0, 5]
    assert rows(("0", "1", "2", "3", "unconditional"), labels, first) == [4, 0, 3]
    with pytest.raises(ValueError, match="call the model with class_labels"):
        rows(("0", "1"))


# files and dtypes


def buffers(calibration) -> dict:
    return {name: value.clone() for name, value in calibration.state_dict().items()}


@pytest.fixture
def filled() -> Calibration:
    config = {"null_class": 5, "measured_on": {"model": "a/b", "seed": 3}, "guidance_scale": 2.5}
    made = table(DDIMScheduler(), rows=("conditional", "unconditional"), **config)
    for i, name in enumerate(("shrinkage", "noise_floor", "squared_norm")):
        getattr(made, name).copy_(torch.rand(made.shrinkage.shape, generator=seeded(i)))
    made.num_samples.fill_(70_000)
    return made


def test_what_is_saved_is_what_is_loaded(filled, tmp_path) -> None:
    filled.save_pretrained(tmp_path)
    loaded = Calibration.from_pretrained(tmp_path)
    assert buffers(loaded).keys() == {"offsets", "shrinkage", "noise_floor", "squared_norm", "num_samples"}
    assert all(torch.equal(value, buffers(filled)[name]) for name, value in buffers(loaded).items())
    own, other = ({k: v for k, v in c.config.items() if k[0] != "_"} for c in (filled, loaded))
    assert own == other | {"rows": tuple(other["rows"])}
    sigma, weights = torch.tensor([0.1, 3.0]), torch.tensor([2.0, -1.0])
    assert torch.equal(loaded.offset(sigma, weights), filled.offset(sigma, weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tables_round_the_offsets_and_nothing_else(filled, dtype, tmp_path) -> None:
    sigma, weights = torch.tensor([0.013, 0.1, 3.0, 150.0]), torch.tensor([2.0, -1.0])
    exact = filled.offset(sigma, weights)
    filled.save_pretrained(tmp_path)
    loaded = Calibration.from_pretrained(tmp_path, torch_dtype=dtype)
    for half in (filled.to("cpu", dtype), loaded):
        assert (half.offsets.dtype, half.num_samples.dtype) == (dtype, torch.int64)
        assert half.num_samples.unique().tolist() == [70_000]
        assert half.offset(sigma, weights).dtype == torch.float32
        torch.testing.assert_close(half.offset(sigma, weights), exact, rtol=0, atol=20 * torch.finfo(dtype).eps)
        assert half.std_error.dtype == half.likelihood_gain().dtype == torch.float32


# subtraction


def test_variance_channels_are_left_alone() -> None:
    output, offset = torch.randn(3, 4, 5, 6, generator=seeded()), torch.randn(1, 2, 5, 6, generator=seeded(1))
    result = subtract(output, offset)
    assert torch.equal(result[:, 2:], output[:, 2:])
    assert torch.equal(result[:, :2], output[:, :2] - offset)
    assert subtract(output.half(), offset).dtype == torch.float16
    for wrong in (output[:, :3], output[..., :5], output[:, :, :1]):
        with pytest.raises(ValueError, match=r"outputs of shape \(2, 5, 6\), this one has"):
            subtract(wrong, offset)


def tiny_unet(num_class_embeds: int | None = None, channels: int = 2) -> UNet2DModel:
    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False}
    sizes = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
    return UNet2DModel(
        in_channels=channels, out_channels=channels, num_class_embeds=num_class_embeds, **blocks, **sizes
    ).eval()


def tiny_text_unet(channels: int = 4) -> UNet2DConditionModel:
    torch.manual_seed(2)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
    widths = {"cross_attention_dim": 6, "attention_head_dim": 4}
    return UNet2DConditionModel(in_channels=channels, out_channels=4, **blocks, **sizes, **widths).eval()


def tiny_dit() -> DiTTransformer2DModel:
    torch.manual_seed(3)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "patch_size": 2, "sample_size": 8}
    dit = DiTTransformer2DModel(in_channels=2, out_channels=4, num_embeds_ada_norm=5, **sizes)
    return dit.eval()


def tiny_flux() -> FluxTransformer2DModel:
    torch.manual_seed(4)
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    axes = {"axes_dims_rope": (2, 2, 4), "guidance_embeds": False}
    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, joint_attention_dim=6, pooled_projection_dim=5, **sizes, **axes
    ).eval()


EPS, FLOW = DDIMScheduler(), FlowMatchEulerDiscreteScheduler()
CLASSES = ("0", "1", "2", "3", "unconditional")


def case(name):
    """A network, its scheduler, its table, the arguments of a call, the trained time of each sample, its row."""
    g, labels = seeded(9), torch.tensor([3, 4, 0, 1])
    x = torch.randn(4, 2, 8, 8, generator=g)
    if name == "unconditional":
        return tiny_unet(), EPS, table(EPS, (2, 8, 8)), {"sample": x, "timestep": 340}, [340] * 4, [0] * 4, None
    if name == "v, times of their own":
        v, t = HOSTS["v"], torch.tensor([3, 340, 700, 999])
        return tiny_unet(), v, table(v, (2, 8, 8)), {"sample": x, "timestep": t}, t.tolist(), [0] * 4, None
    if name == "classes":
        given = {"sample": x, "timestep": torch.tensor(340), "class_labels": labels}
        made = table(EPS, (2, 8, 8), rows=CLASSES, null_class=4)
        return tiny_unet(5), EPS, made, given, [340] * 4, [3, 4, 0, 1], None
    if name == "null class":
        given = {"sample": x, "timestep": torch.tensor([340.0]), "class_labels": labels}
        made = table(EPS, (2, 8, 8), rows=("conditional", "unconditional"), null_class=4)
        return tiny_unet(5), EPS, made, given, [340] * 4, [0, 1, 0, 0], None
    if name == "text, halves":
        given = {"sample": torch.randn(4, 4, 8, 8, generator=g), "timestep": 12.5}
        given["encoder_hidden_states"] = torch.randn(4, 3, 6, generator=g)
        made = table(EPS, (4, 8, 8), rows=("conditional", "unconditional"))
        return tiny_text_unet(), EPS, made, given, [12.5] * 4, [1, 1, 0, 0], "first_half"
    if name == "transformer with variance":
        given = {"hidden_states": x, "timestep": torch.full((4,), 340), "class_labels": labels}
        made = table(EPS, (2, 8, 8), rows=CLASSES, null_class=4)
        return tiny_dit(), EPS, made, given, [340] * 4, [3, 4, 0, 1], None
    given = {
        "hidden_states": torch.randn(4, 9, 16, generator=g),
        "encoder_hidden_states": torch.randn(4, 3, 6, generator=g),
        "pooled_projections": torch.randn(4, 5, generator=g),
        "timestep": torch.tensor([0.02, 0.4, 0.9, 1.0]),
        "img_ids": torch.zeros(9, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    return tiny_flux(), FLOW, table(FLOW, (9, 16)), given, [20.0, 400.0, 900.0, 1000.0], [0] * 4, None


def sigma_at(scheduler, time: float) -> float:
    """The noise level that a network of the scheduler is told as `time`, which may lie between two trained ones."""
    if hasattr(scheduler, "precondition_outputs"):
        return float(np.exp(4 * time))
    if scheduler.config.get("prediction_type", "flow_prediction") == "flow_prediction":
        return time / (1000 - time) if time < 1000 else np.inf
    abar = scheduler.alphas_cumprod.double().numpy()
    abar = abar[:-1] if scheduler.config.get("rescale_betas_zero_snr") else abar  # the last one has sigma = infinity
    return float(np.exp(np.interp(time, np.arange(len(abar)), np.log((1 - abar) / abar) / 2)))


def view_of(scheduler) -> str:
    if hasattr(scheduler, "precondition_outputs"):
        return "edm" if scheduler.config.prediction_type == "epsilon" else "edm v"
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    return {"v_prediction": "v", "flow_prediction": "flow"}.get(kind, kind)


def output_offset(calibration, scheduler, time: float, row: int = 0) -> Tensor:
    """What is to be subtracted from a network's output at a time that it is told."""
    sigma = min(sigma_at(scheduler, float(time)), calibration.config.sigmas[-1])
    sigma = max(sigma, calibration.config.sigmas[0])
    return torch.from_numpy(looked_up(calibration, sigma, row) * IN_OUTPUT[view_of(scheduler)](sigma))


CASES = ["unconditional", "v, times of their own", "classes", "null class", "text, halves", "transformer with variance"]


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("name", [*CASES, "flux"])
@torch.no_grad()
def test_every_output_of_a_network_loses_the_offset_of_its_row_and_time(name, return_dict) -> None:
    network, scheduler, calibration, given, times, rows, guidance = case(name)

    def called() -> Tensor:
        output = network(**given, return_dict=return_dict)
        assert isinstance(output, tuple) == (not return_dict)
        return output[0] if isinstance(output, tuple) else output.sample

    plain = called()
    handle = calibrate_denoiser(network, calibration, guidance=guidance)
    calibrated = called()
    channels = calibration.config.shape[0]
    for before, after, t, row in zip(plain, calibrated, times, rows, strict=True):
        expected = before[:channels].double() - output_offset(calibration, scheduler, t, row)
        assert (after[:channels] - expected).abs().max() < 2e-5 * (1 + expected.abs().max())
        assert torch.equal(after[channels:], before[channels:])
        assert not torch.equal(after[:channels], before[:channels])
    handle.remove()
    assert torch.equal(called(), plain)


def test_another_calibration_takes_the_place_of_the_first() -> None:
    network, _, calibration, given, *_ = case("unconditional")
    calibrate_denoiser(network, calibration)
    once = network(**given).sample
    handle = calibrate_denoiser(torch.nn.DataParallel(network), calibration)  # the same network, wrapped
    assert torch.equal(network(**given).sample, once)
    handle.remove()
    handle.remove()
    assert not torch.equal(network(**given).sample, once)


def test_a_copy_of_a_calibrated_network_is_calibrated_by_itself() -> None:
    network, _, calibration, given, *_ = case("unconditional")
    plain = network(**given).sample
    calibrate_denoiser(network, calibration)
    other = copy.deepcopy(network)
    calibrated = network(**given).sample
    assert torch.equal(other(**given).sample, calibrated)
    stop_calibrating(other)
    assert torch.equal(other(**given).sample, plain)
    assert torch.equal(network(**given).sample, calibrated)
    stop_calibrating(network)
    stop_calibrating(network)
    assert torch.equal(network(**given).sample, plain)


def test_the_hook_follows_a_network_that_moves_and_keeps_its_dtype() -> None:
    network, _, calibration, given, *_ = case("unconditional")
    handle = calibrate_denoiser(network, calibration)
    exact = network(**given).sample
    network.to(torch.bfloat16)
    half = network(given["sample"].bfloat16(), 340).sample
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=0.05)
    moved = []
    calibration.to = lambda device: moved.append(device)  # an offloaded network is on its device in a call only
    network(given["sample"].bfloat16(), 340)
    assert moved == [torch.device("cpu")]
    handle.remove()


def test_a_hook_that_cannot_be_right_is_refused() -> None:
    network, _, calibration, given, *_ = case("classes")
    with pytest.raises(ValueError, match="must be None, or 'first_half'"):
        calibrate_denoiser(network, calibration, guidance="second_half")
    with pytest.raises(ValueError, match="with a row 'unconditional' in \\('all',\\)"):
        calibrate_denoiser(network, table(EPS, (2, 8, 8)), guidance="first_half")
    calibrate_denoiser(network, table(EPS, (2, 8, 9)))
    with pytest.raises(ValueError, match=r"outputs of shape \(2, 8, 9\), this one has \(2, 8, 8\)"):
        network(**given)
