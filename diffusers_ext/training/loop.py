"""The training loop: a generator of micro-batches that knows no method.

    for batch in loop:                      # images, conditions and a generator, on the device
        loss = ...
        loop.update(loss, sigma=sigma, denoising=loss_of_each_sample)

`loop` does the rest: accelerate, gradient accumulation and clipping, learning rate, moving average, logs, sample grids.

Training is a sequence of micro-batches m = 0, 1, 2, ...; with A accumulation steps on W devices, optimiser step k takes
m = k A W, ..., (k + 1) A W - 1, and device r those with m = r modulo W. The samples and the noise of a micro-batch
depend on (seed, m) alone, see `diffusers_ext.training.data`; so W devices do what one does with W times the
accumulation, and the place in a run is one number, the step.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..interop import denoiser_from, noise_schedule
from ..losses import score_matching_loss
from ..noise_levels import log_linear_sigmas, min_snr_weight
from ..process import randn_like
from .arguments import TrainingArguments
from .data import (
    MicroBatches,
    StreamDataset,
    Transform,
    collate,
    first_images,
    load_images,
    load_validation_images,
    seed_for,
)
from .models import (
    build_pipeline,
    classes_of,
    encode,
    image_format,
    image_grid,
    network_of,
    null_class_of,
    sample_images,
    save_pipeline,
    with_weights,
)

# Streams of `seed_for(seed, stream, ...)`; data.py uses 0 and 1.
_NOISE, _DROPOUT, _VALIDATION = 2, 3, 4
SIGMA_BINS, SIGMA_RANGE = 10, (0.02, 20.0)  # losses by noise level, for data in [-1, 1]


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the device."""

    x0: Tensor
    """Clean samples (B, C, H, W): images in [-1, 1], or latents where the pipeline has an autoencoder."""
    cond: dict[str, Tensor]
    """Conditions for every evaluation of the network: class labels, some replaced by the null class; or nothing."""
    generator: torch.Generator
    """The source of every random number of this micro-batch."""


class TrainingLoop:
    """See the module's docstring. Everything is made from the arguments; `name` is the tracker's project.

    Attributes:
        pipeline: what is trained; its network is wrapped by accelerate as `model`.
        denoiser, schedule: the network as a function of (x, sigma), and the noise levels that it is trained for.
        step: optimiser steps done.

    Raises:
        InputError: the arguments, the data and the model do not fit; the message says what to do.
    """

    def __init__(self, args: TrainingArguments, name: str) -> None:
        self.args, self.name, self.step = args, name, 0
        self.output_dir = Path(args.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=str(self.output_dir / "logs"),
        )
        if args.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True

        source = load_images(args, args.train_split)
        num_classes = None if source.class_names is None else len(source.class_names)
        self.pipeline = build_pipeline(args, num_classes)
        self.null_class = null_class_of(self.pipeline)
        self.takes_labels = classes_of(self.pipeline) is not None
        channels, resolution = image_format(self.pipeline, args.resolution)
        transform = Transform(resolution, channels, args.center_crop, args.random_flip)
        self.data = StreamDataset(source, transform, args.seed, args.max_train_samples)
        held_out = load_validation_images(args)
        self.validation_name = "held-out images" if held_out else "training images (the data have no held-out split)"
        self.validation = first_images(held_out or source, args.max_validation_samples, transform)

        global_batch = args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        self.images_per_step = global_batch
        self.total_steps = args.max_train_steps or math.ceil(args.num_train_epochs * self.data.n / global_batch)
        self.unreadable: set[str] = set()

        _, network = network_of(self.pipeline)
        network.train().requires_grad_(True)
        if args.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        for component in self.pipeline.components.values():
            if isinstance(component, torch.nn.Module) and component is not network:
                component.requires_grad_(False).to(self.accelerator.device)
        optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
        )
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=self.total_steps,
        )
        self.model, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.ema = EMAModel(network.parameters(), decay=args.ema_decay, foreach=True) if args.use_ema else None
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
        self.schedule = noise_schedule(self.pipeline.scheduler)
        self.denoiser = denoiser_from(self.model, self.pipeline.scheduler)
        low, high = SIGMA_RANGE
        self.sigma_range = (max(self.schedule.sigma_min, low), min(self.schedule.sigma_max, high))
        self._log = _Log(self)

    # --- training -----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        accumulate, world = self.args.gradient_accumulation_steps, self.accelerator.num_processes
        first = self.step * accumulate * world + self.accelerator.process_index
        count = (self.total_steps - self.step) * accumulate
        loader = DataLoader(
            self.data,
            batch_sampler=MicroBatches(self.args.train_batch_size, first, world, count),
            num_workers=self.args.dataloader_num_workers,
            collate_fn=collate,
            pin_memory=self.accelerator.device.type == "cuda",
            persistent_workers=False,
        )
        self._log.start()
        for i, (images, labels, unreadable) in enumerate(loader):
            self._log.unreadable(unreadable)
            with self.accelerator.accumulate(self.model):
                yield self._batch(first + i * world, images, labels)
            if self.accelerator.sync_gradients:
                self._after_step()
        self._log.close()

    def _batch(self, m: int, images: Tensor, labels: Tensor) -> Batch:
        device = self.accelerator.device
        generator = torch.Generator(device).manual_seed(seed_for(self.args.seed, _NOISE, m))
        torch.manual_seed(seed_for(self.args.seed, _DROPOUT, m))  # dropout has no generator of its own
        x0 = encode(self.pipeline, images.to(device, non_blocking=True), generator)
        if not self.takes_labels:
            return Batch(x0, {}, generator)
        labels = labels.to(device, non_blocking=True)
        if self.null_class is not None:
            dropped = torch.rand(labels.shape, generator=generator, device=device) < self.args.label_drop
            labels = torch.where(dropped, self.null_class, labels)
        return Batch(x0, {"class_labels": labels}, generator)

    def weight(self, sigma: Tensor) -> Tensor:
        """The score-matching weight that the arguments ask for, (B,): by default the error of the network's output."""
        if self.args.min_snr_gamma is not None:
            return min_snr_weight(sigma, self.args.min_snr_gamma)
        return self.denoiser.output_weight(sigma)

    def update(self, loss: Tensor, *, sigma: Tensor, **terms: Tensor) -> None:
        """Backward pass and, at the end of an accumulation, optimiser step.

        Args:
            loss: the scalar to minimise.
            sigma: noise level of each sample, (B,), for the log.
            terms: the loss terms by name, each (B,) or for the first samples of the batch; for the log only.
        """
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._log.record(sigma, terms)

    def _after_step(self) -> None:
        if not self.accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
            if self.ema is not None:
                self.ema.step(self.model.parameters())
        self.step += 1
        self._log.after_step()
        every = self.args.validation_steps
        if every is not None and self.step % every == 0 and self.step < self.total_steps:
            self.validate()

    # --- results ------------------------------------------------------------------------------------------------------

    def trained_pipeline(self) -> DiffusionPipeline:
        """A copy of the pipeline with the weights of now, or their moving average."""
        return with_weights(self.pipeline, self.accelerator.get_state_dict(self.model), self.ema)

    def validate(self) -> dict[str, Any]:
        """A sample grid in `samples/` and the denoising loss by noise level; on the main process, {} on the others."""
        metrics: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            pipeline = self.trained_pipeline()
            if self.args.num_validation_images > 0:
                images = sample_images(
                    pipeline, self.args.num_validation_images, self.args.num_inference_steps, self.args.seed
                )
                path = self.output_dir / "samples" / f"step-{self.step:08d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image_grid(images).save(path)
            metrics = self._loss_by_sigma(pipeline) | {"measured_on": self.validation_name}
            self._log.write({"step": self.step, "validation": metrics})
        self.accelerator.wait_for_everyone()
        return metrics

    @torch.no_grad()
    def _loss_by_sigma(self, pipeline: DiffusionPipeline) -> dict[str, list[float]]:
        """Mean square error of eps on the validation images at log-spaced noise levels, always with the same noise."""
        denoiser = denoiser_from(network_of(pipeline)[1], pipeline.scheduler)
        device = self.accelerator.device
        generator = torch.Generator().manual_seed(seed_for(self.args.seed, _VALIDATION))
        sigmas = log_linear_sigmas(SIGMA_BINS, *self.sigma_range)
        total = torch.zeros(len(sigmas))
        images, labels = self.validation
        for x0, y in zip(
            images.split(self.args.train_batch_size), labels.split(self.args.train_batch_size), strict=True
        ):
            x0 = encode(self.pipeline, x0.to(device), generator)
            cond = {"class_labels": y.to(device)} if self.takes_labels else {}
            noise = randn_like(x0, generator)
            for i, sigma in enumerate(sigmas.tolist()):
                total[i] += score_matching_loss(denoiser, x0 + sigma * noise, x0, sigma, **cond).sum().cpu()
        return {"sigmas": sigmas.tolist(), "eps_mse": (total / len(images)).tolist()}

    def save(self) -> Path:
        """Write the trained pipeline to the output folder, on the main process."""
        if self.accelerator.is_main_process:
            save_pipeline(self.trained_pipeline(), self.output_dir)
        self.accelerator.wait_for_everyone()
        return self.output_dir


class _Log:
    """Progress bar, jsonl and tracker. Losses stay on the device until a record is due."""

    def __init__(self, loop: TrainingLoop) -> None:
        self.loop, self.main = loop, loop.accelerator.is_main_process
        self.edges = log_linear_sigmas(SIGMA_BINS + 1, *loop.sigma_range).flip(0)[1:-1].log().float()
        self.edges = self.edges.to(loop.accelerator.device)
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def start(self) -> None:
        loop = self.loop
        if self.main:
            (loop.output_dir / "logs").mkdir(parents=True, exist_ok=True)
        loop.accelerator.init_trackers(
            loop.name, {k: v for k, v in asdict(loop.args).items() if isinstance(v, int | float | str | bool)}
        )
        self.bar = tqdm(
            total=loop.total_steps, initial=loop.step, unit="step", disable=not self.main, dynamic_ncols=True
        )
        self.since, self.since_step = time.monotonic(), loop.step

    def record(self, sigma: Tensor, terms: dict[str, Tensor]) -> None:
        bins = torch.bucketize(sigma.detach().log(), self.edges)
        for name, values in terms.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros(SIGMA_BINS, device=bins.device)
                self.counts[name] = torch.zeros(SIGMA_BINS, device=bins.device)
            values = values.detach().float()
            self.sums[name].index_add_(0, bins[: len(values)], values)
            self.counts[name].index_add_(0, bins[: len(values)], torch.ones_like(values))

    def after_step(self) -> None:
        loop = self.loop
        self.bar.update()
        if loop.step % loop.args.logging_steps == 0 or loop.step == loop.total_steps:
            self._flush()

    def _flush(self) -> None:
        loop, now = self.loop, time.monotonic()
        names = sorted(self.sums)
        both = torch.stack([torch.stack([self.sums[n], self.counts[n]]) for n in names])
        sums, counts = loop.accelerator.reduce(both, "sum").cpu().unbind(1)
        means = {n: (s.sum() / c.sum()).item() for n, s, c in zip(names, sums, counts, strict=True)}
        speed = (loop.step - self.since_step) * loop.images_per_step / max(now - self.since, 1e-9)
        values = means | {"lr": loop.lr_scheduler.get_last_lr()[0], "images_per_second": speed}
        self.bar.set_postfix({n: f"{v:.3g}" for n, v in values.items()} | {"img/s": f"{speed:.0f}"})
        by_sigma = {
            n: [None if k == 0 else v / k for v, k in zip(s.tolist(), c.tolist(), strict=True)]
            for n, s, c in zip(names, sums, counts, strict=True)
        }
        loop.accelerator.log(values, step=loop.step)
        self.write({"step": loop.step, "images": loop.step * loop.images_per_step, **values, "by_sigma": by_sigma})
        self.sums.clear()
        self.counts.clear()
        self.since, self.since_step = now, loop.step

    def unreadable(self, names: list[str]) -> None:
        for name in names:
            if name not in self.loop.unreadable:
                self.loop.unreadable.add(name)
                tqdm.write(f"unreadable image skipped ({len(self.loop.unreadable)} so far): {name}")
                self.write({"step": self.loop.step, "unreadable": name})

    def write(self, record: dict[str, Any]) -> None:
        if self.main:
            with open(self.loop.output_dir / "logs" / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self.bar.close()
        if self.loop.unreadable:
            print(f"{len(self.loop.unreadable)} unreadable images were skipped; {self.loop.output_dir}/logs names them")
        self.loop.accelerator.end_training()
