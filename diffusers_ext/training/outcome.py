"""The results of a run: measurements and sample grids on the way, at the end the pipeline, its card and its push."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import TrainingStopped
from ..evaluation.measures import loss_by_sigma
from ..files import holds_result, replacing, replacing_files, shown
from ..randomness import Stream
from ..reports.card import command_line, write_model_card
from ..reports.hub import make_pusher
from ..reports.pictures import image_grid
from ..subjects import Subject
from .announce import after
from .best import Best
from .checkpoint import list_checkpoints
from .environment import end_run
from .parts import Run
from .stops import stopping_at_once


class Outcome:
    """Writes the results of a run into its output folder, and to the Hub.

    The methods get a subject with a copy of the current weights on the main process. On the others they get `None`, and
    only wait.

    Args:
        run: the run.
        paper: title and arXiv id of the method, for the model card.

    Attributes:
        best: the part that decides which pipeline is the result; `None` if the last one is.

    Raises:
        InputError: the repository's name is not valid.
    """

    def __init__(self, run: Run, paper: tuple[str, str]) -> None:
        self.run, self.paper, self.best = run, paper, None
        self.pusher = make_pusher(run.args, run.output_dir, run.accelerator.is_main_process)

    best: Best | None

    # --- on the way ---------------------------------------------------------------------------------------------------

    def is_due(self) -> bool:
        """Return whether a validation is due after the current step."""
        every = self.run.args.validation_steps
        return every is not None and self.run.step % every == 0

    def on_the_way(self, trained: Subject | None, push: bool) -> None:
        """Validate in the course of the training, and push the pipeline if `push` says so."""
        if trained is not None:
            with self.run.log.goes_on_without("the sample grid or the pipeline", self.run.step):
                metrics = self.validate(trained)
                if push:
                    self._push(*self._install(trained, metrics))
        self.run.accelerator.wait_for_everyone()

    def validate(self, trained: Subject) -> dict[str, Any]:
        """Draw a sample grid in `samples/`, measure the pipeline, write the measurements to the log and return them."""
        run = self.run
        if (count := run.args.num_validation_images) > 0:
            with run.log.doing(f"drawing {count} samples, {run.args.num_inference_steps} steps"):
                self._draw_sample_grid(trained)
        with run.log.doing("measuring the loss on held-out images"):
            metrics = self.losses(trained) | {"measured_on": run.data.validation_name}
        if self.best is not None and self.best.measured != run.step:
            with run.log.doing(f"measuring {self.best.samples} samples, {self.best.steps} steps"):
                metrics = self.best.offer(trained, metrics)
        run.log.write({"step": run.step, "validation": metrics})
        run.log.track_held_out(run.step, metrics)
        return metrics

    def losses(self, trained: Subject) -> dict[str, Any]:
        """Return the denoising loss on the validation images by noise level."""
        options: dict[str, Any] = {"seeds": self.run.seeds, "batch_size": self.run.args.train_batch_size}
        return loss_by_sigma(trained, self.run.validation, self.run.log.sigma_range, **options)

    def _draw_sample_grid(self, trained: Subject) -> None:
        args, step = self.run.args, self.run.step
        try:
            seed, prompts = self.run.seeds(Stream.GRID), self._prompts()
            rows = {} if prompts is None else {"captions": prompts}
            images = trained.sample(args.num_validation_images, args.num_inference_steps, seed, **rows)
        except (ValueError, RuntimeError, IndexError) as error:  # some samplers cannot take few steps
            failure = f"no sample grid at step {step}, {type(error).__name__} in the sampler: {error}"
            self.run.log.warn(f"{failure}; try another --num_inference_steps")
            return
        path = self._sample_grid(step)
        with replacing(path) as aside:
            image_grid(images).save(aside)
        for tracker in self.run.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"samples": images.transpose(0, 3, 1, 2)}, step=step)
            elif tracker.name == "wandb":
                tracker.log_images({"samples": list(images)}, step=step)

    def _prompts(self) -> list[str] | None:
        """Return the prompts of the sample grid; `None` where the model takes none."""
        if not self.run.subject.takes_captions:
            return None
        prompts = self.run.args.validation_prompt or self.run.validation.captions or [""]
        return list(prompts[: max(1, self.run.args.num_validation_images)])

    def _sample_grid(self, step: int) -> Path:
        return self.run.output_dir / "samples" / f"step-{step:08d}.png"

    # --- the end ------------------------------------------------------------------------------------------------------

    def _install(self, trained: Subject, metrics: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Put the best pipeline, if one was measured, else the given one into the output folder; return the metrics
        and the step of that pipeline."""
        if self.best is None or self.best.step is None or not self.best.is_whole():
            with replacing_files(self.run.output_dir) as aside:
                trained.write(aside)
                for part in self.run.parts.values():
                    part.save(aside)
            return metrics, self.run.step
        self.best.install(self.run.output_dir)
        if (sample := self._sample_grid(self.best.step)).is_file():
            os.utime(sample)  # the newest grid is the one that is pushed
        return self.best.metrics, self.best.step

    def _push(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write the model card of the saved pipeline and hand both over to the pusher."""
        if self.pusher is None:
            return
        run = self.run
        self._write_card(self.pusher.repo_id, {"step": step, "images": step * run.images_per_step, **metrics}, step)
        self.pusher.push(run.output_dir, f"step {step}", [name for name, part in run.parts.items() if part.saved])

    def _write_card(self, name: str, metrics: Mapping[str, Any], step: int) -> None:
        args, subject, sample = self.run.args, self.run.subject, self._sample_grid(step)
        data = args.train_data_dir
        write_model_card(
            self.run.output_dir,
            name=name,
            arguments=asdict(args),
            command=command_line(),
            data=f"the images of {shown(str(Path(data)))}" if data else f"{args.dataset_name}",
            metrics=metrics,
            sample=sample if sample.is_file() else None,
            pipeline_class=type(subject.pipeline).__name__,
            needs_package=subject.needs_package,
            paper=self.paper,
            license=args.license,
            is_lora=subject.is_lora,
            prompts=self._prompts(),
        )

    def finish(self, trained: Subject | None) -> None:
        """Put the pipeline into the output folder, validate, and push if that was asked for.

        Raises:
            TrainingStopped: the pipeline could not be written, and the last checkpoint stays; or it is in the output
                folder, but could not be pushed. The message says how to go on.
        """
        run = self.run
        if trained is not None:
            try:
                with stopping_at_once(lambda: f"stopped after the last step. {self._rest}"):
                    self._leave_result(trained)
            except OSError as error:
                message = f"training is done, but its result could not be written: {error}; mend that. {self._rest}"
                raise TrainingStopped(message, code=1) from error
        end_run(run.accelerator, self._wait_for_push(run.args.hub_timeout))

    def _leave_result(self, trained: Subject) -> None:
        run, metrics = self.run, dict[str, Any]()
        if self.best is not None and self.best.measured != run.step:
            with run.log.goes_on_without("the best pipeline", run.step):
                metrics = self.validate(trained)
        metrics, step = self._install(trained, metrics)
        how = "; `import diffusers_ext` before you open it" if run.subject.needs_package else ""
        which = "" if step == run.step else f", of step {step}, the best,"
        what = "LoRA" if run.subject.is_lora else "pipeline"
        self._push(self.validate(trained) if self.best is None else metrics, step)
        print(after(run, f"the trained {what}{which} is in {run.output_dir}{how}"))

    @property
    def _rest(self) -> str:
        """How to go on from a stop after the last step, for people."""
        if list_checkpoints(self.run.output_dir):
            return "To do only the rest, repeat the command with --resume_from_checkpoint latest"
        done = holds_result(self.run.output_dir)
        return (
            f"There is no checkpoint (--checkpointing_steps 0); {'the pipeline is' if done else 'nothing is'} written"
        )

    def leave(self, stopped: TrainingStopped, failed: bool, timeout: float) -> TrainingStopped:
        """Close what is open when a run ends early; return the reason with notes on what was kept and not pushed.

        Args:
            stopped: the reason why the run ends.
            failed: the run went wrong, and will hardly be continued: put its best pipeline, if there is one, into the
                output folder.
            timeout: how long to wait for a push that is under way, in seconds.
        """
        run = self.run
        if failed and run.accelerator.is_main_process and self.best is not None and self.best.step is not None:
            with run.log.goes_on_without("the best pipeline", run.step):
                self.best.install(run.output_dir)
                kept = f"the best pipeline, of step {self.best.step}, is in {run.output_dir}"
                stopped = TrainingStopped(f"{stopped}\n{kept}", stopped.code)
        failure = self._wait_for_push(min(run.args.hub_timeout, timeout))
        run.accelerator.end_training()
        return stopped if failure is None else TrainingStopped(f"{stopped}\n{failure}", stopped.code)

    def _wait_for_push(self, timeout: float) -> str | None:
        return None if self.pusher is None else self.pusher.finish(timeout)
