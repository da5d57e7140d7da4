"""Compare pipelines by what they draw, by how likely held-out images are to them, and by what it costs.

    evaluation = evaluate(
        {"stock": stock, "tuned": tuned},                   # the first is the baseline
        RealImages.of(training, held_out),
        "evaluation",
        schedulers=["DDIM", "DPMSolverMultistep:use_karras_sigmas=true"],
        nfe=[5, 10],
        num_samples=500,
    )
    evaluation.cells[0].quality.frechet                     # Interval(estimate, low, high)
    write_report(evaluation, "evaluation")                  # tables, plots and index.html

Every model draws from the same noise, so a change from the baseline has the interval of the pairs. The folder keeps
what was drawn and measured, by a hash of all that decides it: a second call draws only what is missing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

import diffusers_ext

from ..data.batches import Images
from ..errors import InputError
from ..extractors import Extractor, default_extractor, make_extractor
from ..fields import arg
from ..files import remove_partial, shown
from ..interop import stored_scheduler
from ..progress import progress_bar
from ..randomness import RULE
from ..reports.measured import Cell, Evaluation, Likelihood
from ..subjects import ImageFormat, Subject, subject_of
from ..subjects.guidance import exposes_guidance
from .measures import NO_QUALITY, Judge, LikelihoodSettings
from .measures import likelihood as measure_likelihood
from .real_images import MIN_IMAGES, MeasureArguments, RealImages
from .sample_pictures import grids, nearest_to_training
from .samples import Drawing, pipeline_fingerprint
from .schedulers import OWN, clipping_advice, possible_steps, read_schedulers, swap_scheduler

if TYPE_CHECKING:
    from accelerate import Accelerator

NFE = (5, 10, 20, 50)
LIKELIHOOD = LikelihoodSettings()


@dataclass
class EvaluationArguments(MeasureArguments):
    """Arguments of a command line that say how models are sampled and what is measured: those of `evaluate`."""

    schedulers: str = arg(
        OWN,
        f"Classes with commas, e.g. DDIM,CalibratedDDIM; {OWN!r} is each pipeline's. With settings: "
        "DPMSolverMultistep:use_karras_sigmas=true:solver_order=3",
    )
    nfe: str = arg(
        ",".join(map(str, NFE)), "Evaluations of the network for an image, with commas; guidance takes twice as many."
    )
    num_samples: int = arg(2000, "Images of each model, scheduler and number of evaluations.", at_least=MIN_IMAGES)
    guidance_scale: float = arg(1.0, "Classifier-free guidance; 1 is the conditional model.")
    extractor: str | None = arg(
        None,
        "efficientnet, inception (the only one called FID), classifier (trained on the labels), pixels, or "
        "package.module:Class; by default a classifier for small grey images with labels, else efficientnet.",
    )
    likelihood_images: int = arg(
        LIKELIHOOD.images, "Held-out images of the likelihood's bound; 0 leaves it out.", at_least=0
    )
    likelihood_evaluations: int = arg(
        LIKELIHOOD.evaluations, "Evaluations of the network for each image's bound.", at_least=1
    )
    ode_images: int = arg(
        LIKELIHOOD.ode_images, "Held-out images of the likelihood by the probability flow; 0 leaves it out.", at_least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = self.options()
        read_schedulers(asked["schedulers"])
        _check(asked["nfe"], self.num_samples, self.guidance_scale, asked["likelihood"])

    def options(self) -> dict[str, Any]:
        """Return these arguments as the keyword arguments of `evaluate`."""
        try:
            nfe = [int(word) for word in self.nfe.split(",")]
        except ValueError as error:
            raise InputError(f"--nfe must be whole numbers with commas between them: {error}") from error
        return {
            "schedulers": [word.strip() for word in self.schedulers.split(",")],
            "nfe": nfe,
            "num_samples": self.num_samples,
            "batch_size": self.train_batch_size,
            "seed": self.seed,
            "guidance_scale": self.guidance_scale,
            "resolution": self.resolution,
            "extractor": self.extractor,
            "likelihood": LikelihoodSettings(self.likelihood_images, self.likelihood_evaluations, self.ode_images),
        }


def evaluate(
    models: Mapping[str, DiffusionPipeline],
    data: RealImages | Callable[[int, int], RealImages],
    folder: str | os.PathLike,
    *,
    schedulers: Sequence[str] = (EvaluationArguments.schedulers,),
    nfe: Sequence[int] = NFE,
    num_samples: int = EvaluationArguments.num_samples,
    batch_size: int = EvaluationArguments.train_batch_size,
    seed: int = EvaluationArguments.seed,
    guidance_scale: float = EvaluationArguments.guidance_scale,
    prompts: Sequence[str] | None = None,
    resolution: int | None = None,
    extractor: str | Extractor | None = None,
    likelihood: LikelihoodSettings | None = LIKELIHOOD,
    accelerator: Accelerator | None = None,
    sources: Mapping[str, str] | None = None,
    command: str = "",
) -> Evaluation:
    """Draw from every model with every scheduler and number of evaluations, and measure what was drawn.

    The models, their schedulers and the global random state are as before when it returns.

    Args:
        models: pipelines by name, on their device; the first is the baseline. They must make images of one shape.
        data: real images, or a function that loads them for a number of channels and a resolution. It is called once
            all other arguments have been checked.
        folder: where `results.json`, the pictures (`samples`) and the drawn images (`drawn`) go. Images that lie there
            from an earlier call are not drawn again.
        schedulers: names, perhaps with settings, as `read_schedulers` takes them. "own" is each pipeline's.
        nfe: numbers of evaluations of the network for one image; guidance takes twice as many. The number of steps is
            the largest that needs no more. Numbers that a scheduler cannot make are left out, which is printed.
        num_samples: images that are drawn from each model with each scheduler and number of evaluations.
        batch_size: images of a forward pass. Another size draws other images.
        seed: the seed of noise, classes and all else that is random.
        guidance_scale: the scale of classifier-free guidance; 1 is the conditional model.
        prompts: prompts of text-to-image pipelines, repeated in turn; by default the empty one.
        resolution: height and width of the images; by default those that the models were made for.
        extractor: the extractor of features, or its name for `make_extractor`; by default `default_extractor` chooses.
        likelihood: on how many held-out images the likelihood of models of pixels is measured, and how exactly; `None`
            leaves it out.
        accelerator: needed where several processes share the work; each then calls this function with equal arguments.
        sources: what the report says of where each model comes from; by default where its pipeline was loaded from.
        command: the command line, for the report.

    Returns:
        The results, as in `results.json`. Only the main process has the pictures.

    Raises:
        InputError: an argument is out of range, or does not fit the others; the message says what would.
    """
    levels, asked, folder = sorted(set(nfe)), read_schedulers(schedulers), Path(folder)
    settings = LikelihoodSettings(images=0, ode_images=0) if likelihood is None else likelihood
    _check(levels, num_samples, guidance_scale, settings)
    rank, world, say = 0, 1, print
    if accelerator is not None:
        rank, world, say = accelerator.process_index, accelerator.num_processes, accelerator.print
    subjects = {name: subject_of(subject_of(model).sampler()) for name, model in models.items()}
    image_format = _image_format(subjects, resolution)
    _check_conditions(subjects, guidance_scale, prompts)
    prompts = None if prompts is None else list(prompts)
    options: dict[str, Any] = {"num_samples": num_samples, "batch_size": min(batch_size, num_samples), "seed": seed}
    options |= {"guidance_scale": guidance_scale, "prompts": prompts}

    with _at_rest(subjects.values(), resolution):
        loaded = {name: model.name_or_path for name, model in models.items()}
        drawings = _plan(subjects, loaded, asked, levels, resolution, options, say)
        real = data if isinstance(data, RealImages) else data(*image_format)
        _check_shape(real, image_format)
        chosen = _extractor(extractor, real, drawings[0].device) if rank == 0 else None
        drawn = _folder(folder / "drawn")
        if rank == 0:
            for left in (folder, drawn, folder / "samples"):
                remove_partial(left)
        if accelerator is not None:
            accelerator.wait_for_everyone()
        _draw(drawings, drawn, rank, world)
        likely = _with_likelihood(drawings, settings, real, say)
        measure = partial(_likelihood, images=real.unseen, settings=settings, batch_size=batch_size, seed=seed)
        for drawing in likely[rank::world]:
            measure(drawing, drawn)
        if accelerator is not None:
            accelerator.wait_for_everyone()
        if chosen is not None:
            judge = Judge(real, chosen, num_samples, progress=True)
            evaluation = _summary(judge, real, loaded if sources is None else sources, seed, command)
            evaluation.likelihoods = {drawing.model: measure(drawing, drawn) for drawing in likely}
            _compare(evaluation, drawings, judge, real, drawn, _folder(folder / "samples"))
            evaluation.save(folder / "results.json")
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return evaluation if rank == 0 else Evaluation.load(folder / "results.json")


def _check(nfe: Sequence[int], num_samples: int, guidance_scale: float, likelihood: LikelihoodSettings) -> None:
    if min(nfe, default=0) < 1:
        raise InputError(f"--nfe must be at least 1, got {', '.join(map(str, nfe)) or 'no number'}")
    if num_samples < MIN_IMAGES:
        raise InputError(f"--num_samples must be at least {MIN_IMAGES}, got {num_samples}")
    if not math.isfinite(guidance_scale):
        raise InputError(f"--guidance_scale must be finite, got {guidance_scale}")
    if likelihood.ode_images > 0 and importlib.util.find_spec("torchdiffeq") is None:
        raise InputError("--ode_images needs torchdiffeq: pip install torchdiffeq, or --ode_images 0")


def _image_format(subjects: Mapping[str, Subject], resolution: int | None) -> ImageFormat:
    """Return the format of the images, after checking that it is the same for all models."""
    formats = {name: subject.image_format(resolution) for name, subject in subjects.items()}
    if not formats:
        raise InputError("there is no model to evaluate")
    if len(set(formats.values())) > 1:
        listed = ", ".join(f"{name}: {channels} x {size} x {size}" for name, (channels, size) in formats.items())
        raise InputError(f"the models make different images, which cannot be compared: {listed}")
    return next(iter(formats.values()))


def _check_conditions(subjects: Mapping[str, Subject], guidance_scale: float, prompts: Sequence[str] | None) -> None:
    for name, subject in subjects.items():
        if guidance_scale != 1 and not subject.takes_captions and subject.null_class is None:
            raise InputError(f"--guidance_scale {guidance_scale}: {name} has no null class to guide away from")
        if prompts is not None and not subject.takes_captions:
            raise InputError(f"{name} takes no prompts: leave --caption_column and --prompt_file out")


def _check_shape(real: RealImages, image_format: ImageFormat) -> None:
    channels, size = image_format
    if (shape := tuple(real.reference.images.shape[1:])) != (channels, size, size):
        raise InputError(f"the models draw images of shape {(channels, size, size)}, and the real ones have {shape}")


@contextmanager
def _at_rest(subjects: Iterable[Subject], resolution: int | None) -> Iterator[None]:
    """Put networks into evaluation mode, without gradients of the weights, let them sample at the resolution, and hide
    progress bars; then restore all."""
    subjects = list(subjects)
    pipelines = [subject.pipeline for subject in subjects]
    networks = [part for pipeline in pipelines for part in pipeline.components.values() if isinstance(part, nn.Module)]
    before: list[tuple[Any, str, Any]] = []
    before += [(module, "training", module.training) for network in networks for module in network.modules()]
    before += [(weight, "requires_grad", weight.requires_grad) for n in networks for weight in n.parameters()]
    before += [
        (pipeline, "_progress_bar_config", getattr(pipeline, "_progress_bar_config", {})) for pipeline in pipelines
    ]
    try:
        for network in networks:
            network.eval().requires_grad_(False)
        for pipeline in pipelines:
            pipeline.set_progress_bar_config(disable=True)
        with ExitStack() as stack:
            for subject in subjects:
                stack.enter_context(subject.sampling_at(resolution))
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _plan(
    subjects: Mapping[str, Subject],
    sources: Mapping[str, str | None],
    asked: Mapping[str, tuple[str, dict[str, Any]]],
    nfe: Sequence[int],
    resolution: int | None,
    options: dict[str, Any],
    say: Callable[[str], None],
) -> list[Drawing]:
    """Return all drawings that the evaluation needs, each once."""
    planned: dict[str, Drawing] = {}
    advice: dict[str, None] = {}
    for model, subject in subjects.items():
        pipeline, identity = subject.pipeline, pipeline_fingerprint(subject.pipeline)
        options = options | {"resolution": resolution if subject.takes_captions else None}
        for words, (name, settings) in asked.items():
            scheduler = swap_scheduler(pipeline, name, sources[model], **settings)
            _guide(scheduler, pipeline, options["guidance_scale"])
            label = ":".join([type(scheduler).__name__.removesuffix("Scheduler"), *words.split(":")[1:]])
            if subject.of_pixels and (missing := clipping_advice(scheduler, label)):
                advice[missing] = None
            for steps in possible_steps(scheduler, nfe, say):
                drawing = Drawing(model, pipeline, identity, scheduler, steps, label=label, **options)
                planned.setdefault(drawing.name, drawing)
    for text in advice:
        say(text)
    return list(planned.values())


def _guide(scheduler: Any, pipeline: DiffusionPipeline, guidance_scale: float) -> None:
    """Tell a calibrated scheduler the scale of the drawings, which may be another one than it was saved with."""
    if getattr(scheduler, "calibration", None) is None or not exposes_guidance(pipeline):
        return
    ours = type(pipeline).__module__.startswith(diffusers_ext.__name__)
    try:
        scheduler.calibrate(scheduler.calibration, guidance_scale if ours else max(guidance_scale, 1.0))
    except ValueError as error:
        raise InputError(f"--guidance_scale {guidance_scale} with {type(scheduler).__name__}: {error}") from error


def _extractor(asked: str | Extractor | None, real: RealImages, device: torch.device) -> Extractor:
    if isinstance(asked, Extractor):
        return asked
    images, labels = real.training.images, real.training.labels
    classes = int(labels.max()) + 1 if int(labels.min()) >= 0 else None
    name = asked or default_extractor(images.shape[1], images.shape[2], classes is not None)
    try:
        return make_extractor(name, device=device, train_images=images, train_labels=labels, classes=classes)
    except (ImportError, ValueError) as error:
        raise InputError(f"--extractor {name}: {error}") from error


def _folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {folder.parent} cannot be made: {error}") from error
    return folder


def _draw(drawings: Sequence[Drawing], folder: Path, rank: int, world: int) -> None:
    """Draw the batches of process number `rank` among `world`."""
    own = sum(len(one.numbers(batch)) for one in drawings for batch in range(rank, one.num_batches, world))
    with progress_bar(None, "images", total=own, unit="image", shown=rank == 0) as bar:
        for drawing in drawings:
            bar.set_postfix_str(f"{drawing.model}, {drawing.scheduler_name}, {drawing.steps} steps")
            drawing.draw(folder, rank, world, bar)


def _with_likelihood(
    drawings: Sequence[Drawing], settings: LikelihoodSettings, real: RealImages, say: Callable[[str], None]
) -> list[Drawing]:
    """Return a drawing of each model whose likelihood can be measured: of pixels, and with the classes of the data."""
    if settings.images == settings.ode_images == 0:
        return []
    first: dict[str, Drawing] = {}
    for drawing in drawings:
        first.setdefault(drawing.model, drawing)
    found, labels = [], real.unseen.labels
    for drawing in first.values():
        subject = subject_of(drawing.pipeline)
        if not subject.of_pixels:
            continue
        classes, null = subject.num_classes, subject.null_class
        if classes is None or -(null is not None) <= int(labels.min()) <= int(labels.max()) < classes:
            found.append(drawing)
        else:
            say(f"no likelihood of {drawing.model}: the labels of the data are not those of its {classes} classes")
    return found


def _likelihood(
    drawing: Drawing, folder: Path, *, images: Images, settings: LikelihoodSettings, batch_size: int, seed: int
) -> Likelihood:
    """Measure the likelihood of a drawing's model, or read it from the folder, if it lies there."""
    counts = settings.images, settings.evaluations, settings.ode_images, RULE, seed, batch_size
    scheduler = sorted(stored_scheduler(drawing.pipeline.scheduler).items())
    key = hashlib.sha256(f"{counts}{drawing.identity}{scheduler}".encode())
    for tensor in (images.images, images.labels):
        key.update(tensor.numpy().tobytes())
    file = folder / f"likelihood-{key.hexdigest()[:12]}.json"
    if not file.exists():
        subject = subject_of(drawing.pipeline)
        measure_likelihood(subject, images, settings, batch_size=batch_size, seed=seed).save(file)
    return Likelihood.load(file)


def _summary(judge: Judge, real: RealImages, sources: Mapping[str, str | None], seed: int, command: str) -> Evaluation:
    """Return an evaluation that has no cells yet, but what is known of the real images."""
    manifold = judge.manifold
    if manifold.count < manifold.least:
        print(
            f"no Frechet distance: {manifold.count} images are fewer than {manifold.least} features, too few to take "
            f"its bias off. Use more images, --reference train, or another --extractor; the kernel distance has no bias"
        )
    return Evaluation(
        data=real.name,
        reference=real.described,
        num_reference=len(real.reference.images),
        extractor=judge.extractor.label,
        num_features=manifold.least,
        is_fid=judge.extractor.is_fid,
        floor=judge.floor,
        num_floor=len(real.floor.images),
        likelihood_of="training images" if real.held_out is None else "held-out images",
        models={name: name if source is None else shown(str(source)) for name, source in sources.items()},
        seed=seed,
        command=command,
        versions={module.__name__: module.__version__ for module in (diffusers_ext, diffusers, torch)},
    )


def _compare(
    evaluation: Evaluation, drawings: Sequence[Drawing], judge: Judge, real: RealImages, drawn: Path, samples: Path
) -> None:
    """Add the cells and the pictures to the evaluation, and save the pictures in `samples`."""
    evaluation.pictures |= grids(drawings, drawn, samples, real.floor.images)
    last = {drawing.model: drawing for drawing in drawings}
    for drawing in progress_bar(drawings, "distances"):
        counted = drawing.counted(drawn)
        evaluation.cells.append(
            Cell(
                drawing.model,
                drawing.scheduler_name,
                drawing.steps,
                counted.nfe,
                counted.seconds,
                counted.out_of_range,
                drawing.num_samples,
                NO_QUALITY if counted.not_finite > 0 else judge.measure(drawing, drawn),
            )
        )
        if drawing is last[drawing.model]:
            features = drawing.features(drawn, judge.extractor)
            title, picture = nearest_to_training(drawing, features, real, judge, drawn, samples)
            evaluation.pictures[title] = picture
