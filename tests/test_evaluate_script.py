"""`training/evaluate.py` as a user runs it. Truth: samples whose numbers are known, and runs against runs."""

import csv
import json
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import stranger
import torch
from datasets import Dataset, Features, Image
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, EDMEulerScheduler
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from PIL import Image as Picture
from safetensors.torch import load_file
from test_calibrate_script import captioned, tiny_stable_diffusion  # noqa: F401
from test_models import tiny_unet
from test_weights import lora
from tiny_pipelines import tiny

from diffusers_ext import ClassConditionalPipeline
from diffusers_ext.evaluation import Drawing, Evaluation, read_schedulers
from diffusers_ext.evaluation.samples import Counted
from diffusers_ext.randomness import Seeds, Stream

NUMBER = r"-?\d+\.\d+(?:e[-+]\d+)?"
SCRIPT = Path(__file__).parents[1] / "training" / "evaluate.py"


@pytest.fixture
def evaluate(load_script):
    return load_script("evaluate")


def save(folder, seed=0, **config):
    torch.manual_seed(seed)
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    DDIMPipeline(tiny_unet(**config), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture
def models(tmp_path):
    return [save(tmp_path / name, i) for i, name in enumerate(("first", "second"))]


def arguments(models, out, *more):
    data = ("--dataset_name", "digits", "--max_train_samples", 150, "--max_validation_samples", 200)
    cheap = ("--extractor", "pixels", "--num_samples", 90, "--train_batch_size", 32, "--nfe", "1,2")
    likely = ("--likelihood_images", 4, "--ode_images", 0, "--likelihood_evaluations", 2)
    return ["--pretrained_model_name_or_path", *models, *data, *cheap, *likely, "--output_dir", out, *more]


def parsed(evaluate, *argv):
    return evaluate.parse_arguments(evaluate.ModelArguments, list(map(str, argv)))


def load(out):
    return Evaluation.load(out / "results.json")


def without_time(evaluation):
    return [replace(cell, seconds=0.0) for cell in evaluation.cells], evaluation.floor, evaluation.likelihoods


def assert_nearly_the_same(ours, theirs):
    """Of models loaded twice: a difference in rounding may move a value of an image by one."""
    numbers = [re.findall(NUMBER, repr(found)) for found in (ours, theirs)]
    assert re.sub(NUMBER, "", repr(ours)) == re.sub(NUMBER, "", repr(theirs))
    np.testing.assert_allclose(*(np.array(n, dtype=float) for n in numbers), rtol=1e-2, atol=1e-3)


@pytest.fixture
def drawn(monkeypatch):
    """The batches that are drawn."""
    calls, inner = [], Drawing._draw
    monkeypatch.setattr(Drawing, "_draw", lambda self, b: calls.append((self.model, self.steps, b)) or inner(self, b))
    return calls


def test_everything_is_written_and_nothing_is_drawn_twice(evaluate, models, tmp_path, drawn, capsys):
    out = tmp_path / "out"
    evaluate.run(*arguments(models, out))
    assert len(drawn) == 2 * 2 * 3  # models, steps, batches
    first = load(out)
    assert [(c.model, c.scheduler, c.steps, c.nfe, c.num_samples) for c in first.cells] == [
        (model, "DDIM", steps, steps, 90) for model in ("first", "second") for steps in (1, 2)
    ]
    assert set(first.likelihoods) == {"first", "second"}
    assert first.likelihoods["first"] != first.likelihoods["second"]
    assert first.reference == "100 held-out images"
    assert first.num_floor == 100
    assert not first.is_fid
    with (out / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 5
    for name in ("table.md", "index.html", "quality_nfe.png", "quality_seconds.png", "loss_by_sigma.png"):
        assert (out / name).stat().st_size > 500
    grid = Picture.open(out / "samples" / "DDIM-2.png")
    assert grid.size == (10 * 64, 3 * 64)  # a row for each model, and one of real images
    said = capsys.readouterr().out
    assert "| first | DDIM |" in said
    assert "FID" not in said

    drawn.clear()
    evaluate.run(*arguments(models, out))
    assert drawn == []
    assert_nearly_the_same(without_time(load(out)), without_time(first))
    evaluate.run(*arguments(models, out, "--nfe", "2,3", "--num_samples", 100))
    missing = [(2, 3), (3, 0), (3, 1), (3, 2), (3, 3)]  # (steps, batch)
    assert sorted(drawn) == [(model, *which) for model in ("first", "second") for which in missing]

    drawn.clear()
    save(models[1], seed=7)  # trained on, in the same folder
    evaluate.run(*arguments(models, out))
    assert {model for model, _, _ in drawn} == {"second"}
    changed = load(out)
    assert changed.cells[0] == first.cells[0]
    assert changed.cells[2] != first.cells[2]
    assert_nearly_the_same(changed.likelihoods["first"], first.likelihoods["first"])
    assert changed.likelihoods["second"] != first.likelihoods["second"]


def test_a_copy_of_a_model_changes_nothing_and_another_what_the_distances_say(evaluate, models, tmp_path):
    shutil.copytree(models[0], tmp_path / "copy")
    evaluate.run(*arguments([*models, tmp_path / "copy"], tmp_path / "out"))
    found = load(tmp_path / "out")
    for i, baseline in enumerate(found.cells[:2]):
        other, copy = found.cells[2 + i], found.cells[4 + i]
        assert found.change(baseline) is None
        against, unchanged = found.change(copy)
        assert against is baseline
        assert unchanged == pytest.approx((0.0, 0.0, 0.0), abs=1e-3)
        change = found.change(other)[1]
        assert change.estimate == pytest.approx(other.quality.frechet.estimate - baseline.quality.frechet.estimate)
        assert change.low < change.estimate < change.high
    assert "Change of the Frechet distance" in (tmp_path / "out" / "table.md").read_text()


def test_a_scheduler_with_settings_and_without_and_what_it_cannot_do(evaluate, models, tmp_path, capsys):
    asked = ("--schedulers", "PNDM, PNDM:skip_prk_steps=true:timestep_spacing=trailing", "--nfe", "2,13")
    evaluate.run(*arguments(models[:1], tmp_path / "out", *asked))
    found = [(c.scheduler, c.nfe) for c in load(tmp_path / "out").cells]
    skipping = "PNDM:skip_prk_steps=true:timestep_spacing=trailing"
    assert found == [("PNDM", 13), (skipping, 1), (skipping, 13)]
    assert "left out: PNDMScheduler makes no image with 2 evaluations" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "out" / "samples").glob("PNDM*"))
    assert names == ["PNDM-4.png", *(f"PNDM-skip-prk-steps-true-timestep-spacing-trailing-{n}.png" for n in (1, 12))]
    with pytest.raises(SystemExit, match="makes no image with 2 evaluations"):
        evaluate.run(*arguments(models[:1], tmp_path / "none", "--schedulers", "PNDM", "--nfe", "1,2"))


def test_settings_are_numbers_truths_and_words(evaluate, tmp_path):
    words = "DDIM:clip_sample=false:clip_sample_range=0.5:prediction_type=v_prediction"
    asked = parsed(
        evaluate, "--pretrained_model_name_or_path", "a", "--ode_images", "0", "--schedulers", f"own,{words}"
    )
    settings = {"clip_sample": False, "clip_sample_range": 0.5, "prediction_type": "v_prediction"}
    assert read_schedulers(asked.options()["schedulers"]) == {"own": ("own", {}), words: ("DDIM", settings)}


def test_lists_are_read_from_a_file_too(evaluate, models, tmp_path):
    (tmp_path / "run.yaml").write_text(f"pretrained_model_name_or_path: [{models[0]}, {models[1]}]\nnames: [a, b]\n")
    found = parsed(evaluate, "--config", tmp_path / "run.yaml")
    assert found.names == ["a", "b"]
    assert found.pretrained_model_name_or_path == list(map(str, models))


def test_an_interrupted_run_goes_on_to_the_same_result(evaluate, models, tmp_path, monkeypatch):
    evaluate.run(*arguments(models, tmp_path / "whole"))
    calls, inner = [], Drawing._draw

    def interrupted(self, batch):
        calls.append(batch)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return inner(self, batch)

    monkeypatch.setattr(Drawing, "_draw", interrupted)
    with pytest.raises(SystemExit, match="interrupted"):
        evaluate.run(*arguments(models, tmp_path / "halves"))
    assert not (tmp_path / "halves" / "results.json").exists()
    evaluate.run(*arguments(models, tmp_path / "halves"))
    assert len(calls) == 8 + 12 - 7
    assert_nearly_the_same(*(without_time(load(tmp_path / name)) for name in ("halves", "whole")))


def test_two_processes_get_what_one_gets(evaluate, models, tmp_path):
    evaluate.run(*arguments(models, tmp_path / "one"))
    done = stranger.ranks(2, SCRIPT, *arguments(models, tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert_nearly_the_same(*(without_time(load(tmp_path / name)) for name in ("two", "one")))
    files = {p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*") if p.is_file()}
    assert files == {p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file()}


def test_a_model_that_copies_is_found_out(evaluate, models, tmp_path, monkeypatch):
    """Its samples are training images: all are copies, and precision is that of the training images."""
    real = evaluate.load_real_images
    training = []

    def remember(*args, **options):
        training.append(real(*args).training.images)
        return real(*args)

    def steal(self, batch):
        images = ((training[0][:90].flip(0)[batch * 32 :][:32] + 1) * 127.5).round().to(torch.uint8)
        return images, Counted(nfe=1.0, seconds=0.1, out_of_range=0.0)

    monkeypatch.setattr(evaluate, "load_real_images", remember)
    monkeypatch.setattr(Drawing, "_draw", steal)
    evaluate.run(*arguments(models[:1], tmp_path / "out", "--nfe", "1", "--reference", "train"))
    (cell,) = load(tmp_path / "out").cells
    assert cell.quality.copies == 1.0
    assert cell.quality.precision == 1.0
    assert cell.quality.frechet.low <= 0 or cell.quality.frechet.estimate < 0.05
    assert load(tmp_path / "out").floor.copies < 0.2
    grid = np.asarray(Picture.open(next((tmp_path / "out" / "samples").glob("nearest-*"))), dtype=int)
    assert np.abs(grid[:64] - grid[64:]).max() <= 1  # the images below are those above


def test_short_of_images_there_is_no_frechet_distance(evaluate, models, tmp_path, capsys):
    """80 features of pixels; 30 reference images."""
    evaluate.run(*arguments(models[:1], tmp_path / "out", "--max_validation_samples", 60))
    assert "30 images are fewer than 80 features" in capsys.readouterr().out
    cell = load(tmp_path / "out").cells[0]
    assert np.isnan(cell.quality.frechet.estimate)
    assert np.isfinite(cell.quality.kernel.estimate)
    assert cell.quality.copies is None  # 60 held-out images do not tell 1%
    assert "kernel distance" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--schedulers", "DDIM:eta"), "must be NAME, or NAME:setting=value"),
        (("--nfe", "5,x"), "whole numbers"),
        (("--nfe", "0"), "at least 1"),
        (("--num_samples", 10), "at least 20"),
        (("--names", "a"), "2 different names"),
        (("--names", "a", "a"), "2 different names"),
        (("--ode_images", 1), "at least 2"),
        (("--likelihood_evaluations", 0), "at least 1"),
        (("--max_validation_samples", 0), "at least 1"),
        (("--streaming",), "leave it out"),
        (("--guidance_scale", "nan"), "finite"),
    ],
)
def test_bad_arguments_end_with_a_message(evaluate, more, message, capsys):
    with pytest.raises(SystemExit):
        parsed(evaluate, *arguments(["a", "b"], "out", *more))
    assert re.search(message, capsys.readouterr().err)


def test_arguments_that_the_models_or_data_do_not_allow_end_with_a_message(evaluate, models, tmp_path):
    """More of them: test_evaluation_function.py, where they need no files."""
    for more, message in (
        (("--extractor", "nope"), "unknown extractor"),
        (("--max_validation_samples", 30), "15 images, and an interval needs 20"),
        (("--caption_column", "text"), "no effect on the embedded digits"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            evaluate.run(*arguments(models, tmp_path / "out", *more))


def test_models_that_do_not_fit_each_other_or_are_broken_are_refused(evaluate, models, tmp_path, capsys):
    larger = save(tmp_path / "larger", sample_size=16)
    with pytest.raises(SystemExit, match="first: 1 x 8 x 8, larger: 1 x 16 x 16"):
        evaluate.run(*arguments([models[0], larger], tmp_path / "out"))
    with pytest.raises(SystemExit):
        evaluate.run("--dataset_name", "digits")
    assert "name the models: --pretrained_model_name_or_path" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="could not be loaded"):
        evaluate.run(*arguments([tmp_path / "nowhere"], tmp_path / "out"))
    (tmp_path / "prompts.txt").write_text("a bike\n")
    for file, message in (("prompts.txt", "first takes no prompts: leave"), ("none.txt", "cannot be read as text")):
        with pytest.raises(SystemExit, match=message):
            evaluate.run(*arguments(models, tmp_path / "out", "--prompt_file", tmp_path / file))
    next((models[0] / "unet").glob("*.safetensors")).unlink()
    with pytest.raises(SystemExit, match="could not be loaded"):
        evaluate.run(*arguments(models, tmp_path / "out"))


def test_edm_models_and_guidance(evaluate, tmp_path, capsys):
    torch.manual_seed(0)
    pipeline = ClassConditionalPipeline(tiny_unet(num_class_embeds=11), EDMEulerScheduler(), null_class=10)
    pipeline.save_pretrained(tmp_path / "model")
    more = ("--schedulers", "own,EDMDPMSolverMultistep", "--nfe", "3", "--guidance_scale", 2)
    evaluate.run(*arguments([tmp_path / "model"], tmp_path / "out", *more))
    clip = "compare EDMDPMSolverMultistep:thresholding=true, too"
    assert capsys.readouterr().out.count(clip) == 1  # said once, of the one that could
    cells = load(tmp_path / "out").cells
    assert [(c.scheduler, c.steps, c.nfe) for c in cells] == [("EDMEuler", 3, 6), ("EDMDPMSolverMultistep", 3, 6)]


def test_text_to_image_pipelines_draw_from_captions(evaluate, captioned, tmp_path):  # noqa: F811
    tiny_stable_diffusion(tmp_path / "parts").save_pretrained(tmp_path / "model")
    data = ("--dataset_name", captioned, "--reference", "train", "--caption_column", "text")
    options = ("--extractor", "pixels", "--num_samples", 20, "--train_batch_size", 10, "--nfe", "2")
    evaluate.run("--pretrained_model_name_or_path", tmp_path / "model", *data, *options, "--output_dir", tmp_path / "o")
    (cell,) = load(tmp_path / "o").cells
    assert (cell.nfe, cell.num_samples) == (2, 20)
    assert load(tmp_path / "o").likelihoods == {}


def test_a_lora_is_compared_with_its_pipeline_for_the_prompts_of_a_file(evaluate, captioned, tmp_path, capsys):  # noqa: F811
    """Truth: what the stock pipeline draws with the LoRA, and without it."""
    pipe = tiny("sd")
    pipe.save_pretrained(tmp_path / "model")
    state = {k.replace(".style", ""): v for k, v in lora(pipe, size=1.0).unet.state_dict().items() if ".lora_" in k}
    pipe.save_lora_weights(tmp_path / "style", unet_lora_layers=state)
    (tmp_path / "prompts.txt").write_text("a bike\ncat 7\n")
    models = ("--pretrained_model_name_or_path", tmp_path / "model", tmp_path / "model")
    data = ("--dataset_name", captioned, "--reference", "train", "--prompt_file", tmp_path / "prompts.txt")
    options = ("--extractor", "pixels", "--num_samples", 20, "--train_batch_size", 10, "--nfe", "2", "--resolution", 16)
    argv = (*models, *data, *options, "--output_dir", tmp_path / "out")
    evaluate.run(*argv, "--lora_weights", "none", tmp_path / "style", "--push_to_hub")
    found = load(tmp_path / "out")
    assert list(found.models) == ["model", "style"]
    assert found.models["style"].endswith("style")
    assert found.cells[0].quality.kernel.estimate != found.cells[1].quality.kernel.estimate
    assert "kernel_distance" in (tmp_path / "style" / "README.md").read_text()
    for name in found.models:
        (file,) = (tmp_path / "out" / "drawn").glob(f"{name}-*/000000.safetensors")
        stock = DiffusionPipeline.from_pretrained(tmp_path / "model")
        stock.set_progress_bar_config(disable=True)
        if name == "style":
            stock.load_lora_weights(tmp_path / "style")
        generator = torch.Generator().manual_seed(Seeds(0)(Stream.SAMPLES, 0))
        call = {
            "guidance_scale": 1.0,
            "num_inference_steps": found.cells[0].steps,
            "height": 16,
            "width": 16,
            "output_type": "np",
        }
        images = torch.from_numpy(stock(["a bike", "cat 7"] * 5, generator=generator, **call).images).movedim(3, 1)
        assert (images * 255 - load_file(file)["images"]).abs().max() < 1, name
    for wrong, message in (
        (("--lora_weights", "none"), "--lora_weights has 1 for 2 pipelines"),
        (("--lora_weights", "none", "none"), "names the same model twice"),
        (("--lora_weights", "none", tmp_path / "nowhere"), "could not be loaded"),
    ):
        with pytest.raises(SystemExit) as refused:
            evaluate.run(*argv, *wrong)
        assert message in str(refused.value) + capsys.readouterr().err


def test_the_card_of_a_local_model_gets_the_results(evaluate, models, tmp_path, capsys):
    (models[0] / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    evaluate.run(*arguments(models[:1], tmp_path / "out", "--push_to_hub"))
    card = ModelCard.load(models[0] / "README.md", ignore_metadata_errors=False)
    assert card.data.license == "mit"
    found = {r.metric_type: r for r in card.data.eval_results if (r.metric_args or {}).get("nfe") == 2}
    measured = load(tmp_path / "out").cells[1].quality
    assert found["frechet_distance"].metric_value == pytest.approx(measured.frechet.estimate)
    assert "fid" not in found
    assert "hf upload" in capsys.readouterr().out


def test_results_reach_the_hub_and_a_failure_keeps_them(models, tmp_path):
    """In a process of its own: the client reads the Hub's address when it is imported."""
    with HubServer() as hub:
        push = (
            "import sys; from huggingface_hub import HfApi; api = HfApi(); api.create_repo('tester/first'); "
            "api.upload_folder(repo_id='tester/first', folder_path=sys.argv[1])"
        )
        env = hub.environment(tmp_path)
        assert stranger.run(push, models[0], env=env).returncode == 0
        options = arguments(["tester/first"], tmp_path / "out", "--nfe", "1", "--push_to_hub")
        hub.fail("POST .*/commit/", status=403, times=99)
        failed = stranger.run(SCRIPT, *options, env=env)
        assert failed.returncode == 3, failed.stderr
        assert "were not pushed to tester/first" in failed.stderr
        assert TOKEN not in failed.stderr + failed.stdout
        assert (tmp_path / "out" / "results.json").exists()
    shutil.rmtree(tmp_path / "out" / "drawn")


def test_a_data_set_without_held_out_images(evaluate, models, tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        images = [np.random.default_rng(i).integers(0, 255, (8, 8), dtype=np.uint8) for i in range(80)]
        data = Dataset.from_dict({"image": images}, features=Features({"image": Image()}))
        data.to_parquet(f"{folder}/train.parquet")
        more = ("--dataset_name", f"{folder}/train.parquet", "--nfe", "1", "--likelihood_images", 0)
        with pytest.raises(SystemExit, match="no held-out split"):
            evaluate.run(*arguments(models[:1], tmp_path / "out", *more))
        evaluate.run(*arguments(models[:1], tmp_path / "out", *more, "--reference", "train"))
    found = load(tmp_path / "out")
    assert (found.num_reference, found.num_floor) == (40, 40)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["likelihoods"] == {}


def test_the_halves_of_the_held_out_images_have_none_in_common(evaluate, models, tmp_path):
    real = evaluate.load_real_images(parsed(evaluate, *arguments(models, tmp_path / "out")), 1, 8)
    sets = {
        name: {x.numpy().tobytes() for x in getattr(real, name).images} for name in ("reference", "floor", "held_out")
    }
    assert len(sets["reference"]) == len(sets["floor"]) == 100
    assert not sets["reference"] & sets["floor"]
    assert sets["reference"] | sets["floor"] == sets["held_out"]
    assert len(real.training.images) == 150
    assert len(real.held_out.labels.unique()) == 10  # stored by class, and drawn at random
