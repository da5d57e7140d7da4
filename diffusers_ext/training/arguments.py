"""Command-line arguments that every training script shares.

They are filled from the defaults below, a preset (`--preset`), a YAML file (`--config`) and the command line; what
comes later wins. The names are those of diffusers' own training scripts wherever these agree on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Literal

from diffusers import DiffusionPipeline

from ..data.prompts import read_prompts
from ..data.sources import HeldOutArguments
from ..errors import InputError
from ..fields import arg
from ..reports.hub import HubArguments

LR_SCHEDULERS = (
    *("constant", "constant_with_warmup", "cosine", "cosine_with_restarts"),
    *("linear", "polynomial"),
)


LORA_ARGUMENTS = ("lora_alpha", "lora_dropout", "lora_layers")


@dataclass
class TrainingArguments(HubArguments, HeldOutArguments):
    """Arguments that say what is trained, on which data, how long, and where the result goes."""

    # model
    pretrained_model_name_or_path: str | None = arg(
        None, "Pipeline to fine-tune (Hub name or folder): of pixels, latents or text-to-image; keeps its scheduler."
    )
    revision: str | None = arg(None, "Git revision of the pretrained pipeline.")
    variant: str | None = arg(None, "Weights variant of the pretrained pipeline, e.g. fp16; trained in float32.")
    rank: int | None = arg(None, "Text-to-image: train a LoRA of this rank; by default the whole network.", at_least=1)
    lora_alpha: float | None = arg(None, "Scale of the LoRA, by default its rank.", above=0)
    lora_dropout: float | None = arg(None, "Dropout before the LoRA, by default none.", at_least=0, below=1)
    lora_layers: list[str] | None = arg(None, "Layers with a LoRA, by the ends of their names; by default attention's.")
    guidance_scale: float | None = arg(
        None, "Flux: the scale that its network is told; by default that of the pipeline's call.", at_least=0
    )
    model_config_name_or_path: str | None = arg(None, "Folder or Hub name with the config.json of a UNet2DModel.")
    scheduler: str | None = arg(None, "From scratch: class of the scheduler, e.g. DDIMScheduler, EDMEulerScheduler.")
    prediction_type: str | None = arg(None, "From scratch: epsilon, v_prediction or sample, as the scheduler takes it.")
    beta_schedule: str | None = arg(None, "From scratch: noise schedule of a scheduler that has one.")
    class_conditional: bool = arg(False, "From scratch: train on the labels, with a null class for guidance.")
    label_drop: float = arg(
        0.1, "Share of labels replaced by the null class, where the model has one.", at_least=0, at_most=1
    )
    proportion_empty_prompts: float | None = arg(
        None, "Text-to-image: share of captions replaced by the null condition, by default none.", at_least=0, at_most=1
    )

    # data
    max_validation_samples: int = arg(512, "Use only the first so many held-out images.", at_least=1)

    cache_latents: bool = arg(
        False, "Text-to-image: encode images and captions once, into a cache beside that of the data (--cache_dir)."
    )

    # optimisation
    gradient_accumulation_steps: int = arg(1, "Forward passes per optimiser step.", at_least=1)
    max_train_steps: int | None = arg(None, "Optimiser steps; overrides num_train_epochs.", at_least=1)
    num_train_epochs: float = arg(100.0, "Passes over the data, where max_train_steps is not given.", above=0)
    learning_rate: float = arg(1e-4, "Peak learning rate of AdamW.", above=0)
    lr_scheduler: str = arg("constant_with_warmup", "Any name of diffusers.optimization: constant, cosine, linear, ...")
    lr_warmup_steps: int = arg(0, "Optimiser steps of linear warm-up.", at_least=0)
    adam_beta1: float = arg(0.9, "AdamW beta1.", at_least=0, below=1)
    adam_beta2: float = arg(0.999, "AdamW beta2.", at_least=0, below=1)
    adam_weight_decay: float = arg(0.0, "AdamW weight decay.", at_least=0)
    adam_epsilon: float = arg(1e-8, "AdamW epsilon.", above=0)
    max_grad_norm: float = arg(1.0, "Gradients are clipped to this norm.", above=0, at_most=inf)
    min_snr_gamma: float | None = arg(
        None, "Min-SNR weighting with this gamma; by default the network's own output.", above=0, at_most=inf
    )
    weighting_scheme: Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none"] | None = arg(
        None, "Flow models: law and weight of the noise levels, as in diffusers' scripts for Stable Diffusion 3."
    )
    logit_mean: float | None = arg(None, "Mean of logit_normal, by default 0.", at_least=-10, at_most=10)
    logit_std: float | None = arg(None, "Standard deviation of logit_normal, by default 1.", above=0)
    mode_scale: float | None = arg(None, "Scale of mode, by default 1.29.", at_least=0)
    snr_gamma: float | None = arg(
        None, "Another name of min_snr_gamma, that of diffusers' scripts.", above=0, at_most=inf
    )
    use_8bit_adam: bool = arg(False, "AdamW with moments of 8 bits (bitsandbytes).")
    use_ema: bool = arg(True, "Validate and save the moving average of the weights; --no_use_ema: the raw ones.")
    ema_decay: float = arg(
        0.9999, "Decay of the moving average, reached by (1 + step) / (10 + step).", at_least=0, below=1
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = arg(None, "By default what `accelerate launch` says.")
    gradient_checkpointing: bool = arg(False, "Less memory for more time.")
    allow_tf32: bool = arg(False, "TensorFloat-32 on GPUs that have it.")
    channels_last: bool = arg(False, "Memory format that convolutions on GPUs like, best with mixed precision.")
    torch_compile: bool = arg(False, "Compile the network.")
    max_skipped_steps: int = arg(
        0, "Stop when more steps than this had a loss or gradient that is not finite.", at_least=0
    )

    # output
    output_dir: str = arg("output", "Folder of the trained pipeline, checkpoints, logs and sample grids.")
    overwrite_output_dir: bool = arg(False, "Replace the run that output_dir holds.")
    checkpointing_steps: int | None = arg(500, "Optimiser steps between two checkpoints; 0 for none.", at_least=0)
    checkpoints_total_limit: int | None = arg(3, "Keep so many of the newest checkpoints.", at_least=1)
    resume_from_checkpoint: str | None = arg(
        None, "`latest`, a name like checkpoint-500 in output_dir, or the path of a checkpoint."
    )
    logging_steps: int = arg(50, "Optimiser steps between two records of the log.", at_least=1)
    report_to: str = arg(
        "auto", "Tracker of accelerate: tensorboard, wandb, ..., or none; auto is tensorboard where it is installed."
    )
    validation_steps: int | None = arg(
        None, "Optimiser steps between two sample grids; one at the end in any case.", at_least=1
    )
    hub_strategy: Literal["end", "every_save"] = arg("end", "Push at the end, or at every checkpoint as well.")
    validation_prompt: list[str] | None = arg(
        None, "Text-to-image: prompts of the sample grid, in turn; by default captions of the held-out images."
    )
    validation_prompt_file: str | None = arg(
        None, "Text file with more of these prompts, one in a line; see --num_validation_images."
    )
    num_validation_images: int = arg(16, "Images of a sample grid; 0 makes none.", at_least=0)
    num_inference_steps: int = arg(50, "Sampler steps of a sample grid.", at_least=1)

    needs_scheduler: ClassVar[str | None] = None
    """The class of the only scheduler whose models the script trains; `None` if it trains others, too."""

    def adapt(self, pipeline: DiffusionPipeline) -> DiffusionPipeline:
        """Return the pipeline that is trained; a script may override this to change it or its scheduler."""
        return pipeline

    def lowest_noise(self, data_noise: Sequence[float]) -> float:
        """Return where the sampler ends, of a model of images with this noise; 0 is where it always does."""
        return 0.0

    def scheduler_settings(self) -> dict[str, Any]:
        """Return the arguments that are settings of a new model's scheduler; `None` leaves the scheduler's default."""
        return {"prediction_type": self.prediction_type, "beta_schedule": self.beta_schedule}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.checkpointing_steps = self.checkpointing_steps or None
        if self.snr_gamma is not None:
            if self.min_snr_gamma not in (None, self.snr_gamma):
                raise InputError("--snr_gamma and --min_snr_gamma are the same argument: give one of them")
            self.min_snr_gamma, self.snr_gamma = self.snr_gamma, None
        if self.validation_prompt_file is not None:
            read = read_prompts(self.validation_prompt_file, "validation_prompt_file")
            self.validation_prompt = list(dict.fromkeys([*(self.validation_prompt or []), *read]))
        if self.rank is None and (of_lora := [n for n in LORA_ARGUMENTS if getattr(self, n) is not None]):
            raise InputError(f"--{of_lora[0]} is a setting of a LoRA: say its --rank, too")
        if self.lora_layers is not None:  # diffusers' scripts have commas between them
            self.lora_layers = [layer for word in self.lora_layers for layer in word.split(",") if layer]
        if self.cache_latents and (self.streaming or self.random_flip or not self.center_crop):
            raise InputError(
                "--cache_latents holds each image once: it needs --center_crop, and no --random_flip or --streaming"
            )
        if self.lora_dropout and self.gradient_checkpointing:
            raise InputError(
                "--lora_dropout and --gradient_checkpointing exclude each other: the backward pass would compute the "
                "activations again with another dropout. Switch one of them off"
            )
        if self.lr_scheduler not in LR_SCHEDULERS:
            raise InputError(f"--lr_scheduler {self.lr_scheduler!r} is not one of {', '.join(LR_SCHEDULERS)}")
