"""Quality, likelihood and cost of diffusers pipelines, side by side: does this help my model?

    accelerate launch training/evaluate.py --pretrained_model_name_or_path google/ddpm-cifar10-32 you/ddpm-tuned \
        --dataset_name uoft-cs/cifar10 --schedulers DDIM,DPMSolverMultistep --nfe 5,10,20,50 --output_dir evaluation

Every model draws from the same noise. Distances are corrected for their bias and have intervals; those of real images
stand beside them. `output_dir` holds results.json, results.csv, table.md, plots, sample grids, and all of it in one
file, index.html. An evaluation that was stopped, or is repeated with more models, schedulers, steps or samples, draws
only what is missing. `--help` lists every argument.
"""

import hashlib
import importlib.util
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import diffusers_ext
from diffusers_ext.commands import parse_arguments
from diffusers_ext.data.sources import Numbered, load_images
from diffusers_ext.errors import InputError, TrainingStopped, command
from diffusers_ext.evaluation import (
    OWN,
    Cell,
    Drawing,
    Evaluation,
    Likelihood,
    Manifold,
    MeasureArguments,
    RealImages,
    file_name,
    likelihood,
    load_real_images,
    markdown_table,
    pipeline_fingerprint,
    push_model_index,
    quality,
    steps_for,
    swap_scheduler,
    write_model_index,
    write_report,
)
from diffusers_ext.extractors import Extractor, default_extractor, make_extractor
from diffusers_ext.fields import arg
from diffusers_ext.files import shown
from diffusers_ext.interop import stored_scheduler
from diffusers_ext.metrics import nearest
from diffusers_ext.reports.card import shown_command
from diffusers_ext.reports.pictures import image_grid
from diffusers_ext.subjects import Pixels, load_pipeline, subject_of

GRID_IMAGES = 10


@dataclass
class EvaluationArguments(MeasureArguments):
    """Which models, how they are sampled, what is measured, and where the results go."""

    pretrained_model_name_or_path: list[str] = field(
        default_factory=list, metadata={"help": "Pipelines (Hub names or folders), the baseline first."}
    )
    names: list[str] = field(
        default_factory=list, metadata={"help": "What to call them; by default the last part of each."}
    )
    revision: str | None = arg(None, "Git revision of the pipelines.")
    variant: str | None = arg(None, "Weights variant of the pipelines, e.g. fp16.")
    torch_dtype: Literal["float32", "float16", "bfloat16"] = arg("float32", "Precision of the networks that draw.")
    schedulers: str = arg(
        OWN,
        f"Classes with commas, e.g. DDIM,CalibratedDDIM; {OWN!r} is each pipeline's. With settings: "
        "DPMSolverMultistep:use_karras_sigmas=true:solver_order=3",
    )
    nfe: str = arg("5,10,20,50", "Evaluations of the network for an image, with commas; guidance takes twice as many.")
    num_samples: int = arg(2000, "Images of each model, scheduler and number of evaluations.")
    guidance_scale: float = arg(1.0, "Classifier-free guidance; 1 is the conditional model.")
    caption_column: str | None = arg(None, "Text-to-image: column of the training data with the prompts.")
    extractor: str | None = arg(
        None,
        "efficientnet, inception (the only one called FID), classifier (trained on the labels), pixels, or "
        "package.module:Class; by default a classifier for small grey images with labels, else efficientnet.",
    )
    output_dir: str = arg("evaluation", "Folder of the results and of the images that were drawn.")
    push_to_hub: bool = arg(False, "Write the results into the model cards (model-index) of the pipelines on the Hub.")
    hub_token: str | None = arg(None, "By default the token that `hf auth login` has stored.")

    def __post_init__(self) -> None:
        super().__post_init__()
        models, names = self.pretrained_model_name_or_path, self.names
        if not models:
            raise InputError("name the models: --pretrained_model_name_or_path A B ...")
        if not names:
            lasts = [Path(model.rstrip("/")).name for model in models]
            self.names = lasts if len(set(lasts)) == len(lasts) else list(models)
        elif len(names) != len(models) or len(set(names)) != len(names):
            raise InputError(f"--names must be {len(models)} different names, one for each model, got {names}")
        if self.num_samples < 20:
            raise InputError(f"--num_samples must be at least 20, got {self.num_samples}")
        if self.ode_images > 0 and importlib.util.find_spec("torchdiffeq") is None:
            raise InputError('--ode_images needs torchdiffeq: pip install "diffusers_ext[evaluate]", or --ode_images 0')
        if not math.isfinite(self.guidance_scale):
            raise InputError(f"--guidance_scale must be finite, got {self.guidance_scale}")
        levels(self)
        asked_schedulers(self)


def asked_schedulers(args: EvaluationArguments) -> dict[str, tuple[str, dict[str, Any]]]:
    """What was asked for -> the class, and its settings."""
    asked = {}
    for words in (word.strip() for word in args.schedulers.split(",")):
        name, *pairs = words.split(":")
        if not name or not all(re.fullmatch(r"\w+=.+", pair) for pair in pairs):
            raise InputError(f"--schedulers {words!r} must be NAME, or NAME:setting=value:setting=value")
        asked[words] = name, {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)}
    return asked


def levels(args: EvaluationArguments) -> list[int]:
    try:
        numbers = sorted({int(word) for word in args.nfe.split(",")})
    except ValueError as error:
        raise InputError(f"--nfe must be whole numbers with commas between them: {error}") from error
    if numbers[0] < 1:
        raise InputError(f"--nfe must be at least 1, got {args.nfe}")
    return numbers


def load(args: EvaluationArguments, device: torch.device) -> tuple[dict[str, Any], int, int]:
    """The pipelines by name, and the (channels, resolution) of their images."""
    pipelines: dict[str, Any] = {}
    formats: dict[str, tuple[int, int]] = {}
    for name, path in zip(args.names, args.pretrained_model_name_or_path, strict=True):
        dtype = getattr(torch, args.torch_dtype)
        pipeline = load_pipeline(path, args.revision, args.variant, args.cache_dir, dtype)
        pipeline = subject_of(pipeline).sampler()
        pipeline.set_progress_bar_config(disable=True)
        subject = subject_of(pipeline)
        subject.network.eval().requires_grad_(False)
        formats[name] = subject.image_format(args.resolution)
        if args.guidance_scale != 1 and not subject.takes_captions and subject.null_class is None:
            raise InputError(f"--guidance_scale {args.guidance_scale}: {name} has no null class to guide away from")
        pipelines[name] = pipeline.to(device)
    if len(set(formats.values())) > 1:
        listed = ", ".join(f"{name}: {channels} x {size} x {size}" for name, (channels, size) in formats.items())
        raise InputError(f"the models make different images, which cannot be compared: {listed}")
    return pipelines, *next(iter(formats.values()))


def drawings(args: EvaluationArguments, pipelines: dict[str, Any], say: Callable[[str], None]) -> Iterator[Drawing]:
    """`say` is told what a scheduler cannot do."""
    prompts: list[str] | None = None
    if args.caption_column is not None:
        prompts = list(Numbered(load_images(args, args.train_split)).column(args.caption_column))  # type: ignore[arg-type]
    for (name, pipeline), path in zip(pipelines.items(), args.pretrained_model_name_or_path, strict=True):
        takes_captions = subject_of(pipeline).takes_captions
        if prompts is not None and not takes_captions:
            raise InputError(f"--caption_column: {name} takes no prompts")
        identity = pipeline_fingerprint(pipeline)
        size = args.resolution if takes_captions else None
        for words, (wanted, settings) in asked_schedulers(args).items():
            scheduler = swap_scheduler(pipeline, wanted, path, **settings)
            label = ":".join([type(scheduler).__name__.removesuffix("Scheduler"), *words.split(":")[1:]])
            for steps in possible_steps(scheduler, levels(args), say):
                yield Drawing(
                    name,
                    pipeline,
                    identity,
                    scheduler,
                    steps,
                    args.num_samples,
                    min(args.train_batch_size, args.num_samples),
                    args.seed,
                    args.guidance_scale,
                    prompts,
                    size,
                    label,
                )


def possible_steps(scheduler: Any, levels: list[int], say: Callable[[str], None]) -> list[int]:
    """Without the levels that the scheduler cannot reach; an `InputError` if that leaves none."""
    steps: list[int] = []
    for nfe in levels:
        try:
            steps.append(steps_for(scheduler, nfe))
        except InputError as error:
            if nfe == levels[-1] and not steps:
                raise
            say(f"left out: {error}")
    return list(dict.fromkeys(steps))


def real_features(real: RealImages, extractor: Extractor) -> dict[str, Tensor]:
    sets = {"training": real.training, "reference": real.reference, "floor": real.floor, "held_out": real.held_out}
    features: dict[str, Tensor] = {}
    for name, images in sets.items():
        if images is not None:
            parts = tqdm(images.images.split(500), desc=f"features, {name}", unit="batch", leave=False)
            features[name] = torch.cat([extractor(part).cpu() for part in parts])
    return features


def extractor_for(
    args: EvaluationArguments, real: RealImages, channels: int, resolution: int, device: torch.device
) -> Extractor:
    labels = real.training.labels
    classes = int(labels.max()) + 1 if int(labels.min()) >= 0 else None
    name = args.extractor or default_extractor(channels, resolution, classes is not None)
    training = {"train_images": real.training.images, "train_labels": labels, "classes": classes}
    try:
        return make_extractor(name, device=device, **training)
    except (ImportError, ValueError) as error:
        raise InputError(f"--extractor {name}: {error}") from error


def measure(
    args: EvaluationArguments,
    drawn: list[Drawing],
    real: RealImages,
    extractor: Extractor,
    folder: Path,
    device: torch.device,
) -> tuple[Evaluation, dict[str, Image.Image]]:
    """Everything but the likelihood, and the pictures by title."""
    out = Path(args.output_dir)
    known = {name: features.to(device) for name, features in real_features(real, extractor).items()}
    smallest = min(args.num_samples, len(known["reference"]), len(known["floor"]))
    manifold = Manifold.of(known["reference"], known["training"], known.get("held_out"), smallest)
    if smallest < manifold.least:
        print(
            f"no Frechet distance: {smallest} images are fewer than {manifold.least} features, too few to take its bias"
            f" off. Use more images, --reference train, or another --extractor; the kernel distance has no bias"
        )
    evaluation = Evaluation(
        data=shown(args.dataset_name or args.train_data_dir or ""),
        reference=real.described,
        num_reference=len(known["reference"]),
        extractor=extractor.label,
        num_features=manifold.least,
        is_fid=extractor.is_fid,
        floor=quality(known["floor"], manifold),
        num_floor=len(known["floor"]),
        models=dict(zip(args.names, map(shown, args.pretrained_model_name_or_path), strict=True)),
        seed=args.seed,
        command=shown_command(f"accelerate launch {shlex.join(sys.argv)}"),
        versions={module.__name__: module.__version__ for module in (diffusers_ext, diffusers, torch)},
    )
    pictures = grids(drawn, folder, out)
    last = {drawing.model: drawing for drawing in drawn}
    for drawing in tqdm(drawn, desc="distances"):
        features, counted = drawing.features(folder, extractor).to(device), drawing.counted(folder)
        evaluation.cells.append(
            Cell(
                drawing.model,
                drawing.scheduler_name,
                drawing.steps,
                counted.nfe,
                counted.seconds,
                counted.out_of_range,
                drawing.num_samples,
                quality(features, manifold),
            )
        )
        if drawing is last[drawing.model]:
            title, picture = neighbours(drawing, features, real, known["training"], folder, out)
            pictures[title] = picture
    return evaluation, pictures


def grids(drawn: list[Drawing], folder: Path, out: Path) -> dict[str, Image.Image]:
    """By title: a grid for each scheduler and number of steps, a row for each model, a column for each noise."""
    groups: dict[tuple[str, int], list[Drawing]] = {}
    for drawing in drawn:
        groups.setdefault((drawing.scheduler_name, drawing.steps), []).append(drawing)
    pictures: dict[str, Image.Image] = {}
    for (scheduler, steps), group in groups.items():
        images = torch.cat([next(drawing.images(folder))[:GRID_IMAGES] for drawing in group])
        picture = image_grid(images.movedim(1, 3).numpy() / 255, len(images) // len(group))
        picture.save(out / "samples" / f"{file_name(scheduler)}-{steps}.png")
        pictures[f"{scheduler}, {steps} steps. Rows: {', '.join(drawing.model for drawing in group)}"] = picture
    return pictures


def neighbours(
    drawing: Drawing, features: Tensor, real: RealImages, of_training: Tensor, folder: Path, out: Path
) -> tuple[str, Image.Image]:
    """The samples that are nearest to a training image, and below each the image that it is nearest to."""
    distances, places = (found.cpu() for found in nearest(features, of_training))
    closest = distances.argsort()[:GRID_IMAGES]
    samples = torch.cat(list(drawing.images(folder)))[closest].float() / 255
    images = torch.cat([samples, real.training.images[places[closest]] / 2 + 0.5])
    grid = image_grid(images.movedim(1, 3).numpy(), len(closest))
    grid.save(out / "samples" / f"nearest-{drawing.name.rsplit('-', 1)[0]}.png")
    how = f"{drawing.model}, {drawing.scheduler_name}, {drawing.steps} steps"
    return f"{how}: the samples nearest to a training image, and below them that image", grid


def likelihood_of(args: EvaluationArguments, drawing: Drawing, real: RealImages, folder: Path) -> Likelihood | None:
    """Of a pixel model, on held-out images or, without any, on the floor; what is in `folder` is not measured again."""
    pipeline, subject = drawing.pipeline, subject_of(drawing.pipeline)
    if not isinstance(subject, Pixels) or subject.autoencoder is not None:
        return None
    if args.likelihood_images == args.ode_images == 0:
        return None
    images = real.floor if real.held_out is None else real.held_out
    classes, null = subject.num_classes, subject.null_class
    if (
        classes is not None
        and not -(null is not None) <= int(images.labels.min()) <= int(images.labels.max()) < classes
    ):
        print(f"no likelihood of {drawing.model}: the labels of the data are not those of its {classes} classes")
        return None
    counts = args.likelihood_images, args.likelihood_evaluations, args.ode_images, args.seed, args.train_batch_size
    key = hashlib.sha256(f"{counts}{drawing.identity}{sorted(stored_scheduler(pipeline.scheduler).items())}".encode())
    for tensor in (images.images, images.labels):
        key.update(tensor.numpy().tobytes())
    file = folder / f"likelihood-{key.hexdigest()[:12]}.json"
    if not file.exists():
        likelihood(subject, images, args).save(file)
    return Likelihood.load(file)


def publish(args: EvaluationArguments, evaluation: Evaluation) -> list[str]:
    """Write the results into the cards; what failed, in words."""
    failures = []
    for name, path in zip(args.names, args.pretrained_model_name_or_path, strict=True):
        try:
            if Path(path).is_dir():
                write_model_index(evaluation, name, Path(path) / "README.md")
                print(f"the card in {path} has the results; it is not on the Hub: hf upload USER/NAME {path}")
                continue
            push_model_index(evaluation, name, path, args.hub_token, args.output_dir)
        except (OSError, RuntimeError, ValueError) as error:
            failures.append(str(error))
    return failures


@command
def main() -> None:
    args = parse_arguments(EvaluationArguments)
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=2))])
    out = Path(args.output_dir)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    pipelines, channels, resolution = load(args, device)
    drawn = list({drawing.name: drawing for drawing in drawings(args, pipelines, accelerator.print)}.values())
    real = load_real_images(args, channels, resolution)
    extractor = extractor_for(args, real, channels, resolution, device) if rank == 0 else None

    folder = out / "drawn"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (out / "samples").mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {out} cannot be made: {error}") from error
    own = sum(len(drawing.numbers(batch)) for drawing in drawn for batch in range(rank, drawing.num_batches, world))
    with tqdm(total=own, desc="images", unit="image", disable=rank > 0) as bar:
        for drawing in drawn:
            bar.set_postfix_str(f"{drawing.model}, {drawing.scheduler_name}, {drawing.steps} steps")
            drawing.draw(folder, rank, world, bar)
    first = {drawing.model: drawing for drawing in reversed(drawn)}
    for i, name in enumerate(pipelines):
        if i % world == rank:
            likelihood_of(args, first[name], real, folder)
    accelerator.wait_for_everyone()

    failures: list[str] = []
    if extractor is not None:  # on the main process
        for drawing in tqdm(drawn, desc="features"):
            drawing.extract(folder, extractor)
        likelihoods = {name: likelihood_of(args, first[name], real, folder) for name in pipelines}
        evaluation, pictures = measure(args, drawn, real, extractor, folder, device)
        evaluation.likelihoods = {name: one for name, one in likelihoods.items() if one is not None}
        evaluation.save(out / "results.json")
        write_report(evaluation, out, pictures)
        print(f"{markdown_table(evaluation)}\nall of it, with pictures: {out / 'index.html'}")
        failures = publish(args, evaluation) if args.push_to_hub else []
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if failures:
        raise TrainingStopped("\n".join(failures), code=3)


if __name__ == "__main__":
    main()
