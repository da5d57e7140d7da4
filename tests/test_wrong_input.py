"""Wrong input of all scripts: each row ends with a message that has these words, before anything is written.

Rows are run as the command line would run them, in this process. What fails while the arguments are read needs no data
and no model; the others get tiny ones, which are made once.
"""

import importlib
import json
import shutil
import sys
from dataclasses import fields
from math import inf
from typing import get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMPipeline, DDIMScheduler, DDPMPipeline, EDMEulerScheduler
from PIL import Image
from test_models import tiny_unet

from diffusers_ext import ClassConditionalPipeline, ReflectedPipeline, ReflectedScheduler
from diffusers_ext.fields import range_of

TRAINING = ("train_consistency", "train_observation", "train_reflected", "train_short_time")
CLASSES = {
    "train_consistency": "ConsistencyArguments",
    "train_observation": "ObservationArguments",
    "train_reflected": "ReflectedArguments",
    "train_short_time": "ShortTimeArguments",
    "calibrate": "CalibrationArguments",
    "fit_bridge": "FitArguments",
    "evaluate": "ModelArguments",
    "convert": "ConvertArguments",
}


WITH_DATA = [name for name in CLASSES if name != "convert"]
SCRIPTS = {name: importlib.import_module(f"diffusers_ext.commands.{name}") for name in CLASSES}
KINDS = {name: getattr(SCRIPTS[name], kind) for name, kind in CLASSES.items()}

# --- what is there ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models, images and files that are right or wrong in one way each."""
    place = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    images = place / "images"
    images.mkdir()
    for i in range(40):
        Image.fromarray(np.full((8, 8), 6 * i, np.uint8)).save(images / f"{i}.png")
    for name, unet, scheduler in (
        ("model", tiny_unet(), DDIMScheduler()),
        ("other", tiny_unet(), DDIMScheduler()),
        ("edm", tiny_unet(), EDMEulerScheduler()),
        ("colour", tiny_unet(in_channels=3, out_channels=3), DDIMScheduler()),
    ):
        kind = DDPMPipeline if name == "edm" else DDIMPipeline
        one = kind(unet, DDIMScheduler())
        one.register_modules(scheduler=scheduler)
        one.save_pretrained(place / name)
    ClassConditionalPipeline(tiny_unet(num_class_embeds=11), DDIMScheduler(), null_class=10).save_pretrained(
        place / "labelled"
    )
    ReflectedPipeline(tiny_unet(), ReflectedScheduler()).save_pretrained(place / "reflected")
    (place / "file").write_text("text")
    (place / "empty").mkdir()
    (place / "link").symlink_to(place / "nowhere")
    (place / "broken").mkdir()
    (place / "broken" / "model_index.json").write_text("{")
    (place / "same").symlink_to(place / "model")
    for name, weights in (("cut", b"\0" * 100), ("text", b"weights"), ("none", None)):
        shutil.copytree(place / "model", place / name)
        file = place / name / "unet" / "diffusion_pytorch_model.safetensors"
        file.unlink() if weights is None else file.write_bytes(weights)
    shutil.copytree(place / "model", place / "shape")
    tiny_unet(block_out_channels=(8, 32)).save_config(place / "shape" / "unet")
    shutil.copytree(place / "model", place / "class")
    index = json.loads((place / "class" / "model_index.json").read_text()) | {"unet": ["diffusers", "NoSuchModel"]}
    (place / "class" / "model_index.json").write_text(json.dumps(index))
    (place / "nothing").mkdir()
    (place / "nothing" / "model_index.json").write_text("{}")
    tiny_unet().save_config(place / "config")
    AutoencoderKL().save_config(place / "vae")
    run = place / "run"
    (run / "logs").mkdir(parents=True)
    (run / "logs" / "log.jsonl").write_text("{}\n")
    return place


def files(folder):
    return sorted((str(f), f.stat().st_mtime_ns) for f in folder.rglob("*") if f.is_file())


def check(script, argv, words, place, out, monkeypatch, capsys):
    """Run a script as its command line would, and look at how it ends."""
    argv = [str(word).replace("{place}", str(place)) for word in argv]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
    before = files(place)
    with pytest.raises(SystemExit) as ended:
        SCRIPTS[script].main()
    message = f"{capsys.readouterr().err} {ended.value}"
    assert ended.value.code not in (0, None)
    for word in words.split("|"):
        assert word.strip() in message, message[-600:]
    assert "error: " in message
    assert files(place) == before
    assert not out.exists() or files(out) == []


# --- numbers: each field that a script declares, with each kind of wrong value ----------------------------------------

# Any finite number is right for these.
FREE = {
    "sigma_log_mean": "the logarithm of a noise level",
    "guidance_scale": "0 is the unconditional model, and a negative one guides away",
}


def numeric(kind):
    """Return the fields that hold a number, with its type."""
    for one, type_ in ((one, get_type_hints(kind)[one.name]) for one in fields(kind)):
        types = {type_, *get_args(type_)} if get_origin(type_) is not list else set()
        if found := types & {int, float}:
            yield one, found.pop()


def test_every_number_has_a_range():
    for kind in KINDS.values():
        for one, _ in numeric(kind):
            assert str(range_of(one)) or one.name in FREE, f"{one.name} of {kind.__name__} has no range"


def test_every_range_holds_its_default_and_is_in_the_help(capsys, monkeypatch):
    for script, kind in KINDS.items():
        monkeypatch.setattr(sys, "argv", [script, "--help", "all"])
        with pytest.raises(SystemExit):
            SCRIPTS[script].main()
        shown = " ".join(capsys.readouterr().out.split())
        for one, _ in numeric(kind):
            assert one.default is None or one.default in range_of(one)
            assert not str(range_of(one)) or f"[{range_of(one)}]" in shown


def wrong_numbers(one, type_):
    """Return wrong values of a field, and words of the message."""
    allowed, message = range_of(one), f"--{one.name} must be {range_of(one)}".rstrip()
    whole = type_ is int
    if allowed.above is not None:
        yield f"{allowed.above:g}", message
    if allowed.at_least is not None:
        yield f"{allowed.at_least - 1:d}" if whole else f"{allowed.at_least - 0.5:g}", message
    if allowed.below is not None:
        yield f"{allowed.below:g}", message
    if allowed.at_most not in (None, inf):
        yield f"{allowed.at_most + 1:d}" if whole else f"{allowed.at_most * 1.5:g}", message
    if whole:
        yield "2.5", f"--{one.name}|invalid int value: '2.5'"
    else:
        yield "nan", message
        yield "-inf", message
        if allowed.at_most is None:
            yield "inf", message
    yield "many", f"--{one.name}|invalid {type_.__name__} value: 'many'"


def number_rows():
    """Return a row for each field and wrong value; a field that several scripts inherit is tried in one of them."""
    seen = set()
    for script, kind in KINDS.items():
        for one, type_ in numeric(kind):
            declared = one.name, one.metadata["help"], one.default
            if declared not in seen:
                seen.add(declared)
                yield from ((script, [f"--{one.name}={value}"], words) for value, words in wrong_numbers(one, type_))


NUMBERS = list(number_rows())


# --- the form of the command line -------------------------------------------------------------------------------------

WORDS = [
    ("train_consistency", ["--learning_rte", "1"], "unknown argument '--learning_rte'; did you mean learning_rate?"),
    ("train_observation", ["--observation_wight=1"], "'--observation_wight'; did you mean observation_weight?"),
    ("train_reflected", ["--sigma_maximum", "1"], "unknown argument '--sigma_maximum'"),
    ("train_short_time", ["--diffusion_time", "1"], "did you mean max_diffusion_time?"),
    ("calibrate", ["--toleranz", "1"], "did you mean tolerance?"),
    ("fit_bridge", ["--bridge_ranks", "1"], "did you mean bridge_rank?"),
    ("evaluate", ["--pretrained_model_name_or_path", "a", "--scheduler=DDIM"], "did you mean schedulers?"),
    ("convert", ["--sde", "vesde"], "invalid choice: 'vesde'"),
    ("convert", ["--output_dir", "pipe", "model.pkl"], "there is no file model.pkl"),
    ("convert", ["--file", "a.pkl", "--output_dir", "pipe", "model.pkl"], "unknown argument 'model.pkl'"),
    ("convert", ["--file", "https://somewhere/model.pkl"], "download the file first"),
    ("convert", ["--file", "{place}/images"], "is a folder: name the file in it"),
    ("convert", ["--output_dir", "pipe"], "name the file: convert FILE --output_dir pipeline"),
    ("convert", ["--file", "nowhere.pkl"], "there is no file nowhere.pkl"),
    ("convert", ["--file", "{place}/file"], "file is "),
    ("convert", ["--file", "model.pkl", "--beta_shedule", "linear"], "did you mean beta_schedule?"),
    ("train_consistency", ["--learning", "1"], "unknown argument '--learning'"),  # no abbreviations
    ("train_consistency", ["faces"], "unknown argument 'faces'"),
    ("train_consistency", ["--max_train_steps", "10", "20"], "unknown argument '20'"),
    ("calibrate", ["--seed"], "--seed|expected one argument"),
    ("train_consistency", ["--config"], "--config|expected one argument"),
    ("train_consistency", ["--preset"], "--preset|expected one argument"),
    ("evaluate", ["--pretrained_model_name_or_path"], "expected at least one argument"),
    ("evaluate", ["--names"], "--names|expected at least one argument"),
    ("train_consistency", ["--use_ema", "maybe"], "--use_ema|Truthy value expected: got maybe"),
    ("train_consistency", ["--no_use_ema=1"], "ignored explicit argument"),
    ("fit_bridge", ["--report=perhaps"], "Truthy value expected: got perhaps"),
    ("calibrate", ["--plain=2"], "Truthy value expected: got 2"),
    ("train_consistency", ["--mixed_precision", "fp32"], "invalid choice: 'fp32'"),
    ("train_consistency", ["--mixed_precision", "fp8"], "invalid choice: 'fp8'"),
    ("train_consistency", ["--hub_strategy", "every_step"], "invalid choice: 'every_step'"),
    ("train_consistency", ["--rollout", "heun"], "invalid choice: 'heun'"),
    ("train_observation", ["--projection", "ddim"], "invalid choice: 'ddim'"),
    ("train_short_time", ["--bridge", "vae"], "invalid choice: 'vae'"),
    ("fit_bridge", ["--bridge", "linear"], "invalid choice: 'linear'"),
    ("calibrate", ["--torch_dtype", "float64"], "invalid choice: 'float64'"),
    ("evaluate", ["--torch_dtype", "half"], "invalid choice: 'half'"),
    ("evaluate", ["--reference", "validation"], "invalid choice: 'validation'"),
    ("train_consistency", ["--lr_scheduler", "cosinus"], "--lr_scheduler 'cosinus' is not one of constant"),
    ("train_reflected", ["--lr_scheduler", "piecewise_constant"], "is not one of constant"),
    ("train_consistency", ["--preset", "cifar100"], "there is no preset 'cifar100'; presets: digits"),
    ("evaluate", ["--preset", "imagenet"], "there is no preset 'imagenet'"),
    *((script, [f"--{name}", ""], f"--{name} is empty") for script, name in (
        *(("train_consistency", "dataset_name"), ("train_reflected", "output_dir"), ("calibrate", "train_data_dir")),
        *(("fit_bridge", "pretrained_model_name_or_path"), ("evaluate", "extractor"), ("calibrate", "hub_model_id")),
        *(("train_short_time", "resume_from_checkpoint"), ("train_observation", "train_split")),
    )),
]  # fmt: skip

# --- arguments that contradict each other -----------------------------------------------------------------------------

PAIRS = [
    ("train_consistency", ["--sigma_width_relative", "--sigma_width", "1"], "--sigma_width must be below 1"),
    ("train_observation", ["--sigma_width_relative", "--sigma_width", "1.5"], "--sigma_width must be below 1"),
    ("train_reflected", ["--sigma_min", "2", "--sigma_max", "1"], "--sigma_min must be below --sigma_max"),
    ("train_reflected", ["--sigma_min", "1", "--sigma_max", "1"], "--sigma_min must be below --sigma_max"),
    ("train_observation", ["--frechet_samples", "1"], "--frechet_samples 1: a covariance needs 2 at least"),
    ("train_observation", ["--discriminator_channels", "64;128"], "--discriminator_channels must be like 64,128"),
    ("train_observation", ["--discriminator_channels", "64,0"], "--discriminator_channels must be like 64,128"),
    ("train_observation", ["--discriminator_channels", "64,-8"], "--discriminator_channels must be like 64,128"),
    ("train_observation", ["--discriminator_channels", "64,,128"], "--discriminator_channels must be like 64,128"),
    ("fit_bridge", ["--report_times", "0.5,one"], "--report_times must be numbers"),
    ("fit_bridge", ["--report_times", "0,1"], "--report_times must be above 0"),
    ("fit_bridge", ["--report_times", "0.5,1.5"], "--report_times must be above 0 and at most 1"),
    ("fit_bridge", ["--report_times", "0.5,nan"], "--report_times must be above 0"),
    ("fit_bridge", ["--report_times", ","], "--report_times must be numbers"),
    ("fit_bridge", ["--pretrained_model_name_or_path", "a", "--bridge", "none"], "--bridge must be gaussian"),
    *(("evaluate", ["--pretrained_model_name_or_path", "a", *argv], words) for argv, words in (
        (["--nfe", "0"], "--nfe must be at least 1"),
        (["--nfe", "5,-1"], "--nfe must be at least 1"),
        (["--nfe", "5;10"], "--nfe must be whole numbers"),
        (["--nfe", "2.5"], "--nfe must be whole numbers"),
        (["--nfe", "5,"], "--nfe must be whole numbers"),
        (["--schedulers", "DDIM:eta"], "--schedulers 'DDIM:eta' must be NAME"),
        (["--schedulers", "DDIM,,own"], "must be NAME"),
        (["--schedulers", ":a=1"], "must be NAME"),
        (["--likelihood_images", "1"], "--likelihood_images must be 0, or at least 2"),
        (["--ode_images", "1"], "--ode_images must be 0, or at least 2"),
        (["--streaming"], "--streaming: an evaluation compares"),
        (["--names", "a", "b"], "--names must be 1 different names"),
    )),
    ("evaluate", ["--pretrained_model_name_or_path", "a", "b", "--names", "x", "x"], "2 different names"),
    ("evaluate", ["--pretrained_model_name_or_path", "a", "b", "--names", "x"], "2 different names"),
    ("evaluate", ["--pretrained_model_name_or_path", "a/b", "a/b"], "names the same model twice: a/b"),
    *(("evaluate", ["--pretrained_model_name_or_path", "{place}/model", *argv], "the same model twice") for argv in (
        ["{place}/../{name}/model"], ["{place}/model/"], ["{place}/same"], ["{place}/model", "--names", "x", "y"],
    )),
]  # fmt: skip

# --- the YAML file: (script, its text, words) -------------------------------------------------------------------------

YAML = [
    ("train_consistency", "", "must hold `name: value` lines"),
    ("train_consistency", "# nothing\n", "must hold `name: value` lines"),
    ("train_consistency", "- seed: 1\n", "must hold `name: value` lines"),
    ("train_consistency", "seed", "must hold `name: value` lines"),
    ("train_consistency", "seed: 1\n\tlearning_rate: 2\n", "cannot be read"),
    ("train_consistency", "seed: [1\n", "cannot be read"),
    ("train_consistency", "seed: 'one\n", "cannot be read"),
    ("train_consistency", "seed: *anchor\n", "cannot be read|undefined alias"),
    ("train_consistency", "? [a]\n: b\n", "cannot be read|unhashable key"),
    ("train_consistency", "seed: !!python/object/apply:os.getcwd []\n", "cannot be read|python/object"),
    ("train_consistency", "seed: 1\n---\nseed: 2\n", "cannot be read|another document"),
    ("train_consistency", "seed: 1\nseed: 2\n", "'seed' comes twice"),
    ("evaluate", "nfe: 5\nnum_samples: 20\nnfe: 10\n", "'nfe' comes twice"),
    ("train_observation", "{seed: 1, seed: 1}", "'seed' comes twice"),
    ("train_consistency", "learning_rat: 1\n", "unknown argument 'learning_rat'; did you mean learning_rate?"),
    ("train_reflected", "consistency_weight: 1\n", "unknown argument 'consistency_weight'"),
    ("calibrate", "learning_rate: 1\n", "unknown argument 'learning_rate'"),
    ("fit_bridge", "bridges: flow\n", "unknown argument 'bridges'; did you mean bridge?"),
    ("train_short_time", "--seed: 1\n", "unknown argument '--seed'"),
    ("train_consistency", "null: 3\n", "unknown argument None"),
    ("train_consistency", "1: 3\n", "unknown argument '1'"),
    ("train_consistency", "seed: {a: 1}\n", "seed must be a value and not a mapping"),
    ("train_consistency", "training:\n  seed: 1\n", "unknown argument 'training'"),
    ("evaluate", "names: {a: b}\n", "names must be a value and not a mapping"),
    ("train_consistency", "seed: [1, 2]\n", "seed must be one value and not a list"),
    ("train_consistency", "seed: [1]\n", "seed must be one value and not a list"),
    ("train_consistency", "use_ema: [true]\n", "use_ema must be one value and not a list"),
    ("evaluate", "nfe: [5, 10]\n", "nfe must be one value and not a list"),
    ("train_observation", "discriminator_channels: [64, 128]\n", "must be one value and not a list"),
    ("evaluate", "names: ['--push_to_hub']\n", "an item of the list names"),
    ("evaluate", "names: [a, --output_dir=/]\n", "an item of the list names|'--output_dir=/'"),
    ("evaluate", "names: [a, -x]\n", "an item of the list names|'-x'"),
    ("evaluate", "names: [a, null]\n", "an item of the list names|None"),
    ("evaluate", "names: [[a, b]]\n", "an item of the list names"),
    ("evaluate", "names: [{a: b}]\n", "an item of the list names"),
    ("evaluate", "pretrained_model_name_or_path: [--overwrite]\n", "an item of the list pretrained_model_name_or_path"),
    ("train_consistency", "config: other.yaml\n", "a file cannot name another one"),
    ("train_consistency", "preset: digitz\n", "there is no preset 'digitz'"),
    ("train_consistency", "mixed_precision: yes\n", "invalid choice: 'yes'"),
    ("train_consistency", "mixed_precision: false\n", "invalid choice: 'false'"),
    ("train_consistency", "use_ema: maybe\n", "Truthy value expected: got maybe"),
    ("train_consistency", "use_ema: 2\n", "Truthy value expected: got 2"),
    ("train_consistency", "seed: true\n", "invalid int value: 'true'"),
    ("train_consistency", "seed: 1.0\n", "invalid int value: '1.0'"),
    ("train_consistency", "max_train_steps: 1e3\n", "invalid int value: '1e3'"),
    ("train_consistency", "max_train_steps: 12:30\n", "invalid int value: '12:30'"),
    ("train_consistency", "max_train_steps: 0x10\n", "invalid int value: '0x10'"),
    ("train_consistency", "learning_rate: fast\n", "invalid float value: 'fast'"),
    ("train_consistency", "learning_rate: .nan\n", "invalid float value: '.nan'"),
    ("train_consistency", "learning_rate: nan\n", "--learning_rate must be above 0, got nan"),
    ("train_consistency", "learning_rate: -1\n", "--learning_rate must be above 0, got -1"),
    ("train_consistency", "learning_rate: 1,5\n", "invalid float value: '1,5'"),
    ("train_consistency", "dataset_name: ''\n", "--dataset_name is empty"),
    ("train_reflected", "output_dir: ''\n", "--output_dir is empty"),
    ("train_reflected", "output_dir: {place}/file\n", "is no folder"),
]

# --- folders and files: every script, for each has its own way to open them -------------------------------------------

FOLDERS = [
    (
        script,
        ["--pretrained_model_name_or_path", "{place}/model", "--dataset_name", "digits", "--output_dir", out],
        words,
    )
    for script in WITH_DATA
    for out, words in (
        ("{place}/file", "is no folder"),
        ("{place}/file/below", "/file is no folder"),
        ("{place}/model/model_index.json/a/b", "model_index.json is no folder"),
        ("{place}/link", "/link is no folder"),
    )
]
CONFIGS = [
    ("train_consistency", ["--config", "{place}/nowhere.yaml"], "nowhere.yaml cannot be read"),
    ("calibrate", ["--config", "{place}/model"], "/model cannot be read"),
    ("evaluate", ["--config", "{place}/images/0.png"], "0.png cannot be read"),
    ("fit_bridge", ["--config", ""], "cannot be read"),
]
MODELS = [
    (script, ["--dataset_name", "digits", "--pretrained_model_name_or_path", model], words)
    for script in WITH_DATA
    for model, words in (
        ("{place}/nowhere", "nowhere"),
        ("{place}/empty", "empty"),
        ("{place}/file", "file"),
        ("{place}/broken", "broken"),
        ("{place}/nothing", "nothing"),
        ("nobody/nothing-there", "nobody/nothing-there"),
    )
]
MODELS += [
    (script, ["--dataset_name", "digits", "--pretrained_model_name_or_path", f"{{place}}/{name}"], f"/{name}|{words}")
    for script in ("train_consistency", "calibrate", "evaluate")
    for name, words in (
        *(("cut", "could not be loaded"), ("text", "could not be loaded"), ("none", "could not be loaded")),
        *(("shape", "could not be loaded"), ("class", "NoSuchModel")),
    )
]
DIGITS = ["--dataset_name", "digits"]
MODEL = ["--pretrained_model_name_or_path", "{place}/model"]
NO_MODEL = [(script, DIGITS, "name the model") for script in WITH_DATA if script != "train_reflected"]
DATA = [
    (script, [*MODEL, *argv], words)
    for script in WITH_DATA
    if script not in ("train_reflected", "evaluate")
    for argv, words in (
        ([], "name the data"),
        (["--train_data_dir", "{place}/nowhere"], "nowhere is not a folder"),
        (["--train_data_dir", "{place}/empty"], "empty"),
        ([*DIGITS, "--train_split", "validation"], "the embedded digits have the splits train and test"),
        ([*DIGITS, "--image_column", "image"], "--image_column has no effect on the embedded digits"),
        ([*DIGITS, "--dataset_config_name", "mnist"], "--dataset_config_name has no effect"),
        ([*DIGITS, "--streaming"], "--streaming has no effect"),
        ([*DIGITS, "--train_data_dir", "{place}/images"], "both name the data"),
    )
]

# --- models, data and arguments that do not fit each other ------------------------------------------------------------

SCRATCH = ["--model_config_name_or_path", "{place}/config", *DIGITS]
FITS = [
    *(("train_consistency", [*MODEL, *DIGITS, *argv], f"--{argv[0][2:]} is for training from scratch") for argv in (
        ["--scheduler", "DDPMScheduler"], ["--prediction_type", "sample"], ["--beta_schedule", "linear"],
        ["--class_conditional"], ["--model_config_name_or_path", "{place}/config"],
    )),
    ("train_consistency", [*SCRATCH, "--scheduler", "DDIM"], "diffusers has no scheduler 'DDIM'"),
    ("train_consistency", [*SCRATCH, "--prediction_type", "noise"], "noise"),
    ("train_consistency", [*SCRATCH, "--beta_schedule", "steep"], "steep"),
    ("train_consistency", [*SCRATCH, "--scheduler", "EDMEulerScheduler", "--beta_schedule", "linear"],
     "EDMEulerScheduler takes no beta_schedule"),
    ("train_consistency", ["--model_config_name_or_path", "{place}/nowhere", *DIGITS], "--model_config_name_or_path"),
    ("train_consistency", ["--model_config_name_or_path", "{place}/images", *DIGITS], "--model_config_name_or_path"),
    ("train_consistency", ["--pretrained_model_name_or_path", "{place}/reflected", *DIGITS], "train_reflected.py"),
    ("train_observation", ["--pretrained_model_name_or_path", "{place}/reflected", *DIGITS], "train_reflected.py"),
    ("train_reflected", [*MODEL, *DIGITS], "this script trains models of a ReflectedScheduler"),
    ("train_reflected", [*SCRATCH, "--algorithm_type", "euler"], "algorithm_type 'euler' is not one of"),
    ("train_reflected", [*SCRATCH, "--scheduler", "DDIMScheduler"], "DDIMScheduler"),
    ("train_short_time", ["--pretrained_model_name_or_path", "{place}/edm", *DIGITS], "no short-time EDM"),
    ("train_short_time", [*MODEL, *DIGITS, "--max_diffusion_time", "1e-5"], "max_diffusion_time"),
    ("train_consistency", [*SCRATCH, "--resume_from_checkpoint", "{place}/nowhere"], "no checkpoint there"),
    ("train_consistency", [*SCRATCH, "--output_dir", "{place}/run"], "holds another run"),
    ("train_consistency", [*SCRATCH, "--report_to", "paper"], "paper"),
    ("train_consistency", [*SCRATCH, "--dataset_name", "{place}/images", "--streaming"], "--max_train_steps"),
    ("fit_bridge", ["--pretrained_model_name_or_path", "{place}/edm", *DIGITS], "EDMEulerScheduler|--scheduler"),
    ("fit_bridge", [*MODEL, *DIGITS, "--scheduler", "EDMEulerScheduler"], "no short-time EDMEulerScheduler"),
    ("fit_bridge", [*MODEL, *DIGITS, "--scheduler", "DDIM"], "no short-time DDIM;"),
    ("fit_bridge", ["--pretrained_model_name_or_path", "{place}/reflected", *DIGITS], "ReflectedScheduler"),
    ("fit_bridge", [*MODEL, *DIGITS, "--max_diffusion_time", "1e-5"], "reach a timestep"),
    ("fit_bridge", [*MODEL, *DIGITS, "--num_inference_steps", "5000"], "--num_inference_steps"),
    ("fit_bridge", [*MODEL, "--train_data_dir", "{place}/images", "--report"], "--report needs held-out images"),
    ("fit_bridge", [*MODEL, *DIGITS, "--bridge_rank", "65"], "rank must be"),
    ("calibrate", ["--pretrained_model_name_or_path", "{place}/reflected", *DIGITS], "reflected process"),
    ("calibrate", [*MODEL, *DIGITS, "--per_class"], "--per_class: the model takes no class labels"),
    ("calibrate", [*MODEL, *DIGITS, "--max_train_samples", "10"], "fewer than a batch of 64"),
    ("calibrate", [*MODEL, *DIGITS, "--max_train_samples", "16", "--train_batch_size", "16"], "a mean error needs 32"),
    ("calibrate", ["--pretrained_model_name_or_path", "{place}/labelled", *DIGITS, "--per_class", "--max_train_samples",
     "256"], "256 images in whole batches are too few: a mean error needs 32 for each of 10 classes"),
    ("calibrate", ["--pretrained_model_name_or_path", "{place}/labelled", "--train_data_dir", "{place}/images",
     "--train_batch_size", "8", "--per_class"], "too few: a mean error needs 32 for each of 10 classes"),
    ("calibrate", [*MODEL, *DIGITS, "--caption_column", "text"], "no effect on the embedded digits"),
    ("evaluate", [*MODEL], "name the data"),
    ("evaluate", [*MODEL, *DIGITS, "--guidance_scale", "2"], "no null class to guide away from"),
    ("evaluate", [*MODEL, "{place}/colour", *DIGITS], "different images, which cannot be compared"),
    ("evaluate", [*MODEL, *DIGITS, "--schedulers", "Nothing"], "there is no NothingScheduler"),
    ("evaluate", [*MODEL, *DIGITS, "--schedulers", "EDMEuler"], "the pipeline cannot take EDMEulerScheduler"),
    ("evaluate", [*MODEL, *DIGITS, "--schedulers", "DDIM:order=2"], "DDIMScheduler has no setting order"),
    ("evaluate", [*MODEL, *DIGITS, "--schedulers", "CalibratedDDIM"], "calibrat"),
    ("evaluate", [*MODEL, *DIGITS, "--extractor", "resnet", "--max_train_samples", "50"], "unknown extractor 'resnet'"),
    ("evaluate", [*MODEL, *DIGITS, "--extractor", "nowhere:Net", "--max_train_samples", "50"], "nowhere"),
    ("evaluate", [*MODEL, *DIGITS, "--max_validation_samples", "30"], "has 15 images, and an interval needs 20"),
    ("evaluate", [*MODEL, "--train_data_dir", "{place}/images"], "--validation_split"),
    ("evaluate", [*MODEL, *DIGITS, "--caption_column", "text"], "no effect on the embedded digits"),
    ("calibrate", [*MODEL, *DIGITS, "--push_to_hub", "--hub_model_id", "a/b/c"], "--hub_model_id"),
    ("fit_bridge", [*MODEL, *DIGITS, "--push_to_hub", "--hub_model_id", "a b"], "--hub_model_id"),
]  # fmt: skip

ROWS = [*NUMBERS, *WORDS, *PAIRS, *FOLDERS, *CONFIGS, *MODELS, *NO_MODEL, *DATA, *FITS]


def named(rows):
    for script, argv, words in rows:
        shown = " ".join(argv) if isinstance(argv, list) else argv
        yield pytest.param(script, argv, words, id=f"{script} {shown!r:.90}")


@pytest.mark.parametrize(("script", "argv", "words"), named(ROWS))
def test_wrong_input_ends_with_a_message(script, argv, words, place, tmp_path, monkeypatch, capsys):
    argv = [word.replace("{name}", place.name) for word in argv]
    argv = argv if "--output_dir" in argv else ["--output_dir", tmp_path / "out", *argv]
    check(script, argv, words, place, tmp_path / "out", monkeypatch, capsys)


@pytest.mark.parametrize(("script", "text", "words"), named(YAML))
def test_a_wrong_file_ends_with_a_message(script, text, words, place, tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_text(text.replace("{place}", str(place)))
    own = ["--output_dir", tmp_path / "out"] if "output_dir" not in text else []
    check(script, ["--config", tmp_path / "run.yaml", *own], words, place, tmp_path / "out", monkeypatch, capsys)


def test_there_are_300_rows_and_no_two_alike():
    keys = {json.dumps((script, argv)) for script, argv, _ in [*ROWS, *YAML]}
    assert len(keys) == len(ROWS) + len(YAML) >= 300
