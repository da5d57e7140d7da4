"""Truth: what a range says in words, and that public functions take no number outside of one: NaN hangs or misleads."""

from math import inf, nan

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from diffusers_ext import (
    Calibration,
    ClassConditionalPipeline,
    FlowBridge,
    MixtureBridge,
    NoiseLevelDiscriminator,
    ReflectedScheduler,
    ShortTimeDDIMScheduler,
    bits_per_dim,
    calibrate_pipeline,
    consistency_loss,
    denoiser_from,
    dequantize,
    diffusion_time_report,
    discriminator_loss,
    elbo,
    estimate_calibration,
    heat_kernel_score,
    karras_sigmas,
    langevin,
    log_likelihood,
    log_linear_sigmas,
    log_normal_sigmas,
    look_ahead_sigma,
    lower_sigma,
    min_snr_weight,
    sample,
    short_time_pipeline,
)
from diffusers_ext.evaluation import LikelihoodSettings
from diffusers_ext.metrics import (
    copies,
    frechet_distance,
    jackknife,
    kernel_distance,
    nearest,
    precision_recall,
    student_interval,
)
from diffusers_ext.ranges import Range, require

SCHEDULER, X, SIGMA = DDIMScheduler(), torch.zeros(4, 1, 2, 2), torch.ones(4)
MODEL = denoiser_from(lambda x, t: 0 * x, SCHEDULER)
CALIBRATION = Calibration([1, 2, 2], [0.1, 1.0], scheduler={"_class_name": "DDIMScheduler"})


def test_a_range_holds_its_bounds_and_no_infinity_that_is_none() -> None:
    for value, allowed in (
        (1, Range(above=0)),
        (0, Range(at_least=0)),
        (1.0, Range(at_most=1)),
        (0.99, Range(at_least=0, below=1)),
        (inf, Range(above=0, at_most=inf)),
        (10**400, Range(at_least=1)),
        (-5, Range()),
    ):
        assert value in allowed
    for value, allowed in (
        (0, Range(above=0)),
        (1, Range(below=1)),
        (2, Range(at_least=0, at_most=1)),
        (inf, Range(above=0)),
        (-inf, Range(below=0)),
        (inf, Range()),
        *((nan, one) for one in (Range(), Range(above=0), Range(at_most=inf), Range(at_least=-inf, at_most=inf))),
    ):
        assert value not in allowed


def test_a_refusal_says_which_numbers_there_are() -> None:
    with pytest.raises(ValueError, match=r"^rate must be above 0 and at most 1, got 2$"):
        require("rate", 2, above=0, at_most=1)
    with pytest.raises(ValueError, match=r"^rate must be above 0 and finite, got inf$"):
        require("rate", inf, above=0)
    with pytest.raises(ValueError, match=r"^rate must be finite, got nan$"):
        require("rate", nan)
    require("rate", None, above=0)
    assert str(Range(at_least=2**-15, at_most=2**63 - 1)) == f"at least 3.05176e-05 and at most {2**63 - 1}"


def report(**options):
    return diffusion_time_report(
        lambda x, t: 0 * x, SCHEDULER, [(torch.zeros(4, 1, 2, 2), {})], progress=False, **options
    )


def pipeline(null_class=2):
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4,),
        norm_num_groups=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        num_class_embeds=3,
    )
    return ClassConditionalPipeline(unet, SCHEDULER, null_class=null_class)


def never():
    pytest.fail("the work has begun")
    yield


def fitted(kind, **options):
    return kind.fit([never], SCHEDULER, options.pop("T", 0.5), progress=False, **options)


# One line for each number of a public function: the number's name and wrong values of it, and the call.
NUMBERS = {
    "log_likelihood": (
        ("rtol", "atol", "max_steps"),
        (nan, 0, -1),
        lambda **o: log_likelihood(MODEL, X, 0.1, 1.0, **o),
    ),
    "its probes": (
        ("probes",),
        (nan, 0),
        lambda **o: log_likelihood(MODEL, X, 0.1, 1.0, divergence="hutchinson", **o),
    ),
    "its levels": (
        ("sigma_min", "sigma_max"),
        (nan, 0.0, inf),
        lambda **o: log_likelihood(MODEL, X, **{"sigma_min": 0.1, "sigma_max": 1.0} | o),
    ),
    "elbo": (("n",), (nan, 0), lambda **o: elbo(MODEL, X, 0.1, 1.0, **o)),
    "dequantize": (("levels", "low", "high"), (nan, inf), lambda **o: dequantize(X, **o)),
    "dequantize to one level": (("levels",), (1, 0, -2), lambda **o: dequantize(X, **o)),
    "bits_per_dim": (("levels", "low", "high"), (nan, inf), lambda **o: bits_per_dim(SIGMA, 4, **o)),
    "bits of an empty range": (("high",), (-1.0, -2.0), lambda **o: bits_per_dim(SIGMA, 4, **o)),
    "karras_sigmas": (
        ("n", "rho"),
        (nan, 0),
        lambda **o: karras_sigmas(**{"n": 3, "sigma_min": 0.1, "sigma_max": 1.0} | o),
    ),
    "their bounds": (
        ("sigma_min", "sigma_max"),
        (nan, 0, -1, inf),
        lambda **o: karras_sigmas(3, **{"sigma_min": 0.1, "sigma_max": 1.0} | o),
    ),
    "log_linear_sigmas": (
        ("n", "sigma_min", "sigma_max"),
        (nan, 0, -1),
        lambda **o: log_linear_sigmas(**{"n": 3, "sigma_min": 0.1, "sigma_max": 1.0} | o),
    ),
    "log_normal_sigmas": (("mean", "std"), (nan, inf), lambda **o: log_normal_sigmas(2, **o)),
    "lower_sigma": (("width", "floor"), (nan, -0.1, inf), lambda **o: lower_sigma(SIGMA, **o)),
    "a relative width": (("width",), (1.0,), lambda **o: lower_sigma(SIGMA, relative=True, **o)),
    "look_ahead_sigma": (
        ("k", "sigma_min", "sigma_max", "rho"),
        (nan, -1, inf),
        lambda **o: look_ahead_sigma(SIGMA, **{"k": 0.1, "sigma_min": 0.1, "sigma_max": 1.0} | o),
    ),
    "min_snr_weight": (("gamma",), (nan, 0, -5), lambda **o: min_snr_weight(SIGMA, **o)),
    "consistency_loss": (("steps",), (nan, 0), lambda **o: consistency_loss(MODEL, X, SIGMA, SIGMA / 2, **o)),
    "discriminator_loss": (
        ("r1_weight", "sigma_data"),
        (nan, -1),
        lambda **o: discriminator_loss(MODEL, None, X, X, SIGMA, SIGMA / 2, **{"sigma_data": 0.5} | o),
    ),
    "langevin": (("steps", "step_size", "sigma"), (nan, 0), lambda **o: langevin(MODEL, X, **{"sigma": 1.0} | o)),
    "sample": (("sigmas",), ([1.0, nan], [1.0, 2.0], [inf, 1.0], [1.0, -1.0]), lambda **o: sample(MODEL, X, **o)),
    "heat_kernel_score": (("sigma",), (nan, 0), lambda **o: heat_kernel_score(X, X, **o)),
    "estimate_calibration": (
        ("num_levels", "significance", "tolerance", "max_samples", "save_every", "num_classes"),
        (nan, 0, -1),
        lambda **o: estimate_calibration(None, SCHEDULER, never(), **o),
    ),
    "calibrate_pipeline": (
        ("guidance_scale",),
        (nan, inf),
        lambda **o: calibrate_pipeline(pipeline(), CALIBRATION, route="scheduler", **o),
    ),
    "Calibration": (("sigmas",), ([0.1, nan], [nan, 1.0], [0.1, inf]), lambda **o: Calibration([1, 2, 2], **o)),
    "short_time_pipeline": (
        ("max_diffusion_time",),
        (nan, 0, -1, 1.1),
        lambda **o: short_time_pipeline(pipeline(), **o),
    ),
    "ShortTimeDDIMScheduler": (("max_diffusion_time",), (nan, 0, 1.1), ShortTimeDDIMScheduler),
    "ReflectedScheduler": (
        ("sigma_min", "sigma_max", "low", "high", "num_train_timesteps"),
        (nan, inf),
        ReflectedScheduler,
    ),
    "diffusion_time_report": (("n", "sigma_min", "levels"), (nan, 0), report),
    "its times": (("times",), ([nan], [0.5, nan], [0.0], [1.5], []), report),
    "ClassConditionalPipeline": (
        ("num_inference_steps", "guidance_scale", "eta", "batch_size"),
        (nan,),
        lambda **o: pipeline()(class_labels=[0], **o),
    ),
    "NoiseLevelDiscriminator": (
        ("sigma_data", "fourier_scale", "in_channels", "num_frequencies", "group_size", "num_class_embeds"),
        (nan, 0),
        NoiseLevelDiscriminator,
    ),
    "MixtureBridge": (
        ("num_components", "noise_draws", "concentration", "max_iter", "T"),
        (nan, 0),
        lambda **o: fitted(MixtureBridge, **o),
    ),
    "FlowBridge": (
        ("transforms", "bins", "passes", "max_steps", "batch_size", "learning_rate", "held_out", "patience", "T"),
        (nan, 0),
        lambda **o: fitted(FlowBridge, **o),
    ),
    "jackknife": (
        ("groups", "level"),
        (nan, 0, 1),
        lambda **o: jackknife(frechet_distance, torch.rand(20, 2), torch.rand(20, 2), **o),
    ),
    "student_interval": (("level",), (nan, 0, 1), lambda **o: student_interval(SIGMA, **o)),
    "precision_recall": (("k",), (nan, 0), lambda **o: precision_recall(torch.rand(9, 2), torch.rand(9, 2), **o)),
    "copies": (("level",), (nan, 0, 1), lambda **o: copies(torch.rand(9, 2), torch.rand(9, 2), torch.rand(9, 2), **o)),
    "LikelihoodSettings": (("images", "evaluations", "ode_images"), (nan, -1), LikelihoodSettings),
}


@pytest.mark.parametrize(
    ("call", "name", "value"),
    [
        pytest.param(call, name, value, id=f"{title}-{name}={value}")
        for title, (names, values, call) in NUMBERS.items()
        for name in names
        for value in values
    ],
)
def test_no_function_takes_a_number_out_of_its_range(call, name, value) -> None:
    with pytest.raises(ValueError, match=r"must|is needed|is empty|at least 2"):
        call(**{name: value})


def test_numbers_in_their_ranges_are_taken() -> None:
    assert min_snr_weight(SIGMA, inf).tolist() == [1.0] * 4
    assert lower_sigma(SIGMA, 0.0).tolist() == [1.0] * 4
    assert karras_sigmas(1, 0.5, 0.5).tolist() == [pytest.approx(0.5)]
    assert sample(MODEL, X, [1.0, 0.0]).shape == X.shape


def test_a_sample_without_a_finite_output_has_no_likelihood_and_the_others_have_theirs() -> None:
    x, broken = torch.ones(4, 1, 2, 2), torch.tensor([1.0, nan, 1.0, inf])[:, None, None, None]
    whole = log_likelihood(denoiser_from(lambda x, t: 0.3 * x, SCHEDULER), x, 0.1, 1.0)
    found = log_likelihood(denoiser_from(lambda x, t: 0.3 * x * broken, SCHEDULER), x, 0.1, 1.0)
    assert found.isnan().tolist() == [False, True, False, True]
    torch.testing.assert_close(found[::2], whole[::2])


@pytest.mark.parametrize("value", [nan, inf])
def test_metrics_refuse_features_that_are_not_finite(value) -> None:
    whole, broken = torch.rand(200, 2), torch.rand(200, 2)
    broken[7, 1] = value
    for metric in (frechet_distance, kernel_distance, precision_recall, nearest):
        for pair in ((whole, broken), (broken, whole)):
            with pytest.raises(ValueError, match="not finite"):
                metric(*pair)
    with pytest.raises(ValueError, match="not finite"):
        copies(whole, whole, broken)
