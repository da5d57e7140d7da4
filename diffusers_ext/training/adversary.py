"""A second network that plays against the first one: its optimiser, its state, and when the game is lost.

    adversary = Adversary(discriminator, learning_rate=2e-4, betas=(0.0, 0.99), max_logit=100.0)
    loop.keep(adversary)
    for batch in loop:
        judged = discriminator_loss(denoiser, adversary.network, ...)
        loss = ... + gamma * observation_loss(denoiser, adversary.network, ...).mean()
        loop.update(loss, sigma=sigma, denoising=...)
        adversary.update(judged, sigma=sigma)

Both losses are of the weights that both networks have at the beginning of the optimiser step, whatever the number of
accumulation steps and devices; so compute both before either update, and update the first network first, whose
gradient passes through the second.

The second network is whole on every device, however the first one is spread; the devices average its gradient once, at
the end of an accumulation. (accelerate would have one plan of sharding and one gradient scaler for both networks.) It
computes in bfloat16 where the run does, and in float32 otherwise: with float16 its gradient penalty, a gradient that is
not scaled, would vanish.

**Divergence.** Whenever the log is due, means over the steps since the last time are compared with bounds. A game in
which a mean logit is beyond `max_logit`, or R1 beyond its square (the logit then changes by more than `max_logit` over
one standard deviation of the discriminator's input), for `DIVERGED_RECORDS` records in a row is lost, and so is one in
which a value is not finite. Gradient norms are logged; they are clipped, and only have to be finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from ..discriminator import NoiseLevelDiscriminator
from ..errors import InputError, TrainingStopped
from ..losses import DiscriminatorLoss
from ..randomness import Stream
from ..subjects import Condition, TextToImage
from .parts import Run

DIVERGED_RECORDS = 3
NAME = "discriminator"
"""The name of the part in a checkpoint, and of the folder beside the pipeline."""


IMAGE_STD, LATENT_STD = 0.5, 1.0
"""Standard deviation of images in [-1, 1], the usual estimate, and of latents, which autoencoders scale so."""


def new_discriminator(run: Run, channels: str, sees_prompt: bool = False) -> NoiseLevelDiscriminator:
    """Make a discriminator that fits what the loop trains, labels included; it is the same on all devices.

    Args:
        channels: features at each resolution, separated by commas.
        sees_prompt: it is told the pooled embedding of the prompt.

    Raises:
        InputError: it shall see prompts, and the model takes none.
    """
    subject, pooled_dim = run.subject, None
    classes = subject.num_classes
    if sees_prompt:
        if not isinstance(subject, TextToImage):
            raise InputError("--discriminator_sees_prompt: the model takes no prompts")
        null = subject.null_condition(run.data.transform.resolution)
        assert null is not None
        pooled_dim = subject.pooled(null).shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seeds(Stream.DISCRIMINATOR))
        return NoiseLevelDiscriminator(
            subject.channels,
            [int(width) for width in channels.split(",")],
            sigma_data=run.schedule.sigma_data or (IMAGE_STD if subject.autoencoder is None else LATENT_STD),
            num_class_embeds=None if classes is None else classes + (subject.null_class is not None),
            pooled_dim=pooled_dim,
        )


class Judge(nn.Module):
    """A discriminator of samples in the form that a subject's network sees them, such as packed latents."""

    def __init__(self, network: nn.Module, unpacked: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.unpacked = network, unpacked

    def forward(self, x: Tensor, *args: Any, **cond: Any) -> Tensor:
        return self.network(self.unpacked(x), *args, **cond)


class Adversary:
    """Trains a second network; see the module's docstring.

    Its learning rate follows the run's schedule, and its gradient is clipped like that of the first network.

    Args:
        network: the second network, in float32, the same on all devices.
        learning_rate: the peak learning rate.
        betas: the betas of AdamW.
        max_logit: the bound of the mean logits.
        saved: write the network beside the pipeline, and push it with the pipeline.
    """

    name = NAME

    def __init__(
        self,
        network: ModelMixin,
        *,
        learning_rate: float,
        betas: tuple[float, float],
        max_logit: float,
        saved: bool = False,
    ) -> None:
        self.network, self.learning_rate, self.betas, self.saved = network, learning_rate, betas, saved
        self.bounds = {"real_logits": max_logit, "fake_logits": max_logit, "r1": max_logit**2}
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.diverged_records = 0

    def join(self, run: Run) -> None:
        """Move to the run's device, and follow its schedule of the learning rate."""
        self.run, args, network = run, run.args, self.network.to(run.accelerator.device).train()
        self.judge = Judge(network, run.subject.unpacked)
        if args.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        rates: dict[str, Any] = {
            "lr": self.learning_rate,
            "betas": self.betas,
            "weight_decay": 0.0,
            "eps": args.adam_epsilon,
        }
        self.optimizer = torch.optim.AdamW(self.parameters, **rates, fused=True)
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler,
            self.optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=run.total_steps,
        )
        if run.accelerator.mixed_precision == "bf16":
            network.forward = torch.autocast(run.accelerator.device.type, torch.bfloat16)(network.forward)

    def seen(self, condition: Condition) -> Condition:
        """Return what the discriminator is told of the network's condition: class labels, or the pooled prompt."""
        subject = self.run.subject
        if not isinstance(subject, TextToImage):
            return condition
        return {} if self.network.config.pooled_dim is None else {"pooled": subject.pooled(condition)}

    def update(self, judged: DiscriminatorLoss, *, sigma: torch.Tensor) -> None:
        """Make the backward pass and, at the end of an accumulation, the optimiser step; call it after `loop.update`.

        Args:
            judged: the loss and its parts, each (B,).
            sigma: the noise level of each sample, (B,), for the log.
        """
        run = self.run
        run.log.record(sigma, {NAME: judged.loss, **{name: getattr(judged, name) for name in self.bounds}})
        (judged.loss.mean() / run.args.gradient_accumulation_steps).backward()
        if not run.accelerator.sync_gradients:
            return
        self._average_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, run.args.max_grad_norm)
        # In the way that gradient scalers take: a step whose gradient is not finite is left out, without a wait.
        setattr(self.optimizer, "found_inf", (~norm.isfinite()).float())  # noqa: B010
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_scheduler.step()
        run.log.record_value(f"{NAME}_norm", norm)
        run.log.record_value("generator_norm", run.grad_norm)

    def _average_gradients(self) -> None:
        if self.run.accelerator.num_processes == 1:
            return
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        mean = self.run.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def check(self, means: Mapping[str, float]) -> None:
        """Stop if the game is lost.

        Args:
            means: what was logged, averaged over the steps since the last time, the same on all devices.

        Raises:
            TrainingStopped: the message says which value is beyond its bound.
        """
        watched = (*self.bounds, NAME, f"{NAME}_norm")
        broken = [name for name in watched if not math.isfinite(means[name])]
        beyond = [name for name, bound in self.bounds.items() if not abs(means[name]) <= bound]
        self.diverged_records = self.diverged_records + 1 if beyond else 0
        if not broken and self.diverged_records < DIVERGED_RECORDS:
            return
        values = ", ".join(f"{name} {means[name]:.4g}" for name in dict.fromkeys(broken + beyond))
        how = "not finite" if broken else f"beyond its bound in {self.diverged_records} records of the log in a row"
        raise TrainingStopped(
            f"the adversarial game diverged before step {self.run.step}: {values} ({how}). A lower "
            f"--observation_weight or --discriminator_learning_rate, or a higher --r1_weight may help",
            code=1,
        )

    def save(self, folder: Path) -> None:
        """Write the network beside a pipeline, if it is `saved`."""
        if self.saved:
            self.network.save_pretrained(folder / NAME)

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "diverged_records": self.diverged_records,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("network", "optimizer", "lr_scheduler"):
            getattr(self, name).load_state_dict(state[name])
        self.diverged_records = state["diverged_records"]
