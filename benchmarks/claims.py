"""Do the papers' claims hold on this data? Every method against its baseline at equal training cost.

    python benchmarks/claims.py --preset digits
    python benchmarks/claims.py --preset mnist --dataset_name $MNIST --methods calibrated short_time
    python benchmarks/claims.py --preset cifar10 --minutes 8          # on a GPU; repeat until it says that it is done
    python benchmarks/claims.py --preset cifar10 --share 0.1 --samples 2000     # a tenth of the steps

Trains what the claims need into output_dir (`--methods` chooses; `--minutes` stops after so long, and the same command
goes on), with a record of command, seed and cost beside each model, and writes docs/claims/PRESET.json, from which
docs/claims.md is made. What is there is neither trained nor drawn again.

The cost of training is counted in passes of the network over a batch, forward 1 and backward 2, and equal for the two
sides of a comparison; a discriminator's own passes are not counted in. A comparison is paired: both sides draw from the
same noise, and the interval (95%, jackknife) is that of their difference: of the extractor's features, and, as a second
measure, of pixels. Every side is trained from `--seeds` seeds; the difference is the mean, and its interval reaches
over those of all seeds, so that a verdict holds for each of them. The draw of a flow is paid
for: its baseline gets the evaluations of the network that take as long, rounded up.
"""

import json
import sys
import time
from argparse import Namespace
from collections import namedtuple
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from math import ceil, log
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench import DEVICE, flags, machine
from diffusers import DiffusionPipeline
from reflected_guidance import TREATMENTS, scheduler_for
from short_time import cost_of_a_draw
from torch import Tensor
from trained import ROOT, OutOfTime, batches, kept, load, of_the_data, train

import diffusers_ext as ext
from diffusers_ext.commands import parse_arguments
from diffusers_ext.evaluation import (
    Drawing,
    Judge,
    MeasureArguments,
    RealImages,
    load_real_images,
    steps_for,
)
from diffusers_ext.evaluation.real_images import rows_of
from diffusers_ext.extractors import default_extractor, make_extractor
from diffusers_ext.files import write_file
from diffusers_ext.metrics import Interval, student_interval
from diffusers_ext.reports.card import table
from diffusers_ext.schedulers import calibrated_class
from diffusers_ext.subjects import Subject
from diffusers_ext.training import TrainingArguments

T = 0.6
HARM = "It does harm to multistep solvers at many steps (PNDM, 50 evaluations)"
# Ours in words, the difference, method less baseline, of which less is better, and that of pixels, of samples.
Found = tuple[str, Interval, Interval | None]
# A claim in words, the paper's figure, what was found, and, of a claim to be as good, up to which difference it is.
Claim = namedtuple("Claim", "words theirs found margin", defaults=[0.0])
AS_GOOD, AS_LIKELY = 0.3, 0.01  # of distances and of bits per dimension


# Of a preset: steps of a training from scratch, of a fine-tuning, of a flow; images that are drawn, the reference,
# more arguments of the training scripts, and those of models from scratch that are not reflected: the preset's EDM
# model has no time T < 1, of which four of the papers' models are.
Budget = namedtuple("Budget", "steps tuning flow samples reference options scratch", defaults=["", ""])
BUDGETS = {
    "digits": Budget(800, 200, 2500, 1000, "train"),
    "mnist": Budget(1500, 200, 5000, 500, "held_out", "--train_batch_size 64"),
    "cifar10": Budget(
        20_000, 2000, 5000, 5000, "train", "--mixed_precision bf16 --allow_tf32",
        "--scheduler DDIMScheduler --beta_schedule squaredcos_cap_v2 --prediction_type v_prediction",
    ),
}  # fmt: skip

# How a model is trained: by a script, at a cost of so many passes a step, with options, perhaps from another one on,
# `base`. From scratch it takes as many passes as the budget's steps of denoising, fine-tuned as many as those of
# observation guidance (4: the generator's, and the forward pass for the discriminator's fake).
Recipe = namedtuple("Recipe", "script cost options base", defaults=[""])
PLAIN, CLASSES = "--consistency_weight 0", "--class_conditional --label_drop 0.2"
OBSERVATION = "--frechet_samples 0 --discriminator_learning_rate 1e-3 --observation_weight 0.005"
# To a learning rate of 0: at a constant one the last steps are noise that hides what is compared.
TUNING = "--lr_scheduler cosine --learning_rate 2e-4 --lr_warmup_steps 10"
RECIPES = {
    "baseline": Recipe("train_consistency.py", 3, PLAIN),
    # From half-way on, on a quarter of the batch: 4 passes a step there, 3 before.
    "consistency": Recipe("train_consistency.py", 3.5, "--consistency_weight 10 --consistency_start 0.5"),
    "ordinary": Recipe("train_consistency.py", 3, f"{PLAIN} {CLASSES}"),
    "reflected": Recipe("train_reflected.py", 3, CLASSES),
    "reflected_likely": Recipe("train_reflected.py", 3, f"{CLASSES} --purpose likelihood"),
    "trained_on": Recipe("train_consistency.py", 3, PLAIN, "baseline"),
    "observed": Recipe("train_observation.py", 4, OBSERVATION, "baseline"),
    "observed_consistent": Recipe("train_observation.py", 5, f"{OBSERVATION} --consistency_weight 10", "baseline"),
    "linear": Recipe("train_consistency.py", 3, f"{PLAIN} --beta_schedule linear"),
    "linear_trained_on": Recipe("train_consistency.py", 3, PLAIN, "linear"),
    "linear_observed": Recipe("train_observation.py", 4, OBSERVATION, "linear"),
}


class Lab:
    """Models, samples and distances, each made when it is first asked for."""

    def __init__(self, args: Namespace, for_training: list[str], number: int = 0, first: Any = None) -> None:
        self.args, self.seed, self.first, self.budget = args, args.seed + number, first, BUDGETS[args.preset]
        self.out = args.output_dir / f"seed-{self.seed}" if number else args.output_dir
        self.for_training = ["--preset", args.preset, *self.budget.options.split(), *for_training]
        self.deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
        self.drawn, self.models = self.out / "drawn", {}

    def train(self, name: str) -> Path:
        script, cost, options, base = RECIPES[name]
        seed, passes = self.seed, self.budget.tuning * 4 if base else self.budget.steps * 3
        steps = round(passes / cost)
        arguments = [*self.for_training, "--num_validation_images", "0", "--max_validation_samples", "64"]
        arguments += ["--seed", str(seed), "--max_train_steps", str(steps)]
        if not base and script != "train_reflected.py":
            arguments += self.budget.scratch.split()
        arguments += options.split()
        if base:
            arguments += ["--pretrained_model_name_or_path", str(self.train(base)), *TUNING.split()]
        folder, record = self.out / name, {"seed": seed, "steps": steps, "passes": steps * cost}
        return train(script, folder, arguments, deadline=self.deadline, **record)

    def model(self, name: str) -> Subject:
        if name not in self.models:
            self.models[name] = load(self.train(name))
        return self.models[name]

    def short(self, kind: Any = None) -> DiffusionPipeline:
        """The baseline on [0, T], from a bridge of this kind or from N(0, I)."""
        base, start = self.model("baseline").pipeline, None
        if kind is not None:
            options = {"max_steps": self.budget.flow} if kind is ext.FlowBridge else {}
            fit = partial(kind.fit, self.real.training.images[:10_000].split(500), base.scheduler, T, **options)
            start = kept(kind, self.out / f"{kind.__name__}-{T}", fit)
        pipeline = ext.short_time_pipeline(base, T, start)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @cached_property
    def calibration(self) -> ext.Calibration:
        """Of the baseline, from 2000 training images."""
        base, options = self.model("baseline"), {"state_path": self.out / "calibration-state.safetensors"}
        data = batches(base, self.real.training, 2000, 100)
        make = partial(ext.estimate_calibration, base.network, base.pipeline.scheduler, data, num_levels=16, **options)
        return kept(ext.Calibration, self.out / "calibration", make)

    @cached_property
    def real(self) -> RealImages:
        data, base = [*of_the_data(self.for_training), "--reference", self.budget.reference], self.model("baseline")
        return load_real_images(parse_arguments(MeasureArguments, data), *base.image_format())

    @cached_property
    def judge(self) -> Judge:
        if self.first is not None:
            return self.first.judge
        images, labels = self.real.training.images, self.real.training.labels
        name = default_extractor(images.shape[1], images.shape[2], True)
        extractor = make_extractor(name, device=DEVICE, train_images=images, train_labels=labels)
        return Judge(self.real, extractor, self.budget.samples)

    def draw(
        self, model: str | DiffusionPipeline, nfe: int, name: str = "DDIM", guidance: float = 1.0, **settings: Any
    ) -> Drawing:
        """Samples of a model by a scheduler of this name; a calibrated one has the baseline's calibration."""
        pipeline, n = self.model(model).pipeline if isinstance(model, str) else model, self.budget.samples
        settings = settings if name == "own" else {"timestep_spacing": "trailing"} | settings
        scheduler = scheduler_for(pipeline, stock := name.removeprefix("Calibrated"), **settings)
        if name != stock:
            scheduler = calibrated_class(type(scheduler).__name__).from_scheduler(scheduler, self.calibration)
        options = {"batch_size": 250, "seed": self.seed, "guidance_scale": guidance}
        drawing = Drawing.of(pipeline, scheduler, steps_for(scheduler, nfe), n, **options)
        drawing.draw(self.drawn)
        if time.monotonic() > self.deadline:
            raise OutOfTime
        return drawing

    def versus(self, method: Drawing, baseline: Drawing) -> Found:
        """The two distances in words, and the interval of their difference, paired."""
        ours, theirs = (self.judge.measure(one, self.drawn) for one in (method, baseline))
        found, pixels = ours.change(theirs), ours.change(theirs, "pixels")
        assert found is not None
        return f"Frechet distance {theirs.frechet.estimate:.2f} → {ours.frechet.estimate:.2f}", found, pixels

    def bits(self, name: str, n: int = 256) -> Tensor:
        """The bound of n held-out images, given their labels."""
        subject, images = self.model(name), rows_of(self.real.unseen, 0, n)
        x = ext.dequantize(images.images, torch.Generator().manual_seed(0)).to(DEVICE)
        scheduler, generator = subject.pipeline.scheduler, torch.Generator(DEVICE).manual_seed(0)
        schedule, network = ext.noise_schedule(scheduler), ext.score_model_from(subject.network, scheduler)
        options = {"n": 32, "generator": generator, **subject.conditions(images)}
        bound = ext.elbo(network, x, schedule.sigma_min, schedule.sigma_max, **options)
        return ext.bits_per_dim(bound.total, x.shape[1:]).double().cpu()


# the claims, by method: what the paper says, its figure, and what we found


def consistency(lab: Lab) -> Iterator[Claim]:
    theirs = "FID 2.01 → 1.95 (CIFAR-10, unconditional, 35 evaluations)"
    for nfe in (10, 35):
        found = lab.versus(lab.draw("consistency", nfe), lab.draw("baseline", nfe))
        yield Claim(f"The regulariser improves samples (DDIM, {nfe} evaluations)", theirs, found)


# Guided samplers of diffusers. Without the flag (`consistent`) DDIM steps along the eps of an x0 that is not clipped.
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM, x0 clipped": ("DDIM", {"clip_sample": True}),
    "DDIM, x0 clipped, use_clipped_model_output": ("DDIM", {"clip_sample": True, "consistent": True}),
    "DDIM, clamped at the end": ("DDIM", {"clip_sample": False}),
    "DDPM, x0 clipped": ("DDPM", {"clip_sample": True}),
    "DDIM, dynamic thresholding, use_clipped_model_output": (
        "DDIM", {"clip_sample": False, "consistent": True, **TREATMENTS["dynamic thresholding"]},
    ),
}  # fmt: skip


def reflected(lab: Lab) -> Iterator[Claim]:
    ode, free = {"name": "own", "algorithm_type": "ode"}, {"clip_sample": False}
    found = lab.versus(lab.draw("reflected", 20, **ode), lab.draw("ordinary", 20, **free))
    theirs = "FID 2.72 (CIFAR-10), as good as ordinary models of its time"
    words = f"Samples without guidance are as good, within {AS_GOOD} (ODE against DDIM, 20 evaluations)"
    yield Claim(words, theirs, found, AS_GOOD)
    ours = lab.draw("reflected", 20, guidance=8.0, **ode)
    theirs = "the ODE can be guided, where thresholding breaks it (shown in pictures)"
    for how, (name, settings) in STOCK.items():
        found = lab.versus(ours, lab.draw("ordinary", 20, name, 8.0, **settings))
        yield Claim(f"Guided by the ODE at scale 8, samples stay faithful (against {how})", theirs, found)
    drawings = ours, lab.draw("ordinary", 20, guidance=8.0, **free)
    after, before = (drawing.counted(lab.drawn).out_of_range for drawing in drawings)
    found = f"values out of range {before:.1%} → {after:.1%}", Interval(*[after - before] * 3), None
    yield Claim("No value leaves the range of the data (against DDIM, scale 8)", "by construction", found)
    after, before = lab.bits("reflected_likely"), lab.bits("ordinary")
    said = f"bits per dimension {before.mean():.3f} → {after.mean():.3f} (bound)"
    found = said, student_interval(after - before), None
    words = f"The likelihood is as good, within {AS_LIKELY} (trained for it)"
    yield Claim(words, "2.68 (CIFAR-10), near the best of its time", found, AS_LIKELY)


def short_time(lab: Lab) -> Iterator[Claim]:
    short = lab.short(ext.FlowBridge)
    flow, steps = lab.draw(short, 10), "(DDIM, 10 evaluations)"
    theirs = "FID 5.74 → 3.72 (CIFAR-10, T = 0.6; not verified by us)"
    found = lab.versus(flow, lab.draw(lab.short(), 10))
    yield Claim(f"At T = {T} an auxiliary start beats N(0, I) {steps}", theirs, found)
    draw, network = cost_of_a_draw(short.bridge, lab.model("baseline").network, 250)  # a batch of `Lab.draw`
    whole = 10 + ceil(median(draw) / median(network))
    theirs = "FID 3.64 → 3.72 at many evaluations (CIFAR-10; not verified by us)"
    words = (
        f"T = {T} from a flow is as good as T = 1, within {AS_GOOD} (DDIM, 10 evaluations and a draw, against {whole})"
    )
    yield Claim(words, theirs, lab.versus(flow, lab.draw("baseline", whole)), AS_GOOD)
    theirs = "FID 19.79 → 15.98 (CIFAR-10, DDIM, 10 steps; arXiv 2305.19693)"
    found = lab.versus(lab.draw(lab.short(ext.GaussianBridge), 10), lab.draw("baseline", 10))
    yield Claim(
        f"From the Gaussian of the moments at T = {T} samples are better than from T = 1 {steps}", theirs, found
    )

    base, images = lab.model("baseline"), lab.real.unseen
    starts, data = {"flow": [short.bridge]}, batches(base, images, 256, 64)
    report = ext.diffusion_time_report(base.network, base.pipeline.scheduler, data, starts, [T, 1.0], levels=256)
    cell, other = (T, "flow"), next(c for c in report.cells if c[0] == 1.0)
    gain, bits = report.difference(cell, other), [report.terms(*c).bits_per_dim.mean for c in (other, cell)]
    nats = images.images[0].numel() * log(2)  # of an image, for each bit per dimension
    mean, half = gain.mean / nats, 1.96 * gain.std_error / nats
    said = f"bits per dimension {bits[0]:.4f} → {bits[1]:.4f} (bound)"
    found = said, Interval(mean, mean - half, mean + half), None
    theirs = "3.09 → 3.07 (CIFAR-10; not verified by us)"
    yield Claim(
        f"The likelihood at T = {T} is as good as at T = 1, within {AS_LIKELY} (flow)", theirs, found, AS_LIKELY
    )


def observation(lab: Lab) -> Iterator[Claim]:
    figures = {10: "FID 20.56 → 10.70", 20: "FID 11.73 → 7.74", 50: "FID 7.70 → 6.28"}
    for nfe in (5, *figures):
        found = lab.versus(lab.draw("observed", nfe), lab.draw("trained_on", nfe))
        theirs = f"{figures[nfe]} (CIFAR-10)" if nfe in figures else "no figure"
        yield Claim(f"Fine-tuning with a discriminator improves samples (DDIM, {nfe} evaluations)", theirs, found)
    for nfe in (5, 10, 20):  # where few steps hurt: the premise of the method
        found = lab.versus(lab.draw("linear_observed", nfe), lab.draw("linear_trained_on", nfe))
        yield Claim(f"The same of a model with linear betas (DDIM, {nfe} evaluations)", "as above", found)
    found = lab.versus(lab.draw("observed", 50, "PNDM"), lab.draw("trained_on", 50, "PNDM"))
    yield Claim(HARM, "FID 4.24 → 4.87 (CIFAR-10, S-PNDM; the authors' logs)", found)


def calibrated(lab: Lab) -> Iterator[Claim]:
    figures = {10: "FID 6.69 → 4.59 (CelebA, 10 evaluations)", 20: "FID 3.74 → 3.36 (CIFAR-10, 20 evaluations)"}
    for nfe, theirs in figures.items():
        found = lab.versus(lab.draw("baseline", nfe, "CalibratedDDIM"), lab.draw("baseline", nfe))
        yield Claim(f"Subtracting the mean error improves samples (DDIM, {nfe} evaluations)", theirs, found)


def combinations(lab: Lab) -> Iterator[Claim]:
    found = lab.versus(lab.draw("observed_consistent", 10), lab.draw("observed", 10))
    yield Claim("Observation and consistency, against observation alone (DDIM, 10 evaluations)", "not tried", found)
    flow = lab.short(ext.FlowBridge)
    found = lab.versus(lab.draw(flow, 10, "CalibratedDDIM"), lab.draw(flow, 10))
    yield Claim(f"Calibrated, from a flow at T = {T}, against uncalibrated (DDIM, 10 evaluations)", "not tried", found)


METHODS = {m.__name__: m for m in (consistency, reflected, short_time, observation, calibrated, combinations)}
PAPERS = dict(zip(METHODS, ("2302.09057", "2304.04740", "2206.05173", "2310.04041", "2302.10688", ""), strict=True))


def verdict(difference: Interval, better: bool, claimed: bool = True, margin: float = 0.0) -> str:
    """By the side of the margin that the interval lies on; `claimed`: a paper says so, or we have only asked."""
    low, high = (difference.low, difference.high) if better else (-difference.high, -difference.low)
    words = ("reproduced", "not reproduced") if claimed else ("better", "worse")
    return words[0] if high < margin else words[1] if low > margin else "too small to tell"


def over_seeds(found: tuple[Claim, ...]) -> Claim:
    """One claim of several seeds: what was found of each, the mean difference, an interval over those of all."""
    ours, differences, pixels = zip(*(one.found for one in found), strict=True)
    words = "; ".join([ours[0], *(other.removeprefix("Frechet distance ") for other in ours[1:])])
    seen = None if None in pixels else hull(pixels)
    return found[0]._replace(found=(words, hull(differences), seen))


def hull(differences: Sequence[Interval]) -> Interval:
    """The mean of several differences, and the interval that holds those of all."""
    mean = sum(one.estimate for one in differences) / len(differences)
    return Interval(mean, min(one.low for one in differences), max(one.high for one in differences))


def shown(d: Interval) -> str:
    return f"{d.estimate:+.3g} ({d.low:+.3g} to {d.high:+.3g})"


def read(docs: Path, preset: str) -> dict[str, Any]:
    """What is known of a preset: `rows`, and `described`, the settings in words."""
    file = docs / "claims" / f"{preset}.json"
    return json.loads(file.read_text()) if file.exists() else {"rows": []}


def write_table(docs: Path) -> None:
    """docs/claims.md of what lies in docs/claims."""
    parts = [(docs / "claims" / "HEAD.md").read_text().rstrip()]
    for preset in BUDGETS:
        found, rows = read(docs, preset), []
        for row in found["rows"]:
            d = Interval(*row["difference"])
            address = f"[{row['paper']}](https://arxiv.org/abs/{row['paper']})" if row["paper"] else ""
            rows.append([address, row["claim"], row["theirs"], row["ours"], shown(d), row["verdict"]])
            rows[-1].insert(5, shown(Interval(*row["pixels"])) if row.get("pixels") else "")
        parts.append(f"## {preset}")
        if rows:
            parts.append(table(["paper", "claim", "theirs", "ours", "difference (95%)", "of pixels", "verdict"], rows))
            parts.append("\n".join(f"    {command}" for command in dict.fromkeys(r["command"] for r in found["rows"])))
            parts.append(found["described"])
        if missing := [name for name in METHODS if name not in {row["method"] for row in found["rows"]}]:
            parts.append(f"Not measured yet: {', '.join(missing)}.")
    (docs / "claims.md").write_text("\n\n".join(parts) + "\n")


def write(labs: list[Lab], rows: list[dict[str, Any]]) -> None:
    """docs/claims/PRESET.json of rows, and the page."""
    lab = labs[0]
    floor, budget, docs = lab.judge.floor.frechet, lab.budget, lab.args.docs
    described = (
        f"{budget.samples} samples; {lab.judge.extractor.label}; reference: {lab.real.described}; "
        f"{len(lab.real.floor.images)} other real images are at {floor.estimate:.2f} "
        f"({floor.low:.2f} to {floor.high:.2f}). {budget.steps} steps from scratch, "
        f"{budget.tuning} of fine-tuning. Machine: {machine()}."
    )
    runs = read(docs, lab.args.preset).get("runs", {})
    for one in labs:
        runs |= {
            f"{path.stem}, seed {one.seed}": json.loads(path.read_text()) for path in sorted(one.out.glob("*.json"))
        }
    record = json.dumps({"described": described, "rows": rows, "runs": runs}, indent=1, ensure_ascii=False)
    write_file(docs / "claims" / f"{lab.args.preset}.json", record + "\n")
    write_table(docs)


DEFAULTS = {"seeds": 2, "share": 1.0, "samples": 0}  # of what a row's command names where it is something else


def main() -> None:
    args, for_training = flags(
        __doc__, rest=True, choices={"preset": BUDGETS, "methods": METHODS}, preset="digits",
        methods=list(METHODS)[:5], output_dir=None, docs=ROOT / "docs", seed=0, minutes=0.0, **DEFAULTS,
    )  # fmt: skip
    whole = BUDGETS[args.preset]
    counts = [round(args.share * n) for n in whole[:3]]
    BUDGETS[args.preset] = Budget(*counts, args.samples or whole.samples, *whole[4:])
    args.output_dir = Path(args.output_dir or f"claims-{args.preset}")
    parse_arguments(TrainingArguments, ["--preset", args.preset, *for_training])  # errors before anything is trained
    lab, rows = Lab(args, for_training), read(args.docs, args.preset)["rows"]
    labs = [lab, *(Lab(args, for_training, number, lab) for number in range(1, args.seeds))]
    settings = [f"--{name} {getattr(args, name)}" for name in DEFAULTS if getattr(args, name) != DEFAULTS[name]]
    settings += [f"${args.preset.upper()}" if "/" in word else word for word in for_training]
    try:
        for method in args.methods:
            paper = PAPERS[method]
            command = " ".join(
                [f"python benchmarks/claims.py --preset {args.preset}", *settings, f"--methods {method}"]
            )
            rows = [row for row in rows if row["method"] != method]
            for found in zip(*(METHODS[method](one) for one in labs), strict=True):
                claim, theirs, (ours, difference, pixels), margin = over_seeds(found)
                said = verdict(difference, claim != HARM, bool(paper), margin)
                row = {"method": method, "paper": paper, "claim": claim, "theirs": theirs, "ours": ours}
                row["seeds"] = [args.seed + number for number in range(args.seeds)]
                rows.append(row | {"difference": difference, "pixels": pixels, "verdict": said, "command": command})
                print(f"{method}: {claim}: {ours}, {said}", flush=True)
            rows.sort(key=lambda row: list(METHODS).index(row["method"]))
            write(labs, rows)
    except OutOfTime:
        sys.exit(f"{args.minutes:g} minutes are over: repeat the command to go on")
    print(f"done: {args.docs / 'claims.md'}")


if __name__ == "__main__":
    main()
