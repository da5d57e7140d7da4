"""The scale of guidance, read from pipelines. Truth: diffusers' source, and an oracle that knows each row."""

import ast
import copy
import functools
import inspect
import pickle
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from test_calibrate_pipeline import BOTH, SIZE, class_pipeline, drawn, quiet, stable, text, tiny_vae
from test_calibration import seeded, table, tiny_dit

from diffusers_ext import calibrate_pipeline
from diffusers_ext.calibration import subtract
from diffusers_ext.schedulers.scheduling_calibrated import calibrated_class
from diffusers_ext.subjects.guidance import AT_EACH_STEP, AT_THE_CALL, UNCONDITIONAL_FIRST, exposes_guidance

# --- the lists --------------------------------------------------------------------------------------------------------


@functools.cache
def classes_in_source():
    """Each pipeline class of diffusers by its name, as a tree."""
    files = (Path(diffusers.__file__).parent / "pipelines").rglob("*.py")
    trees = (ast.parse(file.read_text()) for file in files)
    return {one.name: one for tree in trees for one in tree.body if isinstance(one, ast.ClassDef)}


def scale_in_source(kind):
    """What the class's call multiplies with in its only u + s (c - u)."""
    (call,) = (m for m in kind.body if isinstance(m, ast.FunctionDef) and m.name == "__call__")
    found = []
    for node in ast.walk(call):
        match node:
            case ast.BinOp(u, ast.Add(), ast.BinOp(s, ast.Mult(), ast.BinOp(_, ast.Sub(), v))):
                found.append((ast.unparse(s), ast.unparse(u) == ast.unparse(v)))
    ((scale, same),) = found
    assert same
    return scale


OURS = {"ClassConditionalPipeline", "ShortTimePipeline"}


@pytest.mark.parametrize("name", sorted((AT_EACH_STEP | AT_THE_CALL) - OURS))
def test_the_lists_are_those_of_the_source(name):
    kind = classes_in_source()[name]
    properties = {
        m.name: ast.unparse(m.body[-1])
        for m in kind.body
        if isinstance(m, ast.FunctionDef) and any(ast.unparse(d) == "property" for d in m.decorator_list)
    }
    assert properties["guidance_scale"] == "return self._guidance_scale"
    assert properties["do_classifier_free_guidance"].startswith("return self._guidance_scale > 1")
    own = ("self.guidance_scale", "self._guidance_scale") if name in AT_EACH_STEP else ("guidance_scale",)
    assert scale_in_source(kind) in own


@pytest.mark.parametrize("name", sorted(UNCONDITIONAL_FIRST))
def test_the_first_half_of_a_batch_is_unconditional_in_the_source(name):
    """The one call of the network is cut into halves, and the first one is the u of u + s (c - u)."""
    (call,) = (m for m in classes_in_source()[name].body if isinstance(m, ast.FunctionDef) and m.name == "__call__")
    networks = ("self.unet", "self.transformer")
    assert sum(isinstance(n, ast.Call) and ast.unparse(n.func) in networks for n in ast.walk(call)) == 1
    halves, unconditional = set(), set()
    for node in ast.walk(call):
        match node:
            case ast.Assign([ast.Tuple([first, _])], ast.Call(ast.Attribute(_, "chunk"), [ast.Constant(2)])):
                halves.add(ast.unparse(first))
            case ast.BinOp(u, ast.Add(), ast.BinOp(scale, ast.Mult(), _)) if "guidance_scale" in ast.unparse(scale):
                unconditional.add(ast.unparse(u))
    assert halves & unconditional


# --- the contract -----------------------------------------------------------------------------------------------------


def known_rows(pipe, calibration):
    """Subtract from each row of a batch what is its own: with guidance Stable Diffusion calls the network with the
    unconditional rows before the others."""

    def hook(module, args, output):
        n, time = len(output[0]), args[1].float().reshape(-1).expand(len(output[0]))
        halves = torch.arange(n) < n // 2 if pipe.do_classifier_free_guidance else torch.zeros(n, dtype=torch.bool)
        weights = calibration.row_weights(n, None, halves)
        return (subtract(output[0], calibration.offset(calibration.schedule.sigma(time), weights)), *output[1:])

    pipe.unet.register_forward_hook(hook)
    return pipe


def switch(scale):
    """A callback that gives the second half of the steps another scale."""

    def callback(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = scale
            if scale <= 1:  # as diffusers' own callback for it does
                tensors["prompt_embeds"] = tensors["prompt_embeds"][-1:]
        return tensors

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}


SCALES = (0.0, 0.5, 1.0, 7.5)


@pytest.mark.parametrize(
    ("scale", "later", "per_prompt"),
    [*((scale, None, n) for scale in SCALES for n in (1, 2)), (7.5, 0.0, 1), (7.5, 3.0, 1), (2.0, 1.0, 1)],
)
def test_the_result_is_that_of_the_oracle(scale, later, per_prompt):
    """Without guidance, and with it, which a callback may change or switch off half-way."""
    call = text(scale, num_images_per_prompt=per_prompt, **SIZE) | ({} if later is None else switch(later))
    ours, oracle = stable(), stable()
    calibration = table(ours.scheduler, (4, 8, 8), rows=BOTH, size=0.3)
    plain = stable()(**call | {"generator": seeded()}).images
    assert calibrate_pipeline(ours, calibration) is ours
    images = ours(**call | {"generator": seeded()}).images
    truth = known_rows(oracle, calibration)(**call | {"generator": seeded()}).images
    assert abs(images - truth).max() < 1e-4
    assert abs(images - plain).max() > 1e-3
    again = ours(**text(2.0, **SIZE)).images  # the next call has its own scale
    assert abs(again - oracle(**text(2.0, **SIZE)).images).max() < 1e-4


@pytest.mark.parametrize("scale", [1.0, 0.5, 3.0])
def test_our_own_pipelines_combine_at_every_scale(scale):
    ours, oracle = class_pipeline(), class_pipeline()
    calibration = table(ours.scheduler, (2, 8, 8), rows=BOTH, size=0.3, null_class=4)
    calibrate_pipeline(ours, calibration)
    calibrate_pipeline(oracle, calibration, route="model")
    options = {"class_labels": [1, 3], "guidance_scale": scale}
    torch.testing.assert_close(drawn(ours, **options), drawn(oracle, **options), rtol=0, atol=1e-4)


def test_a_hook_follows_guidance_that_is_off():
    ours, oracle = stable(), stable()
    calibration = table(ours.scheduler, (4, 8, 8), rows=BOTH, size=0.3)
    calibrate_pipeline(ours, calibration, route="model")
    known_rows(oracle, calibration)
    for scale in (7.5, 0.0):
        assert abs(ours(**text(scale, **SIZE)).images - oracle(**text(scale, **SIZE)).images).max() < 1e-4


def test_a_call_that_the_table_has_no_rows_for_is_refused():
    pipe = stable()
    calibrate_pipeline(pipe, table(pipe.scheduler, (4, 8, 8)))
    pipe(**text(1.0, **SIZE))
    with pytest.raises(ValueError, match=r"guidance_scale=5\.0 needs the rows"):
        pipe(**text(5.0, **SIZE))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), torch.tensor(5.0)])
def test_other_scales_are_refused(scale):
    pipe = stable()
    calibration = table(pipe.scheduler, (4, 8, 8), rows=BOTH)
    if not isinstance(scale, torch.Tensor):
        with pytest.raises(ValueError, match="guidance_scale must be"):
            calibrate_pipeline(pipe, calibration, scale)
        with pytest.raises(ValueError, match="guidance_scale must be"):
            calibrated_class("DDIMScheduler").from_scheduler(DDIMScheduler(), calibration, scale)
    calibrate_pipeline(pipe, calibration)
    if scale == scale:  # diffusers takes NaN for no guidance
        with pytest.raises(ValueError, match="guidance_scale must be"):
            pipe(**text(scale, **SIZE))


def test_guidance_that_cannot_be_read_must_be_told():
    pipe = quiet(diffusers.DiTPipeline(tiny_dit(), tiny_vae(2), DDIMScheduler()))
    assert not exposes_guidance(pipe)
    calibration = table(pipe.scheduler, (2, 8, 8), rows=BOTH)
    with pytest.raises(ValueError, match="the guidance of a DiTPipeline cannot be read from it: say guidance_scale"):
        calibrate_pipeline(pipe, calibration)
    for told, used in ((4.0, 4.0), (0.0, 1.0)):
        assert calibrate_pipeline(pipe, calibration, told, route="scheduler").scheduler.guidance_scale == used


# --- whose scheduler it is --------------------------------------------------------------------------------------------


def test_the_pipeline_is_neither_copied_nor_saved(tmp_path):
    pipe = stable()
    calibrate_pipeline(pipe, table(pipe.scheduler, (4, 8, 8), rows=BOTH))
    assert pipe.scheduler.guidance_scale == inspect.signature(StableDiffusionPipeline.__call__).parameters[
        "guidance_scale"].default  # fmt: skip
    pipe(**text(3.0, **SIZE))
    own = pipe.scheduler
    for other in (copy.copy(own), copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert other._read is None
        assert other.guidance_scale == 3.0
    pipe.save_pretrained(tmp_path)
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    loaded = quiet(StableDiffusionPipeline.from_pretrained(tmp_path, requires_safety_checker=False, **absent))
    assert loaded.scheduler.guidance_scale == 3.0
    assert loaded.scheduler._read is None
    calibrate_pipeline(loaded, loaded.scheduler.calibration)
    loaded(**text(6.0, **SIZE))
    assert (loaded.scheduler.guidance_scale, own.guidance_scale) == (6.0, 3.0)


def test_a_second_pipeline_with_the_scheduler_is_refused():
    pipe, other = stable(), stable()
    calibrate_pipeline(pipe, table(pipe.scheduler, (4, 8, 8), rows=BOTH))
    other.scheduler = pipe.scheduler
    with pytest.raises(ValueError, match="give that pipeline its own by calibrate_pipeline"):
        other(**text(3.0, **SIZE))
    pipe(**text(3.0, **SIZE))
    del pipe
    other(**text(3.0, **SIZE))  # there is no other pipeline any more: the last scale is used
    assert other.scheduler.guidance_scale == 3.0


def test_subclasses_are_those_of_their_pipelines():
    class Own(StableDiffusionXLPipeline):
        pass

    assert exposes_guidance(Own.__new__(Own))
    assert not exposes_guidance(diffusers.FluxPipeline.__new__(diffusers.FluxPipeline))
