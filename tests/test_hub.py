"""Truth: what a stranger downloads from a small Hub on this machine, by the real client, in a process of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import stranger
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from PIL import Image
from precision import assert_same_images

from diffusers_ext import ClassConditionalPipeline
from diffusers_ext.reports import hub as hub_module
from diffusers_ext.reports.card import BEGIN, END, write_model_card
from diffusers_ext.reports.hub import HubPusher, pushed_files

MODEL = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}
# The module needs huggingface_hub alone: in a package of its own it spares each process the import of torch.
PRELUDE = f"""
import os, sys, types
from pathlib import Path
sys.modules["light"] = types.ModuleType("light")
sys.modules["light"].__path__ = [{str(Path(hub_module.__file__).parents[1])!r}]
import light.reports.hub as hub

def say(line):
    print(line, flush=True)

def pusher(repo_id="tester/model", private=None, token=None, attempts=3, wait=0.05):
    return hub.HubPusher(repo_id, Path("out"), private=private, token=token, attempts=attempts, wait=wait)
"""


def pipeline(kind=DDIMPipeline):
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        num_class_embeds=4 if kind is ClassConditionalPipeline else None,
    )
    return kind(unet=unet, scheduler=DDIMScheduler())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def out(saved, tmp_path):
    """A pipeline's folder `out` in the working directory of the processes that push."""
    shutil.copytree(saved, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def start(hub, folder, code, token=TOKEN):
    environment = hub.environment(folder / "hf-home", token)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=environment, text=True, **pipes)


def run_diffusers(hub, folder, code, token=TOKEN):
    """The output of a process that uses the Hub and diffusers."""
    done = stranger.run(code, cwd=folder, env=hub.environment(folder / "hf-home", token))
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


def run(hub, folder, code, token=TOKEN):
    """The output of a process that uses the Hub."""
    process = start(hub, folder, code, token)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert TOKEN not in output
    return output


def push(hub, folder, rest="", **arguments):
    """Push `out` in a process of its own; what `finish` returned."""
    options = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    code = f"""{PRELUDE}
p = pusher({options})
p.push(Path("out"), "the model")
{rest}
say("finished: " + repr(p.finish(50)))
"""
    (line,) = re.findall(r"^finished: (.*)$", run(hub, folder, code), re.MULTILINE)
    return eval(line)


def run_command(hub, folder, message):
    """Run the command that a message ends with, as the user would."""
    scripts = str(Path(sys.executable).parent)
    environment = hub.environment(folder / "hf-home")
    environment["PATH"] = os.pathsep.join([scripts, environment["PATH"]])
    subprocess.run(message.splitlines()[-1].strip(), shell=True, check=True, cwd=folder, env=environment)


def content(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def card(folder, **changes):
    arguments = {
        "name": "tester/model",
        "arguments": {"learning_rate": 1e-4, "seed": 3},
        "command": "accelerate launch train.py --seed 3",
        "data": "four digits",
        "metrics": {},
        "sample": None,
        "pipeline_class": "DDIMPipeline",
        "needs_package": False,
        "paper": ("A paper", "2302.09057"),
    }
    return write_model_card(folder, **arguments | changes)


# --- round trips ------------------------------------------------------------------------------------------------------

SAMPLE = """
import numpy as np, torch
labels = {"class_labels": [1, 2]} if hasattr(pipe, "num_classes") else {"batch_size": 2}
images = pipe(**labels, num_inference_steps=3, generator=torch.Generator().manual_seed(5), output_type="np").images
"""


def samples(pipe):
    scope = {"pipe": pipe}
    exec(SAMPLE, scope)
    return scope["images"]


def test_the_server_takes_and_gives_what_diffusers_pushes_and_loads(hub, out, tmp_path):
    code = f"""
from diffusers import DDIMPipeline, DiffusionPipeline
DDIMPipeline.from_pretrained("out").push_to_hub("tester/model", private=True)
pipe = DiffusionPipeline.from_pretrained("tester/model")
{SAMPLE}
np.save("images.npy", images)
"""
    run_diffusers(hub, tmp_path, code)
    assert hub.private("tester/model")
    assert set(hub.files("tester/model")) == MODEL | {"README.md"}
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert hub.files("tester/model")[weights] == (out / weights).read_bytes()
    assert_same_images(np.load(tmp_path / "images.npy"), samples(DDIMPipeline.from_pretrained(out)))
    exists = "from huggingface_hub import HfApi\nprint(HfApi().repo_exists('tester/model'))"
    assert run(hub, tmp_path, exists, token=None).split() == ["False"]


def clutter(folder):
    """What lies around a pipeline while it is trained, none of which inference needs."""
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    for path in (
        "checkpoint-1/optimizer.safetensors",
        "checkpoint-1/model.safetensors",
        "logs/log.jsonl",
        "logs/events.out.tfevents.1",
        ".saving-x/unet/diffusion_pytorch_model.safetensors",
        "unet/.hidden/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/optimizer.pt",
        "unet/ema.pkl",
        "notes.txt",
        "other/model.safetensors",
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(weights, folder / path)
    for step in (1, 2):
        (folder / "samples").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (step, 0, 0)).save(folder / f"samples/step-{step:08d}.png")
        os.utime(folder / f"samples/step-{step:08d}.png", (step, step))
    (folder / "metrics.json").write_text(json.dumps({"loss": 0.5}))


@pytest.mark.parametrize("kind", [DDIMPipeline, ClassConditionalPipeline])
def test_a_stranger_who_follows_the_card_gets_the_same_samples(hub, tmp_path, kind):
    pipe, ours = pipeline(kind), kind is ClassConditionalPipeline
    out = tmp_path / "out"
    pipe.save_pretrained(out)
    clutter(out)
    grid = out / "samples/step-00000002.png"
    card(out, name="out", pipeline_class=kind.__name__, needs_package=ours, sample=grid)

    # Without a name it is the folder's, under the user's; the card's example gets the full name.
    assert push(hub, tmp_path, repo_id=None) is None
    pushed = hub.files("tester/out")
    assert set(pushed) == MODEL | {"README.md", "metrics.json", "samples/step-00000002.png"}
    assert not hub.private("tester/out")
    assert not list(out.glob(".pushing-*"))

    (example,) = re.findall(r"```python\n(.*?)```", pushed["README.md"].decode(), re.DOTALL)
    code = f"{example}\n{SAMPLE}\nnp.save('images.npy', images)\nimport sys; print('diffusers_ext' in sys.modules)"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert run_diffusers(hub, elsewhere, code, token=None).split()[-1] == str(ours)
    assert_same_images(np.load(elsewhere / "images.npy"), samples(pipe))


def test_only_the_newest_grid_stays(hub, out, tmp_path):
    (out / "samples").mkdir()
    first, second = (out / f"samples/step-{step:08d}.png" for step in (1, 2))
    first.write_bytes(b"first")
    rest = f"""
assert p.finish(50) is None
Path({str(second)!r}).write_bytes(b"second")
p.push(Path("out"), "more")
"""
    assert push(hub, tmp_path, rest) is None
    assert hub.commits("tester/model") == ["the model", "more"]
    assert set(hub.files("tester/model")) == MODEL | {"samples/step-00000002.png"}


def test_it_needs_the_client_of_the_hub_alone(hub, tmp_path):
    code = f"{PRELUDE}say(sorted({{'diffusers', 'diffusers_ext', 'torch', 'transformers'}} & set(sys.modules)))"
    assert run(hub, tmp_path, code).strip() == "[]"


# --- visibility -------------------------------------------------------------------------------------------------------


def test_a_private_repository_is_made_where_asked_for(hub, out, tmp_path):
    assert push(hub, tmp_path, private=True) is None
    assert hub.private("tester/model")
    assert set(hub.files("tester/model")) == MODEL


def test_nothing_goes_to_a_public_repository_where_a_private_one_was_asked_for(hub, out, tmp_path):
    hub.create("tester/model", private=False)
    message = push(hub, tmp_path, private=True)
    assert hub.files("tester/model") == {}
    assert not [r for r in hub.requests if "/lfs/" in r or "/commit/" in r]
    assert "tester/model" in message
    assert "is public" in message
    run_command(hub, tmp_path, message)
    assert hub.private("tester/model")
    assert hub.files("tester/model") == content(out)


def test_a_private_repository_stays_private_where_a_public_one_was_asked_for(hub, out, tmp_path):
    hub.create("tester/model", private=True)
    code = f"{PRELUDE}\np = pusher(private=False)\np.push(Path('out'), 'x')\nsay(p.finish(50))"
    assert "stays private" in run(hub, tmp_path, code)
    assert hub.private("tester/model")
    assert set(hub.files("tester/model")) == MODEL


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("POST /api/repos/create", {"status": 503, "times": 2}),
        ("POST .*/commit/", {"status": 503, "times": 2}),
        ("POST .*/commit/", {"status": 429}),
        ("POST .*/commit/", {"cut": True}),
        ("PUT /lfs/", {"cut": True}),  # tried again by the client itself
        ("PUT /lfs/", {"status": 507}),  # by us: the client wraps it in a RuntimeError
    ],
)
def test_what_may_pass_is_tried_again(hub, out, tmp_path, pattern, fault):
    hub.fail(pattern, **fault)
    assert push(hub, tmp_path) is None
    assert len([r for r in hub.requests if re.search(pattern, r)]) == fault.get("times", 1) + 1
    assert hub.files("tester/model") == content(out)


@pytest.mark.parametrize("pattern", ["POST /api/repos/create", "PUT /lfs/", "POST .*/commit/"])
def test_a_refusal_is_told_with_a_command_that_pushes(hub, out, tmp_path, pattern):
    clutter(out)
    card(out)
    fault = hub.fail(pattern, status=403, times=100)
    message = push(hub, tmp_path, token=TOKEN, rest="assert TOKEN not in repr(p)".replace("TOKEN", repr(TOKEN)))
    assert len([r for r in hub.requests if re.search(pattern, r)]) == 1
    assert "403" in message.splitlines()[0]
    assert "tester/model" in message.splitlines()[0]
    assert "Bearer ***" in message or pattern.startswith("PUT")  # the server repeated the token
    assert not hub.exists("tester/model") or hub.files("tester/model") == {}
    assert all(TOKEN.encode() not in data for data in content(out).values())

    fault.lift()
    run_command(hub, tmp_path, message)
    assert set(hub.files("tester/model")) == MODEL | {"README.md", "metrics.json", "samples/step-00000002.png"}
    assert hub.commits("tester/model") == ["the model"]


def test_a_hub_that_cannot_be_reached_is_given_up_with_a_message(out, tmp_path):
    with HubServer() as gone:
        pass
    message = push(gone, tmp_path, attempts=2, private=True)
    assert "refused" in message
    assert message.splitlines()[-1].strip().startswith("hf upload tester/model out .")
    assert "--private" in message.splitlines()[-1]


def test_offline_mode_is_a_refusal(hub, out, tmp_path):
    code = f"import os\nos.environ['HF_HUB_OFFLINE'] = '1'\n{PRELUDE}\np = pusher(attempts=9, wait=600)\n"
    assert "offline mode" in run(hub, tmp_path, f"{code}p.push(Path('out'), 'x')\nsay(p.finish(50))")
    assert hub.requests == []


# --- before there is work to lose -------------------------------------------------------------------------------------

LOGIN = f"{PRELUDE}\nargs = hub.HubArguments(push_to_hub=True, hub_model_id='tester/model')\n"
ASK = """
try:
    say(hub.make_pusher(args, Path("out"), True).repo_id)
except Exception as error:
    say(f"{type(error).__name__}: {error}")
"""


@pytest.mark.parametrize("token", [None, "hf_of_somebody_else"])
def test_who_is_not_logged_in_is_told_before_the_work(hub, out, tmp_path, token):
    said = run(hub, tmp_path, LOGIN + ASK, token=token)
    assert said.startswith("InputError: --push_to_hub: nothing could be pushed")
    assert "hf auth login" in said
    assert "somebody" not in said


def test_who_is_logged_in_goes_on_and_nothing_is_made_on_the_hub(hub, out, tmp_path):
    assert run(hub, tmp_path, LOGIN + ASK).strip() == "tester/model"
    assert hub.requests == ["GET /api/whoami-v2"]
    assert not hub.exists("tester/model")


def test_a_hub_that_cannot_be_reached_now_does_not_keep_anyone_from_training(out, tmp_path):
    with HubServer() as gone:
        pass
    said = run(gone, tmp_path, LOGIN + ASK)
    assert said.strip().endswith("tester/model")


def test_a_mirror_that_does_not_know_the_question_does_not_keep_anyone_from_training(hub, out, tmp_path):
    hub.fail("GET /api/whoami-v2", status=404)
    assert run(hub, tmp_path, LOGIN + ASK).strip().endswith("tester/model")


def test_offline_mode_is_refused_before_the_work(hub, out, tmp_path):
    said = run(hub, tmp_path, f"import os\nos.environ['HF_HUB_OFFLINE'] = '1'\n{LOGIN}{ASK}")
    assert said.startswith("InputError: --push_to_hub: nothing could be pushed")
    assert "offline mode" in said


def test_a_hub_that_does_not_answer_is_not_waited_for(hub, out, tmp_path):
    hub.fail("GET /api/whoami-v2", delay=3600)
    said = run(hub, tmp_path, f"{PRELUDE}\npusher().require_login(timeout=0.5)\nsay('goes on')")
    assert said.strip().endswith("goes on")


# --- slow servers: each test fixes the order of events, and measures no time ------------------------------------------


def read_line(process):
    return process.stdout.readline().strip()


def enter(process):
    """Let a process that waits in `input()` go on."""
    process.stdin.write("\n")
    process.stdin.flush()


def test_push_returns_while_the_server_is_silent_and_sends_what_was_there_then(hub, out, tmp_path):
    before = content(out)
    fault = hub.fail("POST /api/repos/create", delay=3600)
    code = f"{PRELUDE}\np = pusher()\np.push(Path('out'), 'x')\nsay('returned')\ninput()\nsay(p.finish(50))"
    process = start(hub, tmp_path, code)
    assert read_line(process) == "returned"
    assert fault.reached.wait(300)
    assert hub.requests == ["POST /api/repos/create"]  # and it has not been answered
    for name in ("unet/diffusion_pytorch_model.safetensors", "unet/config.json"):
        (out / "new").write_bytes(b"trained on")
        os.replace(out / "new", out / name)
    (out / "model_index.json").write_text("{}")
    fault.lift()
    assert process.communicate("\n", timeout=300)[0].strip() == "None"
    assert hub.files("tester/model") == before
    assert not list(out.glob(".pushing-*"))


def test_of_the_pushes_that_wait_only_the_newest_goes_up(hub, out, tmp_path):
    fault = hub.fail("POST /api/repos/create", delay=3600)
    code = f"""{PRELUDE}
p = pusher()
for name in ("first", "second", "third"):
    Path("out/metrics.json").write_text(name)
    p.push(Path("out"), name)
    say(name)
    input()
say(p.finish(50))
"""
    process = start(hub, tmp_path, code)
    assert read_line(process) == "first"
    assert fault.reached.wait(300)  # the first is under way
    for name in ("second", "third"):
        enter(process)
        assert read_line(process) == name
    fault.lift()
    assert process.communicate("\n", timeout=300)[0].strip() == "None"
    assert hub.commits("tester/model") == ["first", "third"]
    assert hub.files("tester/model")["metrics.json"] == b"third"


def test_a_push_that_waits_for_its_next_attempt_gives_way_to_a_newer_one(hub, out, tmp_path):
    fault = hub.fail("POST /api/repos/create", status=503)
    code = f"{PRELUDE}\np = pusher(wait=600)\np.push(Path('out'), 'first')\ninput()\np.push(Path('out'), 'second')\n"
    process = start(hub, tmp_path, f"{code}say(p.finish(50))")
    assert fault.reached.wait(300)
    assert process.communicate("\n", timeout=300)[0].splitlines()[-1] == "None"
    assert hub.commits("tester/model") == ["second"]


def test_a_server_that_hangs_does_not_keep_the_program_from_ending(hub, out, tmp_path):
    (out / "samples").mkdir()
    (out / "samples/step-00000001.png").write_bytes(b"a second large file")
    fault = hub.fail("PUT /lfs/", delay=3600, times=10)
    code = f"{PRELUDE}\np = pusher()\np.push(Path('out'), 'x')\ninput()\nsay(p.finish(0.1))"
    process = start(hub, tmp_path, code)
    assert fault.reached.wait(300)
    output, _ = process.communicate("\n", timeout=300)  # the server has not answered, and will not
    assert process.returncode == 0
    assert "waiting for the push to tester/model" in output
    assert "still under way after 0.1 seconds" in output
    assert not list(out.glob(".pushing-*"))
    fault.lift()
    run_command(hub, tmp_path, output)
    assert hub.files("tester/model") == content(out)


# --- without a network ------------------------------------------------------------------------------------------------


def test_the_constructor_checks_the_name_and_removes_what_a_killed_run_left(tmp_path):
    (tmp_path / ".pushing-x/unet").mkdir(parents=True)
    with pytest.raises(ValueError, match="a/b/c"):
        HubPusher("a/b/c", tmp_path, private=None, token=None)
    assert HubPusher("a/b", tmp_path, private=None, token=None).finish() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "name"), [("my model (2)", "my-model-2"), ("a--b..c.git", "a-b.c"), ("_x-", "_x"), ("...", "model")]
)
def test_the_folders_name_becomes_a_name_that_the_hub_takes(tmp_path, folder, name):
    assert HubPusher(None, tmp_path / folder, private=None, token=None).repo_id == name


def test_a_folder_that_nobody_could_load_is_not_pushed(tmp_path):
    with pytest.raises(FileNotFoundError, match="model_index"):
        HubPusher("a/b", tmp_path, private=None, token=None).push(tmp_path, "x")


def test_a_snapshot_that_cannot_be_written_is_told_and_does_not_stop_training(out, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    pusher = HubPusher("a/b", tmp_path / "file", private=None, token=None)
    pusher.push(out, "the model")
    assert "snapshot could not be written" in pusher.finish()
    assert f"hf upload a/b {out} ." in pusher.finish()


def test_the_newest_grid_is_the_one_written_last(out):
    clutter(out)
    os.utime(out / "samples/step-00000001.png", (9, 9))
    assert [f.name for f in pushed_files(out) if f.suffix == ".png"] == ["step-00000001.png"]


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_run_knows(out):
    clutter(out)
    metrics = {"loss": 0.123456789, "measured_on": "held-out images", "sigmas": [0.1, 10.0], "eps_mse": [0.5, 0.25]}
    path = card(
        out,
        arguments={"dataset_name": "owner/images", "pretrained_model_name_or_path": "google/ddpm", "use_ema": True},
        metrics=metrics,
        sample=out / "samples/step-00000002.png",
        license="apache-2.0",
    )
    loaded = ModelCard.load(path)
    assert loaded.data.to_dict() == {
        "library_name": "diffusers",
        "license": "apache-2.0",
        "datasets": ["owner/images"],
        "base_model": "google/ddpm",
        "tags": ["diffusers:DDIMPipeline", "image-generation", "arxiv:2302.09057"],
    }
    (picture,) = re.findall(r"!\[.*?\]\((.*?)\)", loaded.text)
    assert (out / picture).read_bytes() == (out / "samples/step-00000002.png").read_bytes()
    assert "[A paper](https://arxiv.org/abs/2302.09057)" in loaded.text
    for row in ("| loss | 0.123457 |", "| measured_on | held-out images |", "| 10 | 0.25 |", "| `use_ema` | `True` |"):
        assert row in loaded.text.splitlines()
    assert not list(out.glob(".card-*"))


def test_the_card_keeps_the_token_and_this_machine_to_itself(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/faces").mkdir(parents=True)
    secret = tmp_path / "secret"
    path = card(
        out,
        arguments={
            "hub_token": TOKEN,
            "cache_dir": str(secret / "cache"),
            "output_dir": str(out),
            "train_data_dir": "data/faces",
            "dataset_name": str(secret / "images.parquet"),
            "pretrained_model_name_or_path": str(secret / "start"),
            "preset": None,
            "learning_rate": 1e-4,
        },
        command=f"accelerate launch {secret}/train.py --hub_token {TOKEN} --hub-token={TOKEN} --output_dir={out} "
        f"--train_data_dir data/faces --cache_dir {secret}/cache --lr 1e-4",
        data=f"the images of {secret}/images.parquet",
    )
    text = path.read_text()
    assert TOKEN not in text
    assert str(tmp_path) not in text
    assert "hub_token" not in text
    assert "hub-token" not in text
    assert "cache" not in text
    assert "accelerate launch train.py --output_dir=out --train_data_dir faces --lr 1e-4" in text.splitlines()
    assert "| `pretrained_model_name_or_path` | `start` |" in text.splitlines()
    assert "| `train_data_dir` | `faces` |" in text.splitlines()
    assert "preset" not in text
    assert {"datasets", "base_model"}.isdisjoint(ModelCard.load(path).data.to_dict())


THEIRS = """---
license: mit  # as agreed
language: [en]
tags:
- ours
---

# Faces

Made for a talk. {}

Thanks to all.
"""


def test_a_card_that_exists_keeps_its_text_and_metadata(out):
    (out / "README.md").write_text(THEIRS.format("Long ago."))
    card(out, metrics={"loss": 1.5}, license=None)
    card(out, metrics={"loss": 2.5}, arguments={"dataset_name": "owner/images"})
    loaded, text = ModelCard.load(out / "README.md"), (out / "README.md").read_text()
    assert loaded.data.to_dict() == {
        "license": "mit",
        "language": ["en"],
        "tags": ["ours", "diffusers:DDIMPipeline", "image-generation", "arxiv:2302.09057"],
        "library_name": "diffusers",
        "datasets": ["owner/images"],
    }
    assert text.startswith("---\nlicense: mit  # as agreed\nlanguage: [en]\n")
    assert loaded.text.strip().startswith("# Faces\n\nMade for a talk. Long ago.\n\nThanks to all.\n\n" + BEGIN)
    assert text.count(BEGIN) == text.count(END) == 1
    assert "| loss | 2.5 |" in text
    assert "| loss | 1.5 |" not in text
    below = text + "\nA note below.\n"
    (out / "README.md").write_text(below)
    card(out, metrics={"loss": 3.5}, license="apache-2.0")
    text = (out / "README.md").read_text()
    assert text.endswith(END + "\n\nA note below.\n")
    assert ModelCard.load(out / "README.md").data.license == "apache-2.0"


def test_a_card_whose_metadata_cannot_be_read_is_not_replaced(out):
    (out / "README.md").write_text("---\nlicense: [\n---\nMine.\n")
    with pytest.raises(ValueError, match="the metadata of the model card cannot be read, correct it first"):
        card(out)
    assert (out / "README.md").read_text().endswith("Mine.\n")


def test_pushes_keep_the_card_of_the_repository(hub, out, tmp_path):
    code = f"""
from huggingface_hub import HfApi
HfApi().create_repo("tester/model")
HfApi().upload_file(path_or_fileobj={THEIRS.format("On the Hub.")!r}.encode(), path_in_repo="README.md",
                    repo_id="tester/model")
from pathlib import Path
from diffusers_ext.reports.hub import HubPusher
for message, license in (("one", None), ("two", None), ("three", "apache-2.0")):
    pusher = HubPusher("tester/model", Path("out"), private=None, token=None, license=license)
    pusher.push(Path("out"), message)
    assert pusher.finish(60) is None
"""
    card(out, metrics={"loss": 1.5})
    run(hub, tmp_path, code)
    text = hub.files("tester/model")["README.md"].decode()
    assert "Made for a talk. On the Hub.\n\nThanks to all." in text
    assert text.startswith("---\nlicense: apache-2.0")
    assert text.count(BEGIN) == 1
    assert "| loss | 1.5 |" in text
    assert hub.commits("tester/model")[-2:] == ["one", "three"]  # the second one changes nothing
