"""The loop as a user meets it. Truth: the run that was not interrupted, and the run on one device."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import stranger
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from hub_server import HubServer
from PIL import Image
from precision import assert_resumed, assert_same_numbers, assert_same_training
from safetensors.torch import load_file
from test_models import tiny_unet
from test_train_consistency import SCRIPT, assert_same_weights, log_of, script, small, weights_of  # noqa: F401

from diffusers_ext.commands import parse_arguments
from diffusers_ext.data.batches import Position, micro_batches
from diffusers_ext.data.images import Transform
from diffusers_ext.data.sources import load_images
from diffusers_ext.errors import InputError
from diffusers_ext.subjects import Pixels
from diffusers_ext.training import TrainingArguments, TrainingLoop
from diffusers_ext.training.checkpoint import list_checkpoints, load_checkpoint, same_state, save_checkpoint


@pytest.fixture
def numbered(monkeypatch):
    """Twelve pictures in two parquet files; picture i is grey value 20 i; row 7 is damaged."""
    import datasets.config
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 seconds at the end of each epoch
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    with tempfile.TemporaryDirectory() as folder:  # pytest's own begins with test_, which `datasets` takes for a split
        for part in range(2):
            cells = [
                {"bytes": png(20 * i) if i != 7 else b"damaged", "path": None} for i in range(6 * part, 6 * part + 6)
            ]
            data = Dataset.from_dict({"image": cells, "label": [0, 1] * 3}, features=features)
            data.to_parquet(Path(folder) / f"train-{part:05d}-of-00002.parquet")
        yield folder


def png(value):
    import io

    file = io.BytesIO()
    Image.new("L", (8, 8), value).save(file, "PNG")
    return file.getvalue()


def replace_data(argv, *data):
    at = argv.index("--dataset_name")
    return [*argv[:at], *data, *argv[at + 2 :]]


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Send this process a signal in the middle of a step."""
    original, sent = TrainingLoop.update, []

    def update(self, loss, **kwargs):
        if self.step == step - 1 and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        original(self, loss, **kwargs)

    monkeypatch.setattr(TrainingLoop, "update", update)
    return lambda: monkeypatch.setattr(TrainingLoop, "update", original)


# --- resuming ---------------------------------------------------------------------------------------------------------

RUNS = {
    "plain": [],
    "accumulation and workers": ["--gradient_accumulation_steps", 2, "--dataloader_num_workers", 2],
    "class-conditional EDM": ["--class_conditional", "--scheduler", "EDMEulerScheduler"],
    "channels_last": ["--channels_last"],
    "warm-up, cosine, no ema": ["--lr_scheduler", "cosine", "--lr_warmup_steps", 3, "--no_use_ema"],
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_stopped_run_goes_on_to_the_same_result(script, small, tmp_path, monkeypatch, options):  # noqa: F811
    tiny_unet(dropout=0.3).save_config(tmp_path / "config")
    argv = [*small, *options, "--max_train_steps", 6, "--max_train_samples", 50]
    script.run(*argv, "--output_dir", tmp_path / "whole")
    go_on = stop_at(monkeypatch, 4)
    with pytest.raises(SystemExit) as stopped:
        script.run(*argv, "--output_dir", tmp_path / "parts")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert [f.name for f in list_checkpoints(tmp_path / "parts")] == ["checkpoint-00000004"]
    start = load_checkpoint(tmp_path / "parts" / "checkpoint-00000004")["model"]
    go_on()
    script.run(*argv, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "latest")
    assert_resumed(start, weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))
    losses = [
        [(r["step"], r["denoising"], r.get("consistency", 0.0), r["lr"]) for r in log_of(tmp_path / name) if "lr" in r]
        for name in ("whole", "parts")
    ]
    assert_same_numbers(*losses)
    assert [step for step, *_ in losses[0]] == list(range(1, 7))


def test_a_run_goes_on_bit_for_bit_where_mkl_is_reproducible():
    """The test above, in a process where it asks for the same bits."""
    only = f"{__file__}::test_a_stopped_run_goes_on_to_the_same_result"
    code = f"import sys, pytest; sys.exit(pytest.main([{only!r}, '-q', '-x', '-p', 'no:cacheprovider', '-k', 'warm']))"
    done = stranger.run(code)  # MKL is reproducible in a stranger
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


@pytest.mark.parametrize("threads", [0, 2])
def test_a_stream_goes_on_to_the_same_result_in_mid_epoch(script, small, tmp_path, monkeypatch, numbered, threads):  # noqa: F811
    data = ("--dataset_name", numbered, "--streaming", "--shuffle_buffer", 4, "--dataloader_num_workers", threads)
    argv = [*replace_data(small, *data), "--train_batch_size", 5, "--max_train_steps", 6, "--class_conditional"]
    script.run(*argv, "--output_dir", tmp_path / "whole")
    go_on = stop_at(monkeypatch, 3)
    with pytest.raises(SystemExit):
        script.run(*argv, "--output_dir", tmp_path / "parts")
    start = load_checkpoint(list_checkpoints(tmp_path / "parts")[-1])["model"]
    go_on()
    script.run(*argv, "--output_dir", tmp_path / "parts", "--resume_from_checkpoint", "latest")
    assert_resumed(start, weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))
    named = [r["unreadable"] for r in log_of(tmp_path / "parts") if "unreadable" in r]
    assert named
    assert all("UnidentifiedImageError" in name for name in named)


def test_a_checkpoint_of_another_run_is_refused(script, small, tmp_path):  # noqa: F811
    out = ["--output_dir", tmp_path / "out", "--checkpointing_steps", 1]
    script.run(*small, *out)
    for options, message in (
        (["--seed", 5], "seed was 0, is 5"),
        (["--prediction_type", "sample"], "prediction_type was None, is 'sample'"),
        (["--consistency_weight", 1], "consistency_weight was 10.0, is 1.0"),
        (["--gradient_accumulation_steps", 2], "images per step, over all devices was 8, is 16"),
    ):
        with pytest.raises(SystemExit, match=message):
            script.run(*small, *options, *out, "--resume_from_checkpoint", "latest")
    with pytest.raises(SystemExit, match=r"holds later checkpoints than .*1: checkpoint-00000002, checkpoint-00000003"):
        script.run(*small, *out, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-00000001")
    with pytest.raises(SystemExit, match=r"no checkpoint there; found: checkpoint-00000001, .*3"):
        script.run(*small, *out, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-7")


def test_a_folder_with_another_run_is_not_overwritten_unasked(script, small, tmp_path):  # noqa: F811
    out = ["--output_dir", tmp_path / "out", "--checkpointing_steps", 2]
    script.run(*small, *out)
    before = weights_of(tmp_path / "out")
    with pytest.raises(SystemExit, match="--resume_from_checkpoint latest, replace it with --overwrite_output_dir"):
        script.run(*small, *out, "--seed", 1)
    assert_same_weights(before, weights_of(tmp_path / "out"))
    script.run(*small, *out, "--seed", 1, "--overwrite_output_dir")
    assert not torch.equal(before["conv_in.weight"], weights_of(tmp_path / "out")["conv_in.weight"])
    assert [r["step"] for r in log_of(tmp_path / "out")] == [0, 1, 2, 3, 3]


def test_a_finished_run_without_checkpoints_is_not_started_over(script, small, tmp_path):  # noqa: F811
    out = ["--output_dir", tmp_path / "out", "--checkpointing_steps", 0]
    script.run(*small, *out)
    before = weights_of(tmp_path / "out")
    with pytest.raises(SystemExit, match="holds a finished run without checkpoints"):
        script.run(*small, *out, "--resume_from_checkpoint", "latest")
    assert_same_weights(before, weights_of(tmp_path / "out"))


def test_a_sampler_that_fails_does_not_end_the_run(script, small, tmp_path, monkeypatch, capsys):  # noqa: F811
    def fails(*args, **kwargs):
        raise ValueError("too few steps")

    monkeypatch.setattr(Pixels, "sample", fails)
    script.run(*small, "--output_dir", tmp_path / "out", "--validation_steps", 1)
    assert "no sample grid at step 3, ValueError in the sampler: too few steps" in capsys.readouterr().out
    assert log_of(tmp_path / "out")[-1]["validation"]["eps_mse"]


def test_the_token_is_in_no_file(script, small, tmp_path):  # noqa: F811
    script.run(*small, "--output_dir", tmp_path / "out", "--hub_token", "hf_secret", "--checkpointing_steps", 3,
               "--report_to", "tensorboard")  # fmt: skip
    files = [f for f in (tmp_path / "out").rglob("*") if f.is_file()]
    assert len(files) > 5
    assert not [f for f in files if b"hf_secret" in f.read_bytes()]


# --- stops ------------------------------------------------------------------------------------------------------------


def test_a_second_signal_leaves_at_once(small, tmp_path):  # noqa: F811
    """The process sends itself both inside one step, which then never ends."""
    code = (
        "import os, signal, sys, runpy, time\n"
        "from diffusers_ext.training import TrainingLoop\n"
        "def update(self, loss, **kwargs):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(0.1)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(600)\n"
        "TrainingLoop.update = update\n"
        f"sys.argv = {['x', *map(str, small), '--output_dir', str(tmp_path / 'out')]!r}\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    done = stranger.run(code)
    assert done.returncode == 128 + signal.SIGINT
    assert "stopping after this step" in done.stderr
    assert "stopped at once" in done.stderr


def test_a_signal_to_the_whole_process_group_leaves_a_checkpoint(small, tmp_path):  # noqa: F811
    """As launchers send it: the data workers get it, too."""
    out = tmp_path / "out"
    options = ["--dataloader_num_workers", 2, "--max_train_steps", 100_000, "--output_dir", out]
    code = (
        "import os, pathlib, runpy, sys\n"
        "os.setsid()\n"
        "group, *sys.argv = sys.argv[1:]\n"
        "pathlib.Path(group).write_text(str(os.getpid()))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    run = stranger.start(code, tmp_path / "group", SCRIPT, *small, *options)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (out / "logs" / "log.jsonl").exists():
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(int((tmp_path / "group").read_text()), signal.SIGTERM)
    done = stranger.wait(run)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert len(list_checkpoints(out)) == 1
    assert "--resume_from_checkpoint latest" in done.stderr


def poison(script, monkeypatch, step, value=float("nan")):  # noqa: F811
    """Make the loss of the third sample of a step `value`."""
    original = script.score_matching_loss
    calls = []

    def loss(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(None)
        if len(calls) == step:
            result = result * torch.where(torch.arange(len(result)) == 2, value, 1.0)
        return result

    monkeypatch.setattr(script, "score_matching_loss", loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_with_the_weights_before_it(
    script, small, tmp_path, monkeypatch, capsys, value  # noqa: F811
):  # fmt: skip
    options = ["--max_train_steps", 6, "--checkpointing_steps", 1, "--checkpoints_total_limit", 9, "--logging_steps", 4]
    script.run(*small, *options, "--output_dir", tmp_path / "healthy")
    poison(script, monkeypatch, 3, value)
    with pytest.raises(SystemExit) as stopped:
        script.run(*small, *options, "--output_dir", tmp_path / "sick")
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert "was not finite at step 3" in message
    assert "the loss at sigma =" in message
    healthy, sick = (list_checkpoints(tmp_path / n) for n in ("healthy", "sick"))
    assert [f.name for f in sick] == ["checkpoint-00000001", "checkpoint-00000002"]
    assert same_state(load_checkpoint(healthy[1])["model"], load_checkpoint(sick[1])["model"])


def test_a_few_steps_that_are_not_finite_may_be_left_out(script, small, tmp_path, monkeypatch):  # noqa: F811
    poison(script, monkeypatch, 2)
    options = ["--max_skipped_steps", 1, "--checkpointing_steps", 1, "--output_dir", tmp_path / "out"]
    script.run(*small, *options)
    states = [load_checkpoint(f) for f in list_checkpoints(tmp_path / "out")]
    assert same_state(states[0]["model"], states[1]["model"])
    assert not same_state(states[1]["model"], states[2]["model"])
    assert all(torch.isfinite(v).all() for v in weights_of(tmp_path / "out").values())


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run(script, small, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The library's own error, see test_checkpoint.py."""
    from safetensors import SafetensorError

    import diffusers_ext.training.checkpoint as module

    original = module.save_file

    def disk(tensors, path):
        if "00000001" not in str(path):
            raise SafetensorError("I/O error: No space left on device")
        original(tensors, path)

    monkeypatch.setattr(module, "save_file", disk)
    script.run(*small, "--checkpointing_steps", 1, "--output_dir", tmp_path / "out")
    assert [f.name for f in list_checkpoints(tmp_path / "out")] == ["checkpoint-00000001"]
    assert "the checkpoint of step 2 could not be written" in capsys.readouterr().out
    assert (tmp_path / "out" / "model_index.json").exists()


# --- several devices --------------------------------------------------------------------------------------------------

DRIVER = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from diffusers_ext import consistency_loss, lower_sigma, score_matching_loss
from diffusers_ext.commands import parse_arguments
from diffusers_ext.training import TrainingArguments, TrainingLoop

out = Path(sys.argv[1])
loop = TrainingLoop(parse_arguments(TrainingArguments, sys.argv[2:]), "test", ("A paper", "2302.09057"))
rank = loop.accelerator.process_index
gradients, images, draws = [], [], []
start = torch.cat([p.flatten().clone() for p in loop.ema.shadow_params])
clip = loop.accelerator.clip_grad_norm_

def spy(parameters, norm):
    parameters = list(parameters)
    gradients.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
    return clip(parameters, norm)

loop.accelerator.clip_grad_norm_ = spy
for batch in loop:
    sigma = loop.schedule.draw_sigmas(len(batch.x0), batch.generator)
    x = loop.denoiser.process.perturb(batch.x0, sigma, batch.generator)
    denoised = loop.denoiser(x, sigma)
    loss = score_matching_loss(loop.denoiser, x, batch.x0, sigma, prediction=denoised, weight=loop.weight(sigma))
    lower = lower_sigma(sigma, 0.5, relative=True, generator=batch.generator)
    loss = loss + 10 * consistency_loss(
        loop.denoiser, x, sigma, lower, denoised=denoised, steps=2, generator=batch.generator
    )
    images.append(batch.x0)
    draws.append(sigma)
    loop.update(loss.mean(), sigma=sigma, denoising=loss)
state = {"gradients": torch.stack(gradients), "images": torch.cat(images), "sigma": torch.cat(draws),
         "processes": torch.tensor(loop.accelerator.num_processes),
         "start": start, "ema": torch.cat([p.flatten() for p in loop.ema.shadow_params])}
save_file(state, out / f"rank{rank}.safetensors")
loop.finish()
"""


def test_two_processes_do_what_one_does(small, tmp_path):  # noqa: F811
    """Two processes against one with two accumulation steps: the same global batch."""
    (tmp_path / "driver.py").write_text(DRIVER)
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    results = {}
    for world in (1, 2):
        out = tmp_path / f"world{world}"
        out.mkdir()
        argv = [*map(str, small), "--gradient_accumulation_steps", str(2 // world), "--max_grad_norm", "1e9"]
        argv += ["--adam_epsilon", "1e-3"]  # above gradients that are mere rounding, whose sign Adam would follow
        command = [tmp_path / "driver.py", out, *argv, "--output_dir", out / "model"]
        if world == 1:
            done = stranger.run(*command, env=env)
        else:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            done = subprocess.run([*launch, *map(str, command)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results[world] = [load_file(out / f"rank{rank}.safetensors") for rank in range(world)]
    (one,), two = results[1], results[2]
    assert [r["processes"].item() for r in two] == [2, 2]

    for name in ("images", "sigma"):  # every micro-batch once, in turn; noise of its own on each
        a, b = (r[name].split(8) for r in two)
        each = torch.cat([chunk for pair in zip(a, b, strict=True) for chunk in pair])
        torch.testing.assert_close(each, one[name], rtol=1e-5, atol=1e-6)
    assert not torch.isclose(two[0]["sigma"], two[1]["sigma"]).reshape(-1, 8).all(1).any()

    assert torch.equal(two[0]["gradients"], two[1]["gradients"])
    first, expected = two[0]["gradients"][0], one["gradients"][0]
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())
    assert_same_training(*({"ema": state} for state in (one["start"], two[0]["ema"], one["ema"])))
    assert torch.equal(two[0]["ema"], two[1]["ema"])
    losses = [[r["denoising"] for r in log_of(tmp_path / f"world{w}" / "model") if "denoising" in r] for w in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[1]) == 3  # one writer


# The script with accelerate's own FSDP version 2. It is offered where there is an accelerator; its code shards on
# the CPU as well, once its state says so.
SHARDED_DRIVER = """
import runpy, sys
import accelerate
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
import diffusers_ext.training.environment as environment

class Sharded(accelerate.Accelerator):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["ResnetBlock2D"], cpu_ram_efficient_loading=False)

    def prepare(self, *args):
        model, optimizer = super().prepare(*args)
        parts = sum(p.to_local().numel() for p in model.parameters())
        print(f"spread {all(isinstance(p, DTensor) for p in model.parameters())} {self.num_processes} "
              f"{parts / sum(p.numel() for p in model.parameters()):.1f}", flush=True)
        return model, optimizer

environment.Accelerator = Sharded
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_sharded_weights_train_and_resume_as_whole_ones(script, small, tmp_path):  # noqa: F811
    """Two processes with FSDP2 against one with two accumulation steps; each goes on from the other's checkpoint."""
    (tmp_path / "driver.py").write_text(SHARDED_DRIVER)
    options = [*map(str, small), "--max_train_steps", "4", "--checkpointing_steps", "2"]
    options += ["--consistency_fraction", "0.5"]  # the first half of every micro-batch, and not all of some

    def sharded(folder, *more):
        done = stranger.ranks(2, tmp_path / "driver.py", SCRIPT, *options, "--output_dir", folder, *more)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("spread True 2 0.5") == 2

    def whole(folder, *more):
        script.run(*options, "--gradient_accumulation_steps", 2, "--output_dir", folder, *more)

    whole(one := tmp_path / "one")
    sharded(two := tmp_path / "two")
    states = [load_checkpoint(folder / "checkpoint-00000004") for folder in (one, two)]
    initial = load_checkpoint(one / "checkpoint-00000002")["model"]
    for name in ("model", "ema", "optimizer", "lr_scheduler"):
        assert states[0][name].keys() == states[1][name].keys()

    def same_update(a, b):
        """The weights of two runs after the same step, relative to how far they moved since step 2."""
        moved, apart = (sum((x[k] - a[k]).square().sum() for k in a) for x in (initial, b))
        return apart < 0.02**2 * moved

    assert same_update(states[0]["model"], states[1]["model"])
    losses = [[r["denoising"] for r in log_of(folder) if "denoising" in r] for folder in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for run, origin, exact in ((sharded, two, True), (sharded, one, False), (whole, two, False)):
        shutil.copytree(origin, resumed := tmp_path / f"resumed-{run.__name__}-{origin.name}")
        shutil.rmtree(resumed / "checkpoint-00000004")
        run(resumed, "--resume_from_checkpoint", "latest")
        state = load_checkpoint(resumed / "checkpoint-00000004")
        if exact:
            assert all(same_state(state[k], states[1][k]) for k in ("model", "ema", "optimizer", "lr_scheduler"))
            assert_same_weights(weights_of(resumed), weights_of(two))
        assert same_update(states[0]["model"], state["model"])


@pytest.mark.parametrize(("kind", "message"), [("DEEPSPEED", "DEEPSPEED keeps"), ("FSDP", "FSDP version 1 keeps")])
def test_sharding_that_checkpoints_cannot_hold_is_refused(small, tmp_path, monkeypatch, kind, message):  # noqa: F811
    class Launched(Accelerator):
        distributed_type, is_fsdp2 = DistributedType[kind], False

    monkeypatch.setattr("diffusers_ext.training.environment.Accelerator", Launched)
    args = parse_arguments(TrainingArguments, [*map(str, small), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(InputError, match=message):
        TrainingLoop(args, "test", ("A paper", "2302.09057"))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_stream_begins_at_any_row_and_each_epoch_is_shuffled_anew(numbered, world):
    """Two files: shared by whole files between 2 devices, by rows between 3."""
    args = TrainingArguments(dataset_name=numbered, streaming=True, shuffle_buffer=4, max_train_steps=1)
    for rank in range(world):
        share = load_images(args, "train").share(rank, world)
        epochs = [[name for *_, name in share.rows(epoch, 0)] for epoch in (0, 1)]
        cells = [[cell["bytes"] for cell, *_ in share.rows(epoch, 0)] for epoch in (0, 1)]
        assert len(epochs[0]) == 12 // world
        assert sorted(cells[0]) == sorted(cells[1]) or world == 3
        assert cells[0] != cells[1]
        for first in (1, 3):
            assert [cell["bytes"] for cell, *_ in share.rows(0, first)] == cells[0][first:]


def test_devices_share_a_stream_without_overlap(numbered):
    args = TrainingArguments(dataset_name=numbered, streaming=True, train_batch_size=5, max_train_steps=1)
    source = load_images(args, "train")
    for world in (1, 2):
        seen = []
        for rank in range(world):
            batches = micro_batches(
                args, source, Transform(8, 1), rank, world, 12 // world // 5 + 1, position=Position(0, 0)
            )
            values = [v for b in batches for v in ((b.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()]
            seen += values[: 12 // world]
        counted = Counter(seen)
        assert set(counted) == {20 * i for i in range(12) if i != 7}
        assert max(counted.values()) == 2  # the one that replaces the damaged row


def test_a_stream_without_a_length_needs_one(numbered):
    args = TrainingArguments(dataset_name=numbered, streaming=True, preset="digits", resolution=8, report_to="none")
    with pytest.raises(InputError, match="--max_train_steps"):
        TrainingLoop(args, "test", ("A paper", "2302.09057"))


def test_labels_are_dropped_at_the_stated_rate(small, tmp_path):  # noqa: F811
    argv = [*map(str, small), "--class_conditional", "--label_drop", "0.2", "--train_batch_size", "400"]
    args = parse_arguments(TrainingArguments, [*argv, "--output_dir", str(tmp_path / "out")])
    batch = next(iter(TrainingLoop(args, "test", ("A paper", "2302.09057"))))
    dropped = (batch.cond["class_labels"] == 10).float().mean().item()
    assert abs(dropped - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 400)


def test_the_log_of_a_killed_run_is_cut_at_the_checkpoint(script, small, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    argv = [*small, "--max_train_steps", 4, "--checkpointing_steps", 2, "--output_dir", out]
    script.run(*argv)
    for folder in list_checkpoints(out)[1:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    with (out / "logs" / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "torn')
    script.run(*argv, "--resume_from_checkpoint", "latest")
    assert [r["step"] for r in log_of(out) if "denoising" in r] == [1, 2, 3, 4]
    assert json.loads((out / "logs" / "log.jsonl").read_text().splitlines()[-1])["validation"]["eps_mse"]


# --- the Hub ----------------------------------------------------------------------------------------------------------


def train_with_hub(hub, small, tmp_path, *options):  # noqa: F811
    argv = [*small, "--push_to_hub", "--hub_model_id", "tester/digits", *options]
    argv += ["--output_dir", tmp_path / "out", "--hub_timeout", 30]
    return stranger.run(SCRIPT, *argv, env=hub.environment(tmp_path / "hf-home"))


def test_a_trained_model_reaches_strangers_with_its_card(small, tmp_path):  # noqa: F811
    with HubServer() as hub:
        options = ("--hub_private_repo", "--hub_strategy", "every_save", "--checkpointing_steps", 1)
        done = train_with_hub(hub, small, tmp_path, *options)
        assert done.returncode == 0, done.stderr
        assert hub.private("tester/digits")
        files = hub.files("tester/digits")
        assert {f.split("/")[0] for f in files} == {
            *(".gitattributes", "README.md", "model_index.json", "samples", "scheduler", "unet")
        } - ({".gitattributes"} - set(files))
        assert any("step 3" in str(commit) for commit in hub.commits("tester/digits"))
        code = (
            "from diffusers import DiffusionPipeline\nimport sys\n"
            "pipe = DiffusionPipeline.from_pretrained('tester/digits')\n"
            "print(pipe.unet.conv_in.weight.sum().item(), 'diffusers_ext' in sys.modules)"
        )
        loaded = stranger.run(code, env=hub.environment(tmp_path / "other-home"))
    expected = weights_of(tmp_path / "out")["conv_in.weight"].sum().item()
    assert loaded.stdout.split() == [str(expected), "False"], loaded.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("2302.09057", "learning_rate", "samples/step-00000003.png", "eps_mse"):
        assert text in card
    assert str(tmp_path) not in card


def test_a_refused_push_keeps_the_model_and_says_how_to_push_it(small, tmp_path):  # noqa: F811
    with HubServer() as hub:
        hub.fail("/api/repos/create", status=403, times=99)
        done = train_with_hub(hub, small, tmp_path)
    assert done.returncode == 3, done.stderr
    assert "hf upload tester/digits" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(weights_of(tmp_path / "out")) > 5


# --- which checkpoint -------------------------------------------------------------------------------------------------


_FINISHED = []


@pytest.fixture
def finished(script, small, tmp_path):  # noqa: F811
    """A copy of a finished run of 3 steps with its 3 checkpoints, and the arguments that continue it up to step 4."""
    if not _FINISHED:
        script.run(*small, "--checkpointing_steps", 1, "--output_dir", tmp_path / "first")
        _FINISHED.extend((tmp_path / "first", small))
    shutil.copytree(_FINISHED[0], tmp_path / "out")
    return tmp_path / "out", [*_FINISHED[1], "--checkpointing_steps", 1, "--max_train_steps", 4]


def checkpoints_of(folder):
    return [int(f.name.removeprefix("checkpoint-")) for f in list_checkpoints(folder)]


@pytest.mark.parametrize("spelling", ["absolute", "relative", "link", "name", "padded"])
def test_a_checkpoint_may_be_spelled_in_many_ways(script, finished, monkeypatch, spelling):  # noqa: F811
    out, argv = finished
    monkeypatch.chdir(out.parent)
    os.symlink(out, "link")
    names = {
        "absolute": out / "checkpoint-00000003",
        "relative": "out/../out/checkpoint-00000003",
        "link": "link/checkpoint-00000003",
        "name": "checkpoint-3",
        "padded": "checkpoint-00000003",
    }
    resume = ["--checkpoints_total_limit", 2, "--resume_from_checkpoint", names[spelling]]
    script.run(*argv, *resume, "--output_dir", "link" if spelling == "absolute" else out)
    assert checkpoints_of(out) == [3, 4]
    assert [r["step"] for r in log_of(out) if "start" in r] == [0, 3]


def test_a_run_that_goes_on_in_another_folder_leaves_both_whole(script, finished, tmp_path):  # noqa: F811
    out, argv = finished
    resume = ["--checkpoints_total_limit", 1, "--resume_from_checkpoint", out / "checkpoint-00000002"]
    script.run(*argv, *resume, "--output_dir", tmp_path / "branch")
    assert checkpoints_of(out) == [1, 2, 3]
    assert checkpoints_of(tmp_path / "branch") == [4]
    with pytest.raises(SystemExit, match=r"branch holds another run than .*2 \(checkpoints: checkpoint-00000004\)"):
        script.run(*argv, *resume, "--output_dir", tmp_path / "branch")
    script.run(*argv, *resume, "--output_dir", tmp_path / "branch", "--overwrite_output_dir")
    assert [r["step"] for r in log_of(tmp_path / "branch") if "start" in r] == [2]


def edited(change):
    def damage(folder):
        state = load_checkpoint(folder)
        change(state)
        shutil.rmtree(folder)
        save_checkpoint(folder.parent, int(folder.name[-8:]), state)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edited(lambda s: s.update(step=-5)), "called that of step 3, and says step -5"),
        (edited(lambda s: s.update(step=99999)), "called that of step 3, and says step 99999"),
        (edited(lambda s: s.update(step="3")), "step cannot be read from its state.json"),
        (edited(lambda s: s.pop("model")), "model cannot be read from its state.json"),
        (edited(lambda s: s["model"].pop("conv_in.weight")), "the weights conv_in.weight are not those"),
        (
            edited(lambda s: s["model"].update({"conv_in.weight": torch.ones(2)})),
            "the weights conv_in.weight are not those",
        ),
        (edited(lambda s: s.pop("ema")), "KeyError: 'ema'"),
        (edited(lambda s: s["ema"].pop("shadow_params")), "KeyError: 'shadow_params'"),
        (edited(lambda s: s["optimizer"].update(state=[])), "AttributeError"),
        (lambda f: (f / "state.json").write_text("{}"), "is damaged"),
        (lambda f: (f / "state.json").write_text("[1, 2]"), "cannot be read from its state.json"),
        (lambda f: (f / "state.safetensors").write_bytes(b""), "is damaged"),
        (lambda f: os.truncate(f / "state.safetensors", 1000), "is damaged"),
        (lambda f: (f / "state.safetensors").unlink(), "No such file"),
    ],
)
def test_a_damaged_checkpoint_is_named_with_what_to_do(script, finished, damage, message):  # noqa: F811
    out, argv = finished
    damage(out / "checkpoint-00000003")
    with pytest.raises(SystemExit) as stopped:
        script.run(*argv, "--output_dir", out, "--resume_from_checkpoint", "latest")
    assert message in str(stopped.value)
    assert f"the checkpoint {out / 'checkpoint-00000003'}" in str(stopped.value)
    assert "Delete it to go on from checkpoint-00000002" in str(stopped.value)
    assert checkpoints_of(out) == [1, 2, 3]


def test_a_checkpoint_of_a_later_step_than_the_last_is_refused(script, finished):  # noqa: F811
    out, argv = finished
    with pytest.raises(SystemExit, match="it is of step 3, and --max_train_steps ends the run at step 2"):
        script.run(*argv, "--max_train_steps", 2, "--output_dir", out, "--resume_from_checkpoint", "latest")


# --- several processes ------------------------------------------------------------------------------------------------

WAITS = """
import sys, time
from datetime import timedelta
from diffusers_ext.training import environment
if sys.argv[1] == "short":
    environment.TIMEOUT = timedelta(seconds=1)
accelerator = environment.make_accelerator()
if accelerator.is_main_process:
    time.sleep(4)
accelerator.wait_for_everyone()
print("both")
"""


@pytest.mark.parametrize("timeout", ["own", "short"])
def test_processes_wait_for_one_that_works_alone(tmp_path, timeout):
    (tmp_path / "waits.py").write_text(WAITS)
    done = stranger.ranks(2, tmp_path / "waits.py", timeout)
    assert (done.stdout.count("both") == 2, done.returncode == 0) == (timeout == "own",) * 2, done.stderr
