"""What README says is true: its Python and its commands run, its files exist, its length is kept."""

import json
import re
import shlex
from pathlib import Path

import foreign
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from PIL import Image as Picture
from test_models import tiny_unet
from test_wrong_input import KINDS
from tiny_pipelines import tiny

from diffusers_ext import CalibratedDDPMScheduler, Calibration
from diffusers_ext.commands import parse_arguments

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_in_the_readme_runs(code):
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["loss"].isfinite()
    assert scope["unet"].conv_in.weight.grad.abs().sum() > 0


def test_files_named_in_the_readme_exist():
    named = re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"(?:training|benchmarks)/\w+\.py", README)
    assert named
    assert [n for n in named if not (ROOT / n).exists()] == []


COMMANDS = re.findall(r"^diffusers-ext ([\w-]+)((?:.*\\\n)*.*)", README, re.MULTILINE)


def test_commands_in_the_readme_have_arguments_that_exist():
    assert len(COMMANDS) == len(re.findall(r"^diffusers-ext", README, re.MULTILINE)) >= 7
    for name, command in COMMANDS:
        parse_arguments(KINDS[name.replace("-", "_")], shlex.split(command.replace("\\\n", " ")))


def photos(folder, n, size):
    """A folder of pictures with captions."""
    folder.mkdir(parents=True)
    lines = []
    for i, values in enumerate(np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)):
        Picture.fromarray(values).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"photo {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def cifar10(folder):
    """The layout of the data set of this name on the Hub, with noise for images."""
    features = Features({"img": Image(), "label": Value("int64")})
    for split, n in (("train", 80), ("test", 40)):
        values = np.random.default_rng(n).integers(0, 256, (n, 32, 32, 3), np.uint8)
        rows = {"img": [Picture.fromarray(v) for v in values], "label": [i % 10 for i in range(n)]}
        (folder / "plain_text").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows, features).to_parquet(folder / "plain_text" / f"{split}-00000-of-00001.parquet")


FEWER = {  # what comes later on a command line wins
    "train-consistency": "--max_train_steps 1 --train_batch_size 2 --max_validation_samples 4 --max_train_samples 16 "
    "--num_validation_images 0 --report_to none",
    "evaluate": "--nfe 2 --num_samples 24 --extractor pixels --likelihood_images 0 --ode_images 0",
    "calibrate": "--num_levels 2 --train_batch_size 16",
    "fit-bridge": "--train_batch_size 16",
}


def test_commands_of_the_readme_run_when_they_are_pasted(load_script, tmp_path, monkeypatch):
    """In a folder where what they name on the Hub lies, in small: each as it stands, but for fewer steps and images."""
    monkeypatch.chdir(tmp_path)
    rgb = {"sample_size": 32, "in_channels": 3, "out_channels": 3}
    for name in ("google/ddpm-cifar10-32", "you/ddpm-tuned"):
        DDPMPipeline(tiny_unet(**rgb), DDPMScheduler()).save_pretrained(name)
    tiny("sdxl").save_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
    cifar10(Path("uoft-cs/cifar10"))
    photos(Path("you/photos"), 16, 16)
    weights, noise = foreign.Weights(), torch.zeros(1, 3, 32, 32).double()
    foreign.edm_unet(weights, noise, torch.ones(1).double())
    precond = {"precond": "VPPrecond", "attributes": {"beta_d": 19.9, "beta_min": 0.1}}
    foreign.edm_file(Path("edm-cifar10-32x32-uncond-vp.pkl"), weights, size=32, **precond)
    made = []
    for name, command in COMMANDS:
        words = shlex.split(command.replace("\\\n", " "))
        fewer = FEWER.get(name, "").split() + (["--resolution", "16"] if "1024" in words else [])
        made += [(name, words[words.index("--output_dir") + 1])] if "--output_dir" in words else []
        load_script(name.replace("-", "_")).run(*words, *fewer)
    assert [name for name, folder in made if not any(Path(folder).iterdir())] == []
    (line,) = re.findall(r"Then `(pipe.scheduler = .*)`\.", README)
    scope = {"CalibratedDDPMScheduler": CalibratedDDPMScheduler, "Calibration": Calibration}
    scope["pipe"] = DiffusionPipeline.from_pretrained("google/ddpm-cifar10-32")
    exec(line, scope)
    assert len(scope["pipe"](batch_size=2, num_inference_steps=2).images) == 2


@pytest.mark.parametrize(("name", "lines"), [("README.md", 120), ("CONTRIBUTING.md", 60)])
def test_documents_stay_short(name, lines):
    assert len((ROOT / name).read_text().splitlines()) <= lines
