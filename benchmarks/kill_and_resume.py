"""Kill a training run with SIGKILL at random moments, resume it each time, and compare it with a run left alone.

    python benchmarks/kill_and_resume.py [--kills 20] [--steps 120] [--seed 0]

A checkpoint is written at every second step. Each kill comes a random time after the run has taken up work; about a
third wait for the next write of a checkpoint and fall into it. At the end weights, moving average, optimiser state and
the losses of every step must be equal bit for bit; the script ends with status 1 if they are not.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trained import command

from diffusers_ext.training.checkpoint import list_checkpoints, load_checkpoint, same_state

OPTIONS = {
    "preset": "digits",
    "train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "dataloader_num_workers": 1,
    "checkpointing_steps": 2,
    "logging_steps": 1,
    "max_validation_samples": 8,
    "num_validation_images": 0,
    "report_to": "none",
}


def digits_run(out: Path, steps: int) -> list[str]:
    """The command of a run of the digits preset, with data workers and accumulation."""
    options = OPTIONS | {"max_train_steps": steps}
    return command("train_consistency.py", out, [f"--{name}={value}" for name, value in options.items()])


def losses(out: Path) -> list[tuple]:
    """(step, both losses) of every step in the log."""
    records = [json.loads(line) for line in (out / "logs" / "log.jsonl").read_text().splitlines()]
    return [(r["step"], r["denoising"], r["consistency"]) for r in records if "denoising" in r]


def state_of(out: Path) -> tuple[str, dict]:
    newest = list_checkpoints(out)[-1]
    state = load_checkpoint(newest)
    del state["arguments"]
    return newest.name, state


def kill_at_random(out: Path, steps: int, draw: random.Random, log: Path) -> str | None:
    """Start or resume the run and kill it some time after its first step; `None` if it came to its end."""
    begun = len(losses(out)) if (out / "logs" / "log.jsonl").exists() else 0
    with log.open("a") as output:
        run = subprocess.Popen(digits_run(out, steps), stdout=output, stderr=output, start_new_session=True)
        while run.poll() is None and (not (out / "logs" / "log.jsonl").exists() or _lines(out) <= begun):
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


def _lines(out: Path) -> int:
    return sum("denoising" in line for line in (out / "logs" / "log.jsonl").read_text().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)

    with tempfile.TemporaryDirectory() as folder:
        whole, killed, log = Path(folder) / "whole", Path(folder) / "killed", Path(folder) / "output"
        subprocess.run(digits_run(whole, args.steps), check=True, capture_output=True)
        done = 0
        while done < args.kills:
            where = kill_at_random(killed, args.steps, draw, log)
            if where is None:
                sys.exit(f"the run ended after {done} kills: give it more --steps\n{log.read_text()[-2000:]}")
            done += 1
            newest = [c.name for c in list_checkpoints(killed)[-1:]]
            print(f"kill {done}: {where}; newest checkpoint: {newest[0] if newest else 'none'}", flush=True)
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
