"""The benchmarks: their size, their command lines, how they time and measure memory, and one that draws. Truth: memory
and times that are known, and what the library draws and measures when it is called directly."""

import importlib.util
import sys
from pathlib import Path

import foreign
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from test_models import tiny_unet

from diffusers_ext.evaluation import Drawing, Evaluation, MeasureArguments, load_real_images, swap_scheduler
from diffusers_ext.extractors import make_extractor
from diffusers_ext.metrics import frechet_distance, jackknife

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHARED = ("bench", "trained")
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in SHARED)


@pytest.fixture
def load(monkeypatch):
    """A benchmark as a module, with `run(*argv)` to run it in this process as the command line would."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in SHARED:
        monkeypatch.delitem(sys.modules, name, raising=False)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

        def run(*argv):
            monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
            module.main()

        module.run = run
        return module

    yield load
    for name in SHARED:
        sys.modules.pop(name, None)


def test_they_stay_small():
    assert sum(len(path.read_text().splitlines()) for path in BENCHMARKS.glob("*.py")) <= 2150


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "first_step"])  # it has no flags
def test_help_shows_what_is_measured(load, capsys, name):
    module = load(name)
    with pytest.raises(SystemExit) as ended:
        module.run("--help")
    assert ended.value.code == 0
    assert module.__doc__.splitlines()[0] in capsys.readouterr().out


def test_flags_are_read_by_their_defaults(load, monkeypatch, capsys):
    flags = load("bench").flags
    defaults = {"n": 2, "times": [1.0, 0.5], "on": False, "name": None, "out": Path}

    def read(line, **more):
        monkeypatch.setattr(sys, "argv", ["script.py", *line.split()])
        return flags("What it does.", **defaults, **more)

    args, rest = read("--n 3 --times 1 2 --on --out a --learning_rate 0.1", rest=True)
    assert vars(args) == {"n": 3, "times": [1.0, 2.0], "on": True, "name": None, "out": Path("a")}
    assert rest == ["--learning_rate", "0.1"]
    assert vars(read("--out a")[0]) == {"n": 2, "times": [1.0, 0.5], "on": False, "name": None, "out": Path("a")}
    for line, message in (
        ("", "--out"),
        ("--out a --what 1", "unrecognized arguments: --what 1"),
        ("--out a --nam x", "unrecognized arguments: --nam x"),  # not taken for --name
        ("--out a --name y", "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            read(line, choices={"name": ("x",)})
        assert message in capsys.readouterr().err


def test_every_round_times_all_variants_and_ratios_are_of_one_round(load, monkeypatch):
    bench, calls, clock = load("bench"), [], [0.0]
    seconds = iter(range(1, 100))

    def variant(name, factor):
        def run():
            calls.append(name)
            clock[0] += factor * (next(seconds) if name == "base" else 1)

        return run

    variants = {"base": variant("base", 1), "same": variant("same", 5)}
    times = bench.in_turn(variants, rounds=4, warm_up=2, clock=lambda: clock[0])
    assert times == {"base": [3, 4, 5, 6], "same": [5] * 4}  # the first two rounds are left out
    assert all(set(calls[i : i + 2]) == set(variants) for i in range(0, 12, 2))
    assert bench.ratio([2, 6, 12], [1, 2, 3]) == "3.00 (2.00 to 4.00)"
    assert bench.ratio([3], [2], ".1f") == "1.5 (1.5 to 1.5)"


def test_the_peak_of_memory_is_that_of_what_lives_at_one_time(load):
    size = 2**20

    def run():
        kept = torch.empty(size)
        for _ in range(3):
            torch.empty(2 * size)  # freed at once
        return kept

    assert load("bench").peak_memory(run) == pytest.approx(3 * size * 4, rel=1e-3)


def test_a_benchmark_that_draws_measures_what_the_library_does(load, tmp_path):
    torch.manual_seed(0)
    DDIMPipeline(tiny_unet(), DDIMScheduler(timestep_spacing="trailing")).save_pretrained(tmp_path / "steps-1")
    data = ("--resolution", 8, "--max_train_samples", 200, "--max_validation_samples", 100)  # of the digits
    settings = ("--training_steps", 1, "--passes", 64, "--nfe", 2, "--num_samples", 80, *data)
    load("calibration_effect").run("--output_dir", tmp_path, *settings)

    found = Evaluation.load(tmp_path / "steps-1-DDIMScheduler" / "results.json")
    names = [cell.model.split(", bound")[0] for cell in found.cells]
    assert names == ["baseline", "64 passes, plain", "64 passes, ours", "64 passes, random"]

    pipeline = DDIMPipeline.from_pretrained(tmp_path / "steps-1")
    args = MeasureArguments(dataset_name="digits", max_train_samples=200, max_validation_samples=100, reference="train")
    real = load_real_images(args, 1, 8)
    training = {"train_images": real.training.images, "train_labels": real.training.labels}
    extractor = make_extractor("classifier", device="cpu", **training)
    drawing = Drawing.of(pipeline, swap_scheduler(pipeline, "DDIM"), 2, 80, batch_size=100)
    drawing.draw(tmp_path / "drawn")
    features = drawing.features(tmp_path / "drawn", extractor), extractor(real.held_out.images)
    expected = jackknife(frechet_distance, *features)
    # The calibrated scheduler without tables is the stock one.
    assert found.cells[0].quality.frechet == pytest.approx(expected, rel=1e-4)
    assert found.num_reference == 100
    assert found.num_floor == 80


def test_a_converted_checkpoint_is_measured_beside_the_known_figure(load, tmp_path, capsys):
    weights = foreign.Weights()
    foreign.ncsnpp(
        weights, torch.zeros(1, 3, 8, 8).double(), torch.ones(1).double(), fourier=False, residual_input=None
    )
    told = ("--resolution", 8, "--sde", "vp", "--known", "2.41, of another sampler")
    data = ("--dataset_name", "digits", "--max_train_samples", 200, "--max_validation_samples", 100)
    settings = ("--nfe", 2, "--num_samples", 80, "--extractor", "pixels", "--likelihood_images", 0, "--ode_images", 0)
    file = foreign.pth_file(tmp_path / "vp.pth", weights)
    load("converted").run(file, "--output_dir", tmp_path / "out", *told, *data, *settings)
    shown = capsys.readouterr().out
    assert "FID that the authors report: 2.41, of another sampler" in shown
    (cell,) = Evaluation.load(tmp_path / "out" / "results.json").cells
    assert f"{cell.quality.kernel.estimate:.3g}" in shown


@pytest.mark.slow  # five trainings in processes of their own
def test_a_text_to_image_model_is_made_and_tuned(load, tmp_path):
    """A few steps of each training, with a random autoencoder; the table has a row for each model."""
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image
    from diffusers import AutoencoderTiny

    blocks = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    layers = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)}
    AutoencoderTiny(latent_channels=4, **blocks, **layers).save_pretrained(tmp_path / "vae")
    features = Features({"image": Image(), "label": ClassLabel(names=list(load("text_to_image").CLASSES))})
    rows = {
        "image": [np.full((32, 32, 3), 3 * i, np.uint8) for i in range(64)],
        "label": [8 * (i % 2) for i in range(64)],
    }
    (tmp_path / "cifar").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "cifar" / "train.parquet")
    (tmp_path / "docs").mkdir()
    load("text_to_image").run(
        *("--cifar10", tmp_path / "cifar", "--autoencoder", tmp_path / "vae", "--minutes", 0.001, "--samples", 20),
        *("--output_dir", tmp_path / "out", "--docs", tmp_path / "docs", "--train_batch_size", 4),
        *("--num_inference_steps", 2, "--max_validation_samples", 4),
    )
    table = (tmp_path / "out" / "evaluation" / "table.md").read_text()
    for name in ("before", "LoRA, plain", "LoRA, consistency", "LoRA, observation"):
        assert f"| {name} | " in table
    assert {file.name for file in (tmp_path / "docs").iterdir()} == {"text_to_image.png", "text_to_image_lora.png"}
