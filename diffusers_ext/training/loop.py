"""The training loop: a generator of micro-batches that knows no method.

    loop = TrainingLoop(args, "train_consistency")
    for batch in loop:                      # images, conditions and a generator, on the device
        loss = ...
        loop.update(loss, sigma=sigma, denoising=loss_of_each_sample)
    loop.finish()

`loop` does the rest: accelerate, gradient accumulation and clipping, learning rate, moving average. It writes
checkpoints and goes on from them by `Checkpoints` (resume.py), and what a run leaves behind is its `Outcome`
(outcome.py): measurements, sample grids, the saved pipeline, the card and the push.

Training is a sequence of micro-batches m = 0, 1, 2, ...; with A accumulation steps on W devices, optimiser step k takes
m = k A W, ..., (k + 1) A W - 1, and device r those with m = r modulo W. The samples and the noise of a micro-batch
depend on the seed, the batch size and m alone, see `diffusers_ext.data.batches`. So W devices do what one does with W
times the accumulation, and the position in a run, its random state included, is one number: the step (and, of a stream,
the row that comes next).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from ..data.batches import Images, Position, micro_batches
from ..data.labelling import number_of_classes
from ..data.prepared import prepare_data
from ..data.sources import HubStream, ImageSource, load_images
from ..errors import SIGNALLED, InputError, TrainingStopped
from ..files import remove_partial
from ..interop import noise_schedule, score_model_from
from ..process import ReflectedProcess
from ..randomness import Seeds
from ..score import Denoiser
from ..subjects import Subject
from .announce import before
from .arguments import TrainingArguments
from .batch import Batch, fill_cache, make_batch
from .best import Best
from .build import build_subject
from .environment import make_accelerator, require_as_asked, tracker_named
from .levels import Levels
from .lock import RunLock
from .log import RunLog
from .outcome import Outcome
from .parts import Part
from .resume import Checkpoints, clear_output_dir
from .sharding import whole, whole_tensor
from .stops import FiniteGuard, StopSignals

# After a signal the process has little time: a push that takes longer than so many seconds is given up.
STOP_TIMEOUT = 10.0

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}

# These keep their own copy of the optimiser's state, in parts that only they can put together.
_OPAQUE = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class TrainingLoop:
    """Runs the training that the arguments describe; see the module's docstring.

    Args:
        args: the run's arguments.
        name: the name of the tracker's project.
        paper: title and arXiv id of the method, for the model card.

    The global random state is set at every micro-batch, for dropout, which has no generator of its own.

    Attributes:
        subject, pipeline: what is trained; its network is wrapped by accelerate as `model`.
        score_model, schedule: the network as a function of (x, sigma), and the noise levels that it is trained for.
        step, total_steps: the number of optimiser steps so far, and of the whole run.
        grad_norm: the norm of the gradient in the last optimiser step, before it was clipped.
        parts: the parts that `keep` has added, by name.
        checkpoints, outcome: see the module's docstring.

    Raises:
        InputError: the arguments, the data and the model do not fit; the message says what to do.
    """

    grad_norm: Tensor

    def __init__(self, args: TrainingArguments, name: str, paper: tuple[str, str]) -> None:
        self.args, self.name, self.step, self.seeds = args, name, 0, Seeds(args.seed)
        self.parts: dict[str, Part] = {}
        self.output_dir = Path(args.output_dir)
        self.accelerator = _accelerator(args)
        self.checkpoints = Checkpoints(args, self.accelerator)
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output_dir {self.output_dir} cannot be made: {error}") from error
        self._set_up_data()
        self._set_up_model()
        sigma_range = self.schedule.sigma_min, self.schedule.sigma_max
        self.log = RunLog(args, self.accelerator, sigma_range, self.images_per_step, self.total_steps)
        self.guard = FiniteGuard(self.accelerator)
        self.outcome = Outcome(self, paper)
        self.accelerator.print(before(self, self.outcome.pusher))
        self._resumed = self.checkpoints.resume(self)

    def _set_up_data(self) -> None:
        args, source = self.args, load_images(self.args, self.args.train_split)
        classes = number_of_classes(source) if args.class_conditional else None
        self.subject = build_subject(args, classes, source.data_noise)
        self.pipeline = self.subject.pipeline
        image_format = self.subject.image_format(args.resolution)
        self.subject.train_at(image_format.resolution)
        self.data = prepare_data(args, source, self.subject.num_classes, image_format, args.max_validation_samples)
        self.source, self.validation = self.data.source, self.data.validation
        self.streamed, self.position = isinstance(source, HubStream), Position(0, 0)
        self.accelerator.print(self.data.described + self.subject.too_long(getattr(source, "captions", None) or []))
        _require_in_box(self.validation.images, self.pipeline.scheduler)
        self.images_per_step = args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        self.total_steps = _total_steps(args, self.source, self.images_per_step)

    def _set_up_model(self) -> None:
        args, device, network = self.args, self.accelerator.device, self.subject.network
        network.train()
        if args.channels_last:
            network.to(memory_format=torch.channels_last)
        if args.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if (half := HALF.get(self.accelerator.mixed_precision)) is not None:
            self.subject.freeze_in(half)
        for other in self.subject.others:
            other.requires_grad_(False).to(device)
        network.to(device)
        self.cache = fill_cache(args, self.subject, self.data, self.accelerator) if args.cache_latents else None
        optimizer = _optimizer(args)(self.subject.trainable().values(), **_adam(args))
        steps = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": self.total_steps}
        self.lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, **steps)
        self.model, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.ema = EMAModel(self._trainable(), decay=args.ema_decay, foreach=True) if args.use_ema else None
        self.schedule = noise_schedule(self.pipeline.scheduler)
        self.score_model = score_model_from(self.model, self.pipeline.scheduler)
        self.levels = Levels(args, self.schedule, self.pipeline.scheduler, self.score_model)

    def keep(self, part: Part) -> None:
        """Add a part to the run; call this before the loop begins. Checkpoints hold the part's state, which is restored
        here if the run goes on from one. A `Best` decides which pipeline is the result."""
        part.join(self)
        self.parts[part.name] = part
        if isinstance(part, Best):
            self.outcome.best = part
        if part.name in self._resumed:
            part.load_state_dict(self._resumed.pop(part.name))

    # --- training -----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        if self.accelerator.is_main_process:
            self.lock = RunLock(self.output_dir)
            if self.args.overwrite_output_dir and self.checkpoints.starts_here:
                clear_output_dir(self.output_dir)
            remove_partial(self.output_dir)
        self.accelerator.wait_for_everyone()
        self.log.start(self.name, self.step)
        self.log.unreadable(self.step, self.validation.unreadable)
        try:
            with StopSignals(self.accelerator) as stop:
                if self._catch_up():
                    return
                for m, batch in self._micro_batches():
                    self.log.unreadable(self.step, batch.unreadable)
                    with self.accelerator.accumulate(self.model):
                        device, world = self.accelerator.device, self.accelerator.num_processes
                        yield make_batch(self.subject, self.args, self.seeds, m, batch, device, world, self.cache)
                    self.position = batch.position or self.position
                    if self.accelerator.sync_gradients and self._after_step(stop):
                        return
        except TrainingStopped as stopped:
            raise self.outcome.leave(stopped, stopped.code < SIGNALLED, STOP_TIMEOUT) from None
        finally:
            self.log.close()

    def _micro_batches(self) -> Iterator[tuple[int, Images]]:
        """Yield the micro-batches of this device, with their numbers m, from the current step on."""
        accumulate, world = self.args.gradient_accumulation_steps, self.accelerator.num_processes
        first = self.step * accumulate * world + self.accelerator.process_index
        count = (self.total_steps - self.step) * accumulate
        pinned = self.accelerator.device.type == "cuda"
        options = {"position": self.position, "seeds": self.seeds, "pin_memory": pinned, "opens": self.cache is None}
        loader = micro_batches(self.args, self.source, self.data.transform, first, world, count, **options)
        try:
            for i, batch in enumerate(loader):
                yield first + i * world, batch
        except InputError as error:  # of a worker process, it comes with that one's traceback
            raise InputError(str(error).split("InputError: ")[-1].strip()) from error

    @property
    def denoiser(self) -> Denoiser:
        """The score model of a Gaussian process.

        Raises:
            InputError: the model is one of a reflected process, which has a score and no denoiser.
        """
        if isinstance(self.score_model, Denoiser):
            return self.score_model
        raise InputError(
            f"{self.name} needs a denoiser, and the model of a {type(self.pipeline.scheduler).__name__} is none: train "
            f"it with train_reflected.py"
        )

    def weight(self, sigma: Tensor) -> Tensor:
        """Return the score-matching weight, (B,), see `Levels`."""
        return self.levels.weight(sigma)

    def update(self, loss: Tensor, *, sigma: Tensor, **terms: Tensor) -> None:
        """Make the backward pass and, at the end of an accumulation, the optimiser step.

        Args:
            loss: the scalar to minimise.
            sigma: the noise level of each sample, (B,), for the log.
            terms: the loss terms by name, for the log only; each is (B,), or shorter for the first samples alone.
        """
        terms = terms or {"loss": loss.expand(len(sigma))}
        self.log.record(sigma, terms)
        self.accelerator.backward(self.guard.watch(loss, sigma, terms))
        if self.accelerator.sync_gradients:
            norm = self.accelerator.clip_grad_norm_(self._trainable(), self.args.max_grad_norm)
            self.grad_norm = whole_tensor(norm)
            self.guard.before_step(self.optimizer, self.grad_norm, self.step + 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _after_step(self, stop: StopSignals) -> bool:
        """Do everything that is due after an optimiser step; return whether training ends early."""
        if not self.accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
            if self.ema is not None:
                self.ema.step(self._trainable())
        self.step += 1
        self.log.bar.update()
        done, args = self.step == self.total_steps, self.args
        if self.step % args.logging_steps == 0 or done:
            means = self.log.flush(self.step, self.lr_scheduler.get_last_lr()[0], self.grad_norm.item())
            self.guard.check(args.max_skipped_steps)
            for part in self.parts.values():
                part.check(means)
        if not done and (number := stop.agreed()) is not None:
            self._stop(number)
        if checkpointed := self.checkpoints.are_due(self.step, done):
            self._write_checkpoint()
        validate = self.outcome.is_due() and not done
        push = checkpointed and args.push_to_hub and args.hub_strategy == "every_save" and not done
        if validate or push:
            self.outcome.on_the_way(self.trained(), push)
        ends = validate and self.outcome.best is not None and self.outcome.best.ends()
        if ends and not checkpointed and self.checkpoints.are_due(self.step, last=True):
            self._write_checkpoint()
        return ends

    def _write_checkpoint(self) -> bool:
        self.guard.check(self.args.max_skipped_steps)
        return self.checkpoints.write(self)

    def _stop(self, number: int) -> None:
        """Write a checkpoint after a signal, and stop.

        Raises:
            TrainingStopped: always; the message says how to go on.
        """
        written = self._write_checkpoint()
        raise TrainingStopped(
            f"stopped at step {self.step} of {self.total_steps}{'' if written else ', without a checkpoint'}; "
            f"to go on, repeat the command with --resume_from_checkpoint latest",
            code=SIGNALLED + number,
        )

    def _catch_up(self) -> bool:
        """Make the validation that a killed run has not made; return whether training ends. For all processes."""
        best = self.outcome.best
        if best is None or self.step in (0, self.total_steps) or not self.outcome.is_due():
            return False
        if best.measured != self.step:
            self.outcome.on_the_way(self.trained(), push=False)
        return best.ends()

    # --- results ------------------------------------------------------------------------------------------------------

    def stateful(self) -> dict[str, Any]:
        """Return what has a state beside the network, by its name in a checkpoint."""
        parts: dict[str, Any] = {"optimizer": self.optimizer, "lr_scheduler": self.lr_scheduler}
        parts |= {} if self.ema is None else {"ema": self.ema}
        parts |= {} if self.accelerator.scaler is None else {"scaler": self.accelerator.scaler}
        return parts | self.parts

    def _trainable(self) -> list[torch.nn.Parameter]:
        return list(self.subject.trainable(self.model).values())

    def trained(self) -> Subject | None:
        """Return a copy of the subject with the current weights, or their moving average, on the main process, and
        `None` on the others; all must call this together."""
        keep = self.accelerator.is_main_process
        state = whole(self.subject.state(self.model), keep)
        average = None if self.ema is None else whole(self.ema.shadow_params, keep)
        return self.subject.with_weights(state, average) if keep else None

    def finish(self) -> None:
        """End the run: put the pipeline into the output folder, validate, and push it if the arguments say so.

        Raises:
            TrainingStopped: the pipeline could not be written, or not pushed; the message says how to go on.
        """
        self.outcome.finish(self.trained())
        if self.accelerator.is_main_process:
            self.lock.release()


def _accelerator(args: TrainingArguments) -> Accelerator:
    tracker = tracker_named(args.report_to)
    try:
        accelerator = make_accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=tracker,
            project_dir=str(Path(args.output_dir) / "logs"),
            dynamo_backend="inductor" if args.torch_compile else None,
        )
    except (ValueError, ImportError) as error:  # no such tracker, no such precision on this device
        raise InputError(f"accelerate: {error}") from error
    require_as_asked(accelerator, args)
    kind = accelerator.distributed_type
    if kind in _OPAQUE or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        raise InputError(
            f"{'FSDP version 1' if kind == DistributedType.FSDP else kind.value} keeps the optimiser in parts that "
            f"these checkpoints cannot hold. Launch with FSDP version 2 (`fsdp_version: 2` in accelerate's config), or "
            f"without sharding (DistributedDataParallel)"
        )
    if args.rank is not None and kind == DistributedType.FSDP:
        raise InputError("--rank is not made for FSDP, which shards what is frozen, too: launch without sharding")
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def _optimizer(args: TrainingArguments) -> Any:
    if not args.use_8bit_adam:
        return partial(torch.optim.AdamW, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from error
    return AdamW8bit


def _adam(args: TrainingArguments) -> dict[str, Any]:
    betas = args.adam_beta1, args.adam_beta2
    return {"lr": args.learning_rate, "betas": betas, "weight_decay": args.adam_weight_decay, "eps": args.adam_epsilon}


def _total_steps(args: TrainingArguments, source: ImageSource | HubStream, images_per_step: int) -> int:
    if args.max_train_steps is not None:
        return args.max_train_steps
    if isinstance(source, HubStream):
        raise InputError("a stream has no known length: say how long to train with --max_train_steps")
    n = min(len(source), args.max_train_samples or sys.maxsize)
    return math.ceil(args.num_train_epochs * n / images_per_step)


def _require_in_box(images: Tensor, scheduler: Any) -> None:
    """Refuse images that lie outside of the box of a reflected process."""
    process = noise_schedule(scheduler).process
    if not isinstance(process, ReflectedProcess):
        return
    try:
        process.require_inside(images, "the images")
    except ValueError as error:
        raise InputError(f"{error}: the box of the pipeline's scheduler") from error
