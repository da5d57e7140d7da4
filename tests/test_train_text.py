"""Text-to-image models in the training scripts. Truth: what stock pipelines of diffusers load and draw, and losses
computed by hand."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import stranger
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from hub_server import HubServer
from precision import assert_same_images
from safetensors.torch import load_file
from test_captions import saved
from test_short_time_text import call
from test_text_subjects import assert_same, received, recorded, rows
from tiny_pipelines import SIZE, tiny

from diffusers_ext import NoiseLevelDiscriminator
from diffusers_ext.errors import InputError
from diffusers_ext.randomness import Seeds
from diffusers_ext.subjects import Lora, subject_of
from diffusers_ext.training import Batch, TrainingLoop

ROOT = Path(__file__).parents[1]
WITH_LORA = ("sd", "sd-v", "sdxl", "sd3", "flux", "flux-schnell")
FAMILIES = (*WITH_LORA, "pixart", "pixart-alpha")
LORA = ("--rank", 2, "--lora_alpha", 6, "--learning_rate", 0.1, "--no_use_ema")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")

    def model(name):
        if not (folder / name).exists():
            tiny(name).save_pretrained(folder / name)
        return folder / name

    return model


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return saved(tmp_path / "data", [f"grey {i}" for i in range(16)])


def arguments(model, data, out, *more):
    return [
        *("--pretrained_model_name_or_path", model, "--dataset_name", data, "--caption_column", "text"),
        *("--resolution", SIZE, "--train_batch_size", 2, "--max_train_steps", 2, "--max_validation_samples", 4),
        *("--num_validation_images", 2, "--num_inference_steps", 2, "--logging_steps", 1, "--report_to", "none"),
        *("--output_dir", out, *more),
    ]


def drawn(pipe, name: str) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**call(name, output_type="np")).images


# --- the result opens in diffusers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train_consistency", "train_observation"])
@pytest.mark.parametrize("name", WITH_LORA)
def test_a_lora_opens_in_the_stock_pipeline_and_changes_its_images(name, script, models, data, tmp_path, load_script):
    more = (*LORA, *(("--frechet_samples", 0, "--discriminator_channels", "8,8") if "obs" in script else ()))
    load_script(script).run(*arguments(models(name), data, tmp_path / "out", *more))
    assert not (tmp_path / "out" / "model_index.json").exists()
    pipe = DiffusionPipeline.from_pretrained(models(name))
    before = drawn(pipe, name)
    pipe.load_lora_weights(tmp_path / "out")
    after = drawn(pipe, name)
    assert np.abs(after - before).max() > 1e-3
    pipe.unload_lora_weights()
    assert np.abs(drawn(pipe, name) - before).max() < 1e-5
    (state,) = (tmp_path / "out").glob("checkpoint-*/state.safetensors")
    trained = load_file(state)
    assert all("lora_" in key for key in trained if key.startswith("/model/"))


@pytest.mark.parametrize("script", ["train_consistency", "train_observation"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_full_fine_tuning_is_the_stock_pipeline(name, script, models, data, tmp_path, load_script):
    more = ("--frechet_samples", 0, "--discriminator_channels", "8,8") if "obs" in script else ()
    load_script(script).run(*arguments(models(name), data, tmp_path / "out", "--learning_rate", 1e-3, *more))
    trained = DiffusionPipeline.from_pretrained(tmp_path / "out")
    stock = DiffusionPipeline.from_pretrained(models(name))
    assert type(trained) is type(stock)
    assert dict(trained.scheduler.config) == dict(stock.scheduler.config)
    for part, value in stock.components.items():
        if isinstance(value, torch.nn.Module):
            same = [
                torch.equal(a, b)
                for a, b in zip(value.parameters(), trained.components[part].parameters(), strict=True)
            ]
            assert all(same) is (part not in ("unet", "transformer"))
    assert np.abs(drawn(trained, name) - drawn(stock, name)).max() > 1e-4


STRANGER = """
import sys
sys.modules["diffusers_ext"] = None
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.load_lora_weights(sys.argv[2])
options = {"num_inference_steps": 3, "height": 16, "width": 16, "output_type": "pt"}
torch.save(pipe(["a bike", "cat 7"], generator=torch.Generator().manual_seed(0), **options).images, sys.argv[3])
"""


def test_the_trained_pipeline_draws_what_the_stock_one_does_with_its_lora(models, data, tmp_path, load_script):
    """With an alpha that is not the rank: the file says so. By a stranger, who does not have this package."""
    script, kept = load_script("train_consistency"), {}

    class Kept(TrainingLoop):
        def finish(self):
            kept["pipe"] = self.trained().pipeline
            super().finish()

    script.TrainingLoop = Kept
    script.run(*arguments(models("sd"), data, tmp_path / "out", *LORA, "--lora_layers", "to_q,ff.net.2"))
    done = stranger.run(STRANGER, models("sd"), tmp_path / "out", tmp_path / "images.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours = torch.from_numpy(drawn(kept["pipe"], "sd")).movedim(3, 1)
    assert_same_images(torch.load(tmp_path / "images.pt"), ours)
    layers = {
        key.split(".lora")[0].split(".")[-1] for key in load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    }
    assert layers == {"to_q", "2"}


# --- what is trained, and how -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), LORA], ids=["full", "lora"])
def test_a_run_goes_on_bit_for_bit_from_a_checkpoint_that_holds_what_is_trained(
    more, models, data, tmp_path, load_script
):
    script = load_script("train_consistency")
    long = ("--max_train_steps", 4, "--checkpointing_steps", 2, "--proportion_empty_prompts", 0.5)
    script.run(*arguments(models("sdxl"), data, tmp_path / "whole", *more, *long))
    script.run(*arguments(models("sdxl"), data, tmp_path / "parts", *more, *long, "--max_train_steps", 2))
    script.run(*arguments(models("sdxl"), data, tmp_path / "parts", *more, *long, "--resume_from_checkpoint", "latest"))
    name = "checkpoint-00000004/state.safetensors"
    whole, parts = (load_file(tmp_path / folder / name) for folder in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    trained = sum(value.numel() for key, value in whole.items() if key.startswith("/model/"))
    copies = 3 if more else 4  # the weights, two moments, and the moving average
    size = (tmp_path / "whole" / name).stat().st_size
    headers = 300 * len(whole)
    assert size - headers <= 1.2 * copies * 4 * trained


def test_every_tensor_of_a_lora_is_trained_and_nothing_else(models, data, tmp_path, load_script):
    script, seen = load_script("train_consistency"), {}

    class Watched(TrainingLoop):
        def __init__(self, *args):
            super().__init__(*args)
            seen["before"] = {name: value.clone() for name, value in self.model.state_dict().items()}

        def finish(self):
            seen["after"] = self.model.state_dict()
            super().finish()

    script.TrainingLoop = Watched
    script.run(*arguments(models("sd"), data, tmp_path / "out", *LORA))
    for name, value in seen["before"].items():
        assert torch.equal(value, seen["after"][name]) is ("lora_" not in name), name


@pytest.fixture
def other_precision():
    """accelerate lets a process have one precision only."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("other_precision")
@pytest.mark.parametrize("more", [(), LORA], ids=["full", "lora"])
def test_what_is_frozen_is_in_half_precision_and_what_is_trained_is_not(more, models, data, tmp_path, load_script):
    script, seen = load_script("train_consistency"), {}

    class Watched(TrainingLoop):
        def finish(self):
            trainable = self.subject.trainable()
            seen["trained"] = {p.dtype for p in trainable.values()}
            own = dict(self.subject.network.named_parameters())
            seen["frozen"] = {p.dtype for name, p in own.items() if name not in trainable}
            seen["others"] = {p.dtype for other in self.subject.others for p in other.parameters()}
            super().finish()

    script.TrainingLoop = Watched
    script.run(*arguments(models("sd"), data, tmp_path / "out", *more, "--mixed_precision", "bf16"))
    assert seen["trained"] == {torch.float32}
    assert seen["frozen"] == ({torch.bfloat16} if more else set())
    assert seen["others"] == {torch.bfloat16}
    assert (tmp_path / "out" / "samples" / "step-00000002.png").is_file()
    if not more:  # the frozen parts are saved as they were loaded
        saved_ = DiffusionPipeline.from_pretrained(tmp_path / "out")
        stock = DiffusionPipeline.from_pretrained(models("sd"))
        for a, b in zip(saved_.text_encoder.parameters(), stock.text_encoder.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_trained_copy_shares_what_is_frozen_and_follows_the_average() -> None:
    subject = subject_of(tiny("sd"))
    subject.add_lora(Lora(2), seed=0)
    state = {name: value.clone() for name, value in subject.state().items()}
    assert all("lora_" in name for name in state)
    average = [torch.full_like(value, 0.5) for value in subject.trainable().values()]
    copied = subject.with_weights(state, average)
    theirs = dict(copied.network.named_parameters())
    for name, own in subject.network.named_parameters():
        if "lora_" in name:
            assert (theirs[name] == 0.5).all()
            assert torch.equal(own, state[name])
        else:
            assert theirs[name].data_ptr() == own.data_ptr()


def micro_batch(size: int, turn: int = 0) -> Batch:
    return Batch(torch.zeros(size, 1), {}, torch.Generator(), turn, Seeds(3))


@pytest.mark.parametrize(
    ("batch", "share", "rows_"), [(1, 0.25, 1), (2, 0.25, 1), (3, 0.1, 2), (4, 0.25, 2), (16, 0.25, 8), (40, 0.01, 8)]
)
def test_of_small_micro_batches_some_are_taken_with_the_weight_that_keeps_the_mean(batch, share, rows_) -> None:
    n, chance = 20_000, share * batch / rows_
    taken = [micro_batch(batch, turn).part(share) for turn in range(n)]
    assert {part.stop for part, _ in taken} == {0, rows_}
    assert {weight for _, weight in taken} == {1 / chance}
    mean = sum((part.stop > 0) * weight for part, weight in taken) / n
    assert mean == pytest.approx(1, abs=4 * (1 / chance / n) ** 0.5)
    assert taken == [micro_batch(batch, turn).part(share) for turn in range(n)]


@pytest.mark.parametrize(
    ("batch", "share", "rows_"), [(1, 1.0, 1), (4, 0.5, 2), (8, 1.0, 8), (32, 0.25, 8), (64, 0.25, 16), (70, 0.2, 14)]
)
def test_of_larger_ones_it_is_the_first_rows(batch, share, rows_) -> None:
    assert micro_batch(batch).part(share) == (slice(rows_), 1.0)


def test_sdxl_is_told_the_size_and_the_crop_of_each_image() -> None:
    pipe = tiny("sdxl")
    sizes = {"original_size": (24, 40), "crops_coords_top_left": (3, 5), "guidance_scale": 1.0}
    theirs = recorded(pipe, **call("sdxl") | sizes)
    given = rows(["a bike", "cat 7"])
    given.places = torch.tensor([[24, 40, 3, 5]]).expand(2, -1)
    subject = subject_of(pipe)
    assert_same(received(subject, subject.conditions(given)), theirs[0])
    null = subject.drop(subject.conditions(given), 1.0, torch.Generator(), SIZE)
    assert torch.equal(null["added_cond_kwargs"]["time_ids"], theirs[0]["added_cond_kwargs"]["time_ids"])


def test_prompts_of_the_sample_grid_are_drawn_with_the_guidance_of_the_pipeline() -> None:
    pipe = tiny("sd")
    subject = subject_of(pipe)
    subject.train_at(SIZE)
    ours = subject.sample(3, 2, seed=1, captions=["a bike", "cat 7"])
    options = {"num_inference_steps": 2, "height": SIZE, "width": SIZE, "output_type": "np"}
    theirs = pipe(["a bike", "cat 7", "a bike"], generator=torch.Generator().manual_seed(1), **options).images
    assert np.array_equal(ours, theirs)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("sd", ("--caption_column", "words"), "no column 'words': image, text"),
        ("pixart", ("--rank", 2), "stock pipeline of PixArt has no loader for a LoRA; leave --rank out"),
        ("sd", ("--rank", 0), "--rank must be at least 1"),
        ("sd", ("--lora_alpha", 2), "--lora_alpha is a setting of a LoRA: say its --rank, too"),
        ("sd", ("--rank", 2, "--lora_layers", "nothing"), "--lora_layers nothing: "),
        ("sd", ("--rank", 2, "--ema_decay", 1.0), "--ema_decay must be at least 0 and below 1"),
        ("sd", ("--rank", 2, "--lora_dropout", 0.1, "--gradient_checkpointing"), "exclude each other"),
        ("sd", ("--resolution", 17), "--resolution 17 does not fit the model: use 16 or 18"),
        ("sd", ("--guidance_scale", 2), "network of a StableDiffusionPipeline is told no guidance scale"),
        ("sd", ("--use_8bit_adam",), "needs bitsandbytes: pip install bitsandbytes"),
    ],
)
def test_what_cannot_work_is_refused_before_the_training(name, more, said, models, data, tmp_path, load_script, capsys):
    with pytest.raises(SystemExit) as stopped:
        load_script("train_consistency").run(*arguments(models(name), data, tmp_path / "out", *more))
    assert said in str(stopped.value.code) + capsys.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_captions_are_asked_for_and_refused_where_they_say_nothing(models, data, tmp_path, load_script):
    script = load_script("train_consistency")
    words = [
        word for word in arguments(models("sd"), data, tmp_path / "out") if word not in ("--caption_column", "text")
    ]
    with pytest.raises(SystemExit, match="trained on captions: name their column, --caption_column"):
        script.run(*words)
    with pytest.raises(SystemExit, match="--rank is for text-to-image models, and DDIMPipeline is none"):
        script.run("--preset", "digits", "--rank", 2, "--output_dir", tmp_path / "digits")


def test_other_text_to_image_pipelines_are_refused_by_name() -> None:
    import diffusers

    pipe = tiny("sd")
    other = diffusers.StableDiffusionPAGPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(InputError, match=r"StableDiffusionPAGPipeline cannot be trained here: .* only StableDiff"):
        subject_of(other).require_trainable()


def test_the_log_has_the_consistency_loss_of_some_micro_batches(models, data, tmp_path, load_script):
    more = ("--train_batch_size", 1, "--max_train_steps", 12, *LORA)
    load_script("train_consistency").run(*arguments(models("sd"), data, tmp_path / "out", *more))
    lines = [json.loads(line) for line in Path(tmp_path / "out" / "logs" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "denoising" in line]
    assert 0 < sum("consistency" in line for line in steps) < len(steps) == 12


def test_the_best_lora_is_kept_and_installed(models, data, tmp_path, load_script, capsys):
    more = (
        *LORA,
        "--validation_steps",
        1,
        "--frechet_steps",
        2,
        "--frechet_samples",
        4,
        "--discriminator_channels",
        "8,8",
    )
    load_script("train_observation").run(*arguments(models("sd"), data, tmp_path / "out", *more))
    best = json.loads((tmp_path / "out" / "best" / "best.json").read_text())
    name = "pytorch_lora_weights.safetensors"
    ours, kept = (load_file(tmp_path / "out" / folder / name) for folder in (".", "best"))
    assert all(torch.equal(ours[key], kept[key]) for key in ours)
    assert best["step"] in (1, 2)
    assert f"the trained LoRA{'' if best['step'] == 2 else ', of step 1, the best,'} is in" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds another run"):
        load_script("train_observation").run(*arguments(models("sd"), data, tmp_path / "out", *more))


def test_a_lora_is_pushed_with_a_card_whose_code_runs(models, data, tmp_path, monkeypatch):
    with HubServer() as hub:
        more = (*LORA, "--push_to_hub", "--hub_model_id", "tester/style", "--validation_prompt", "a bike", "cat 7")
        words = arguments(models("sd"), data, tmp_path / "out", *more)
        script = Path(__file__).parents[1] / "training" / "train_consistency.py"
        done = stranger.run(script, *words, cwd=tmp_path, env=hub.environment(tmp_path / "home"))
        assert done.returncode == 0, done.stderr
        files = hub.files("tester/style")
    assert {"README.md", "pytorch_lora_weights.safetensors", "samples/step-00000002.png"} == set(files) - {
        ".gitattributes"
    }
    card = files["README.md"].decode()
    for text in ("- lora", "- text-to-image", "- a bike", "- cat 7", "LoRA of a `StableDiffusionPipeline`"):
        assert text in card
    (tmp_path / "sd").symlink_to(models("sd"))
    (tmp_path / "tester").mkdir()
    (tmp_path / "tester" / "style").symlink_to(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    exec(card.split("```python\n")[1].split("```")[0], given := {})
    assert given["image"].size == (SIZE, SIZE)


# --- the cache --------------------------------------------------------------------------------------------------------

CACHED = ("--center_crop", "--cache_latents")


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux", "pixart"])
def test_with_a_cache_the_weights_are_the_same(name, models, data, tmp_path, load_script):
    """And so with one that was half filled by a run that was killed."""
    script = load_script("train_consistency")
    more = ("--proportion_empty_prompts", 0.3, "--checkpointing_steps", 0)
    words = ("--cache_dir", tmp_path / "cache")
    script.run(*arguments(models(name), data, tmp_path / "without", *more, *words, "--center_crop"))
    script.run(*arguments(models(name), data, tmp_path / "with", *more, *words, *CACHED))
    (file,) = (tmp_path / "cache" / "diffusers_ext").rglob("rows-*.safetensors")
    written = file.stat().st_mtime_ns
    script.run(*arguments(models(name), data, tmp_path / "again", *more, *words, *CACHED))
    assert file.stat().st_mtime_ns == written
    part = "unet" if name.startswith("sd") else "transformer"
    first, *others = (
        load_file(tmp_path / folder / part / "diffusion_pytorch_model.safetensors")
        for folder in ("without", "with", "again")
    )
    for other in others:  # up to rounding, which Adam makes large where a gradient is nearly 0
        differ = torch.cat([(other[key] - value).abs().flatten() for key, value in first.items()])
        assert differ.mean() < 1e-6


def test_encoders_leave_and_come_back_for_pictures(models, data, tmp_path, load_script, monkeypatch):
    """On a device that only says so: the encoders are asked to move to the CPU after the cache is filled."""
    from diffusers import AutoencoderKL

    moves, script = [], load_script("train_consistency")
    monkeypatch.setattr(AutoencoderKL, "to", lambda self, *where: moves.append(str(where[0])) or self)
    script.run(*arguments(models("sd"), data, tmp_path / "out", *CACHED, "--cache_dir", tmp_path / "cache"))
    assert moves[-1] == "cpu"
    assert moves.count("cpu") >= 3  # after the cache, and after the sample grid


def test_other_data_or_encoders_have_another_cache(models, data, tmp_path, load_script):
    script, cache = load_script("train_consistency"), tmp_path / "cache"
    for i, (name, more) in enumerate([("sd", ()), ("sd-v", ()), ("sd", ("--resolution", 18))]):
        script.run(*arguments(models(name), data, tmp_path / f"{i}", *CACHED, "--cache_dir", cache, *more))
        assert len(list((cache / "diffusers_ext").iterdir())) == i + 1


def test_a_cache_that_the_disk_cannot_hold_is_refused(models, data, tmp_path, load_script, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(SystemExit, match=r"--cache_latents needs 0\.0 GiB in .*, and 0\.0 GiB are free"):
        load_script("train_consistency").run(
            *arguments(models("sd"), data, tmp_path / "out", *CACHED, "--cache_dir", tmp_path / "cache")
        )


@pytest.mark.parametrize("more", [(), ("--center_crop", "--random_flip"), ("--center_crop", "--streaming")])
def test_a_cache_of_changing_images_is_refused(more, models, data, tmp_path, load_script, capsys):
    with pytest.raises(SystemExit):
        load_script("train_consistency").run(*arguments(models("sd"), data, tmp_path / "out", "--cache_latents", *more))
    assert "it needs --center_crop, and no --random_flip or --streaming" in capsys.readouterr().err


# --- what is said and shown -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "most"), [("sd", 16), ("sdxl", 16), ("sd3", 16), ("flux", 16), ("pixart", 300)])
def test_captions_that_are_cut_are_counted(name, most) -> None:
    subject = subject_of(tiny(name))
    short, long = "cat 7", "a " * most
    assert subject.too_long([short] * 3) == subject.too_long([]) == ""
    said = f"of 3 captions 2 are longer than the {most} tokens that the text encoder takes: they are cut"
    assert said in subject.too_long([short, long, long])
    if name == "pixart":
        return
    edge = "a " * (most - 2)  # beside the marks of the beginning and the end
    assert subject.too_long([edge]) == ""
    assert "1 are longer" in subject.too_long([edge + "a"])


def test_pictures_reach_the_tracker(models, data, tmp_path, load_script):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = [*arguments(models("sd"), data, tmp_path / "out", *LORA), "--report_to", "tensorboard"]
    load_script("train_consistency").run(*words)
    (events,) = (tmp_path / "out" / "logs" / "train_consistency").glob("events.*")
    found = EventAccumulator(str(events)).Reload()
    assert found.Tags()["images"] == ["samples/0", "samples/1"] or found.Tags()["images"] == ["samples"]


def test_snr_gamma_is_min_snr_gamma() -> None:
    from diffusers_ext.training import TrainingArguments

    args = TrainingArguments(snr_gamma=5.0)
    assert (args.min_snr_gamma, args.snr_gamma) == (5.0, None)
    with pytest.raises(InputError, match="are the same argument"):
        TrainingArguments(snr_gamma=5.0, min_snr_gamma=4.0)


def test_processes_and_other_runs_fill_a_cache_together(data, tmp_path, monkeypatch) -> None:
    """One after the other, so that the second finds what the first has written."""
    from diffusers_ext.data import latent_cache
    from diffusers_ext.data.images import Transform
    from diffusers_ext.data.sources import DataArguments, load_images

    monkeypatch.setattr(latent_cache, "ROWS", 4)
    subject, transform = subject_of(tiny("sd")), Transform(SIZE, 3)
    source = load_images(DataArguments(dataset_name=str(data), caption_column="text"), "train")
    cache = latent_cache.LatentCache(subject, source, transform, tmp_path, {"content": "these"})
    cache.folder.mkdir(parents=True)
    left, written_now = cache.folder / ".partial-7-rows-00000000.safetensors", cache.folder / ".partial-8-rows"
    left.write_text("of a run that was killed yesterday")
    os.utime(left, (time.time() - 86400,) * 2)
    written_now.write_text("of another run")
    for rank in (0, 1):
        process = SimpleNamespace(
            process_index=rank, num_processes=2, is_main_process=rank == 0, wait_for_everyone=lambda: None
        )
        cache.fill(process, batch_size=3)
    files = [file.name for file in sorted(cache.folder.iterdir())]
    assert files == [written_now.name, *(f"rows-{i:08d}.safetensors" for i in (0, 4, 8, 12))]
    x0, condition = cache.rows(torch.tensor([13, 2]), torch.Generator().manual_seed(0))
    images = torch.stack([transform(source.open(i), torch.Generator()) for i in (13, 2)])
    expected = subject.encode(images, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-5)
    given = subject.conditions(rows(["grey 13", "grey 2"]))
    torch.testing.assert_close(condition["encoder_hidden_states"], given["encoder_hidden_states"], rtol=1e-4, atol=1e-5)


def test_sharded_weights_are_fine_tuned_as_whole_ones(models, data, tmp_path, load_script):
    """Two processes with FSDP2 against one with two accumulation steps."""
    from test_loop import SHARDED_DRIVER

    (tmp_path / "driver.py").write_text(SHARDED_DRIVER)
    more = ("--learning_rate", 1e-3, "--consistency_fraction", 0.5)
    argv = [*map(str, arguments(models("sd"), data, tmp_path / "two", *more))]
    done = stranger.ranks(2, tmp_path / "driver.py", ROOT / "training" / "train_consistency.py", *argv)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("spread True 2 0.5") == 2
    whole = arguments(models("sd"), data, tmp_path / "one", *more, "--gradient_accumulation_steps", 2)
    load_script("train_consistency").run(*whole)
    losses = []
    for name in ("two", "one"):
        lines = [json.loads(line) for line in (tmp_path / name / "logs" / "log.jsonl").read_text().splitlines()]
        losses.append([line["denoising"] for line in lines if "lr" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    two, one, start = (
        DiffusionPipeline.from_pretrained(folder).unet.state_dict()
        for folder in (tmp_path / "two", tmp_path / "one", models("sd"))
    )
    apart, moved = (sum((a[k] - b[k]).square().sum() for k in a) for a, b in ((two, one), (one, start)))
    assert apart < 0.02**2 * moved


def test_a_lora_is_refused_where_what_is_frozen_would_be_sharded(monkeypatch) -> None:
    from accelerate import DistributedType

    from diffusers_ext.training import TrainingArguments, loop

    sharded = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True)
    monkeypatch.setattr(loop, "make_accelerator", lambda **options: sharded)
    monkeypatch.setattr(loop, "require_as_asked", lambda *args: None)
    assert loop._accelerator(TrainingArguments()) is sharded
    with pytest.raises(InputError, match="--rank is not made for FSDP"):
        loop._accelerator(TrainingArguments(rank=4))


@pytest.mark.usefixtures("other_precision")
def test_a_pipeline_that_has_gone_meanwhile_costs_no_result(models, data, tmp_path, load_script, monkeypatch):
    """At the end the frozen parts, which were rounded, cannot be loaded again: they are saved as they are."""
    import shutil

    from diffusers_ext.subjects import text

    said = []
    monkeypatch.setattr(text.logger, "warning", said.append)
    shutil.copytree(models("sd"), tmp_path / "model")
    script = load_script("train_consistency")

    class Gone(TrainingLoop):
        def finish(self):
            shutil.rmtree(tmp_path / "model")
            super().finish()

    script.TrainingLoop = Gone
    script.run(*arguments(tmp_path / "model", data, tmp_path / "out", "--mixed_precision", "bf16"))
    assert any("saved in half precision: the pipeline" in text for text in said)
    trained = DiffusionPipeline.from_pretrained(tmp_path / "out")
    stock = DiffusionPipeline.from_pretrained(models("sd"))
    pairs = zip(trained.text_encoder.parameters(), stock.text_encoder.parameters(), strict=True)
    assert all(torch.equal(a, b.bfloat16().float()) for a, b in pairs)


def test_the_grid_shows_the_prompts_of_a_file(models, data, tmp_path, load_script, monkeypatch):
    asked = []
    own = subject_of(tiny("sd")).__class__.sample

    def sample(self, n, steps=50, seed=0, **options):
        asked.append(options["captions"])
        return own(self, n, steps, seed, **options)

    monkeypatch.setattr(subject_of(tiny("sd")).__class__, "sample", sample)
    (tmp_path / "prompts.txt").write_text("cat 7\na boat\na bike\n")
    more = ("--validation_prompt", "a bike", "--validation_prompt_file", tmp_path / "prompts.txt")
    load_script("train_consistency").run(
        *arguments(models("sd"), data, tmp_path / "out", *more, *LORA, "--num_validation_images", 3)
    )
    assert asked == [["a bike", "cat 7", "a boat"]]


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux", "pixart"])
def test_a_discriminator_may_see_the_prompt(name, models, data, tmp_path, load_script):
    more = ("--discriminator_channels", "8,8", "--frechet_samples", 0, "--push_discriminator")
    for flag in ((), ("--discriminator_sees_prompt",)):
        out = tmp_path / f"out{len(flag)}"
        load_script("train_observation").run(*arguments(models(name), data, out, *more, *flag))
        disc = NoiseLevelDiscriminator.from_pretrained(out / "discriminator")
        subject = subject_of(tiny(name))
        size = subject.pooled(subject.null_condition(SIZE)).shape[1]
        assert disc.config.pooled_dim == (size if flag else None)
    start = tmp_path / "out1" / "logs" / "log.jsonl"
    assert "real_logits" in start.read_text()


def test_a_discriminator_of_images_without_prompts_sees_none(tmp_path, load_script):
    argv = ("--preset", "digits", "--discriminator_sees_prompt", "--max_train_steps", 1, "--output_dir", tmp_path)
    with pytest.raises(SystemExit, match="--discriminator_sees_prompt: the model takes no prompts"):
        load_script("train_observation").run(*argv, "--report_to", "none")


@pytest.mark.parametrize(("package", "flags"), [("bitsandbytes", ("--use_8bit_adam",)), ("wandb", ())])
def test_with_packages_that_are_not_required(package, flags, models, data, tmp_path, load_script, monkeypatch):
    """With the real ones, where they are installed."""
    pytest.importorskip(package)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    report = ("--report_to", "wandb" if package == "wandb" else "none")
    load_script("train_consistency").run(*arguments(models("sd"), data, tmp_path / "out", *LORA, *report, *flags))
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))) == (2 if package == "wandb" else 0)
