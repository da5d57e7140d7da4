"""The contract of calibrated schedulers: pipelines x schedulers x guidance x batch. Truth: the stock scheduler, with a
network of which each row has lost what is its own. Which rows are unconditional is read from how each pipeline calls
its network: the first half of the batch, or, for Flux, the second call of a step."""

import diffusers
import pytest
import torch
from products import every_value
from test_calibration import table
from test_guidance import switch
from test_text_subjects import options
from tiny_pipelines import tiny

from diffusers_ext import calibrate_pipeline
from diffusers_ext.calibration import subtract
from diffusers_ext.networks import convention_of
from diffusers_ext.subjects import subject_of

BOTH = ("conditional", "unconditional")
VP = [None, diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler, diffusers.EulerAncestralDiscreteScheduler]
FLOW = [None, diffusers.FlowMatchHeunDiscreteScheduler]
SCHEDULERS = {"sd": VP, "sdxl": VP, "pixart": VP, "sd3": FLOW, "flux": [None]}
READ = ("sd", "sdxl", "sd3")  # their guidance is read from them, that of the others is told
GUIDANCE = [0.0, 0.5, 1.0, 7.5, "3 from half-way on", "off from half-way on"]
BATCHES = [(1, 1), (2, 1), (2, 2)]  # prompts, images of each

CASES = [
    case
    for name in SCHEDULERS
    for case in every_value([name], SCHEDULERS[name], GUIDANCE if name in READ else GUIDANCE[:4], BATCHES)
]


def made(name: str, scheduler):
    pipe = tiny(name)
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    return pipe


def call(name: str, guidance, batch) -> dict:
    prompts, images = batch
    given = options(name) | {"num_images_per_prompt": images, "num_inference_steps": 4, "output_type": "latent"}
    given["prompt"] = given["prompt"][:prompts]
    scale = guidance if isinstance(guidance, float) else 7.5
    if name == "flux":
        given |= {"true_cfg_scale": scale, "negative_prompt": [""] * prompts}
    else:
        given["guidance_scale"] = scale
    if not isinstance(guidance, float):
        given |= changed(name, 3.0 if guidance[0] == "3" else 1.0)
    return given


def changed(name: str, scale: float) -> dict:
    """A callback that gives the second half of the steps another scale, and cuts the embeddings where that is none."""
    names = {"sd": [], "sdxl": ["add_text_embeds", "add_time_ids"], "sd3": ["pooled_prompt_embeds"]}[name]
    given = switch(scale)
    callback, tensors = given["callback_on_step_end"], [*given["callback_on_step_end_tensor_inputs"], *names]

    def cut(pipe, step, timestep, values):
        if step == 1 and scale <= 1:
            for one in (*names, "prompt_embeds"):
                values[one] = values[one][len(values[one]) // 2 :]
            pipe._guidance_scale = scale
            return values
        return callback(pipe, step, timestep, values)

    return {"callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": tensors}


def known_rows(name: str, pipe, calibration, given: dict):
    """Let the network lose in each row what is its own."""
    network, calls = subject_of(pipe).network, []
    told = convention_of(network)

    def hook(module, args, kwargs, output):
        calls.append(1)
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        n = len(output[0])
        if name == "flux":
            guided = given["true_cfg_scale"] > 1
            unconditional = torch.full((n,), guided and len(calls) % 2 == 0)
        else:
            scale = getattr(pipe, "_guidance_scale", None)
            guided = (given["guidance_scale"] if scale is None else scale) > 1
            unconditional = (torch.arange(n) < n // 2) & guided
        weights = calibration.row_weights(n, None, unconditional)
        time = told.timestep(time.float().reshape(-1), 1000).expand(n)
        offset = calibration.offset(calibration.schedule.sigma(time), weights)
        return (subtract(output[0], told.sign * offset), *output[1:])

    network.register_forward_hook(hook, with_kwargs=True)
    return pipe


@pytest.mark.parametrize(("name", "scheduler", "guidance", "batch"), CASES)
def test_the_calibrated_result_is_that_of_the_oracle(name, scheduler, guidance, batch) -> None:
    ours, oracle, plain = (made(name, scheduler) for _ in range(3))
    given = call(name, guidance, batch)
    calibration = table(ours.scheduler, (16, 16) if name == "flux" else (4, 8, 8), BOTH, size=0.3)
    if name in READ:
        calibrate_pipeline(ours, calibration)
    else:
        with pytest.raises(ValueError, match="cannot be read from it: say guidance_scale"):
            calibrate_pipeline(ours, calibration)
        calibrate_pipeline(ours, calibration, guidance_scale=given.get("true_cfg_scale", given.get("guidance_scale")))

    def drawn(pipe):
        return pipe(**given | {"generator": torch.Generator().manual_seed(0)}).images.float()

    images, stock = drawn(ours), drawn(plain)
    truth = drawn(known_rows(name, oracle, calibration, given))
    size = stock.abs().max()
    assert (truth - stock).abs().max() > 1e-3 * size
    assert (images - truth).abs().max() < 1e-4 * size


@pytest.mark.parametrize("name", SCHEDULERS)
def test_without_a_calibration_a_live_pipeline_draws_the_same_bits(name: str) -> None:
    """After one was taken away, too."""
    ours, stock = tiny(name), tiny(name)
    given = call(name, 7.5, (2, 1))
    calibration = table(ours.scheduler, (16, 16) if name == "flux" else (4, 8, 8), BOTH, size=0.3)
    calibrate_pipeline(ours, calibration, 7.5)
    ours(**given)
    ours.scheduler.calibrate(None)
    images, expected = (
        pipe(**given | {"generator": torch.Generator().manual_seed(0)}).images for pipe in (ours, stock)
    )
    assert torch.equal(images, expected)
