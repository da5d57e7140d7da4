"""Kill a training run with SIGKILL at random moments, resume it each time, and compare it with a run left alone.

    python benchmarks/kill_and_resume.py [--kills 20] [--steps 120] [--seed 0]

A checkpoint is written at every second step. Each kill comes a random time after the run has taken up work; about a
third wait for the next write of a checkpoint and fall into it. At the end weights, moving average, optimiser state and
the losses of every step must be equal bit for bit; the script ends with status 1 if they are not.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import flags
from trained import command

from diffusers_ext.training.checkpoint import list_checkpoints, load_checkpoint, same_state

os.environ["MKL_CBWR"] = "COMPATIBLE"  # the mode of MKL in which runs have the same bits
# With data workers and accumulation.
OPTIONS = (
    "--preset digits --train_batch_size 4 --gradient_accumulation_steps 2 --dataloader_num_workers 1 --logging_steps 1 "
    "--checkpointing_steps 2 --max_validation_samples 8 --num_validation_images 0 --report_to none --max_train_steps"
)


def digits_run(out: Path, steps: int) -> list[str]:
    return command("train_consistency.py", out, [*OPTIONS.split(), str(steps)])


def losses(out: Path) -> list[tuple]:
    """(step, both losses) of every step in the log."""
    log = out / "logs" / "log.jsonl"
    complete = log.read_text().rpartition("\n")[0] if log.exists() else ""  # a line may be written right now
    records = [json.loads(line) for line in complete.splitlines()]
    return [(r["step"], r["denoising"], r["consistency"]) for r in records if "denoising" in r]


def state_of(out: Path) -> tuple[str, dict]:
    """The newest checkpoint, and what it holds but for the arguments."""
    newest = list_checkpoints(out)[-1]
    return newest.name, {name: value for name, value in load_checkpoint(newest).items() if name != "arguments"}


def kill_at_random(out: Path, steps: int, draw: random.Random, log: Path) -> str | None:
    """Start or resume the run and kill it some time after its first step; `None` if it came to its end."""
    begun = len(losses(out))
    with log.open("a") as output:
        run = subprocess.Popen(digits_run(out, steps), stdout=output, stderr=output, start_new_session=True)
        while run.poll() is None and len(losses(out)) <= begun:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 1.5))
        if draw.random() < 0.3:  # the write of a checkpoint is short: wait for the next one
            while run.poll() is None and not list(out.glob(".partial-*")):
                pass
        writing = bool(list(out.glob(".partial-*")))
        if run.poll() is not None:
            return None
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    return "while writing a checkpoint" if writing else "between checkpoints"


def main() -> None:
    args, _ = flags(__doc__, kills=20, steps=120, seed=0)
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed, log = (Path(folder) / name for name in ("whole", "killed", "output"))
        subprocess.run(digits_run(whole, args.steps), check=True, capture_output=True)
        for number in range(1, args.kills + 1):
            where = kill_at_random(killed, args.steps, draw, log)
            if where is None:
                sys.exit(f"the run ended after {number - 1} kills: give it more --steps\n{log.read_text()[-2000:]}")
            newest = "".join(checkpoint.name for checkpoint in list_checkpoints(killed)[-1:]) or "none"
            print(f"kill {number}: {where}; newest checkpoint: {newest}", flush=True)
        subprocess.run(digits_run(killed, args.steps), check=True, capture_output=True)
        same = {
            "losses of every step": losses(whole) == losses(killed),
            "weights, average, optimiser, learning rate": same_state(state_of(whole), state_of(killed)),
        }
    for name, value in same.items():
        print(f"{name}: {'equal bit for bit' if value else 'DIFFERENT'}")
    sys.exit(0 if all(same.values()) else 1)


if __name__ == "__main__":
    main()
