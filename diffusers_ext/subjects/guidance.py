"""The scale of classifier-free guidance, read from a pipeline of diffusers while it samples.

Such a pipeline combines u + s (c - u), where its property `do_classifier_free_guidance` is true, and else it takes the
conditional output c alone: at `guidance_scale` <= 1, or where a callback has switched guidance off. The scale s is its
property `guidance_scale`: some read it at each step, so that a callback can change it, others keep that of the call.
The lists hold the classes of which the tests have read this in diffusers' source; the scale of all others must be told.
(Not in them: guidance from c on, c + s (c - u); three branches; perturbed attention; a scale for each frame; and the
embedded scale of distilled models such as Flux, which is no classifier-free guidance.)
"""

from __future__ import annotations

import inspect
import sys
import weakref

from diffusers import DiffusionPipeline

from ..ranges import require
from ..stock import class_names

AT_EACH_STEP = class_names(
    "Pipeline",
    """
    AltDiffusionImg2Img AltDiffusion AnimateDiffSDXL BriaFibo2 Bria CogView3Plus CogView4Control CogView4 GlmImage
    HiDreamImage JoyImageEdit JoyImageEditPlus Kandinsky6TI2VA KandinskyV22Img2Img KandinskyV22Inpaint
    KandinskyV22 KandinskyV22Prior KolorsImg2Img Kolors LTXCondition LTXImageToVideo LTX LongCatImageEdit
    LongCatImage Mochi SanaWM StableAudio3 StableDiffusion3ControlNetInpainting StableDiffusion3ControlNet
    StableDiffusion3Img2Img StableDiffusion3Inpaint StableDiffusion3 StableDiffusionControlNet
    StableDiffusionDepth2Img StableDiffusionImg2Img StableDiffusionInpaint StableDiffusion
    StableDiffusionXLImg2Img StableDiffusionXLInpaint StableDiffusionXL
    ClassConditional ShortTime
""",
)
AT_THE_CALL = class_names(
    "Pipeline",
    """
    AnimateDiffControlNet AnimateDiff AnimateDiffSparseControlNet AnimateDiffVideoToVideoControlNet
    AnimateDiffVideoToVideo AnyFlowFAR AnyFlow ChromaImg2Img ChromaInpaint Chroma ChronoEdit EasyAnimateControl
    EasyAnimateInpaint EasyAnimate ErnieImage Flux2KleinInpaint Flux2Klein Helios HunyuanDiTControlNet HunyuanDiT
    I2VGenXL Latte Lumina2 Lumina PIA PRX PRXPixel SanaControlNet SanaImageToVideo Sana SanaVideo
    SkyReelsV2DiffusionForcingImageToVideo SkyReelsV2DiffusionForcing SkyReelsV2DiffusionForcingVideoToVideo
    SkyReelsV2ImageToVideo SkyReelsV2 StableDiffusionAdapter StableDiffusionControlNetImg2Img
    StableDiffusionControlNetInpaint StableDiffusionControlNetXS StableDiffusionLDM3D StableDiffusionXLAdapter
    StableDiffusionXLControlNetImg2Img StableDiffusionXLControlNetInpaint StableDiffusionXLControlNet
    StableDiffusionXLControlNetUnionImg2Img StableDiffusionXLControlNetUnionInpaint
    StableDiffusionXLControlNetUnion StableDiffusionXLControlNetXS WanAnimate WanVideoToVideo
""",
)


_NOT_IN_ONE_BATCH = class_names(
    "Pipeline",
    """
    BriaFibo2 Chroma ChromaImg2Img ChromaInpaint ChronoEdit CogView4 CogView4Control Flux2Klein Flux2KleinInpaint
    GlmImage Helios JoyImageEdit Kandinsky6TI2VA KandinskyV22Prior LongCatImage LongCatImageEdit Lumina Lumina2
    SkyReelsV2 SkyReelsV2DiffusionForcing SkyReelsV2DiffusionForcingImageToVideo
    SkyReelsV2DiffusionForcingVideoToVideo SkyReelsV2ImageToVideo StableDiffusion3 WanAnimate WanVideoToVideo
    ClassConditional ShortTime
""",
)
UNCONDITIONAL_FIRST = (AT_EACH_STEP | AT_THE_CALL) - _NOT_IN_ONE_BATCH
"""With guidance these call the network once a step, with the unconditional rows in the first half of the batch."""


def exposes_guidance(pipeline: DiffusionPipeline) -> bool:
    """Return whether the scale of a pipeline's guidance can be read from it."""
    return _kind(pipeline) is not None


def default_scale(pipeline: DiffusionPipeline) -> float:
    """Return the scale of classifier-free guidance of a call that names none; 1 is none.

    Where there is a `true_cfg_scale`, `guidance_scale` is what a distilled network is told.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    names = (name for name in ("true_cfg_scale", "guidance_scale") if name in parameters)
    scale = parameters[name].default if (name := next(names, None)) is not None else 1.0
    return float(scale) if isinstance(scale, int | float) and scale > 1 else 1.0


def puts_unconditional_first(pipeline: DiffusionPipeline) -> bool:
    """Return whether the layout of a guided batch is known, see `UNCONDITIONAL_FIRST`."""
    return _kind(pipeline) in UNCONDITIONAL_FIRST


def _kind(pipeline: DiffusionPipeline) -> str | None:
    """Return the name of the nearest class of the pipeline that is in a list."""
    names = (kind.__name__ for kind in type(pipeline).__mro__)
    return next((name for name in names if name in AT_EACH_STEP | AT_THE_CALL), None)


class ReadGuidance:
    """The scale with which a pipeline guides at the present step; 1 while it does not.

    It holds the pipeline weakly: a scheduler that asks it keeps no pipeline alive.

    Args:
        pipeline: one that `exposes_guidance`.
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self._pipeline, self._of_the_call = weakref.ref(pipeline), 1.0
        self._at_each_step = _kind(pipeline) in AT_EACH_STEP

    @property
    def by_default(self) -> float:
        """The scale of a call that names none."""
        pipeline = self._pipeline()
        assert pipeline is not None
        return default_scale(pipeline)

    def is_on(self) -> bool:
        """Return whether the pipeline guides at the present step; `True` if that is not known."""
        pipeline = self._pipeline()
        called = getattr(pipeline, "_guidance_scale", None) is not None
        return not called or bool(pipeline.do_classifier_free_guidance)  # type: ignore[union-attr]

    def __call__(self, begins: bool = False) -> float | None:
        """Return the scale of the present step; `None` if the pipeline is gone.

        Args:
            begins: a call of the pipeline begins.

        Raises:
            ValueError: another pipeline calls, or the scale is no finite number.
        """
        pipeline = self._pipeline()
        if pipeline is None:
            return None
        if begins and (caller := _calling()) is not None and caller is not pipeline:
            raise ValueError(
                f"this scheduler reads the guidance of a {type(pipeline).__name__}, and a {type(caller).__name__} "
                f"calls it: give that pipeline its own by calibrate_pipeline(pipeline, calibration)"
            )
        if getattr(pipeline, "_guidance_scale", None) is None:  # it has not been called yet
            return None
        if not pipeline.do_classifier_free_guidance:
            return 1.0
        if begins or self._at_each_step:
            scale = pipeline.guidance_scale
            if not isinstance(scale, int | float):
                kind = type(scale).__name__
                raise ValueError(f"with a calibrated scheduler guidance_scale must be a number, got a {kind}")
            require("guidance_scale", scale)
            self._of_the_call = float(scale)
        return self._of_the_call


def _calling() -> DiffusionPipeline | None:
    """Return the pipeline whose call this is a part of, if there is one."""
    frame = sys._getframe(1)
    while frame is not None:
        own = frame.f_locals.get("self")
        if isinstance(own, DiffusionPipeline) and frame.f_code.co_name == "__call__":
            return own
        frame = frame.f_back  # type: ignore[assignment]
    return None
