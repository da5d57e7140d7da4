"""Text-to-image subjects. Truth: what the networks of stock pipelines are called with, recorded from calls, for every
argument, bit for bit."""

import inspect
from types import SimpleNamespace

import diffusers
import pytest
import torch
from test_short_time_text import call
from tiny_pipelines import MAKERS, SIZE, tiny

from diffusers_ext.conditions import each_tensor
from diffusers_ext.errors import InputError
from diffusers_ext.networks import Network
from diffusers_ext.subjects import FAMILIES, TextToImage, subject_of

PROMPTS = ["a bike", "cat 7 on a mat"]
# Arguments that are no condition: the sample, the time, and what is the same in every call without adapters.
NOT_CONDITIONS = {"sample", "hidden_states", "timestep", "return_dict", "joint_attention_kwargs"}


def rows(captions, size: int = SIZE):
    return SimpleNamespace(
        images=torch.zeros(len(captions), 3, size, size), labels=None, captions=captions, places=None
    )


def recorded(pipe, **options) -> list[dict]:
    """The arguments of each call of the network by name, without those that are `None`."""
    network = getattr(pipe, "unet", None) or pipe.transformer
    forward, calls = network.forward, []
    signature = inspect.signature(forward)

    def record(*args, **kwargs):
        calls.append(signature.bind(*args, **kwargs).arguments)
        return forward(*args, **kwargs)

    network.forward = record
    try:
        pipe(**options)
    finally:
        del network.forward
    return [without_none({k: v for k, v in one.items() if k not in NOT_CONDITIONS}) for one in calls]


def without_none(tree):
    if not isinstance(tree, dict):
        return tree
    cleaned = {name: without_none(value) for name, value in tree.items() if value is not None}
    return {name: value for name, value in cleaned.items() if not (isinstance(value, dict) and not value)}


@pytest.mark.parametrize("name", MAKERS)
def test_the_pooled_prompt_is_what_the_network_is_told_or_the_mean_over_the_tokens(name) -> None:
    subject = subject_of(tiny(name))
    condition = subject.conditions(rows(PROMPTS))
    pooled = subject.pooled(condition)
    if "added_cond_kwargs" in condition and "text_embeds" in condition["added_cond_kwargs"]:
        expected = subject.pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, device="cpu")[2]
    elif "pooled_projections" in condition:
        encoded = subject.pipeline.encode_prompt(PROMPTS, *[None] * (subject.prompts - 1))
        expected = encoded[2 if name.startswith("sd3") else 1]
    else:
        mask = condition.get("encoder_attention_mask", torch.ones(condition["encoder_hidden_states"].shape[:2]))
        tokens = condition["encoder_hidden_states"]
        expected = torch.stack([tokens[i][mask[i].bool()].mean(0) for i in range(2)])
    torch.testing.assert_close(pooled, expected)
    assert (pooled[0] - pooled[1]).abs().max() > 1e-4


def received(subject, condition) -> dict:
    """The condition as the network gets it from `Network`."""
    got = {}
    network, called = subject.network, Network(subject.network)
    signature = inspect.signature(network.forward)

    def record(*args, **kwargs):
        got.update(signature.bind(*args, **kwargs).arguments)
        sample = got.get("sample", got.get("hidden_states"))
        return (sample,)

    network.forward = record
    try:
        x0 = subject.encode(torch.zeros(2, 3, SIZE, SIZE))
        called(x0, torch.full((2,), 10.0), **condition)
    finally:
        del network.forward
    return without_none({k: v for k, v in got.items() if k not in NOT_CONDITIONS})


def assert_same(ours, theirs, path="", tolerance: float = 0.0) -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), path
        for name in theirs:
            assert_same(ours[name], theirs[name], f"{path}.{name}", tolerance)
        return
    assert ours.dtype == theirs.dtype, path
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance, msg=lambda text: f"{path}: {text}")


@pytest.mark.parametrize("name", MAKERS)
def test_the_network_is_told_what_its_pipeline_tells_it(name: str) -> None:
    pipe = tiny(name)
    guidance = {} if name.startswith("flux") else {"guidance_scale": 1.0}
    theirs = recorded(pipe, **options(name), **guidance)
    subject = subject_of(pipe)
    ours = received(subject, subject.conditions(rows(PROMPTS)))
    for one in theirs:
        assert_same(ours, one)


def options(name: str) -> dict:
    given = call(name) | {"prompt": PROMPTS}
    given.pop("max_sequence_length", None)  # their default is ours
    return given


@pytest.mark.parametrize("name", MAKERS)
def test_the_null_condition_is_that_of_a_call_without_a_negative_prompt(name: str) -> None:
    """Flux has none by itself: there it is the empty prompt."""
    pipe = tiny(name)
    flux = name.startswith("flux")
    guidance = {"true_cfg_scale": 3.0, "negative_prompt": ["", ""]} if flux else {"guidance_scale": 3.0}
    first = recorded(pipe, **options(name), **guidance)
    theirs = first[1] if flux else each_tensor(lambda value: value[:2], first[0])
    subject = subject_of(pipe)
    given = subject.conditions(rows(PROMPTS))
    null = subject.drop(given, 1.0, torch.Generator(), SIZE)
    assert_same(received(subject, null), theirs, tolerance=1e-5)  # encoded one by one: rounding differs
    kept = subject.drop(given, 0.0, torch.Generator(), SIZE)
    assert_same(received(subject, kept), received(subject, given))


@pytest.mark.parametrize("name", MAKERS)
def test_each_row_is_dropped_as_a_whole(name: str) -> None:
    subject = subject_of(tiny(name))
    given = subject.conditions(rows([f"cat {i}" for i in range(8)]))
    null = subject.drop(given, 1.0, torch.Generator(), SIZE)
    mixed = subject.drop(given, 0.5, torch.Generator().manual_seed(1), SIZE)

    def of(condition):
        return torch.cat([leaf.double().reshape(len(leaf), -1) for leaf in leaves(condition)], 1)

    is_null, is_given = ((of(mixed) == of(whole)).all(1) for whole in (null, given))
    assert (is_null ^ is_given).all()
    assert 0 < is_null.sum() < 8


def leaves(tree):
    return [leaf for value in tree.values() for leaf in leaves(value)] if isinstance(tree, dict) else [tree]


def test_an_empty_caption_is_a_prompt_and_not_the_null_condition() -> None:
    """Stable Diffusion XL calls its network with zeros where there is no negative prompt, and encodes a prompt ''."""
    pipe = tiny("sdxl")
    subject = subject_of(pipe)
    theirs = recorded(pipe, **options("sdxl") | {"prompt": ["", ""]}, guidance_scale=1.0)
    assert_same(received(subject, subject.conditions(rows(["", ""]))), theirs[0])
    assert not theirs[0]["encoder_hidden_states"].eq(0).all()
    assert subject.null_condition(SIZE)["encoder_hidden_states"].eq(0).all()


@pytest.mark.parametrize("name", MAKERS)
def test_data_are_the_latents_that_the_pipeline_decodes(name: str) -> None:
    """A pipeline whose chain ends at x0 draws what the autoencoder makes of the unscaled latents."""
    pipe = tiny(name)
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = pipe.vae.encode(images).latent_dist.mean
    pipe.vae.encode = lambda x: SimpleNamespace(latents=latents)
    x0 = subject_of(pipe).encode(images)
    pipe.scheduler.step = lambda *args, **kwargs: (x0, x0)
    drawn = pipe(**options(name) | {"output_type": "pt", "num_inference_steps": 2}).images
    expected = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [("sd", 17, "use 16 or 18"), ("sd3", 18, "use 16 or 20"), ("flux", 18, "use 16 or 20"), ("pixart", 1, "use 4")],
)
def test_a_size_that_does_not_fit_is_refused_with_one_that_does(name: str, wrong: int, said: str) -> None:
    subject = subject_of(tiny(name))
    assert subject.image_format(SIZE) == (3, SIZE)
    with pytest.raises(InputError, match=f"--resolution {wrong} does not fit the model: {said}"):
        subject.image_format(wrong)


@pytest.mark.parametrize(("name", "size"), [("sd", 16), ("sdxl", 16), ("sd3", 16), ("flux", 256), ("pixart", 16)])
def test_the_default_size_is_the_pipelines(name: str, size: int) -> None:
    assert subject_of(tiny(name)).image_format().resolution == size


def test_every_family_has_a_tiny_pipeline_and_others_are_refused_by_name() -> None:
    assert {type(tiny(name)).__name__ for name in MAKERS} == set(FAMILIES)
    pipe = tiny("sd")
    other = diffusers.StableDiffusionPAGPipeline(**pipe.components, requires_safety_checker=False)
    assert type(subject_of(other)) is TextToImage
    with pytest.raises(InputError, match="the conditions of a StableDiffusionPAGPipeline are not known here, only"):
        subject_of(other).conditions(rows(PROMPTS))
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(InputError, match="told a guidance scale"):
        subject_of(pipe).conditions(rows(PROMPTS))


@pytest.mark.parametrize("name", MAKERS)
def test_its_call_draws_at_the_size_with_guidance_or_without(name: str) -> None:
    pipe = tiny(name)
    subject = subject_of(pipe)
    for scale in (1.0, 3.0):
        arguments = subject.call(2, captions=PROMPTS, guidance_scale=scale, resolution=SIZE)
        calls = recorded(pipe, num_inference_steps=2, output_type="latent", **arguments)
        batch = each_tensor(len, calls[0])["encoder_hidden_states"]
        branches = len(calls) // 2 * batch // 2 if name.startswith("flux") else batch // 2
        assert branches == (1 if scale == 1 else 2)


def test_a_pipeline_without_text_encoders_says_so() -> None:
    pipe = tiny("sd")
    pipe.register_modules(text_encoder=None)
    with pytest.raises(InputError, match="has no text encoder"):
        subject_of(pipe).conditions(rows(PROMPTS))


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_latents_are_drawn_by_the_generator_alone(name: str) -> None:
    subject, images = subject_of(tiny(name)), torch.zeros(2, 3, SIZE, SIZE)
    before = torch.get_rng_state()
    first, again, other = (subject.encode(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-3
