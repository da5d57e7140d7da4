"""Kill every script with SIGKILL at random moments, repeat its command each time, and compare with a run left alone.

    python benchmarks/kill_and_resume.py [--kills 100] [--seed 0] [--only streaming,calibrate]

A third of the kills come at any time after the start, a third while a file is being written, and a third in the last
stretch of the script, from its last progress to its end. The kills are shared by the jobs below. At the end every
weight, table and number must be that of the run that was left alone, bit for bit, and the losses of every step, too; the
script ends with status 1 if one is not.
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

os.environ["MKL_CBWR"] = "COMPATIBLE"  # the mode of MKL in which runs have the same bits
TRAIN = (
    "--preset digits --train_batch_size 4 --logging_steps 1 --checkpointing_steps 2 --max_validation_samples 8 "
    "--num_validation_images 2 --num_inference_steps 2 --report_to none --max_train_steps 30"
)
MODEL = "--pretrained_model_name_or_path {0}/model --dataset_name digits"
JOBS = {
    "consistency": ("train_consistency", f"{TRAIN} --gradient_accumulation_steps 2 --dataloader_num_workers 1"),
    "streaming": ("train_consistency", f"{TRAIN} --dataset_name {{0}}/images.parquet --streaming --validation_split none"),
    "observation": ("train_observation", f"{TRAIN} --validation_steps 10 --frechet_samples 20 --frechet_steps 2"),
    "reflected": ("train_reflected", TRAIN),
    "short_time": ("train_short_time", f"{TRAIN} --max_bridge_samples 400 --bridge mixture"),
    "fit_bridge": ("fit_bridge", f"{MODEL} --bridge mixture --max_bridge_samples 2000 --num_inference_steps 5"),
    "calibrate": ("calibrate", f"{MODEL} --num_levels 8 --max_train_samples 1500 --train_batch_size 50"),
    "evaluate": ("evaluate", f"{MODEL} --nfe 5,10 --num_samples 60 --likelihood_images 20 --train_batch_size 20"),
}
LAST = ("fit_bridge", "calibrate", "evaluate")


def shell(job: str, place: Path, out: Path) -> list[str]:
    script, options = JOBS[job]
    again = ["--resume_from_checkpoint", "latest"] if script.startswith("train") else []
    return command(f"{script}.py", out, [*options.format(place).split(), *again])


def results(out: Path) -> dict[str, object]:
    """What a script leaves: tensors by file, numbers of an evaluation without its times, and the losses of each step."""
    files = [f for f in out.rglob("*") if f.is_file() and not any(p.startswith((".", "state")) for p in f.parts)]
    found: dict[str, object] = {str(f.relative_to(out)): f.read_bytes() for f in files if f.suffix == ".safetensors"}
    for file in out.glob("results.json"):
        found[file.name] = [{k: v for k, v in c.items() if "second" not in k} for c in json.loads(file.read_text())["cells"]]
    for log in out.glob("logs/log.jsonl"):
        records = [json.loads(line) for line in log.read_text().splitlines()]
        found["losses"] = [(r["step"], r["denoising"]) for r in records if "denoising" in r]
    return found


def last_stretch(job: str, out: Path) -> bool:
    """Whether a training has made its last step; the other scripts have no log."""
    log = out / "logs" / "log.jsonl"
    return JOBS[job][0].startswith("train") and log.exists() and '"step": 30, "images"' in log.read_text()


def writing(out: Path) -> bool:
    return any(True for name in (".partial-*", ".saving-*", "*/.partial-*") for _ in out.glob(name))


def killed(job: str, words: list[str], out: Path, seconds: float, draw: random.Random) -> str | None:
    """Start or go on with a script and kill it; return at which moment, or `None` if it came to its end before."""
    kind = draw.choice(("any time", "writing", "last stretch"))
    run = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait = {"any time": draw.uniform(0, seconds), "writing": draw.uniform(0, 0.7 * seconds), "last stretch": 0.6 * seconds}
    end = time.monotonic() + wait[kind]
    while run.poll() is None and (time.monotonic() < end or (kind == "writing" and not writing(out))):
        if kind == "last stretch" and last_stretch(job, out):
            break
        time.sleep(0.001 if kind == "writing" else 0.02)
    if kind == "last stretch":
        time.sleep(draw.uniform(0, 0.3 * seconds if job in LAST else 1.0))
    if run.poll() is not None:
        return None
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    return kind


def main() -> None:
    args, _ = flags(__doc__, kills=100, seed=0, only=",".join(JOBS))
    draw, jobs = random.Random(args.seed), args.only.split(",")
    quota, lost, made = -(-args.kills // len(jobs)), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        prepare(place)
        for job in jobs:
            start = time.monotonic()
            subprocess.run(shell(job, place, place / job), check=True, capture_output=True)
            seconds, truth, done = time.monotonic() - start, results(place / job), 0
            while done < quota:
                out, moments = place / f"{job}-{done}", []
                while len(moments) < min(4, quota - done):
                    moments += filter(None, [killed(job, shell(job, place, out), out, seconds, draw)])
                last = subprocess.run(shell(job, place, out), capture_output=True, text=True)
                same = last.returncode == 0 and results(out) == truth
                done, made, lost = done + len(moments), made + len(moments), lost + (not same)
                print(f"{job}: killed at {', '.join(moments)}: {'equal bit for bit' if same else 'LOST'}", flush=True)
                if not same:
                    print(last.stderr[-2000:])
    print(f"{made} kills, {lost} runs lost")
    sys.exit(1 if lost else 0)


def prepare(place: Path) -> None:
    """A small model, and 400 images in a file that is streamed."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    from diffusers_ext.data.sources import Digits

    run = command("train_consistency.py", place / "model", [*TRAIN.split(), "--max_train_steps", "5"])
    subprocess.run(run, check=True, capture_output=True)
    digits, some = Digits("train"), range(0, 4000, 10)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=digits.class_names)})
    rows = {"image": [digits.open(i) for i in some], "label": [digits.labels[i] for i in some]}
    Dataset.from_dict(rows, features=features).to_parquet(place / "images.parquet")


if __name__ == "__main__":
    main()
