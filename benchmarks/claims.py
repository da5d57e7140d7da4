"""Do the papers' claims hold on this data? Every method against its baseline at equal training cost.

    python benchmarks/claims.py --preset digits
    python benchmarks/claims.py --preset mnist --dataset_name $MNIST --methods calibrated short_time
    python benchmarks/claims.py --preset cifar10 --minutes 8          # on a GPU; repeat until it says that it is done

Trains what the claims need into output_dir (`--methods` chooses; `--minutes` stops after so long, and the same command
goes on), with a record of command, seed and cost beside each model, draws from it with `diffusers_ext.evaluation`, and
writes docs/claims/PRESET.json, from which docs/claims.md is made. What is there is neither trained nor drawn again.

The cost of training is counted in passes of the network over a batch, forward 1 and backward 2, and equal for the two
sides of a comparison; a discriminator's own passes are not counted in. A comparison is paired: both sides draw from the
same noise, and the interval (95%, jackknife) is that of their difference. It covers the sampling, not another seed of
the training: `control` trains the baseline once more, from another seed, to show how much that does.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from math import log
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor
from tqdm import tqdm
from trained import ROOT, OutOfTime, of_the_data, train

from diffusers_ext import (
    FlowBridge,
    GaussianBridge,
    bits_per_dim,
    dequantize,
    diffusion_time_report,
    elbo,
    estimate_calibration,
    noise_schedule,
    score_model_from,
    short_time_pipeline,
)
from diffusers_ext.commands import parse_arguments
from diffusers_ext.evaluation import (
    Drawing,
    MeasureArguments,
    load_real_images,
    pipeline_fingerprint,
    steps_for,
    swap_scheduler,
)
from diffusers_ext.extractors import default_extractor, make_extractor
from diffusers_ext.metrics import Interval, frechet_distance, jackknife, pseudo_values, student_interval
from diffusers_ext.schedulers import calibrated_class
from diffusers_ext.subjects import subject_of
from diffusers_ext.training import TrainingArguments

T = 0.6
REPRODUCED, NOT_REPRODUCED, TOO_SMALL = "reproduced", "not reproduced", "too small to tell"


@dataclass(frozen=True)
class Budget:
    """Of a preset: steps of a training from scratch, of a fine-tuning, of a flow; images that are drawn, the reference,
    and more arguments of the training scripts."""

    steps: int
    tuning: int
    flow: int
    samples: int
    reference: str
    options: tuple[str, ...] = ()


BUDGETS = {
    "digits": Budget(800, 200, 2500, 1000, "train"),
    "mnist": Budget(1500, 200, 5000, 500, "held_out", ("--train_batch_size", "64")),
    "cifar10": Budget(20_000, 2000, 5000, 5000, "held_out", ("--mixed_precision", "bf16", "--allow_tf32")),
}


@dataclass(frozen=True)
class Result:
    """One row: a claim, the paper's figure and ours.

    Attributes:
        ours: the two sides in words.
        difference: method less baseline, where less is better.
        verdict: by its interval.
    """

    method: str
    paper: str
    claim: str
    theirs: str
    ours: str
    difference: Interval
    verdict: str
    command: str


class Lab:
    """Models, samples and distances, each made when it is first asked for."""

    def __init__(self, args: argparse.Namespace, for_training: list[str]) -> None:
        self.args, self.out, self.budget = args, args.output_dir, BUDGETS[args.preset]
        self.for_training = ["--preset", args.preset, *self.budget.options, *for_training]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
        data = of_the_data(self.for_training)
        self.measured = parse_arguments(MeasureArguments, [*data, "--reference", self.budget.reference])
        self.pipelines: dict[str, Any] = {}

    # models

    def train(self, name: str, script: str, steps: int, cost: float, *options: str, seed: int | None = None) -> Path:
        """`cost` is that of a step, in passes."""
        seed = self.args.seed if seed is None else seed
        arguments = [*self.for_training, "--num_validation_images", "0", "--max_validation_samples", "64"]
        arguments += ["--seed", str(seed), "--max_train_steps", str(steps), *options]
        record = {"seed": seed, "steps": steps, "passes": steps * cost}
        return train(script, self.out / name, arguments, deadline=self.deadline, **record)

    def model(self, name: str) -> Any:
        if name not in self.pipelines:
            pipeline = subject_of(DiffusionPipeline.from_pretrained(getattr(self, name))).sampler().to(self.device)
            pipeline.set_progress_bar_config(disable=True)
            pipeline.unet.eval().requires_grad_(False)
            self.pipelines[name] = pipeline
        return self.pipelines[name]

    PLAIN = ("--consistency_weight", "0")

    @cached_property
    def baseline(self) -> Path:
        return self.train("baseline", "train_consistency.py", self.budget.steps, 3, *self.PLAIN)

    @cached_property
    def control(self) -> Path:
        other = self.args.seed + 1
        return self.train("control", "train_consistency.py", self.budget.steps, 3, *self.PLAIN, seed=other)

    @cached_property
    def consistency(self) -> Path:
        """From half-way on, on a quarter of the batch: 4.5 passes a step there, 3 before."""
        options = ("--consistency_weight", "10", "--consistency_start", "0.5")
        return self.train("consistency", "train_consistency.py", round(self.budget.steps / 1.25), 3.75, *options)

    CLASSES = ("--class_conditional", "--label_drop", "0.2")

    @cached_property
    def ordinary(self) -> Path:
        """Class-conditional."""
        return self.train("ordinary", "train_consistency.py", self.budget.steps, 3, *self.PLAIN, *self.CLASSES)

    @cached_property
    def reflected(self) -> Path:
        law = ("--sigma_log_mean", "-0.7", "--sigma_log_std", "1.0")
        return self.train("reflected", "train_reflected.py", self.budget.steps, 3, *self.CLASSES, *law)

    def _tuning(self, name: str, script: str, steps: int, cost: float, *options: str) -> Path:
        """To a learning rate of 0: at a constant one the last steps are noise that hides what is compared."""
        tuned = ("--pretrained_model_name_or_path", str(self.baseline), "--lr_scheduler", "cosine")
        rate = ("--learning_rate", "2e-4", "--lr_warmup_steps", "10")
        return self.train(name, script, steps, cost, *tuned, *rate, *options)

    @cached_property
    def trained_on(self) -> Path:
        """The generator's passes of the observed one, and the forward pass for the discriminator's fake: 4 a step."""
        return self._tuning("trained_on", "train_consistency.py", round(self.budget.tuning * 4 / 3), 3, *self.PLAIN)

    OBSERVATION = ("--frechet_samples", "0", "--discriminator_learning_rate", "1e-3", "--observation_weight", "0.005")

    @cached_property
    def observed(self) -> Path:
        return self._tuning("observed", "train_observation.py", self.budget.tuning, 4, *self.OBSERVATION)

    @cached_property
    def observed_consistent(self) -> Path:
        both = (*self.OBSERVATION, "--consistency_weight", "10")
        return self._tuning(
            "observed_consistent", "train_observation.py", round(self.budget.tuning * 4 / 5.5), 5.5, *both
        )

    # samples

    @cached_property
    def real(self) -> Any:
        config = self.model("baseline").unet.config
        return load_real_images(self.measured, config.in_channels, config.sample_size)

    @cached_property
    def extractor(self) -> Any:
        images, labels = self.real.training.images, self.real.training.labels
        name = default_extractor(images.shape[1], images.shape[2], True)
        return make_extractor(name, device=self.device, train_images=images, train_labels=labels)

    @cached_property
    def reference(self) -> Tensor:
        return self._features(self.real.reference.images)

    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self.extractor(part).cpu() for part in images.split(500)])

    def draw(self, pipeline: Any, scheduler: Any, nfe: int, guidance: float = 1.0) -> Drawing:
        steps, n, identity = steps_for(scheduler, nfe), self.budget.samples, pipeline_fingerprint(pipeline)
        drawing = Drawing("model", pipeline, identity, scheduler, steps, n, min(250, n), self.args.seed, guidance)
        folder = self.out / "drawn"
        with tqdm(total=n, desc=drawing.name, unit="image", leave=False) as bar:
            drawing.draw(folder, bar=bar)
        drawing.extract(folder, self.extractor)
        if time.monotonic() > self.deadline:
            raise OutOfTime
        return drawing

    def features(self, pipeline: Any, scheduler: Any, nfe: int, guidance: float = 1.0) -> Tensor:
        return self.draw(pipeline, scheduler, nfe, guidance).features(self.out / "drawn", self.extractor)

    def compare(self, method: Tensor, baseline: Tensor) -> tuple[str, Interval]:
        """The two distances in words, and the interval of their difference, paired."""
        ours, theirs = (pseudo_values(frechet_distance, features, self.reference) for features in (method, baseline))
        words = f"Frechet distance {theirs.mean():.2f} → {ours.mean():.2f}"
        return words, student_interval(ours - theirs)


# the claims, by method

Row = tuple[str, str, str, tuple[str, Interval], bool]
"""(paper, claim, their figure, (words, difference), whether the claim is that the method is better, and not worse)"""


def consistency(lab: Lab) -> Iterator[Row]:
    paper, (base, ours) = "2302.09057", (lab.model(name) for name in ("baseline", "consistency"))
    theirs = "FID 2.01 → 1.95 (CIFAR-10, unconditional, 35 evaluations)"
    for nfe in (10, 35):
        found = lab.compare(*(lab.features(p, swap_scheduler(p, "DDIM"), nfe) for p in (ours, base)))
        yield paper, f"The regulariser improves samples (DDIM, {nfe} evaluations)", theirs, found, True


def control(lab: Lab) -> Iterator[Row]:
    base, other = lab.model("baseline"), lab.model("control")
    for nfe in (10, 50):
        found = lab.compare(*(lab.features(p, swap_scheduler(p, "DDIM"), nfe) for p in (other, base)))
        yield "", f"None: the baseline against itself from another seed (DDIM, {nfe} evaluations)", "", found, True


def reflected(lab: Lab) -> Iterator[Row]:
    paper, base, ours = "2304.04740", lab.model("ordinary"), lab.model("reflected")
    ode, clipped = swap_scheduler(ours, "own", algorithm_type="ode"), swap_scheduler(base, "DDIM", clip_sample=True)
    free = swap_scheduler(base, "DDIM", clip_sample=False)
    found = lab.compare(lab.features(ours, ode, 20), lab.features(base, free, 20))
    theirs = "FID 2.72 (CIFAR-10), as good as ordinary models of its time"
    yield paper, "Samples without guidance are as good (ODE against DDIM, 20 evaluations)", theirs, found, True
    found = lab.compare(lab.features(ours, ode, 20, 8.0), lab.features(base, clipped, 20, 8.0))
    said = "the ODE can be guided, where thresholding breaks it (shown in pictures)"
    yield paper, "Guided by the ODE at scale 8, samples stay faithful (against DDIM, x0 clipped)", said, found, True
    shares = [lab.draw(p, s, 20, 8.0).counted(lab.out / "drawn").out_of_range for p, s in ((ours, ode), (base, free))]
    words = f"values out of range {shares[1]:.1%} → {shares[0]:.1%}"
    gap = shares[0] - shares[1]
    claim = "No value leaves the range of the data (against DDIM, scale 8)"
    yield paper, claim, "by construction", (words, Interval(gap, gap, gap)), True
    bits = [_bits(lab, p) for p in (ours, base)]
    words = f"bits per dimension {bits[1].mean():.3f} → {bits[0].mean():.3f} (bound)"
    theirs = "2.68 (CIFAR-10), near the best of its time"
    yield paper, "The likelihood is as good", theirs, (words, student_interval(bits[0] - bits[1])), True


def _bits(lab: Lab, pipeline: Any, n: int = 256) -> Tensor:
    """The bound of held-out images, given their labels."""
    images = lab.real.floor if lab.real.held_out is None else lab.real.held_out
    x = dequantize(images.images[:n], torch.Generator().manual_seed(0)).to(lab.device)
    schedule, model = noise_schedule(pipeline.scheduler), score_model_from(pipeline.unet, pipeline.scheduler)
    told = {"class_labels": images.labels[:n].to(lab.device)} if subject_of(pipeline).num_classes is not None else {}
    generator = torch.Generator(lab.device).manual_seed(0)
    bound = elbo(model, x, schedule.sigma_min, schedule.sigma_max, n=32, generator=generator, **told)
    return bits_per_dim(bound.total, x.shape[1:]).double().cpu()


def _bridge(lab: Lab, kind: Any) -> Any:
    folder = lab.out / f"{kind.__name__}-{T}"
    if not (folder / "config.json").exists():
        images, steps = lab.real.training.images[:10_000], {"max_steps": lab.budget.flow} if kind is FlowBridge else {}
        kind.fit(images.split(500), lab.model("baseline").scheduler, T, **steps).save_pretrained(folder)
    return kind.from_pretrained(folder).to(lab.device)


def short_time(lab: Lab) -> Iterator[Row]:
    paper, base, bridge = "2206.05173", lab.model("baseline"), _bridge(lab, FlowBridge)
    plain, ours = (short_time_pipeline(base, T, start) for start in (None, bridge))
    simple = short_time_pipeline(base, T, _bridge(lab, GaussianBridge))
    for p in (plain, ours, simple):
        p.set_progress_bar_config(disable=True)
    at = {name: lab.features(p, swap_scheduler(p, "DDIM"), 10) for name, p in (("plain", plain), ("flow", ours))}
    found = lab.compare(at["flow"], at["plain"])
    theirs = "FID 5.74 → 3.72 (CIFAR-10, T = 0.6; not verified by us)"
    yield paper, f"At T = {T} an auxiliary start beats N(0, I) (DDIM, 10 evaluations)", theirs, found, True
    whole = lab.features(base, swap_scheduler(base, "DDIM"), 10)
    theirs = "FID 3.64 → 3.72 at many evaluations (CIFAR-10; not verified by us)"
    claim = f"T = {T} from an auxiliary model is as good as T = 1 (flow, DDIM, 10 evaluations)"
    yield paper, claim, theirs, lab.compare(at["flow"], whole), True
    gaussian = lab.features(simple, swap_scheduler(simple, "DDIM"), 10)
    theirs = "FID 19.79 → 15.98 (CIFAR-10, DDIM, 10 steps; arXiv 2305.19693)"
    claim = f"From the Gaussian of the moments at T = {T} few steps are better than from T = 1 (DDIM, 10 evaluations)"
    yield paper, claim, theirs, lab.compare(gaussian, whole), True
    images = (lab.real.floor if lab.real.held_out is None else lab.real.held_out).images[:256].to(lab.device)
    batches = ((x, {}) for x in images.split(64))
    report = diffusion_time_report(base.unet, base.scheduler, batches, {"flow": [bridge]}, [T, 1.0], levels=256)
    cell, other = (T, "flow"), next(c for c in report.cells if c[0] == 1.0)
    gain, bits = report.difference(cell, other), [report.terms(*c).bits_per_dim.mean for c in (other, cell)]
    nats = images[0].numel() * log(2)  # of an image, for each bit per dimension
    mean, half = gain.mean / nats, 1.96 * gain.std_error / nats
    words = f"bits per dimension {bits[0]:.4f} → {bits[1]:.4f} (bound)"
    theirs = "3.09 → 3.07 (CIFAR-10; not verified by us)"
    claim = f"The likelihood at T = {T} is no worse than at T = 1 (flow)"
    yield paper, claim, theirs, (words, Interval(mean, mean - half, mean + half)), True


def observation(lab: Lab) -> Iterator[Row]:
    paper, base, ours = "2310.04041", lab.model("trained_on"), lab.model("observed")
    figures = {10: "FID 20.56 → 10.70", 20: "FID 11.73 → 7.74", 50: "FID 7.70 → 6.28"}
    for nfe in (5, *figures):
        found = lab.compare(*(lab.features(p, swap_scheduler(p, "DDIM"), nfe) for p in (ours, base)))
        theirs = f"{figures[nfe]} (CIFAR-10)" if nfe in figures else "no figure"
        yield paper, f"Fine-tuning with a discriminator improves samples (DDIM, {nfe} evaluations)", theirs, found, True
    found = lab.compare(*(lab.features(p, swap_scheduler(p, "PNDM"), 50) for p in (ours, base)))
    theirs = "FID 4.24 → 4.87 (CIFAR-10, S-PNDM; the authors' logs)"
    yield paper, "It does harm to multistep solvers at many steps (PNDM, 50 evaluations)", theirs, found, False


def calibrated(lab: Lab) -> Iterator[Row]:
    paper, base, folder = "2302.10688", lab.model("baseline"), lab.out / "calibration"
    calibration = _calibration(lab, base, folder)
    figures = {10: "FID 6.69 → 4.59 (CelebA, 10 evaluations)", 20: "FID 3.74 → 3.36 (CIFAR-10, 20 evaluations)"}
    for nfe, theirs in figures.items():
        stock = swap_scheduler(base, "DDIM")
        ours = calibrated_class("DDIMScheduler").from_scheduler(stock, calibration)
        found = lab.compare(lab.features(base, ours, nfe), lab.features(base, stock, nfe))
        yield paper, f"Subtracting the mean error improves samples (DDIM, {nfe} evaluations)", theirs, found, True


def _calibration(lab: Lab, pipeline: Any, folder: Path) -> Any:
    """From 2000 training images: the tables in `folder`, or new ones."""
    from diffusers_ext import Calibration

    if not (folder / "config.json").exists():
        batches = ((x.to(lab.device), {}) for x in lab.real.training.images[:2000].split(100))
        state = lab.out / "calibration-state.safetensors"
        found = estimate_calibration(pipeline.unet, pipeline.scheduler, batches, num_levels=16, state_path=state)
        found.save_pretrained(folder)
    return Calibration.from_pretrained(folder)


def combinations(lab: Lab) -> Iterator[Row]:
    base, both = lab.model("observed"), lab.model("observed_consistent")
    found = lab.compare(*(lab.features(p, swap_scheduler(p, "DDIM"), 10) for p in (both, base)))
    yield "", "Observation and consistency, against observation alone (DDIM, 10 evaluations)", "not tried", found, True
    short = short_time_pipeline(lab.model("baseline"), T, _bridge(lab, FlowBridge))
    short.set_progress_bar_config(disable=True)
    stock = swap_scheduler(short, "DDIM")
    calibration = _calibration(lab, lab.model("baseline"), lab.out / "calibration")
    ours = calibrated_class(type(stock).__name__).from_scheduler(stock, calibration)
    found = lab.compare(lab.features(short, ours, 10), lab.features(short, stock, 10))
    claim = f"Calibrated, from a flow at T = {T}, against uncalibrated (DDIM, 10 evaluations)"
    yield "", claim, "not tried", found, True
    model, base = lab.model("reflected"), lab.model("ordinary")
    found = lab.compare(
        lab.features(model, swap_scheduler(model, "own", algorithm_type="heun"), 20, 8.0),
        lab.features(base, DDPMScheduler.from_config(base.scheduler.config, clip_sample=True), 20, 8.0),
    )
    claim = "Reflected, guided by Heun's ODE at scale 8, against DDPM with x0 clipped (20 evaluations)"
    yield "", claim, "not tried", found, True


METHODS: dict[str, Callable[[Lab], Iterator[Row]]] = {
    "consistency": consistency,
    "reflected": reflected,
    "short_time": short_time,
    "observation": observation,
    "calibrated": calibrated,
    "combinations": combinations,
    "control": control,
}


def verdict(difference: Interval, better: bool, claimed: bool = True) -> str:
    """By the side of 0 that the interval lies on; `claimed`: a paper says so, or we have only asked."""
    low, high = (difference.low, difference.high) if better else (-difference.high, -difference.low)
    words = (REPRODUCED, NOT_REPRODUCED) if claimed else ("better", "worse")
    return words[0] if high < 0 else words[1] if low > 0 else TOO_SMALL


# the table


def write_table(folder: Path) -> None:
    """docs/claims.md of what lies in docs/claims."""
    lines = (folder / "claims" / "HEAD.md").read_text().rstrip().splitlines()
    for preset in BUDGETS:
        file = folder / "claims" / f"{preset}.json"
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
        lines += ["", f"## {preset}", ""]
        missing = [name for name in METHODS if name not in {row["method"] for row in rows}]
        if rows:
            lines += ["| paper | claim | theirs | ours | difference (95%) | verdict |", "|---|---|---|---|---|---|"]
        for row in rows:
            d = Interval(*row["difference"])
            address = f"[{row['paper']}](https://arxiv.org/abs/{row['paper']})" if row["paper"] else ""
            shown = f"{d.estimate:+.3g} ({d.low:+.3g} to {d.high:+.3g})"
            lines.append(
                f"| {address} | {row['claim']} | {row['theirs']} | {row['ours']} | {shown} | {row['verdict']} |"
            )
        if rows:
            lines += ["", *(f"    {command}" for command in dict.fromkeys(row["command"] for row in rows))]
            lines += ["", json.loads(file.read_text())["described"]]
        if missing:
            lines += ["", f"Not measured yet: {', '.join(missing)}."]
    (folder / "claims.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits", choices=list(BUDGETS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS)[:5])
    parser.add_argument("--output_dir", type=Path, help="by default claims-PRESET")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on")
    args, for_training = parser.parse_known_args()
    args.output_dir = args.output_dir or Path(f"claims-{args.preset}")
    parse_arguments(TrainingArguments, ["--preset", args.preset, *for_training])  # errors before anything is trained
    lab, file = Lab(args, for_training), args.docs / "claims" / f"{args.preset}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    data = f"--dataset_name ${args.preset.upper()} " if "--dataset_name" in for_training else ""
    try:
        for method in args.methods:
            command = f"python benchmarks/claims.py --preset {args.preset} {data}--methods {method}"
            found = []
            for paper, claim, theirs, (ours, difference), better in METHODS[method](lab):
                said = verdict(difference, better, bool(paper))
                found.append(asdict(Result(method, paper, claim, theirs, ours, difference, said, command)))
                print(f"{method}: {claim}: {ours}, {said}", flush=True)
            rows = [row for row in rows if row["method"] != method] + found
            rows.sort(key=lambda row: list(METHODS).index(row["method"]))
            floor = jackknife(frechet_distance, lab._features(lab.real.floor.images), lab.reference)
            described = (
                f"{lab.budget.samples} samples; {lab.extractor.label}; reference: {lab.real.described}; "
                f"{len(lab.real.floor.images)} other real images are at {floor.estimate:.2f} "
                f"({floor.low:.2f} to {floor.high:.2f}). Seed {args.seed}; {lab.budget.steps} steps from scratch, "
                f"{lab.budget.tuning} of fine-tuning."
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            aside = file.with_name(f".partial-{file.name}")
            runs = {path.stem: json.loads(path.read_text()) for path in sorted(lab.out.glob("*.json"))}
            record = {"described": described, "rows": rows, "runs": runs}
            aside.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
            aside.replace(file)
            write_table(args.docs)
    except OutOfTime:
        sys.exit(f"{args.minutes:g} minutes are over: repeat the command to go on")
    print(f"done: {args.docs / 'claims.md'}")


if __name__ == "__main__":
    main()
