"""Models, schedulers and settings that work together; comments name the source of each value.

A preset's `arguments` replace defaults of the command line (see `diffusers_ext.commands`), which can override them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A `UNet2DModel` configuration, a scheduler (class, configuration) and values of arguments."""

    model: dict[str, Any]
    scheduler: tuple[str, dict[str, Any]]
    arguments: dict[str, Any]


# Cosine schedule: Improved DDPM (Nichol, Dhariwal, 2021, arXiv 2102.09672), section 3.2. v-prediction: Progressive
# Distillation (Salimans, Ho, 2022, arXiv 2202.00512). Trailing steps start at the last timestep: Common Diffusion Noise
# Schedules (Lin et al., 2023, arXiv 2305.08891), table 2.
_COSINE_V = (
    "DDIMScheduler",
    {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
)

PRESETS: dict[str, Preset] = {
    # A model for two CPU cores; its sizes and rates were chosen by trying, to give readable digits in about 3 minutes.
    "digits": Preset(
        model={
            "sample_size": 16,
            "in_channels": 1,
            "out_channels": 1,
            "layers_per_block": 1,
            "block_out_channels": (32, 64, 64),
            "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            "norm_num_groups": 8,
        },
        scheduler=_COSINE_V,
        arguments={
            "dataset_name": "digits",
            "resolution": 16,
            "train_batch_size": 64,
            "max_train_steps": 800,
            "learning_rate": 2e-3,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 50,
            "ema_decay": 0.995,
            "discriminator_channels": "32,64,64",
        },
    ),
    # A model of the same family at 28 x 28; its sizes were also chosen by trying.
    "mnist": Preset(
        model={
            "sample_size": 28,
            "in_channels": 1,
            "out_channels": 1,
            "layers_per_block": 1,
            "block_out_channels": (32, 64, 96),
            "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            "norm_num_groups": 8,
        },
        scheduler=_COSINE_V,
        arguments={
            "dataset_name": "ylecun/mnist",
            "resolution": 28,
            "train_batch_size": 128,
            "max_train_steps": 20_000,
            "learning_rate": 1e-3,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 200,
            "ema_decay": 0.999,
            "discriminator_channels": "32,64,96",
        },
    ),
    # Network, dropout, learning rate, batch, warm-up and EMA: DDPM (Ho, Jain, Abbeel, 2020, arXiv 2006.11239),
    # appendix B. Preconditioning, weighting and training law: EDM (Karras et al., 2022, arXiv 2206.00364), table 1.
    # Regulariser: the consistent-diffusion paper (arXiv 2302.09057) adds it to EDM.
    "cifar10": Preset(
        model={
            "sample_size": 32,
            "in_channels": 3,
            "out_channels": 3,
            "layers_per_block": 2,
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "dropout": 0.1,
        },
        scheduler=("EDMEulerScheduler", {}),
        arguments={
            "dataset_name": "uoft-cs/cifar10",
            "resolution": 32,
            "train_batch_size": 128,
            "max_train_steps": 800_000,
            "learning_rate": 2e-4,
            "lr_warmup_steps": 5000,
            "ema_decay": 0.9999,
            "random_flip": True,
        },
    ),
}
