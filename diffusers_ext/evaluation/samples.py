"""Draw images from pipelines, every model from the same noise, and keep them, so that none is drawn twice.

    drawing = Drawing.of(pipeline, swap_scheduler(pipeline, "DDIM"), steps=10, num_samples=500)
    drawing.draw(folder)                    # in batches; those that lie in the folder are not drawn again
    drawing.images(folder)                  # these batches, (n, C, H, W), uint8
    drawing.features(folder, extractor)     # (500, d)
    drawing.counted(folder).seconds         # per image

Batch b of a drawing is a function of its settings, the seed and b alone: not of the number of processes, nor of what
was drawn before. Each batch lies in a file of its own, in a folder whose name holds a hash of all that decides the
images (the weights, too), so that a drawing with other settings never reads it.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..data.sources import DataArguments
from ..extractors import Extractor
from ..files import replacing
from ..randomness import RULE, Seeds, Stream
from ..subjects import subject_of

_LEVEL = 1 / 255


def file_name(text: str) -> str:
    """Turn a text into a readable file name that every file system takes."""
    return "".join(c if c.isalnum() else "-" for c in text)


def fingerprint(module: nn.Module) -> str:
    """Return a hash of a network's weights and buffers."""
    digest = hashlib.sha256(type(module).__name__.encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@functools.lru_cache
def extractor_id(extractor: Extractor, shape: tuple[int, ...]) -> str:
    """Return a hash that tells extractors apart, of the label and the features of noise of shape (C, H, W)."""
    noise = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    digest = hashlib.sha256(extractor.label.encode())
    digest.update(extractor(noise.to(extractor.device)).double().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def save_aside(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file aside, then rename it."""
    with replacing(file) as aside:
        save_file(tensors, aside, metadata=metadata)


def pipeline_fingerprint(pipeline: DiffusionPipeline) -> str:
    """Return a hash of all networks and settings of a pipeline, except its scheduler."""
    digest = hashlib.sha256(_settings([type(pipeline).__name__, _public(pipeline.config)]))
    for name, part in sorted(pipeline.components.items()):
        if isinstance(part, nn.Module):
            digest.update(_settings([name, _public(getattr(part, "config", {})), fingerprint(part)]))
    return digest.hexdigest()


def _public(config: Any) -> dict[str, str]:
    """Return a configuration without the entries that diffusers adds, which may differ from process to process."""
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)  # transformers', diffusers'
    return {key: repr(value) for key, value in sorted(values.items()) if not key.startswith("_")}


def _settings(values: Any) -> bytes:
    return json.dumps(values).encode()


class Counted(NamedTuple):
    """What an image cost, in evaluations of the network and seconds, the share of its values out of range, and that of
    those which are not finite, and black in the image."""

    nfe: float
    seconds: float
    out_of_range: float
    not_finite: float = 0.0


@dataclass(frozen=True)
class Drawing:
    """The images that one model draws with one scheduler and number of steps.

    Args:
        model: the model's name, for people.
        pipeline: what `Subject.sampler` returned; its scheduler is replaced while it draws.
        identity: the pipeline's `pipeline_fingerprint`.
        scheduler, steps: see `swap_scheduler`, `steps_for`.
        num_samples: the number of images; whole batches are drawn, and the rest is not used.
        batch_size: images of a forward pass.
        seed: the seed of the noise and the classes.
        guidance_scale: the scale of classifier-free guidance; 1 is the conditional model.
        prompts: prompts of a text-to-image pipeline, repeated in turn.
        resolution: height and width that a text-to-image pipeline is asked for.
        label: the scheduler's name, for people; by default its class, without "Scheduler".
        labels: classes of a class-conditional pipeline, repeated in turn; by default they are drawn at random.
    """

    model: str
    pipeline: DiffusionPipeline
    identity: str
    scheduler: Any
    steps: int
    num_samples: int
    batch_size: int
    seed: int = 0
    guidance_scale: float = 1.0
    prompts: Sequence[str] | None = None
    resolution: int | None = None
    label: str = ""
    labels: Sequence[int] | None = None

    @classmethod
    def of(
        cls,
        pipeline: DiffusionPipeline,
        scheduler: Any,
        steps: int,
        num_samples: int,
        *,
        batch_size: int = DataArguments.train_batch_size,
        model: str = "model",
        **options: Any,
    ) -> Drawing:
        """Make a drawing of a pipeline: this fills in its identity and the scheduler's label.

        Args:
            pipeline: one that `subject_of` knows, in evaluation mode.
            scheduler, steps: see `swap_scheduler`, `steps_for`.
            options: the other attributes, such as `seed`, `guidance_scale` and `labels`.
        """
        sampler = subject_of(pipeline).sampler()
        identity, batch_size = pipeline_fingerprint(sampler), min(batch_size, num_samples)
        return cls(model, sampler, identity, scheduler, steps, num_samples, batch_size, **options)

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(subject_of(self.pipeline).network.parameters()).device

    @property
    def scheduler_name(self) -> str:
        return self.label or type(self.scheduler).__name__.removesuffix("Scheduler")

    @functools.cached_property
    def name(self) -> str:
        """The name of the drawing's folder, which holds a hash of all that decides the images."""
        calibration = getattr(self.scheduler, "calibration", None)
        tables = None if calibration is None else (fingerprint(calibration), self.scheduler.guidance_scale)
        drawn = (self.identity, type(self.scheduler).__name__, _public(self.scheduler.config), tables, self.steps)
        asked: list[Any] = [RULE, self.batch_size, self.seed, self.guidance_scale, self.prompts, self.resolution]
        if self.labels is not None:
            asked.append(list(self.labels))
        digest = hashlib.sha256(_settings([drawn, asked])).hexdigest()[:12]
        return f"{file_name(self.model)}-{file_name(self.scheduler_name)}-{self.steps}-{digest}"

    @property
    def num_batches(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def numbers(self, batch: int) -> range:
        """Return the numbers of the samples of a batch, without those beyond `num_samples`."""
        return range(self.num_samples)[batch * self.batch_size : (batch + 1) * self.batch_size]

    def file(self, folder: Path, batch: int) -> Path:
        return folder / self.name / f"{batch:06d}.safetensors"

    def draw(self, folder: Path, rank: int = 0, world: int = 1, bar: tqdm | None = None) -> None:
        """Draw the batches rank, rank + world, ... that do not lie in `folder` yet, each into a file of its own."""
        (folder / self.name).mkdir(parents=True, exist_ok=True)
        for batch in range(rank, self.num_batches, world):
            file = self.file(folder, batch)
            if not file.exists():
                images, counted = self._draw(batch)
                values = {name: repr(value) for name, value in counted._asdict().items()}
                save_aside({"images": images.contiguous()}, file, values)
            if bar is not None:
                bar.update(len(self.numbers(batch)))

    def images(self, folder: Path) -> Iterator[Tensor]:
        """Yield the batches that lie in `folder`, (n, C, H, W), uint8; the last one is cut to the number of samples."""
        for batch in range(self.num_batches):
            with safe_open(self.file(folder, batch), "pt") as file:
                yield file.get_tensor("images")[: len(self.numbers(batch))]

    def extract(self, folder: Path, extractor: Extractor) -> None:
        """Write the features of the batches in `folder` into files beside them, where they are missing."""
        for batch in range(self.num_batches):
            file = self._features_file(folder, extractor, batch)
            if not file.exists():
                with safe_open(self.file(folder, batch), "pt") as drawn:
                    images = drawn.get_tensor("images").to(self.device).float() / 127.5 - 1
                save_aside({"features": extractor(images).cpu().contiguous()}, file)

    def features(self, folder: Path, extractor: Extractor) -> Tensor:
        """Return the features (num_samples, d) of the images in `folder`; those that lie there already are read."""
        self.extract(folder, extractor)
        files = (self._features_file(folder, extractor, batch) for batch in range(self.num_batches))
        return torch.cat([load_file(file)["features"] for file in files])[: self.num_samples]

    def _features_file(self, folder: Path, extractor: Extractor, batch: int) -> Path:
        file = self.file(folder, batch)
        with safe_open(file, "pt") as drawn:
            shape = tuple(drawn.get_slice("images").get_shape()[1:])
        return file.with_suffix(f".{extractor_id(extractor, shape)}.safetensors")

    def counted(self, folder: Path) -> Counted:
        """Return what the images in `folder` cost: means over the batches, and the median of the seconds, which a
        first, slow batch does not move."""
        rows = []
        for batch in range(self.num_batches):
            with safe_open(self.file(folder, batch), "pt") as file:
                stored = Counted._field_defaults | file.metadata()  # files of before say nothing of what is not finite
                rows.append([float(stored[name]) for name in Counted._fields])
        nfe, seconds, *shares = torch.tensor(rows, dtype=torch.float64).T
        return Counted(nfe.mean().item(), seconds.median().item(), *(share.mean().item() for share in shares))

    @torch.no_grad()
    def _draw(self, batch: int) -> tuple[Tensor, Counted]:
        pipeline, n = self.pipeline, self.batch_size
        subject = subject_of(pipeline)
        network, autoencoder = subject.network, subject.autoencoder
        seed = Seeds(self.seed)(Stream.SAMPLES, batch)
        generator, own = torch.Generator().manual_seed(seed), pipeline.scheduler
        call = self._call(range(batch * n, (batch + 1) * n))
        pipeline.scheduler = copy.deepcopy(self.scheduler)
        device = self.device
        try:
            with (
                torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
                _watched(network, autoencoder, pipeline.scheduler) as watched,
            ):
                torch.manual_seed(seed)  # some pipelines do not pass the generator on to their scheduler
                _synchronize(network)
                start = time.perf_counter()
                images = pipeline(**call, num_inference_steps=self.steps, generator=generator).images
                _synchronize(network)
                seconds = time.perf_counter() - start
            unit = subject.unit_range(watched.last.float())
        finally:
            pipeline.scheduler = own
        inside = (unit >= -_LEVEL / 2) & (unit <= 1 + _LEVEL / 2)  # NaN is not
        shares = ((~one).double().mean().item() for one in (inside, unit.isfinite()))
        counted = Counted(watched.rows / n, seconds / n, *shares)
        images = torch.from_numpy(images).nan_to_num().movedim(3, 1)
        return (images * 255).round().to(torch.uint8), counted

    def _call(self, numbers: range) -> dict[str, Any]:
        """Return the arguments of the pipeline's call for the samples with these numbers."""
        subject, prompts, labels = subject_of(self.pipeline), self.prompts or [""], None
        if self.labels is not None:
            labels = [self.labels[i % len(self.labels)] for i in numbers]
        elif subject.num_classes is not None:
            # Independent, as intervals take them to be; from a generator of their own, so that noise is shared.
            generator = Seeds(self.seed).generator(Stream.CLASSES, numbers.start)
            labels = torch.randint(subject.num_classes, (len(numbers),), generator=generator).tolist()
        call = subject.call(
            len(numbers),
            labels=labels,
            captions=[prompts[i % len(prompts)] for i in numbers],
            guidance_scale=self.guidance_scale,
            resolution=self.resolution,
        )
        return call | {"output_type": "np"}


@dataclass
class _Watched:
    rows: int = 0
    last: Any = None


@contextmanager
def _watched(network: nn.Module, autoencoder: Any, scheduler: Any) -> Iterator[_Watched]:
    """Count the network's inputs, and keep what the last step, or the autoencoder, returned, before it is clamped."""
    watched = _Watched()

    def count(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        first = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        watched.rows += len(first)  # type: ignore[arg-type]

    def keep(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)  # pipelines read its signature
        def kept(*args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            watched.last = output[0]
            return output

        setattr(owner, name, kept)

    keep(scheduler if autoencoder is None else autoencoder, "step" if autoencoder is None else "decode")
    hook = network.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield watched
    finally:
        hook.remove()
        if autoencoder is not None:
            del autoencoder.decode


def _synchronize(network: nn.Module) -> None:
    if torch.cuda.is_available() and next(network.parameters()).is_cuda:
        torch.cuda.synchronize()
