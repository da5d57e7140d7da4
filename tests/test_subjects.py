"""What a pipeline trains. Truth: what plain diffusers loads, draws and passes to its networks."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
)
from test_models import tiny_unet
from torch import nn

from diffusers_ext import ClassConditionalPipeline
from diffusers_ext.data.batches import Images
from diffusers_ext.errors import InputError
from diffusers_ext.subjects import (
    LatentTransformer,
    LatentUNet,
    Pixels,
    Subject,
    TextToImage,
    subject_of,
)
from diffusers_ext.subjects.base import NotKept
from diffusers_ext.subjects.loading import load_pipeline


def rows(n, labels=None):
    return Images(torch.zeros(n, 1, 8, 8), torch.full((n,), -1) if labels is None else torch.tensor(labels), [])


def conditional(null_class=3):
    return ClassConditionalPipeline(tiny_unet(num_class_embeds=4), DDIMScheduler(), null_class)


def tiny_dit():
    from diffusers import AutoencoderKL

    sizes = {"sample_size": 4, "patch_size": 2, "in_channels": 4, "out_channels": 4, "norm_num_groups": 4}
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, num_layers=1, num_embeds_ada_norm=5, **sizes
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks)
    return DiTPipeline(network, vae, DDIMScheduler())


@pytest.mark.parametrize(
    ("pipeline", "classes", "null", "image_format", "labels"),
    [
        (lambda: DDPMPipeline(tiny_unet(), DDIMScheduler()), None, None, (1, 8), None),
        (conditional, 3, 3, (1, 8), [0, 1, 2, 0]),
        (lambda: conditional(None), 4, None, (1, 8), [0, 1, 2, 3]),
        (tiny_dit, 5, 5, (3, 8), [0, 1, 2, 3]),
    ],
    ids=["unconditional", "null class", "no null class", "DiT"],
)
def test_a_subject_reads_the_pipeline(pipeline, classes, null, image_format, labels):
    subject = subject_of(pipeline())
    assert (subject.num_classes, subject.null_class) == (classes, null)
    assert subject.image_format() == image_format
    assert subject.call(4).get("class_labels") == labels
    condition = subject.conditions(rows(2, [1, 0]))
    assert condition.keys() == ({"class_labels"} if classes else set())
    assert not classes or condition["class_labels"].tolist() == [1, 0]


def test_images_come_from_the_labels_that_are_asked_for():
    """Truth: the pipeline called by hand."""
    pipeline = conditional()
    drawn = subject_of(pipeline).sample(3, num_inference_steps=2, seed=5, labels=[2, 0, 1])
    options = {"generator": torch.Generator().manual_seed(5), "num_inference_steps": 2, "output_type": "np"}
    assert (drawn == pipeline(class_labels=[2, 0, 1], **options).images).all()


def test_dropped_rows_say_nothing_and_the_others_stay():
    subject, labels = subject_of(conditional()), torch.arange(3).repeat(1000)
    condition = {"class_labels": labels}
    dropped = subject.drop(condition, 0.2, torch.Generator().manual_seed(0), 8)["class_labels"]
    where = torch.rand(3000, generator=torch.Generator().manual_seed(0)) < 0.2
    assert dropped[where].eq(3).all()
    assert torch.equal(dropped[~where], labels[~where])
    assert torch.equal(condition["class_labels"], torch.arange(3).repeat(1000))
    for untouched in (subject_of(conditional(None)), subject_of(DDIMPipeline(tiny_unet(), DDIMScheduler()))):
        assert untouched.drop(condition, 0.2, torch.Generator().manual_seed(0), 8) is condition


class Nested(TextToImage):
    """The form of Stable Diffusion XL's conditions."""

    def null_condition(self, resolution):
        return {"a": torch.zeros(1, 2, 3), "b": {"c": torch.full((1, 6), float(resolution))}}


def test_nested_conditions_are_parted_and_dropped_as_a_whole():
    subject = Nested(SimpleNamespace(), "unet")
    condition = {"a": torch.ones(50, 2, 3), "b": {"c": torch.arange(300.0).reshape(50, 6) + 100}}
    part = subject.part(condition, slice(3, 5))
    assert torch.equal(part["b"]["c"], condition["b"]["c"][3:5])
    assert part["a"].shape == (2, 2, 3)
    dropped = subject.drop(condition, 0.5, torch.Generator().manual_seed(1), 64)
    where = torch.rand(50, generator=torch.Generator().manual_seed(1)) < 0.5
    assert torch.equal(dropped["a"][:, 0, 0], (~where).float())
    assert torch.equal(dropped["b"]["c"], torch.where(where[:, None], 64.0, condition["b"]["c"]))


def test_frozen_parameters_are_in_no_checkpoint_and_keep_their_values():
    class Last(Pixels):
        """Trains the last layer alone."""

        def trainable(self, network=None):
            return {k: p for k, p in super().trainable(network).items() if k.startswith("conv_out")}

    pipeline = DDIMPipeline(tiny_unet(), DDIMScheduler())
    subject = Last(pipeline, "unet")
    assert subject.trainable().keys() == subject.state().keys() == {"conv_out.weight", "conv_out.bias"}
    wrapped = nn.DataParallel(pipeline.unet)
    assert subject.state(wrapped).keys() == subject.state().keys()
    state = {name: value + 1 for name, value in subject.state().items()}
    average = [p + 2 for p in subject.trainable().values()]
    copied, averaged = subject.with_weights(state).network, subject.with_weights(state, average).network
    for name, value in pipeline.unet.state_dict().items():
        shift = 1 if name.startswith("conv_out") else 0
        torch.testing.assert_close(copied.state_dict()[name], value + shift)
        torch.testing.assert_close(averaged.state_dict()[name], value + 2 * shift)


def test_a_scheduler_is_kept_or_the_pipeline_is_another_one():
    scheduler = EulerDiscreteScheduler()
    pipeline = conditional()
    assert subject_of(pipeline).with_scheduler(scheduler) is pipeline
    assert pipeline.scheduler is scheduler
    stock = DDIMPipeline(tiny_unet(), DDIMScheduler())
    other = subject_of(stock).with_scheduler(scheduler)
    assert type(other) is ClassConditionalPipeline
    assert (other.unet, other.scheduler) == (stock.unet, scheduler)
    assert type(stock.scheduler) is DDIMScheduler

    class Stubborn(DiTPipeline):
        def __init__(self, transformer, vae, scheduler):
            super().__init__(transformer, vae, DDIMScheduler())

    dit = tiny_dit()
    with pytest.raises(NotKept, match="Stubborn does not keep a EulerDiscreteScheduler"):
        subject_of(Stubborn(dit.transformer, dit.vae, None)).with_scheduler(scheduler)
    assert "DiTPipeline samples wrongly with EulerDiscreteScheduler" in subject_of(dit).refusal_of(scheduler)
    assert subject_of(dit).refusal_of(DDIMScheduler()) is None


def test_labels_that_the_network_drops_itself_are_left_to_the_loop():
    subject = subject_of(tiny_dit())
    subject.before_training()
    rates = [m.dropout_prob for m in subject.network.modules() if hasattr(m, "dropout_prob")]
    assert rates == [0.0]


def test_a_pipeline_without_a_network_is_refused_and_one_of_an_unknown_kind_is_named():
    class Other(DiffusionPipeline):
        def __init__(self, **parts):
            super().__init__()
            self.register_modules(**parts)

    with pytest.raises(InputError, match="Other has neither a `unet` nor a `transformer`"):
        subject_of(Other(scheduler=DDIMScheduler()))
    unknown = subject_of(Other(transformer=nn.Linear(2, 2), scheduler=DDIMScheduler()))
    assert type(unknown) is Subject
    assert isinstance(subject_of(tiny_dit()), LatentTransformer)
    with pytest.raises(InputError, match="Other cannot be trained here"):
        unknown.require_trainable()


def test_a_text_conditioned_pipeline_is_refused(tmp_path):
    from diffusers import LMSDiscreteScheduler
    from diffusers import UNet2DConditionModel as Unet

    class TextPipeline(DiffusionPipeline):
        def __init__(self, unet, scheduler):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": None}
    unet = Unet(8, 4, 4, block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=8, **blocks)
    with pytest.raises(InputError, match="TextPipeline cannot be trained or evaluated here"):
        subject_of(TextPipeline(unet, LMSDiscreteScheduler())).image_format()


@pytest.mark.parametrize(("resolution", "message"), [(9, "use 8 or 10"), (1, "use 2")])
def test_a_size_that_the_network_cannot_take_is_refused_with_one_that_it_can(resolution, message):
    pipeline = DDIMPipeline(unet=tiny_unet(), scheduler=DDIMScheduler())
    with pytest.raises(InputError, match=f"--resolution {resolution} does not fit the model: {message}"):
        subject_of(pipeline).image_format(resolution)


def test_training_at_another_resolution_samples_at_it():
    pipeline = DDIMPipeline(unet=tiny_unet(), scheduler=DDIMScheduler())
    subject = subject_of(pipeline)
    assert subject.image_format(12) == (1, 12)
    assert subject.sample(2, num_inference_steps=2).shape == (2, 8, 8, 1)  # asking changes nothing
    subject.train_at(12)
    assert subject.sample(2, num_inference_steps=2).shape == (2, 12, 12, 1)


def test_with_weights_makes_a_copy_that_training_does_not_touch():
    pipeline = DDIMPipeline(unet=tiny_unet(), scheduler=DDIMScheduler())
    before = {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    subject = subject_of(pipeline)
    averaged = subject.with_weights(before, [p + 2 for p in pipeline.unet.parameters()]).pipeline
    copied = subject.with_weights({k: v + 1 for k, v in before.items()}).pipeline
    copied.scheduler.set_timesteps(3)
    with torch.no_grad():
        pipeline.unet.conv_in.bias.add_(5)
    for name, value in before.items():
        torch.testing.assert_close(copied.unet.state_dict()[name], value + 1)
        torch.testing.assert_close(averaged.unet.state_dict()[name], value + 2)
    assert pipeline.unet.training
    assert not copied.unet.training
    assert pipeline.scheduler.num_inference_steps is None


def test_a_save_replaces_the_last_one_and_leaves_other_files(tmp_path):
    (tmp_path / "logs").mkdir()
    for value in (1.0, 2.0):
        pipeline = DDIMPipeline(unet=tiny_unet(), scheduler=DDIMScheduler())
        torch.nn.init.constant_(pipeline.unet.conv_in.bias, value)
        subject_of(pipeline).save(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        assert loaded.unet.conv_in.bias.eq(value).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".written.json",
        "logs",
        "model_index.json",
        "scheduler",
        "unet",
    ]


def test_a_failed_save_keeps_the_last_one(tmp_path, monkeypatch):
    pipeline = DDIMPipeline(unet=tiny_unet(), scheduler=DDIMScheduler())
    subject_of(pipeline).save(tmp_path)
    weight = pipeline.unet.conv_in.weight.clone()
    torch.nn.init.zeros_(pipeline.unet.conv_in.weight)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline.unet, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        subject_of(pipeline).save(tmp_path)
    assert torch.equal(DiffusionPipeline.from_pretrained(tmp_path).unet.conv_in.weight, weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".written.json", "model_index.json", "scheduler", "unet"]


def test_latents_are_scaled_to_what_the_decoder_undoes():
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.25, **blocks)

    subject = subject_of(SimpleNamespace(unet=tiny_unet(), vae=vae))
    assert type(subject) is LatentUNet
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    latents = subject.encode(images, torch.Generator().manual_seed(0))
    mode = vae.encode(images).latent_dist
    noise = torch.randn(mode.mean.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(latents, 0.25 * (mode.mean + mode.std * noise))
    assert subject_of(DDIMPipeline(tiny_unet(), DDIMScheduler())).encode(images) is images


def test_sampling_at_another_resolution_ends(tmp_path):
    subject = subject_of(DDIMPipeline(tiny_unet(dropout=0.5).train(), DDIMScheduler()))
    before = torch.get_rng_state()
    assert subject.image_format(12) == (1, 12)
    assert torch.equal(torch.get_rng_state(), before)  # the probe's dropout draws elsewhere
    with subject.sampling_at(12):
        assert subject.sample(1, num_inference_steps=1).shape == (1, 12, 12, 1)
    assert subject.sample(1, num_inference_steps=1).shape == (1, 8, 8, 1)


def test_loading_a_pipeline_warns_of_nothing(tmp_path, recwarn):
    """What a user cannot act on is not shown: diffusers has renamed the argument of the precision."""
    DDPMPipeline(tiny_unet(), DDIMScheduler()).save_pretrained(tmp_path)
    assert load_pipeline(str(tmp_path), dtype=torch.float16).dtype == torch.float16
    assert [str(w.message) for w in recwarn if "dtype" in str(w.message)] == []
