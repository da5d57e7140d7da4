"""The calibrated schedulers. Truth: the stock schedulers themselves, given the output minus an offset that the test
looks up in float64; what a stranger downloads from a small Hub; and the network's own branches under guidance."""

import copy
import inspect
import json
import pickle

import diffusers
import pytest
import stranger
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from diffusers.utils import is_torchsde_available, logging
from hub_server import HubServer
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from oracles import image_mixture
from test_calibration import HOSTS, OracleNetwork, buffers, output_offset, seeded, table, tiny_unet
from torch import Tensor

import diffusers_ext
from diffusers_ext import Calibration, ClassConditionalPipeline, calibrate_denoiser
from diffusers_ext.schedulers.scheduling_calibrated import CALIBRATED_SCHEDULERS, calibrated_class
from diffusers_ext.stock import VP_SCHEDULERS, swapped_in

SHAPE = (2, 3, 4)
BOTH = ("conditional", "unconditional")
FEW = {"num_train_timesteps": 100, "beta_end": 0.2}
SEEDED = {"DPMSolverSDEScheduler": {"noise_sampler_seed": 0}, "KDPM2DiscreteScheduler": FEW}
SEEDED["KDPM2AncestralDiscreteScheduler"] = FEW
SETTINGS = {
    "DDIMScheduler": [{}, {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}],
    "DDPMScheduler": [{}, {"prediction_type": "sample", "variance_type": "fixed_large"}],
    "PNDMScheduler": [{}, {"skip_prk_steps": True, "prediction_type": "v_prediction"}],
    "DPMSolverMultistepScheduler": [
        {},
        {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ],
    "DPMSolverSinglestepScheduler": [{}, {"use_karras_sigmas": True, "prediction_type": "v_prediction"}],
    "UniPCMultistepScheduler": [{}, {"timestep_spacing": "trailing", "prediction_type": "sample"}],
    "DEISMultistepScheduler": [{}],
    "EulerDiscreteScheduler": [
        {},
        {"use_karras_sigmas": True, "timestep_spacing": "leading"},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ],
    "EulerAncestralDiscreteScheduler": [{}, {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}],
    "HeunDiscreteScheduler": [{}, {"use_karras_sigmas": True, "prediction_type": "sample"}],
    # these two take long to make for many timesteps
    "KDPM2DiscreteScheduler": [{**FEW}, {**FEW, "use_karras_sigmas": True}],
    "KDPM2AncestralDiscreteScheduler": [{**FEW}],
    "LMSDiscreteScheduler": [{}, {"use_karras_sigmas": True, "prediction_type": "v_prediction"}],
    "SASolverScheduler": [{}, {"prediction_type": "v_prediction"}],
    "LCMScheduler": [{}],
    "TCDScheduler": [{}, {"prediction_type": "v_prediction"}],
    "CogVideoXDDIMScheduler": [{}, {"prediction_type": "v_prediction", "snr_shift_scale": 1.0}],
    "CogVideoXDPMScheduler": [{}, {"prediction_type": "v_prediction", "snr_shift_scale": 1.0}],
    **({"DPMSolverSDEScheduler": [{"noise_sampler_seed": 0}]} if is_torchsde_available() else {}),
    "FlowMatchHeunDiscreteScheduler": [{}, {"shift": 3.0}],
    "FlowMatchLCMScheduler": [{}],
    "EDMEulerScheduler": [{}, {"prediction_type": "v_prediction", "sigma_data": 0.8}],
    "EDMDPMSolverMultistepScheduler": [{}],
    "FlowMatchEulerDiscreteScheduler": [{}, {"shift": 3.0}, {"use_karras_sigmas": True}],
    **{
        f"ShortTime{name}": [{**SEEDED.get(name, {})}, {**SEEDED.get(name, {}), "max_diffusion_time": 0.6}]
        for name in swapped_in(VP_SCHEDULERS)
    },
}
EVERY = [(name, i) for name, settings in SETTINGS.items() for i in range(len(settings))]


def stock(name: str, i: int = 0):
    return getattr(diffusers, name)(**SETTINGS[name][i])


def raw(sample: Tensor, t) -> Tensor:
    """A network's output: any function of its input."""
    return torch.sin(3 * sample.float()) / 2 + 0.001 * float(t if abs(float(t)) < 1e6 else 0)


def trajectory(scheduler, change=None, steps: int = 7, start: int = 0) -> list:
    """Samples of a whole loop; `change` is made to the network's output before the step."""
    scheduler.set_timesteps(steps)
    if start and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    x = torch.randn(2, *SHAPE, generator=seeded()) * getattr(scheduler, "init_noise_sigma", 1.0)
    step, samples = steps_of(scheduler, seeded(1)), []
    for t in scheduler.timesteps[start * scheduler.order :]:
        output = raw(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x, t)
        x = step(output if change is None else change(output, t), t, x)
        samples.append(x)
    return samples


def steps_of(scheduler, generator=None):
    """The scheduler's `step` as (output, t, x) -> the next x, called as its pipelines do."""
    takes = inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if "generator" in takes else {}
    last: dict = {"x0": None, "t": None}

    def step(output: Tensor, t, x: Tensor) -> Tensor:
        if "old_pred_original_sample" in takes:  # CogVideoX's DPM scheduler
            back, last["t"] = last["t"], t
            x, last["x0"] = scheduler.step(output, last["x0"], t, back, x, **options, return_dict=False)
            return x
        return scheduler.step(output, t, x, **options).prev_sample

    return step


def assert_same(ours: list, theirs: list, scale: float = 1.0) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 3e-5 * scale * (1 + b.abs().max())


# in the place of the stock ones


def test_every_scheduler_has_settings_here() -> None:
    assert set(SETTINGS) == set(CALIBRATED_SCHEDULERS)
    assert {f"Calibrated{name}" for name in SETTINGS} <= set(diffusers_ext.__all__)


@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_one_of_the_stock_class_with_the_same_signatures(name) -> None:
    base, ours = getattr(diffusers, name), calibrated_class(name)
    assert ours is getattr(diffusers_ext, f"Calibrated{name}")
    assert ours.__name__ == f"Calibrated{name}"
    assert issubclass(ours, base)
    for method in ("step", "set_timesteps", "__init__"):
        assert inspect.signature(getattr(ours, method)) == inspect.signature(getattr(base, method))


def test_other_schedulers_have_no_calibrated_class() -> None:
    with pytest.raises(
        ValueError, match=r"no calibrated SCMScheduler: it is of distilled .*; there are those of .*DDI"
    ):
        calibrated_class("SCMScheduler")


@pytest.mark.parametrize(("name", "i"), EVERY)
def test_without_a_calibration_it_is_the_stock_one_bit_for_bit(name, i) -> None:
    theirs = trajectory(stock(name, i))
    for ours in (
        calibrated_class(name)(**SETTINGS[name][i]),
        calibrated_class(name).from_config(stock(name, i).config),
        calibrated_class(name).from_scheduler(stock(name, i), None),
        calibrated_class(name).from_scheduler(stock(name, i), table(stock(name, i))).calibrate(None),
    ):
        own, theirs_config = ({k: v for k, v in s.config.items() if k[0] != "_"} for s in (ours, stock(name, i)))
        assert own == theirs_config
        assert all(torch.equal(a, b) for a, b in zip(trajectory(ours), theirs, strict=True))


@pytest.mark.parametrize(("name", "i"), EVERY)
def test_each_step_is_the_stock_one_of_the_output_less_its_offset(name, i) -> None:
    scheduler = stock(name, i)
    calibration = table(scheduler, size=0.2)
    ours = calibrated_class(name).from_scheduler(scheduler, calibration)

    def lessened(output: Tensor, t) -> Tensor:
        offset = output_offset(calibration, scheduler, float(t))
        assert torch.isfinite(offset).all()
        return (output.double() - offset).float()

    theirs = trajectory(scheduler, lessened)
    # near zero terminal SNR two networks' worth of float32 differ by sigma
    scale = 30.0 if scheduler.config.get("rescale_betas_zero_snr") else 3.0
    result = trajectory(ours)
    assert_same(result, theirs, scale)
    assert (result[-1] - trajectory(stock(name, i))[-1]).abs().max() > 0.02
    again = trajectory(ours)  # set_timesteps again, as for a second image
    assert all(torch.equal(a, b) for a, b in zip(again, result, strict=True))
    assert_same(trajectory(ours, steps=5), trajectory(stock(name, i), lessened, steps=5), scale)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_it_can_start_in_the_middle_as_image_to_image_does(name) -> None:
    scheduler = stock(name)
    calibration = table(scheduler, size=0.2)
    ours = calibrated_class(name).from_scheduler(scheduler, calibration)
    theirs = trajectory(
        scheduler, lambda o, t: o - output_offset(calibration, scheduler, float(t)).float(), start=3, steps=8
    )
    assert_same(trajectory(ours, start=3, steps=8), theirs)


def test_long_grids_need_bounded_memory_and_give_the_same(monkeypatch) -> None:
    from diffusers_ext.schedulers import scheduling_calibrated

    ours = calibrated_class("DDIMScheduler").from_scheduler(DDIMScheduler(), table(DDIMScheduler()))
    short = trajectory(ours)
    monkeypatch.setattr(scheduling_calibrated, "MAX_REMEMBERED", 6)
    ours.calibrate(ours.calibration)
    partly = trajectory(ours)
    assert len(ours._offsets) == 6
    assert all(torch.equal(a, b) for a, b in zip(partly, short, strict=True))


def test_a_timestep_is_known_by_its_place_or_else_by_its_value() -> None:
    """As an element of `timesteps`, a copy of it, and a number; after another grid; and in a copy of the scheduler."""
    ours = calibrated_class("DDIMScheduler").from_scheduler(DDIMScheduler(), table(DDIMScheduler(), size=0.2))
    like = torch.zeros(1, *SHAPE)
    ours.set_timesteps(7)
    kept = ours.timesteps[2]
    for scheduler in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        for steps in (7, 10):
            scheduler.set_timesteps(steps)
            for t in [*scheduler.timesteps, kept]:
                expected = output_offset(ours.calibration, DDIMScheduler(), int(t)).float()[None]
                for given in (t, t.clone(), int(t), float(t)):
                    torch.testing.assert_close(scheduler.offset(given, like), expected)


def test_a_learned_variance_is_left_alone() -> None:
    scheduler = DDPMScheduler(variance_type="learned_range")
    calibration = table(scheduler)
    ours = calibrated_class("DDPMScheduler").from_scheduler(scheduler, calibration)
    x, output = torch.randn(2, *SHAPE, generator=seeded()), torch.randn(2, 4, 3, 4, generator=seeded(1))
    for t in (999, 500, 3):
        given = output.clone()
        given[:, :2] -= output_offset(calibration, scheduler, t).float()
        expected = scheduler.step(given, t, x, generator=seeded(2)).prev_sample
        torch.testing.assert_close(ours.step(output, t, x, generator=seeded(2)).prev_sample, expected)


@pytest.mark.parametrize("name", HOSTS)
def test_the_trajectory_of_a_biased_model_is_that_of_the_perfect_one(name) -> None:
    """And so the same under every prediction type of one model."""
    law, scheduler = image_mixture(*SHAPE), copy.deepcopy(HOSTS[name])
    start, slope = 0.3 * torch.randn(2, *SHAPE, dtype=torch.float64, generator=seeded(3))
    biased = OracleNetwork().tell(law, scheduler, lambda sigma, _: start + slope * sigma.log())
    perfect = OracleNetwork().tell(law, scheduler)
    calibration = table(scheduler, offset=lambda u: start + slope * u)
    ours = calibrated_class(type(scheduler).__name__).from_scheduler(scheduler, calibration)

    def last(sampler, network, steps=10) -> Tensor:
        sampler.set_timesteps(steps)
        x = torch.randn(4, *SHAPE, dtype=torch.float64, generator=seeded()) * getattr(sampler, "init_noise_sigma", 1)
        for t in sampler.timesteps[1 if name == "flow" else 0 :]:  # the oracle is not defined at pure noise
            scale = getattr(sampler, "scale_model_input", lambda x, t: x)
            x = sampler.step(network(scale(x, t), t).sample, t, x).prev_sample
        return x.double()

    result, expected = last(ours, biased), last(scheduler, perfect)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)
    assert (last(copy.deepcopy(HOSTS[name]), biased) - expected).abs().max() > 0.1
    if name in ("v", "sample"):
        same_law = OracleNetwork().tell(law, HOSTS["epsilon"])
        torch.testing.assert_close(result, last(copy.deepcopy(HOSTS["epsilon"]), same_law), rtol=0, atol=1e-3)


# times


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_time_may_be_any_number_in_any_form(name) -> None:
    scheduler, like = stock(name), torch.zeros(1, *SHAPE)
    calibration = table(scheduler)
    ours = calibrated_class(name).from_scheduler(scheduler, calibration)
    for prepare in (lambda: None, lambda: ours.set_timesteps(10)):
        prepare()
        for t in (0.25, 333, 333.7, float(ours.timesteps[3]), 990.5, 1000.0):
            expected = output_offset(calibration, scheduler, t).float()[None]
            for form in (t, torch.tensor(t), torch.tensor([t]), torch.tensor(t, dtype=torch.float64)):
                torch.testing.assert_close(ours.offset(form, like), expected, rtol=1e-4, atol=1e-4)
    assert ours.offset(333.7, like.half()).dtype == torch.float16


class Elsewhere(Tensor):
    """A number that claims to be on another device; what is made of it is an ordinary tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self):
        return torch.device("cuda")


@pytest.mark.parametrize("remembered", [True, False])
def test_a_time_on_another_device_is_never_read_on_this_one(remembered, monkeypatch) -> None:
    calibration = table(DDIMScheduler())
    ours = calibrated_class("DDIMScheduler").from_scheduler(DDIMScheduler(), calibration)
    moved = []
    monkeypatch.setattr(calibration, "to", moved.append)
    for read in ("item", "tolist", "__float__", "__int__", "cpu"):
        monkeypatch.setattr(Elsewhere, read, lambda self: pytest.fail("read"), raising=False)
    if remembered:
        ours.set_timesteps(10)
    t = torch.tensor(ours.timesteps[2].item()).as_subclass(Elsewhere)
    given = ours.offset(t, torch.zeros(1))
    expected = output_offset(calibration, DDIMScheduler(), ours.timesteps[2].item()).float()[None]
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    assert moved == [torch.device("cuda")]


# guidance


def class_pipeline(scheduler) -> ClassConditionalPipeline:
    pipe = ClassConditionalPipeline(tiny_unet(5), scheduler, null_class=4)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0, 7.5])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_guided_output_loses_what_both_branches_would_have_lost(name, guidance_scale) -> None:
    scheduler = getattr(diffusers, name)()
    calibration = table(scheduler, (2, 8, 8), rows=BOTH, size=0.1, null_class=4)
    options = {"class_labels": [0, 3], "num_inference_steps": 6, "guidance_scale": guidance_scale}
    options |= {"output_type": "pt", "latents": torch.randn(2, 2, 8, 8, generator=seeded())}
    ours = calibrated_class(name).from_scheduler(scheduler, calibration, guidance_scale)
    swapped = class_pipeline(ours)(**options).images
    hooked = class_pipeline(scheduler)
    plain = hooked(**options).images
    calibrate_denoiser(hooked.unet, calibration)
    torch.testing.assert_close(swapped, hooked(**options).images, rtol=0, atol=1e-4)
    assert (swapped - plain).abs().max() > 0.02


def test_guidance_that_the_table_has_no_rows_for_is_refused() -> None:
    single = table(DDIMScheduler())
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 needs the rows"):
        calibrated_class("DDIMScheduler").from_scheduler(DDIMScheduler(), single, 2.0)


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (DDIMScheduler(prediction_type="v_prediction"), "prediction_type is 'v_prediction'"),
        (DDIMScheduler(beta_schedule="scaled_linear"), "the noise schedule"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "family is 'flow'"),
    ],
)
def test_the_calibration_of_another_model_is_refused(scheduler, said) -> None:
    with pytest.raises(ValueError, match=said):
        calibrated_class(type(scheduler).__name__).from_scheduler(scheduler, table(DDIMScheduler()))


def test_samples_of_another_shape_are_refused() -> None:
    ours = calibrated_class("DDIMScheduler").from_scheduler(DDIMScheduler(), table(DDIMScheduler()))
    with pytest.raises(ValueError, match=r"outputs of shape \(2, 3, 4\), this one has \(2, 8, 8\)"):
        ours.step(torch.zeros(1, 2, 8, 8), 10, torch.zeros(1, 2, 8, 8))


# files


def made(guidance_scale: float = 2.5):
    calibration = table(EulerDiscreteScheduler(), rows=BOTH)
    scheduler = EulerDiscreteScheduler(use_karras_sigmas=True)
    return calibrated_class("EulerDiscreteScheduler").from_scheduler(scheduler, calibration, guidance_scale)


def by_saving(scheduler, folder):
    scheduler.save_pretrained(folder)
    return type(scheduler).from_pretrained(folder)


@pytest.mark.parametrize(
    "copied",
    [lambda s, _: copy.deepcopy(s), lambda s, _: pickle.loads(pickle.dumps(s)), by_saving],
    ids=["deepcopy", "pickle", "save"],
)
@pytest.mark.parametrize("used", [True, False])
def test_a_copy_takes_the_same_steps(copied, used, tmp_path) -> None:
    scheduler = made()
    if used:
        trajectory(scheduler, steps=3)
    other = copied(scheduler, tmp_path)
    assert type(other) is type(scheduler)
    assert other.guidance_scale == 2.5
    assert other.calibration is not scheduler.calibration
    expected = trajectory(scheduler)
    assert all(torch.equal(a, b) for a, b in zip(trajectory(other), expected, strict=True))


def test_another_scale_of_guidance_can_be_chosen_on_loading(tmp_path) -> None:
    made().save_pretrained(tmp_path)
    other = diffusers_ext.CalibratedEulerDiscreteScheduler.from_pretrained(tmp_path, guidance_scale=4.0)
    expected = trajectory(made(4.0))
    assert all(torch.equal(a, b) for a, b in zip(trajectory(other), expected, strict=True))
    loaded, unused = diffusers_ext.CalibratedEulerDiscreteScheduler.from_pretrained(
        tmp_path, return_unused_kwargs=True, something=1
    )
    assert (loaded.guidance_scale, unused["something"], "calibration" in unused) == (2.5, 1, False)
    # another sampler of the same model finds them, too
    ddim = diffusers_ext.CalibratedDDIMScheduler.from_pretrained(tmp_path)
    assert same_tables(ddim.calibration, loaded.calibration)


def same_tables(a, b) -> bool:
    return all(torch.equal(value, buffers(b)[name]) for name, value in buffers(a).items())


def test_saving_without_a_calibration_leaves_no_old_one_behind(tmp_path, caplog) -> None:
    made().save_pretrained(tmp_path)
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == {
        "scheduler_config.json",
        "calibration.tables/config.json",
        "calibration.tables/diffusion_pytorch_model.safetensors",
    }
    made().calibrate(None).save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["scheduler_config.json"]
    logging.enable_propagation()
    loaded = diffusers_ext.CalibratedEulerDiscreteScheduler.from_pretrained(tmp_path)
    logging.disable_propagation()
    assert loaded.calibration is None
    assert "has no calibration.tables: CalibratedEulerDiscreteScheduler is the stock one" in caplog.text


def test_tables_that_cannot_be_read_are_an_error_and_not_taken_for_none(tmp_path, monkeypatch) -> None:
    made().save_pretrained(tmp_path)
    (tmp_path / "calibration.tables" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        diffusers_ext.CalibratedEulerDiscreteScheduler.from_pretrained(tmp_path)
    config = dict(made().config)
    monkeypatch.setattr(
        diffusers_ext.CalibratedEulerDiscreteScheduler,
        "load_config",
        classmethod(lambda cls, *args, **kwargs: (config, {}, None)),
    )

    def load(error):
        def raised(*args, **kwargs):
            try:
                raise error
            except type(error):
                raise OSError("as diffusers says it")  # noqa: B904

        monkeypatch.setattr(Calibration, "load_config", raised)
        return diffusers_ext.CalibratedEulerDiscreteScheduler.from_pretrained("user/repository")

    assert load(EntryNotFoundError("404")).calibration is None
    for out_of_reach in (LocalEntryNotFoundError("no connection"), ValueError("?")):
        with pytest.raises(OSError, match="as diffusers says it"):
            load(out_of_reach)


PUSH = """
import sys
sys.path.insert(0, sys.argv[1])
from test_scheduling_calibrated import *
from diffusers_ext.schedulers.scheduling_calibrated import save_tables
torch.manual_seed(0)
scheduler = made(1.0)
pipe = class_pipeline(made(1.0).calibrate(table(EulerDiscreteScheduler(), (2, 8, 8), rows=BOTH)))
pipe.push_to_hub("tester/whole")
pipe.save_pretrained("whole")
pipe.scheduler.calibration.push_to_hub("tester/tables")
pipe.scheduler.push_to_hub("tester/scheduler")
stock_scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
stock_pipe = diffusers.DDPMPipeline(tiny_unet(), stock_scheduler)
for variant in (None, "fp16"):
    stock_pipe.save_pretrained("beside", variant=variant)
save_tables(pipe.scheduler.calibration, "beside/scheduler", 1.0)
from huggingface_hub import HfApi
HfApi().create_repo("tester/beside")
HfApi().upload_folder(folder_path="beside", repo_id="tester/beside")

def images(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(class_labels=[1], num_inference_steps=3, output_type="pt", generator=seeded()).images

expected = images(pipe)
for where in ("whole", "tester/whole"):
    loaded = DiffusionPipeline.from_pretrained(where)
    print(where, type(loaded.scheduler).__name__, torch.allclose(images(loaded), expected, rtol=0, atol=1e-4))
print("tables", same_tables(Calibration.from_pretrained("tester/tables"), pipe.scheduler.calibration))
kind = diffusers_ext.CalibratedEulerDiscreteScheduler
for where, subfolder in (("tester/scheduler", None), ("tester/whole", "scheduler"), ("tester/beside", "scheduler")):
    loaded = kind.from_pretrained(where, subfolder=subfolder)
    print(where, same_tables(loaded.calibration, pipe.scheduler.calibration))
    pipe.scheduler = loaded
    print(where, torch.equal(images(pipe), expected))
half = DiffusionPipeline.from_pretrained("tester/beside", variant="fp16")
print("fp16", type(half).__name__, type(half.scheduler).__name__)
"""
OPEN = """
import sys, torch
sys.modules["diffusers_ext"] = None
from diffusers import DDPMPipeline, DiffusionPipeline
for variant in (None, "fp16"):
    pipe = DiffusionPipeline.from_pretrained("tester/beside", variant=variant)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(num_inference_steps=1, output_type="np").images
    print(type(pipe).__name__, type(pipe.scheduler).__name__, image.shape)
"""


def test_the_hub_keeps_the_tables_and_people_without_this_package_are_not_in_their_way(tmp_path) -> None:
    from pathlib import Path

    def run(code, *args, home, token):
        done = stranger.run(code, *args, cwd=tmp_path, env=hub.environment(tmp_path / home, **token))
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    with HubServer() as hub:
        lines = run(PUSH, str(Path(__file__).parent), home="own", token={})
        assert [v for v in lines if v.endswith("False")] == []
        assert [v for v in lines if v.startswith(("whole", "tester/whole C"))] == [
            "whole CalibratedEulerDiscreteScheduler True",
            "tester/whole CalibratedEulerDiscreteScheduler True",
        ]
        assert sum(v.endswith("True") for v in lines) == 9
        assert lines[-1] == "fp16 DDPMPipeline EulerDiscreteScheduler"
        assert "scheduler/calibration.tables/diffusion_pytorch_model.safetensors" in hub.files("tester/beside")
        index = json.loads(hub.files("tester/whole")["model_index.json"])
        assert index["scheduler"] == ["diffusers_ext", "CalibratedEulerDiscreteScheduler"]
        opened = run(OPEN, home="stranger", token={"token": None})
    assert opened == ["DDPMPipeline EulerDiscreteScheduler (1, 8, 8, 2)"] * 2


def test_the_package_names_the_classes_for_diffusers(tmp_path) -> None:
    class_pipeline(made(1.0)).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers_ext", "CalibratedEulerDiscreteScheduler"]
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert same_tables(loaded.scheduler.calibration, made().calibration)
