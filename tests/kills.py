"""Kill every script with SIGKILL at random moments, repeat its command each time, and compare with a run left alone.

    python tests/kills.py [--kills 100] [--seed 0] [--only streaming,calibrate]

A third of the kills come at any time, a third while a file is being written, and a third in the last stretch, after the
last step. At the end every weight, table, sample and number, and the losses of every step, must be those of the run
that was left alone, bit for bit; the script ends with status 1 if one is not.
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

from safetensors.torch import load_file

os.environ["MKL_CBWR"] = "COMPATIBLE"  # the mode of MKL in which runs have the same bits
SCRIPTS = Path(__file__).resolve().parents[1] / "training"
TRAIN = (
    "--preset digits --train_batch_size 4 --logging_steps 1 --checkpointing_steps 2 --max_validation_samples 8 "
    "--num_validation_images 2 --num_inference_steps 2 --report_to none --max_train_steps 30"
)
MODEL = "--pretrained_model_name_or_path {0}/model --dataset_name digits"
JOBS = {
    "consistency": ("train_consistency", f"{TRAIN} --gradient_accumulation_steps 2 --dataloader_num_workers 1"),
    "streaming": ("train_consistency", f"{TRAIN} --dataset_name {{0}}/images.parquet --streaming"),
    "observation": ("train_observation", f"{TRAIN} --validation_steps 10 --frechet_samples 20 --frechet_steps 2"),
    "reflected": ("train_reflected", TRAIN),
    "short_time": ("train_short_time", f"{TRAIN} --max_bridge_samples 400 --bridge mixture"),
    "fit_bridge": ("fit_bridge", f"{MODEL} --bridge mixture --max_bridge_samples 2000 --num_inference_steps 5"),
    "calibrate": ("calibrate", f"{MODEL} --num_levels 8 --max_train_samples 1500 --train_batch_size 50"),
    "evaluate": ("evaluate", f"{MODEL} --nfe 5,10 --num_samples 60 --likelihood_images 20 --train_batch_size 20"),
}


def shell(job: str, place: Path, out: Path) -> list[str]:
    """The command of a job, which goes on where an earlier one was killed."""
    script, options = JOBS[job]
    again = ["--resume_from_checkpoint", "latest"] if script.startswith("train") else []  # the others need no word
    return [
        sys.executable,
        str(SCRIPTS / f"{script}.py"),
        *again,
        *options.format(place).split(),
        "--output_dir",
        str(out),
    ]


def results(out: Path) -> dict[str, object]:
    """What a script leaves: weights and samples by file, an evaluation but for its times, the losses of every step."""
    kept = (
        f
        for f in out.rglob("*.safetensors")
        if not any(part.startswith((".", "state")) for part in f.relative_to(out).parts)
    )
    found: dict[str, object] = {str(f.relative_to(out)): contents(f) for f in kept}
    for file in out.glob("results.json"):
        cells = json.loads(file.read_text())["cells"]
        found["cells"] = [{name: value for name, value in cell.items() if "second" not in name} for cell in cells]
    for log in out.glob("logs/log.jsonl"):
        records = map(json.loads, log.read_text().splitlines())
        found["losses"] = [(r["step"], r["denoising"]) for r in records if "denoising" in r]
    return found


def contents(file: Path) -> dict[str, bytes]:
    """The tensors of a file, without its notes: drawn images have the seconds that they took."""
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}


def kill(words: list[str], out: Path, seconds: float, draw: random.Random) -> str | None:
    """Start or go on with a script and kill it; return at which moment, or `None` if it came to its end before."""
    moment, log = draw.choice(("any time", "a write", "the end")), out / "logs" / "log.jsonl"
    run = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    start, share = time.monotonic(), draw.uniform(0, 0.7 if moment == "a write" else 1)

    def is_due() -> bool:
        late = time.monotonic() > start + share * seconds
        if moment == "a write":
            return late and any(list(out.glob(p)) for p in (".partial-*", ".saving-*", "*/.partial-*"))
        return late or (moment == "the end" and log.exists() and '"step": 30, "images"' in log.read_text())

    while run.poll() is None and not is_due():
        time.sleep(0.001)
    if moment == "the end":
        time.sleep(draw.uniform(0, 0.5))
    if run.poll() is not None:
        return None
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    return moment


def prepare(place: Path) -> None:
    """A small model, and 400 images in a file that is streamed."""
    from datasets import Dataset, Features, Image

    from diffusers_ext.data.sources import Digits

    subprocess.run(
        [*shell("consistency", place, place / "model"), "--max_train_steps", "5"], check=True, capture_output=True
    )
    rows = {"image": [Digits("train").open(i) for i in range(0, 4000, 10)]}
    Dataset.from_dict(rows, Features({"image": Image()})).to_parquet(place / "images.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(JOBS), help="some of the jobs")
    args = parser.parse_args()
    draw, jobs, made, lost = random.Random(args.seed), args.only.split(","), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        prepare(place := Path(folder))
        for job in jobs:
            start, done, quota = time.monotonic(), 0, -(-args.kills // len(jobs))
            subprocess.run(shell(job, place, place / job), check=True, capture_output=True)
            whole, truth = time.monotonic() - start, results(place / job)
            while done < quota:
                words, moments = shell(job, place, out := place / f"{job}-{done}"), list[str]()
                seconds = whole
                while len(moments) < min(4, quota - done):
                    start = time.monotonic()
                    if (moment := kill(words, out, seconds, draw)) is not None:
                        moments.append(moment)
                    else:
                        seconds = time.monotonic() - start  # what is left takes less time
                last = subprocess.run(words, capture_output=True, text=True)
                same = last.returncode == 0 and results(out) == truth
                done, made, lost = done + len(moments), made + len(moments), lost + (not same)
                print(f"{job}, killed at {', '.join(moments)}: {'equal bit for bit' if same else 'LOST'}", flush=True)
    print(f"{made} kills, {lost} runs lost")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
