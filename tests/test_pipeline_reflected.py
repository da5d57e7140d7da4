"""`ReflectedPipeline`. Truth: the exact transport map and the exact law of folded mixtures, loops written out by hand,
a network whose guidance is linear, and what a stranger downloads from a small Hub."""

import inspect
import json
import sys

import numpy as np
import pytest
import stranger
import torch
import torchdiffeq
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.models.unets.unet_2d import UNet2DOutput
from hub_server import TOKEN, HubServer
from oracles import Folded, two_bumps
from PIL import Image
from precision import assert_same_images
from test_pipelines import CONDITIONAL, OracleUNet, quiet, tiny_unet
from test_reflected_process import inside, kolmogorov_smirnov, seeded
from torch import Tensor

from diffusers_ext import ClassConditionalPipeline, ReflectedPipeline, ReflectedScheduler
from diffusers_ext.pipelines import pipeline_reflected

LOW, HIGH = 0.05, 4.0
BOX = (-0.5, 1.5)  # not the box of ordinary images
LAW = Folded(two_bumps(), *BOX, images=6)  # of each pixel


def scheduler_of(**settings) -> ReflectedScheduler:
    return ReflectedScheduler(**{"low": BOX[0], "high": BOX[1], "sigma_min": LOW, "sigma_max": HIGH} | settings)


def sigma_at(t) -> Tensor:
    return LOW * (HIGH / LOW) ** (torch.as_tensor(t).double() / 999)


def exact_network(sample: Tensor, timestep: Tensor) -> Tensor:
    sigma = sigma_at(timestep)
    return -sigma * LAW.score(sample.flatten(), sigma).reshape(sample.shape)


def oracle_pipeline(**settings) -> ReflectedPipeline:
    unet = OracleUNet()
    unet.network = exact_network
    return quiet(ReflectedPipeline(unet, scheduler_of(**settings)))


def class_pipeline(null_class: int | None = 4, **settings) -> ReflectedPipeline:
    return quiet(ReflectedPipeline(tiny_unet(num_class_embeds=5), scheduler_of(**settings), null_class=null_class))


def images(pipe, *args, steps: int = 4, **kwargs) -> Tensor:
    return pipe(*args, num_inference_steps=steps, output_type="pt", **kwargs).images


def starts(n: int, channels: int = 1, size: int = 4, seed: int = 0) -> Tensor:
    """Points of the box."""
    return BOX[0] + 2 * torch.rand(n, channels, size, size, generator=seeded(seed))


def transport(x: Tensor) -> Tensor:
    """The exact probability flow: the monotone map of each pixel's law at HIGH to that at LOW."""
    q = LAW.cdf(x.flatten().double(), HIGH)
    low, high = (torch.full_like(q, v) for v in BOX)
    for _ in range(60):
        middle = (low + high) / 2
        below = LAW.cdf(middle, LOW) < q
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return ((low + high) / 2).reshape(x.shape)


def in_unit_range(x: Tensor) -> Tensor:
    return (x - BOX[0]) / 2


# the images are the right ones


def test_adaptive_solver_and_heun_carry_the_start_along_the_exact_flow() -> None:
    latents = starts(6)
    exact = in_unit_range(transport(latents))
    adaptive = images(oracle_pipeline(), batch_size=6, latents=latents, rtol=1e-5).double()
    heun = images(oracle_pipeline(algorithm_type="heun"), batch_size=6, latents=latents, steps=100).double()
    torch.testing.assert_close(adaptive, exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(heun, exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("one", ["rtol", "atol"])
def test_one_tolerance_stands_for_the_other_and_sets_the_error(one: str) -> None:
    pipe, latents = oracle_pipeline(), starts(6)
    exact, errors = in_unit_range(transport(latents)), []
    for tolerance in (1e-2, 1e-4):
        alone = images(pipe, batch_size=6, latents=latents, **{one: tolerance})
        assert torch.equal(alone, images(pipe, batch_size=6, latents=latents, rtol=tolerance, atol=tolerance))
        errors.append((alone - exact).abs().max().item())
    assert errors[1] < errors[0] / 10


def test_two_tolerances_are_what_they_are_called(monkeypatch) -> None:
    solve, told = torchdiffeq.odeint, []
    monkeypatch.setattr(torchdiffeq, "odeint", lambda *a, **k: told.append((k["rtol"], k["atol"])) or solve(*a, **k))
    images(oracle_pipeline(), rtol=1e-2, atol=1e-3)
    assert told == [(1e-2, 1e-3)]


@pytest.mark.parametrize("options", [{"steps": 60}, {"rtol": 1e-4}], ids=["sde", "adaptive"])
def test_pixels_have_the_exact_law(options: dict) -> None:
    x = images(oracle_pipeline(), batch_size=250, generator=seeded(), **options).flatten()
    critical = 2.5 if "rtol" in options else 2.5 + 0.01 * len(x) ** 0.5  # the SDE's bias at 60 steps
    assert kolmogorov_smirnov(x, lambda v: LAW.cdf(BOX[0] + 2 * v, LOW)) < critical


def test_the_chain_starts_from_the_uniform_law() -> None:
    pipe, seen = oracle_pipeline(), []
    pipe.unet.network = lambda x, t: seen.append(x) or torch.zeros_like(x)
    images(pipe, batch_size=1000, steps=1, generator=seeded())
    assert kolmogorov_smirnov(seen[0].flatten(), lambda v: (v - BOX[0]) / 2) < 2.5


class KinkedUNet(OracleUNet):
    """Pushes out of the box at every face, as no exact score does."""

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> UNet2DOutput:
        return UNet2DOutput(sample=-0.5 * torch.sign(sample - 0.5) * torch.ones_like(sample))


def test_flux_through_the_faces_ends_neither_outside_nor_never(monkeypatch) -> None:
    monkeypatch.setattr(pipeline_reflected, "MAX_STEPS", 100)
    pipe, calls, found = quiet(ReflectedPipeline(KinkedUNet(), scheduler_of())), [], []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    spy(pipe, found)
    eps, points = pipe.scheduler.eps, []
    pipe.scheduler.eps = lambda output, x, sigma: points.append(x) or eps(output, x, sigma)
    images(pipe, batch_size=2, rtol=1e-6, generator=seeded())
    assert inside(found[0], 0.0, 1.0)
    assert all(inside(x, *BOX) for x in points)
    assert torch.minimum(found[0], 1 - found[0]).max() < 0.01  # pushed to a face, and held there by the mirrored field
    assert 300 < len(calls) < 700  # six evaluations in each step


# guidance


def spy(pipe: ReflectedPipeline, found: list) -> None:
    """Note what the images are before they are clamped to [0, 1]."""
    plain = pipe._in_unit_range
    pipe._in_unit_range = lambda sample: found.append(plain(sample)) or found[-1]


@pytest.mark.parametrize("guidance_scale", [0.0, -3.0, 1.0, 7.0, 100.0])
@pytest.mark.parametrize("options", [{}, {"algorithm_type": "ode"}, {"algorithm_type": "heun"}, {"rtol": 0.1}], ids=str)
def test_no_guidance_scale_leads_out_of_the_box(options: dict, guidance_scale: float, monkeypatch) -> None:
    monkeypatch.setattr(pipeline_reflected, "MAX_STEPS", 20)  # a random network has much flux through the faces
    rtol, settings = options.get("rtol"), {k: v for k, v in options.items() if k != "rtol"}
    pipe, found = class_pipeline(**settings), []
    spy(pipe, found)
    result = images(pipe, [0, 3], guidance_scale=guidance_scale, generator=seeded(), rtol=rtol)
    assert inside(found[0], 0.0, 1.0)
    assert torch.equal(result, found[0])  # so the clamp had nothing to do


class LinearUNet(OracleUNet):
    """eps = a_k x + b_k for the class k."""

    A, B = torch.tensor([0.3, 0.7, -0.2]), torch.tensor([0.1, -0.4, 0.2])

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> UNet2DOutput:
        a, b = (v[class_labels].reshape(-1, 1, 1, 1) for v in (self.A, self.B))
        return UNet2DOutput(sample=a * sample + b)


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5, -1.0])
def test_guidance_extrapolates_from_the_null_class(w: float) -> None:
    pipe = quiet(
        ReflectedPipeline(
            LinearUNet(num_class_embeds=3), scheduler_of(algorithm_type="ode", sigma_max=0.1), null_class=1
        )
    )
    latents, labels = 0.5 + 0.01 * (starts(2) - 0.5), torch.tensor([0, 2])  # so far inside that nothing is folded
    a, b = (v[1] + w * (v[labels] - v[1]) for v in (LinearUNet.A.double(), LinearUNet.B.double()))
    a, b = (v.reshape(-1, 1, 1, 1) for v in (a, b))
    # dx/dsigma = a x + b, solved from 0.1 to 0.05
    exact = (latents.double() + b / a) * torch.exp(-0.05 * a) - b / a
    stepped = images(pipe, labels, guidance_scale=w, latents=latents, steps=1000).double()
    torch.testing.assert_close(stepped, in_unit_range(exact), rtol=0, atol=2e-5)
    adaptive = images(pipe, labels, guidance_scale=w, latents=latents, rtol=1e-6).double()
    torch.testing.assert_close(adaptive, in_unit_range(exact), rtol=0, atol=2e-6)


def test_guidance_scale_1_asks_the_conditional_model_alone() -> None:
    pipe, asked = class_pipeline(), []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    images(pipe, [0, 3], generator=seeded(), steps=2)
    images(pipe, [0, 3], generator=seeded(), steps=1, guidance_scale=2.0)
    assert asked == [[0, 3], [0, 3], [0, 3, 4, 4]]
    latents = starts(2, 3, 8)
    for w, labels in ((1.0 + 1e-9, [0, 3]), (0.0, [4, 4])):
        guided = images(pipe, [0, 3], guidance_scale=w, latents=latents, generator=seeded())
        assert_same_images(guided, images(pipe, labels, latents=latents, generator=seeded()))


@pytest.mark.parametrize("algorithm", ["sde", "heun"])
def test_it_is_the_schedulers_loop(algorithm: str) -> None:
    pipe = class_pipeline(algorithm_type=algorithm)
    scheduler, x, g, w = scheduler_of(algorithm_type=algorithm), starts(2, 3, 8), seeded(5), 2.5
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in scheduler.timesteps:
            conditional = pipe.unet(x, t, class_labels=torch.tensor([0, 3])).sample
            null = pipe.unet(x, t, class_labels=torch.tensor([4, 4])).sample
            x = scheduler.step(w * conditional + (1 - w) * null, t, x, generator=g).prev_sample
    ours = images(pipe, [0, 3], guidance_scale=w, latents=starts(2, 3, 8), generator=seeded(5))
    # The network rounds otherwise for the two halves at once: 1.05e-4 was seen; a guidance scale of 2.4 gives 0.6.
    torch.testing.assert_close(ours, in_unit_range(x), rtol=0, atol=1e-3)


# randomness


@pytest.mark.parametrize("options", [{}, {"rtol": 1e-3}], ids=["steps", "adaptive"])
def test_all_randomness_is_the_generators(options: dict) -> None:
    pipe, state = oracle_pipeline(), torch.get_rng_state()
    first, again, other = (images(pipe, batch_size=2, generator=seeded(s), **options) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [{}, {"rtol": 1e-5}], ids=["steps", "adaptive"])
def test_a_list_of_generators_gives_the_images_of_single_runs(options: dict) -> None:
    pipe = oracle_pipeline()
    together = images(pipe, batch_size=3, generator=[seeded(s) for s in (5, 6, 7)], **options)
    for i, s in enumerate((5, 6, 7)):
        alone = images(pipe, generator=seeded(s), **options)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-4)


def test_latents_are_the_uniform_points_that_the_generator_would_have_given() -> None:
    pipe = class_pipeline(algorithm_type="ode")
    latents = BOX[0] + 2 * torch.rand(2, 3, 8, 8, generator=seeded())
    assert torch.equal(images(pipe, [0, 1], latents=latents), images(pipe, [0, 1], generator=seeded()))


# callbacks, outputs, dtypes


def test_callback_sees_every_step_and_may_replace_the_sample() -> None:
    pipe, seen = class_pipeline(algorithm_type="heun"), []

    def watch(owner, i, t, tensors) -> dict:
        seen.append((owner is pipe, i, float(t), tensors["latents"]))
        return {}

    plain = images(pipe, 1, generator=seeded())
    assert torch.equal(images(pipe, 1, generator=seeded(), callback_on_step_end=watch), plain)
    assert [s[:3] for s in seen] == [(True, i, float(t)) for i, t in enumerate(pipe.scheduler.timesteps)]
    assert torch.equal(in_unit_range(seen[-1][3]), plain)

    def replace(owner, i, t, tensors) -> dict:
        return {"latents": torch.full_like(tensors["latents"], 1.0)}

    assert (images(pipe, 1, generator=seeded(), callback_on_step_end=replace) == 0.75).all()


@pytest.mark.parametrize("options", [{}, {"rtol": 1e-2}], ids=["steps", "adaptive"])
def test_output_types_hold_the_same_image(options: dict) -> None:
    pipe = oracle_pipeline()
    options = options | {"batch_size": 2, "num_inference_steps": 4}
    as_tensor = pipe(output_type="pt", generator=seeded(), **options).images
    as_array = pipe(output_type="np", generator=seeded(), **options).images
    assert np.array_equal(as_array, as_tensor.permute(0, 2, 3, 1).numpy())
    (as_pil,) = pipe(generator=seeded(), return_dict=False, **options)
    assert all(isinstance(image, Image.Image) for image in as_pil)
    for image, array in zip(as_pil, as_array[..., 0], strict=True):
        assert np.abs(np.asarray(image) / 255 - array).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{"steps": 100}, {"rtol": 1e-2}], ids=["steps", "adaptive"])
def test_low_precision_gives_nearly_the_same_images(options: dict, dtype: torch.dtype) -> None:
    latents, results = starts(4), []
    for precision in (torch.float32, dtype):
        pipe, found = oracle_pipeline(algorithm_type="ode").to(precision), []
        spy(pipe, found)
        results.append(images(pipe, batch_size=4, latents=latents, **options))
        assert results[-1].dtype == precision
        assert found[0].dtype == torch.float32
    assert (results[0] - results[1].float()).square().mean().sqrt() < 0.02


def test_the_progress_bar_of_the_adaptive_solver_counts_evaluations(capsys) -> None:
    pipe, calls = oracle_pipeline(), []
    pipe.set_progress_bar_config(disable=False, miniters=1, mininterval=0)
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    pipe(rtol=1e-2)
    assert f"{len(calls)}it" in capsys.readouterr().err


# saving and loading


@pytest.mark.parametrize("settings", [{}, {"algorithm_type": "heun", "step_variable": "sigma", "boundary": "project"}])
def test_a_saved_pipeline_loads_by_its_name_and_draws_the_same_images(settings: dict, tmp_path) -> None:
    pipe = class_pipeline(**settings)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "ReflectedPipeline"
    assert (index["unet"], index["scheduler"]) == (
        ["diffusers", "UNet2DModel"],
        ["diffusers_ext", "ReflectedScheduler"],
    )
    assert "diffusers_ext." not in json.dumps(index)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(loaded) is ReflectedPipeline
    assert type(loaded.scheduler) is ReflectedScheduler
    expected = images(pipe, [0, 1], guidance_scale=2.0, generator=seeded())
    assert_same_images(images(loaded, [0, 1], guidance_scale=2.0, generator=seeded()), expected)


PUSH = "import diffusers_ext, sys\nfrom diffusers import DiffusionPipeline\n" + (
    "DiffusionPipeline.from_pretrained('model').push_to_hub('tester/reflected')"
)
LOAD = """
import diffusers_ext, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("tester/reflected")
generator = torch.Generator().manual_seed(0)
options = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "pt", "generator": generator}
torch.save((type(pipe).__name__, type(pipe.scheduler).__name__, pipe([0, 1], **options).images), "images.pt")
"""


def test_a_stranger_gets_the_same_images_from_the_hub(tmp_path) -> None:
    pipe = class_pipeline(algorithm_type="heun")
    pipe.save_pretrained(tmp_path / "model")
    with HubServer() as hub:
        for code, token in ((PUSH, TOKEN), (LOAD, None)):
            done = stranger.run(code, cwd=tmp_path, env=hub.environment(tmp_path / f"home-{token}", token))
            assert done.returncode == 0, done.stderr
        assert "scheduler/scheduler_config.json" in hub.files("tester/reflected")
    *names, theirs = torch.load(tmp_path / "images.pt")
    assert names == ["ReflectedPipeline", "ReflectedScheduler"]
    assert_same_images(theirs, images(pipe, [0, 1], guidance_scale=2.0, generator=seeded()))


# refusals


def test_its_arguments_are_those_of_the_other_pipeline_and_the_tolerances() -> None:
    ours, theirs = (
        dict(inspect.signature(k.__call__).parameters) for k in (ReflectedPipeline, ClassConditionalPipeline)
    )
    *own, options = theirs
    assert list(ours) == [*own, "rtol", "atol", options]
    assert all(ours[name] == theirs[name] for name in theirs)


@pytest.mark.parametrize("tolerance", [{}, {"rtol": 1e-3}], ids=["steps", "adaptive"])
@pytest.mark.parametrize(("options", "message"), CONDITIONAL)
def test_a_contradiction_is_refused(options: dict, message: str, tolerance: dict) -> None:
    with pytest.raises(ValueError, match=message):
        class_pipeline()(num_inference_steps=1, **options, **tolerance)


OWN = [
    ({"latents": torch.full((1, 1, 4, 4), 1.6)}, r"latents must lie in \[-0.5, 1.5\], it is from 1.6 to 1.6"),
    ({"latents": torch.full((1, 1, 4, 4), float("nan"))}, "latents must lie in"),
    ({"latents": torch.zeros(1, 1, 4, 5)}, r"\(1, 1, 4, 5\), the model needs \(1, 1, 4, 4\)"),
    ({"rtol": 0.0}, "rtol must be above 0, got 0.0"),
    ({"atol": -1.0, "rtol": 1.0}, "atol must be above 0"),
    ({"rtol": float("nan")}, "rtol must be above 0"),
    ({"rtol": 1e-3, "callback_on_step_end": print}, "no steps to call back from"),
    ({"rtol": 1e-3, "s_churn": 1}, r"makes no steps of the scheduler: it takes no \['s_churn'\]"),
    ({"s_churn": 1}, r"\['s_churn'\] are no arguments of this pipeline, nor of ReflectedScheduler.step, .* no more"),
    ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
    ({"num_inference_steps": 1001}, "num_inference_steps must be at least 1 and at most 1000, got 1001"),
]


@pytest.mark.parametrize(("options", "message"), OWN)
def test_what_is_its_own_is_refused_as_well(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        oracle_pipeline()(**options)


def test_guidance_without_a_null_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"guidance_scale=2.0 needs a null class"):
        class_pipeline(null_class=None)(0, num_inference_steps=1, guidance_scale=2.0)


def test_another_scheduler_is_refused_and_the_solver_asks_for_its_library(monkeypatch) -> None:
    pipe = oracle_pipeline()
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match="pip install torchdiffeq"):
        pipe(rtol=1e-3)
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="a model of a reflected process needs a ReflectedScheduler, not DDIM"):
        pipe(num_inference_steps=1)
