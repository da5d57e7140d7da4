"""The training loop: a generator of micro-batches that knows no method.

    loop = TrainingLoop(args, "train_consistency")
    for batch in loop:                      # images, conditions and a generator, on the device
        loss = ...
        loop.update(loss, sigma=sigma, denoising=loss_of_each_sample)
    loop.finish()

`loop` does the rest: accelerate, gradient accumulation and clipping, learning rate, moving average, checkpoints and
resuming, logs, sample grids, the Hub.

Training is a sequence of micro-batches m = 0, 1, 2, ...; with A accumulation steps on W devices, optimiser step k takes
m = k A W, ..., (k + 1) A W - 1, and device r those with m = r modulo W. The samples and the noise of a micro-batch
depend on the seed, the batch size and m alone, see `diffusers_ext.data.batches`. So W devices do what one does with W
times the accumulation, and the place in a run, its random state included, is one number: the step (and, of a stream,
the row that comes next).
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list, gather_object
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from ..data.batches import Images, Place, first_images, micro_batches
from ..data.images import Transform
from ..data.sources import HubStream, load_images, load_validation_images
from ..errors import InputError, TrainingStopped
from ..evaluation.measures import loss_by_sigma
from ..files import remove_partial
from ..interop import noise_schedule, score_model_from, unwrap
from ..noise_levels import min_snr_weight
from ..process import ReflectedProcess
from ..reports.hub import make_pusher
from ..reports.pictures import image_grid
from ..score import Denoiser
from ..subjects import Subject
from . import checkpoint
from .arguments import TrainingArguments
from .batch import Batch, make_batch
from .best import NAME as BEST
from .best import Best
from .build import build_subject
from .log import RunLog
from .outcome import describe
from .parts import Part
from .resume import check_same_run, checkpoint_to_resume, place_state
from .sharding import whole, whole_tensor
from .stops import FiniteGuard, StopSignals

# Exit codes from here on are those of signals.
SIGNALLED = 128

# After a signal the process has little time: a push that takes longer than so many seconds is given up.
STOP_TIMEOUT = 10.0

# What keeps its own copy of the optimiser, in parts that only it can put together.
_OPAQUE = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class TrainingLoop:
    """See the module's docstring. Everything is made from the arguments.

    Args:
        args: the run's arguments.
        name: the tracker's project.
        paper: title and arXiv id of the method, for the model card.

    The global random state is set at every micro-batch, for dropout, which has no generator of its own.

    Attributes:
        pipeline: what is trained; its network is wrapped by accelerate as `model`.
        score_model, schedule: the network as a function of (x, sigma), and the noise levels that it is trained for.
        step, total_steps: optimiser steps done, and in all.
        grad_norm: of the last optimiser step, before it was clipped.
        parts: what `add` was given, by name.
        best: decides which pipeline is the result, where there is such a part.

    Raises:
        InputError: the arguments, the data and the model do not fit; the message says what to do.
    """

    def __init__(self, args: TrainingArguments, name: str, paper: tuple[str, str]) -> None:
        self.args, self.name, self.paper, self.step = args, name, paper, 0
        self.warnings: list[str] = []
        self.parts: dict[str, Part] = {}
        self.best: Best | None = None
        self._resumed: dict[str, Any] = {}
        self.output_dir = Path(args.output_dir)
        try:
            self.accelerator = Accelerator(
                mixed_precision=args.mixed_precision,
                gradient_accumulation_steps=args.gradient_accumulation_steps,
                log_with=None if args.report_to == "none" else args.report_to,
                project_dir=str(self.output_dir / "logs"),
                dynamo_backend="inductor" if args.torch_compile else None,
            )
        except (ValueError, ImportError) as error:  # no such tracker, no such precision on this device
            raise InputError(f"accelerate: {error}") from error
        kind = self.accelerator.distributed_type
        if kind in _OPAQUE or (kind == DistributedType.FSDP and not self.accelerator.is_fsdp2):
            raise InputError(
                f"{'FSDP version 1' if kind == DistributedType.FSDP else kind.value} keeps the optimiser in parts that "
                f"these checkpoints cannot hold. Launch with FSDP version 2 (`fsdp_version: 2` in accelerate's "
                f"config), or without sharding (DistributedDataParallel)"
            )
        if args.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        (resume_from,) = broadcast_object_list([checkpoint_to_resume(args)])  # what the main process sees
        if args.resume_from_checkpoint == "latest" and resume_from is None and self.accelerator.is_main_process:
            print(f"no checkpoint in {self.output_dir} yet: starting from the beginning")
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output_dir {self.output_dir} cannot be made: {error}") from error
        self._set_up_data()
        self._set_up_model()
        self.log = RunLog(
            args,
            self.accelerator,
            (self.schedule.sigma_min, self.schedule.sigma_max),
            self.images_per_step,
            self.total_steps,
        )
        self.guard = FiniteGuard(self.accelerator)
        self.pusher = make_pusher(args, self.output_dir, self.accelerator.is_main_process)
        if resume_from is not None:
            self._resume(resume_from)

    def _set_up_data(self) -> None:
        args = self.args
        self.source = load_images(args, args.train_split)
        names = self.source.class_names
        self.subject = build_subject(args, None if names is None else len(names))
        self.pipeline = self.subject.pipeline
        channels, resolution = self.subject.image_format(args.resolution)
        self.subject.train_at(resolution)
        self.transform = Transform(resolution, channels, args.center_crop, args.random_flip)
        held_out = load_validation_images(args)
        self.validation_name = "held-out images" if held_out else "training images (the data have no held-out split)"
        self.validation = first_images(held_out or self.source, args.max_validation_samples, self.transform)
        if isinstance(process := noise_schedule(self.pipeline.scheduler).process, ReflectedProcess):
            try:
                process.require_inside(self.validation.images, "the images")
            except ValueError as error:
                raise InputError(f"{error}: the box of the pipeline's scheduler") from error

        per_step = args.gradient_accumulation_steps * self.accelerator.num_processes
        self.images_per_step = args.train_batch_size * per_step
        self.place = Place(0, 0)
        if args.max_train_steps is not None:
            self.total_steps = args.max_train_steps
        elif isinstance(self.source, HubStream):
            raise InputError("a stream has no known length: say how long to train with --max_train_steps")
        else:
            n = min(len(self.source), args.max_train_samples or sys.maxsize)
            self.total_steps = math.ceil(args.num_train_epochs * n / self.images_per_step)

    def _set_up_model(self) -> None:
        args, device = self.args, self.accelerator.device
        network: Any = self.subject.network
        network.train()
        if args.channels_last:
            network.to(memory_format=torch.channels_last)
        if args.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        for other in self.subject.others:
            other.requires_grad_(False).to(device)
        network.to(device)
        optimizer = torch.optim.AdamW(
            self.subject.trainable().values(),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
            fused=True,
        )
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=self.total_steps,
        )
        self.model, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.ema = EMAModel(self._trainable(), decay=args.ema_decay, foreach=True) if args.use_ema else None
        self.schedule = noise_schedule(self.pipeline.scheduler)
        self.score_model = score_model_from(self.model, self.pipeline.scheduler)

    def add(self, name: str, part: Part) -> None:
        """Let a part train along, before the loop begins: the checkpoints hold it under this name, and the one that the
        run goes on from is given back to it."""
        self.parts[name] = part
        if name in self._resumed:
            part.load_state_dict(self._resumed.pop(name))

    # --- training -----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        if self.args.overwrite_output_dir and self.step == 0:
            self._clear_output_dir()
        if self.accelerator.is_main_process:
            remove_partial(self.output_dir)
        self.log.start(self.name, self.step)
        self.log.unreadable(self.step, self.validation.unreadable)
        try:
            with StopSignals(self.accelerator) as stop:
                if self.best is not None and self.best.catch_up():
                    return
                for m, batch in self._micro_batches():
                    self.log.unreadable(self.step, batch.unreadable)
                    with self.accelerator.accumulate(self.model):
                        yield make_batch(self.subject, self.args, m, batch, self.accelerator.device)
                    self.place = batch.place or self.place
                    if self.accelerator.sync_gradients and self._after_step(stop):
                        return
        except TrainingStopped as stopped:
            raise self._leave(stopped) from None
        finally:
            self.log.close()

    def _micro_batches(self) -> Iterator[tuple[int, Images]]:
        """The micro-batches of this device, with their numbers m, from the current step on."""
        accumulate, world = self.args.gradient_accumulation_steps, self.accelerator.num_processes
        first = self.step * accumulate * world + self.accelerator.process_index
        count = (self.total_steps - self.step) * accumulate
        pin = self.accelerator.device.type == "cuda"
        loader = micro_batches(
            self.args, self.source, self.transform, first, world, count, place=self.place, pin_memory=pin
        )
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
        """The score-matching weight that the arguments ask for, (B,): by default the error of the network's output."""
        if self.args.min_snr_gamma is not None:
            return min_snr_weight(sigma, self.args.min_snr_gamma)
        return self.score_model.output_weight(sigma)

    def update(self, loss: Tensor, *, sigma: Tensor, **terms: Tensor) -> None:
        """Backward pass and, at the end of an accumulation, optimiser step.

        Args:
            loss: the scalar to minimise.
            sigma: noise level of each sample, (B,), for the log.
            terms: the loss terms by name, each (B,) or for the first samples of the batch; for the log only.
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
        """Everything that is due after an optimiser step; says whether training ends early."""
        if not self.accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
            if self.ema is not None:
                self.ema.step(self._trainable())
        self.step += 1
        self.log.bar.update()
        done, args = self.step == self.total_steps, self.args
        if self.step % args.logging_steps == 0 or done:
            means = self.log.flush(self.step, self.lr_scheduler.get_last_lr()[0])
            self.guard.check(args.max_skipped_steps)
            for part in self.parts.values():
                part.check(means)
        if not done and (number := stop.agreed()) is not None:
            written = self.checkpoint()
            raise TrainingStopped(
                f"stopped at step {self.step} of {self.total_steps}{'' if written else ', without a checkpoint'}; "
                f"to go on, repeat the command with --resume_from_checkpoint latest",
                code=SIGNALLED + number,
            )
        validate = self.validation_is_due()
        if args.checkpointing_steps is not None and self.step % args.checkpointing_steps == 0:
            self.checkpoint()
            push = args.push_to_hub and args.hub_strategy == "every_save"
        else:
            push = False
        if (validate or push) and not done:
            if (trained := self.trained()) is not None:
                with self.goes_on_without("the sample grid or the pipeline"):
                    metrics = self.validate(trained)
                    if push:
                        self._push(*self._put_in_place(trained, metrics))
            self.accelerator.wait_for_everyone()
        return validate and not done and self.best is not None and self.best.ends()

    def validation_is_due(self) -> bool:
        """Whether validation follows the step that is done."""
        return self.args.validation_steps is not None and self.step % self.args.validation_steps == 0

    def warn(self, message: str) -> None:
        """Say and remember what goes on in spite of a failure."""
        self.warnings.append(message)
        print(f"\nwarning: {message}")

    @contextmanager
    def goes_on_without(self, what: str) -> Iterator[None]:
        """Turn a failed write, on a full disk say, into a warning."""
        try:
            yield
        except OSError as error:
            self.warn(f"{what} of step {self.step} could not be written: {error}")

    def _leave(self, stopped: TrainingStopped) -> TrainingStopped:
        """Close what an early end leaves open; what was not pushed is added to the message. A run that went wrong
        leaves its best pipeline, if it has one, in the output folder."""
        failed = self.accelerator.is_main_process and stopped.code < SIGNALLED
        if failed and self.best is not None and self.best.step is not None:
            with self.goes_on_without("the best pipeline"):
                self.best.install(self.output_dir)
                kept = f"the best pipeline, of step {self.best.step}, is in {self.output_dir}"
                stopped = TrainingStopped(f"{stopped}\n{kept}", stopped.code)
        failure = None if self.pusher is None else self.pusher.finish(min(self.args.hub_timeout, STOP_TIMEOUT))
        self.accelerator.end_training()
        return stopped if failure is None else TrainingStopped(f"{stopped}\n{failure}", stopped.code)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _stateful(self) -> dict[str, Any]:
        """What trains beside the network, by name."""
        parts = {"optimizer": self.optimizer, "lr_scheduler": self.lr_scheduler}
        parts |= {} if self.ema is None else {"ema": self.ema}
        parts |= {} if self.accelerator.scaler is None else {"scaler": self.accelerator.scaler}
        return parts | self.parts

    def checkpoint(self) -> bool:
        """Write a checkpoint; on a full disk say so and go on, with the last one in place. Says whether it was written,
        on the main process."""
        self.guard.check(self.args.max_skipped_steps)
        places = gather_object([list(self.place)])
        before = len(self.warnings)
        stateful = self._stateful()
        state = {
            "step": self.step,
            "images_per_step": self.images_per_step,
            "processes": self.accelerator.num_processes,
            "places": places,
            "arguments": {k: v for k, v in asdict(self.args).items() if "token" not in k},
            "model": self._whole(self.subject.state(self.model)),
            **{name: self._whole(part.state_dict()) for name, part in stateful.items()},
        }
        if self.accelerator.is_main_process:
            with self.goes_on_without("the checkpoint"):
                checkpoint.save_checkpoint(self.output_dir, self.step, state, self.args.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()
        return len(self.warnings) == before

    def _clear_output_dir(self) -> None:
        """Delete the run that the folder holds."""
        if self.accelerator.is_main_process:
            found = checkpoint.list_checkpoints(self.output_dir)
            for old in (*found, *(self.output_dir / name for name in ("logs", "samples", BEST, *self.parts))):
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _resume(self, folder: Path) -> None:
        try:
            state = checkpoint.load_checkpoint(folder)
        except OSError as error:
            raise InputError(f"the checkpoint {folder} cannot be read: {error}") from error
        shares = self.accelerator.num_processes if isinstance(self.source, HubStream) else None
        check_same_run(folder, state, self.args, self.images_per_step, shares)
        self.step = state["step"]
        if isinstance(self.source, HubStream):
            self.place = Place(*state["places"][self.accelerator.process_index])
        place_state(state, unwrap(self.model), self.ema is not None)
        own = self._stateful()
        for name, part in own.items():
            part.load_state_dict(state[name])
        self._resumed = {name: value for name, value in state.items() if name != "model" and name not in own}
        if self.accelerator.is_main_process:
            print(f"going on from {folder}, step {self.step} of {self.total_steps}")

    # --- results ------------------------------------------------------------------------------------------------------

    def _whole(self, state: Any) -> Any:
        return whole(state, keep=self.accelerator.is_main_process)

    def _trainable(self) -> list[torch.nn.Parameter]:
        return list(self.subject.trainable(self.model).values())

    def trained(self) -> Subject | None:
        """A copy with the weights of now, or their moving average, on the main process, and `None` on the others; all
        must call it together."""
        state = self._whole(self.subject.state(self.model))
        average = None if self.ema is None else self._whole(self.ema.shadow_params)
        return self.subject.with_weights(state, average) if self.accelerator.is_main_process else None

    def validate(self, trained: Subject) -> dict[str, Any]:
        """Draw a sample grid in `samples/` and measure the denoising loss by noise level, which is returned."""
        if self.args.num_validation_images > 0:
            self._draw_sample_grid(trained)
        metrics = self._loss_by_sigma(trained) | {"measured_on": self.validation_name}
        if self.best is not None and self.best.measured != self.step:
            metrics = self.best.offer(trained, self.step, metrics)
        self.log.write({"step": self.step, "validation": metrics})
        return metrics

    def _draw_sample_grid(self, trained: Subject) -> None:
        n, steps, path = self.args.num_validation_images, self.args.num_inference_steps, self._sample_grid(self.step)
        try:
            images = trained.sample(n, steps, self.args.seed)
        except (ValueError, RuntimeError, IndexError) as error:  # some samplers cannot take few steps
            failure = f"no sample grid at step {self.step}, {type(error).__name__} in the sampler: {error}"
            self.warn(f"{failure}; try another --num_inference_steps")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid(images).save(path)

    def _sample_grid(self, step: int) -> Path:
        return self.output_dir / "samples" / f"step-{step:08d}.png"

    def _loss_by_sigma(self, trained: Subject) -> dict[str, list[float]]:
        return loss_by_sigma(trained, self.validation, self.args, self.log.sigma_range)

    def _put_in_place(self, trained: Subject, metrics: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Put the result so far into the output folder: the best pipeline if one was measured, else that of now. Its
        metrics and its step."""
        if self.best is None or self.best.step is None:
            trained.save(self.output_dir)
            for part in self.parts.values():
                part.save(self.output_dir)
            return metrics, self.step
        self.best.install(self.output_dir)
        if (sample := self._sample_grid(self.best.step)).is_file():
            os.utime(sample)  # the newest grid is the one that is pushed
        return self.best.metrics, self.best.step

    def _push(self, metrics: dict[str, Any], step: int) -> None:
        """Write the model card of the saved pipeline and hand both over to the pusher."""
        if self.pusher is None:
            return
        metrics = {"step": step, "images": step * self.images_per_step, **metrics}
        sample = self._sample_grid(step)
        describe(self.output_dir, self.pusher.repo_id, self.subject, self.args, self.paper, metrics, sample)
        self.pusher.push(self.output_dir, f"step {step}", [name for name, part in self.parts.items() if part.saved])

    def finish(self) -> None:
        """The end of a run: the pipeline in the output folder, validation, and the Hub if that was asked for.

        Raises:
            TrainingStopped: the pipeline is in the output folder, but could not be pushed; says how to push it.
        """
        if (trained := self.trained()) is not None:
            unmeasured = self.best is not None and self.best.measured != self.step
            metrics: dict[str, Any] = {}
            with self.goes_on_without("the best pipeline"):
                metrics = self.validate(trained) if unmeasured else metrics
            metrics, step = self._put_in_place(trained, metrics)
            how = "; `import diffusers_ext` before you open it" if self.subject.needs_package else ""
            which = "" if step == self.step else f", of step {step}, the best,"
            print(f"the trained pipeline{which} is in {self.output_dir}{how}")
            self._push(self.validate(trained) if self.best is None else metrics, step)
        failure = None if self.pusher is None else self.pusher.finish(self.args.hub_timeout)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if failure is not None:
            raise TrainingStopped(failure, code=3)
