"""Five published methods for diffusion models as parts that plug into Hugging Face diffusers.

Importing this package makes its classes known to `DiffusionPipeline.from_pretrained`: import it before loading a
pipeline that was saved with one of them.
"""

from typing import Any

import diffusers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.pipelines import pipeline_loading_utils

from .bridges import Bridge, FlowBridge, GaussianBridge, MixtureBridge
from .calibration import Calibration, calibrate_denoiser
from .checkpoints import convert_checkpoint
from .conversion import calibrate_pipeline, short_time_pipeline
from .diffusion_time import DiffusionTimeReport, diffusion_time_report
from .discriminator import NoiseLevelDiscriminator
from .extractors import Extractor, make_extractor
from .hypercube import heat_kernel_log_prob, heat_kernel_score, reflect
from .interop import NoiseSchedule, denoiser_from, noise_schedule, score_model_from
from .likelihood import Elbo, bits_per_dim, boundary_flux, dequantize, elbo, log_likelihood
from .losses import (
    DiscriminatorLoss,
    ambient_loss,
    consistency_loss,
    denoised_copies,
    discriminator_loss,
    observation_loss,
    score_matching_loss,
)
from .mean_error import estimate_calibration
from .networks import NetworkConvention
from .noise_levels import (
    karras_sigmas,
    log_linear_sigmas,
    log_normal_sigmas,
    look_ahead_sigma,
    lower_sigma,
    min_snr_weight,
)
from .pipelines import (
    SHORT_TIME_TEXT_PIPELINES,
    ClassConditionalPipeline,
    ReflectedPipeline,
    ShortTimePipeline,
    short_time_text,
)
from .process import GaussianProcess, Process, ReflectedProcess
from .schedulers import FAMILIES, ReflectedScheduler
from .score import Denoiser, ReflectedModel, ScoreModel
from .score_unet import ScoreUNet2DModel
from .solvers import euler, euler_maruyama, heun, langevin, posterior, sample

__version__ = "0.1.0"

__all__ = [
    "Bridge",
    "Calibration",
    "ClassConditionalPipeline",
    "Denoiser",
    "DiffusionTimeReport",
    "DiscriminatorLoss",
    "Elbo",
    "Extractor",
    "FlowBridge",
    "GaussianBridge",
    "GaussianProcess",
    "MixtureBridge",
    "NetworkConvention",
    "NoiseLevelDiscriminator",
    "NoiseSchedule",
    "Process",
    "ReflectedModel",
    "ReflectedPipeline",
    "ReflectedProcess",
    "ReflectedScheduler",
    "ScoreModel",
    "ScoreUNet2DModel",
    "ShortTimePipeline",
    "ambient_loss",
    "bits_per_dim",
    "boundary_flux",
    "calibrate_denoiser",
    "calibrate_pipeline",
    "consistency_loss",
    "convert_checkpoint",
    "denoised_copies",
    "denoiser_from",
    "dequantize",
    "diffusion_time_report",
    "discriminator_loss",
    "elbo",
    "estimate_calibration",
    "euler",
    "euler_maruyama",
    "heat_kernel_log_prob",
    "heat_kernel_score",
    "heun",
    "karras_sigmas",
    "langevin",
    "log_likelihood",
    "log_linear_sigmas",
    "log_normal_sigmas",
    "look_ahead_sigma",
    "lower_sigma",
    "make_extractor",
    "min_snr_weight",
    "noise_schedule",
    "observation_loss",
    "posterior",
    "reflect",
    "sample",
    "score_matching_loss",
    "score_model_from",
    "short_time_pipeline",
]
__all__ += FAMILIES
__all__.sort()

globals().update(FAMILIES)


def __getattr__(name: str) -> Any:
    """Return a short-time text-to-image pipeline, which is made when it is first asked for.

    It also tells type checkers that there are more names than they see: the schedulers of the families.
    """
    if name in SHORT_TIME_TEXT_PIPELINES:
        return getattr(short_time_text, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register() -> None:
    """Let diffusers save our classes as ["diffusers_ext", name] and find them again by that name.

    diffusers looks components up in `LOADABLE_CLASSES[package]`, whose base classes must be attributes of the package,
    and a pipeline's own class in its own namespace: there `__getattr__` is asked for the names that it does not have.
    """
    bases = (ModelMixin, SchedulerMixin, DiffusionPipeline)
    methods = ["save_pretrained", "from_pretrained"]
    for table in (
        pipeline_loading_utils.LOADABLE_CLASSES.setdefault(__name__, {}),
        pipeline_loading_utils.ALL_IMPORTABLE_CLASSES,
    ):
        for base in bases:
            table.setdefault(base.__name__, methods)
    for name in __all__:
        value = globals()[name]
        if isinstance(value, type) and issubclass(value, bases) and not hasattr(diffusers, name):
            setattr(diffusers, name, value)
    diffusers.__getattr__ = __getattr__


_register()
