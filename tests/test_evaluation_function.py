"""`evaluate` as a library user calls it. Truth: images that the pipelines draw when they are called directly, and
`diffusers_ext.metrics` of them."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, EDMEulerScheduler
from PIL import Image
from safetensors.torch import load_file
from test_calibration import table
from test_models import tiny_unet

from diffusers_ext import ClassConditionalPipeline, calibrate_pipeline
from diffusers_ext.errors import InputError
from diffusers_ext.evaluation import (
    Drawing,
    Evaluation,
    Judge,
    LikelihoodSettings,
    RealImages,
    evaluate,
    markdown_table,
    swap_scheduler,
    write_report,
)
from diffusers_ext.extractors import Extractor, make_extractor, pixel_features
from diffusers_ext.metrics import (
    copies,
    frechet_distance,
    jackknife,
    kernel_distance,
    precision_recall,
    pseudo_values,
    student_interval,
)
from diffusers_ext.randomness import Seeds, Stream
from diffusers_ext.reports.page import html_page
from diffusers_ext.reports.plots import plots
from diffusers_ext.schedulers.scheduling_calibrated import calibrated_class

PIXELS = Extractor("values", lambda images: images.flatten(1))  # 64 of images of 8 x 8


def pipeline(seed=0, kind=DDIMPipeline, scheduler=None, **config):
    torch.manual_seed(seed)
    return kind(tiny_unet(**config), scheduler or DDIMScheduler(timestep_spacing="trailing"))


def images(n, seed, side=8):
    return torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def real(**more):
    return RealImages.of(images(90, 1), images(200, 2), name="noise", **more)


def cheap(models, folder, data=None, **more):
    options = {"nfe": [2], "num_samples": 70, "batch_size": 40, "extractor": PIXELS, "likelihood": None}
    return evaluate(models, real() if data is None else data, folder, **options | more)


def by_hand(one, steps, seed=0, batches=(0, 1)):
    """70 images in two batches of 40, of 8 bits, in [-1, 1]."""
    one.set_progress_bar_config(disable=True)
    drawn = []
    for batch in batches:
        generator = Seeds(seed).generator(Stream.SAMPLES, batch)
        drawn.append(one(batch_size=40, num_inference_steps=steps, generator=generator, output_type="np").images)
    levels = np.round(np.concatenate(drawn)[:70] * 255)
    return torch.from_numpy(levels).movedim(3, 1).float() / 127.5 - 1


@pytest.fixture
def drawn(monkeypatch):
    """The batches that are drawn."""
    calls, inner = [], Drawing._draw
    monkeypatch.setattr(Drawing, "_draw", lambda self, b: calls.append((self.model, self.steps, b)) or inner(self, b))
    return calls


def test_the_numbers_are_those_of_the_images_that_the_pipelines_draw(tmp_path, drawn):
    models, data = {"a": pipeline(0), "b": pipeline(1)}, real()
    for folder in ("drawn", "samples"):  # of a killed process
        (tmp_path / folder).mkdir()
        (tmp_path / folder / ".partial-1-x.png").touch()
    found = cheap(models, tmp_path, data, schedulers=["DDIM"], nfe=[3, 2, 3], seed=5)
    assert list(tmp_path.rglob(".partial-*")) == []
    assert [(c.model, c.scheduler, c.steps, c.nfe) for c in found.cells] == [
        (model, "DDIM", steps, steps) for model in ("a", "b") for steps in (2, 3)
    ]
    reference, training, held_out = (PIXELS(x.images) for x in (data.reference, data.training, data.held_out))
    values = {}
    for cell in found.cells:
        own = ClassConditionalPipeline(models[cell.model].unet, models[cell.model].scheduler)
        features = PIXELS(by_hand(own, cell.steps, seed=5))
        values[cell.model, cell.steps] = pseudo_values(frechet_distance, features, reference)
        assert cell.quality.frechet == pytest.approx(jackknife(frechet_distance, features, reference), rel=1e-5)
        assert cell.quality.kernel == pytest.approx(jackknife(kernel_distance, features, reference), rel=1e-5)
        shares = precision_recall(features, reference[:70])
        assert (cell.quality.precision, cell.quality.recall) == pytest.approx(shares)
        assert cell.quality.copies == pytest.approx(copies(features, training, held_out))
        baseline = found.change(cell)
        if cell.model == "b":
            change = student_interval(values["b", cell.steps] - values["a", cell.steps])
            assert baseline[1] == pytest.approx(change, rel=1e-4, abs=1e-5)
            assert cell.quality.change(baseline[0].quality) == baseline[1]
    floor = PIXELS(data.floor.images)
    assert found.floor.frechet == pytest.approx(jackknife(frechet_distance, floor, reference), rel=1e-5)
    assert (found.data, found.reference, found.num_reference, found.num_floor) == (
        *("noise", "100 held-out images"),
        *(100, 100),
    )
    assert found.models == {"a": "a", "b": "b"}
    assert len(drawn) == 2 * 2 * 2

    drawn.clear()
    again = cheap(models, tmp_path, data, schedulers=["DDIM"], nfe=[2, 3], seed=5)
    assert drawn == []
    assert again == found == Evaluation.load(tmp_path / "results.json")
    cheap(models, tmp_path, data, schedulers=["DDIM"], nfe=[2, 4], seed=5)
    assert drawn == [(model, 4, batch) for model in ("a", "b") for batch in (0, 1)]


def test_pictures_come_back_and_are_shown(tmp_path):
    one = pipeline()
    found = cheap({"a": one}, tmp_path)
    grid, near = found.pictures.values()
    assert next(iter(found.pictures)) == "DDIM, 2 steps. Rows: a, real images"
    below = np.asarray(grid)[64 + 4 : 128 : 8, 4:64:8, 0]  # the second row
    assert np.abs(below - ((real().floor.images[0, 0] + 1) * 127.5).numpy()).max() <= 1
    first = ((by_hand(ClassConditionalPipeline(one.unet, one.scheduler), 2)[0, 0] + 1) * 127.5).round()
    assert np.abs(np.asarray(grid)[4:64:8, 4:64:8, 0] - first.numpy()).max() <= 1  # a pixel is a square of 8 x 8
    for picture, name in ((grid, "DDIM-2"), (near, "nearest-a-DDIM-2")):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "samples" / f"{name}.png")), np.asarray(picture))
    write_report(found, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert page.count("<figure>") == 2 + 2  # plots, pictures
    assert "<code>" not in page  # there was no command


def test_everything_is_as_before_when_it_returns(tmp_path):
    one = pipeline()
    one.unet.train()
    one.unet.conv_in.eval()
    one.unet.conv_in.weight.requires_grad_(False)
    one.set_progress_bar_config(desc="mine")
    scheduler, before = one.scheduler, torch.random.get_rng_state()
    modes = [module.training for module in one.unet.modules()]
    cheap({"a": one}, tmp_path, schedulers=["PNDM:skip_prk_steps=true"], likelihood=LikelihoodSettings(2, 2, 0))
    assert [module.training for module in one.unet.modules()] == modes
    assert [name for name, p in one.unet.named_parameters() if not p.requires_grad] == ["conv_in.weight"]
    assert one._progress_bar_config == {"desc": "mine"}
    assert one.scheduler is scheduler
    assert torch.equal(torch.random.get_rng_state(), before)


def test_data_are_loaded_once_all_else_is_possible(tmp_path):
    asked = []

    def load(channels, resolution):
        asked.append((channels, resolution))
        return real()

    with pytest.raises(InputError, match="there is no NoneScheduler"):
        cheap({"a": pipeline()}, tmp_path, load, schedulers=["None"])
    assert asked == []
    assert cheap({"a": pipeline()}, tmp_path, load).data == "noise"
    assert asked == [(1, 8)]


def test_likelihoods_are_of_the_data_labels_and_are_kept(tmp_path, monkeypatch, capsys):
    labelled = pipeline(2, ClassConditionalPipeline, num_class_embeds=3)
    models, settings = {"plain": pipeline(), "labelled": labelled}, LikelihoodSettings(4, 2, 0)
    labels = torch.arange(200) % 3
    found = cheap(models, tmp_path, real(held_out_labels=labels), likelihood=settings)
    assert set(found.likelihoods) == {"plain", "labelled"}
    assert found.likelihoods["plain"].ode is None
    same = cheap(models, tmp_path, real(held_out_labels=labels), likelihood=settings)
    assert same.likelihoods == found.likelihoods
    fewer = cheap(models, tmp_path, likelihood=settings)
    assert set(fewer.likelihoods) == {"plain"}
    assert "no likelihood of labelled: the labels of the data are not those of its 3 classes" in capsys.readouterr().out
    assert cheap(models, tmp_path, likelihood=None).likelihoods == {}


BAD = {
    "levels": ({"nfe": [5, 0]}, "--nfe must be at least 1"),
    "no levels": ({"nfe": []}, "--nfe must be at least 1"),
    "samples": ({"num_samples": 10}, "at least 20"),
    "guidance": ({"guidance_scale": float("nan")}, "finite"),
    "no null class": ({"guidance_scale": 2.0}, "a has no null class"),
    "prompts": ({"prompts": ["a cat"]}, "a takes no prompts"),
    "form of a scheduler": ({"schedulers": ["DDIM:eta"]}, "must be NAME, or NAME:setting=value"),
    "setting": ({"schedulers": ["DDIM:eta=1"]}, "DDIMScheduler has no setting eta"),
    "family": ({"schedulers": ["own", "EDMEuler"]}, "cannot take EDMEulerScheduler"),
    "no scheduler": ({"schedulers": ["Foo"]}, "there is no FooScheduler"),
    "steps": ({"schedulers": ["PNDM"], "nfe": [1, 2]}, "makes no image with 2 evaluations"),
    "resolution": ({"resolution": 9}, "does not fit the model"),
    "extractor": ({"extractor": "nope"}, "unknown extractor"),
    "path of an extractor": ({"extractor": "no.such:Thing"}, "no.such"),
    "shape": ({"data": RealImages.of(images(40, 0, 16), reference="train")}, r"\(1, 8, 8\).*\(1, 16, 16\)"),
    "no model": ({"models": {}}, "no model"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_possible_is_refused_before_anything_is_drawn(tmp_path, name, drawn):
    options, message = BAD[name]
    with pytest.raises(InputError, match=message):
        cheap(**{"models": {"a": pipeline()}, "folder": tmp_path} | options)
    assert drawn == []


def test_models_of_other_images_are_refused(tmp_path):
    with pytest.raises(InputError, match="a: 1 x 8 x 8, b: 1 x 16 x 16"):
        cheap({"a": pipeline(), "b": pipeline(sample_size=16)}, tmp_path)


def test_a_bound_without_the_ode_needs_no_solver_package(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--ode_images needs torchdiffeq"):
        cheap({"a": pipeline()}, tmp_path, likelihood=LikelihoodSettings(0, 1, 2))
    for settings in ((1, 1, 0), (0, 1, 1), (-2, 1, 0), (0, 0, 0)):
        with pytest.raises(InputError, match="must be"):
            LikelihoodSettings(*settings)


def test_a_calibrated_scheduler_takes_the_scale_of_the_evaluation(tmp_path):
    """Whatever scale it was saved with: the same images as by a hook on the network, which knows each row."""
    kind = functools.partial(ClassConditionalPipeline, null_class=2)
    calibration = table(DDIMScheduler(), (1, 8, 8), rows=("conditional", "unconditional"), size=0.3, null_class=2)
    ours, hooked = (pipeline(kind=kind, num_class_embeds=3) for _ in range(2))
    saved = calibrated_class("DDIMScheduler").from_scheduler(ours.scheduler, calibration, 7.5)
    ours.scheduler = saved
    calibrate_pipeline(hooked, calibration, route="model")
    for scale in (1.0, 0.5, 3.0):
        out = tmp_path / str(scale)
        cheap({"a": ours, "b": hooked}, out, guidance_scale=scale, num_samples=40, nfe=[4])
        a, b = (load_file(next((out / "drawn").glob(f"{name}-*/*0.safetensors")))["images"].float() for name in "ab")
        assert (a - b).abs().max() <= 1
        assert a.std() > 10
    assert saved.guidance_scale == 7.5
    ours.scheduler = calibrated_class("DDIMScheduler").from_scheduler(saved, table(DDIMScheduler(), (1, 8, 8)))
    with pytest.raises(InputError, match=r"--guidance_scale 3\.0 with CalibratedDDIMScheduler: .* needs the rows"):
        cheap({"a": ours}, tmp_path / "no", guidance_scale=3.0)


def test_images_that_are_trained_on_are_not_called_held_out(tmp_path):
    settings = LikelihoodSettings(images=4, evaluations=2, ode_images=0)
    without = RealImages.of(images(90, 1), reference="train")
    for data, what in ((without, "training images"), (real(), "held-out images")):
        found = cheap({"a": pipeline()}, tmp_path / what, data, likelihood=settings)
        assert f"Bits per dimension of {what}" in markdown_table(found)
        assert f"Mean square error of the predicted noise by noise level, of {what}" in html_page(found, plots(found))


# --- its parts --------------------------------------------------------------------------------------------------------


def test_training_images_are_not_held_out():
    images = torch.linspace(-1, 1, 256).reshape(256, 1, 1, 1).expand(-1, 1, 8, 8)
    found = RealImages.of(images[:150], images[100:])
    torch.testing.assert_close(found.held_out.images.sort(0)[0], images[150:])
    assert found.described == "53 held-out images (50 of the held-out split are training images, and are left out)"
    with pytest.raises(InputError, match="all 50 held-out images are training images"):
        RealImages.of(images[:150], images[:50])


def test_real_images_of_tensors():
    """Every image has a value and a label of its own, sorted; a half has some of all of them."""
    training, held_out = (
        torch.linspace(low, 1, n).reshape(n, 1, 1, 1).expand(-1, 1, 8, 8) for low, n in ((-1, 60), (0, 80))
    )
    training = training.clone().index_fill_(3, torch.tensor([0]), -1)  # none is a held-out image
    labels = torch.arange(80)
    found = RealImages.of(training, held_out, held_out_labels=labels)
    halves = [set(x.labels.tolist()) for x in (found.reference, found.floor)]
    assert halves[0] | halves[1] == set(range(80))
    assert not halves[0] & halves[1]
    assert all(10 < sum(label < 40 for label in half) < 30 for half in halves)  # random
    for one in (found.reference, found.floor, found.held_out):
        torch.testing.assert_close(one.images, held_out[one.labels], rtol=0, atol=0.501 / 127.5)
        levels = one.images * 127.5 + 127.5
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)  # 8 bits
    assert set(found.training.labels.tolist()) == {-1}
    assert found.training.images.mean() == pytest.approx(training.mean().item(), abs=0.501 / 127.5)
    assert found.described == "40 held-out images"

    whole = RealImages.of(training, held_out, reference="train")
    assert whole.reference is whole.training
    assert whole.floor is whole.held_out is whole.unseen
    alone = RealImages.of(training, reference="train", training_labels=torch.arange(60))
    assert (len(alone.training.images), len(alone.floor.images), alone.held_out) == (30, 30, None)
    assert alone.unseen is alone.floor
    assert not set(alone.training.labels.tolist()) & set(alone.floor.labels.tolist())

    for wrong, message in (
        ({}, "no held-out split"),
        ({"held_out": held_out[:30]}, "15 images, and an interval needs 20"),
        ({"held_out": held_out[..., :4]}, "do not fit"),
        ({"held_out": held_out * 127.5 + 127.5}, r"must be in \[-1, 1\], got 127.5 to 255"),
    ):
        with pytest.raises(InputError, match=message):
            RealImages.of(training, **wrong)


def test_drawings_and_a_judge_are_of_use_alone(tmp_path):
    """With classes that are named, a scheduler object and guidance: twice the evaluations."""
    seen, data = [], real()
    one = pipeline(0, ClassConditionalPipeline, num_class_embeds=4)
    one = ClassConditionalPipeline(one.unet, one.scheduler, null_class=3)
    one.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    one.set_progress_bar_config(disable=True)
    options = {"num_samples": 70, "batch_size": 40, "guidance_scale": 2.0, "labels": [2, 0, 1]}
    drawing = Drawing.of(one, swap_scheduler(one, "HeunDiscrete"), 2, **options)
    drawing.draw(tmp_path)
    assert drawing.counted(tmp_path).nfe == 6
    classes = ([2, 0, 1] * 40)[:80]
    assert seen == [[*part, *[3] * 40] for part in (classes[:40], classes[40:]) for _ in range(3)]
    others = [replace(drawing, labels=labels).name for labels in (None, [2, 1, 0])]
    assert len({drawing.name, *others}) == 3

    judge = Judge(data, PIXELS, num_samples=70)
    quality = judge.quality(drawing.features(tmp_path, PIXELS))
    drawn = torch.cat(list(drawing.images(tmp_path))).float() / 127.5 - 1
    reference = PIXELS(data.reference.images)
    assert quality.frechet == pytest.approx(jackknife(frechet_distance, PIXELS(drawn), reference), rel=1e-5)
    assert quality.change(quality) == (0.0, 0.0, 0.0)
    assert quality.change(quality, "kernel") == (0.0, 0.0, 0.0)
    assert quality.change(replace(quality, frechet_values=[])) is None
    assert judge.measure(drawing, tmp_path) == quality  # fewer images than pixel features


def test_the_distance_of_pixels_sees_noise():
    data = RealImages.of(images(90, 1), images(300, 2), name="noise")
    judge, smooth = Judge(data, PIXELS, num_samples=150), data.floor.images / 2
    pixels = [pixel_features(one) for one in (smooth, smooth + 0.3 * images(150, 3))]
    truth = [jackknife(frechet_distance, one, pixel_features(data.reference.images)) for one in pixels]
    found = [judge.quality(PIXELS(smooth), one) for one in pixels]
    for one, interval in zip(found, truth, strict=True):
        assert one.pixels == pytest.approx(interval, rel=1e-5)
    assert found[1].change(found[0], "pixels").estimate == pytest.approx(truth[1].estimate - truth[0].estimate)
    assert judge.floor.pixels.high < truth[0].low
    assert judge.quality(PIXELS(smooth)).pixels is None


def test_features_are_extracted_once(tmp_path):
    calls = []

    def network(x):
        calls.append(len(x))
        return x.flatten(1)

    extractor = Extractor("mine", network, batch_size=1000)
    drawing = Drawing.of(pipeline(), swap_scheduler(pipeline(), "own"), 1, 30, batch_size=20)
    drawing.draw(tmp_path)
    first = drawing.features(tmp_path, extractor)
    assert first.shape == (30, 64)
    assert calls == [2, 20, 20]  # noise, by which the extractor is known, and the batches
    assert torch.equal(drawing.features(tmp_path, extractor), first)
    assert calls == [2, 20, 20]


def test_an_edm_model_keeps_its_own_scheduler(tmp_path):
    edm = pipeline(0, ClassConditionalPipeline, EDMEulerScheduler())
    assert [c.scheduler for c in cheap({"a": edm}, tmp_path).cells] == ["EDMEuler"]


def test_another_resolution_is_drawn_and_the_model_is_as_before(tmp_path):
    one = pipeline()
    data = RealImages.of(images(90, 1, side=12), images(200, 2, side=12), name="noise")
    options = {"nfe": [2], "num_samples": 20, "batch_size": 20, "likelihood": None, "resolution": 12}
    evaluate({"A": one}, data, tmp_path, extractor=make_extractor("pixels", device="cpu"), **options)
    (folder,) = (tmp_path / "drawn").glob("A-*")
    assert load_file(folder / "000000.safetensors")["images"].shape == (20, 1, 12, 12)
    assert one.unet.config.sample_size == 8


def test_asking_for_no_scheduler_is_refused(tmp_path):
    with pytest.raises(InputError, match="--schedulers names none"):
        cheap({"A": pipeline()}, tmp_path, schedulers=[])


def test_a_model_whose_weights_are_not_finite_has_no_rank(tmp_path):
    broken = pipeline(1)
    torch.nn.init.constant_(broken.unet.conv_out.bias, float("nan"))
    found = cheap({"a": pipeline(0), "broken": broken}, tmp_path, likelihood=LikelihoodSettings(4, 2, 2))
    whole, lost = found.cells
    assert np.isfinite(whole.quality.frechet).all()
    assert np.isnan([*lost.quality.frechet, *lost.quality.kernel, lost.quality.precision, lost.quality.recall]).all()
    assert lost.out_of_range == 1
    assert np.isfinite(found.likelihoods["a"].ode).all()
    assert np.isnan([*found.likelihoods["broken"].ode, *found.likelihoods["broken"].bound]).all()
    rows = [row for row in markdown_table(found).splitlines() if "broken" in row]
    assert len(rows) == 3
    assert all("not finite" in row for row in rows)
    assert not any("**" in row for row in rows)
