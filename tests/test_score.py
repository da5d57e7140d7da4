"""`score`. Truth: exact laws (oracles), autograd of their densities, the EDM scheduler's own preconditioning, and the
definitions of what a network is trained to output."""

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from oracles import along, host_units, image_mixture, plain_denoiser, raw_target

from diffusers_ext import Denoiser, GaussianProcess, score_matching_loss
from diffusers_ext.score import preconditioning

SIGMA = torch.tensor([0.02, 0.5, 1.0, 3.0, 60.0], dtype=torch.float64)
LAW = image_mixture(2, 3)
HOSTS = [
    DDIMScheduler(prediction_type="epsilon"),
    DDIMScheduler(prediction_type="sample"),
    DDIMScheduler(prediction_type="v_prediction"),
    FlowMatchEulerDiscreteScheduler(),
    EDMEulerScheduler(prediction_type="epsilon", sigma_data=0.7),
    EDMEulerScheduler(prediction_type="v_prediction", sigma_data=0.7),
]


def kind(scheduler) -> str:
    return f"{type(scheduler).__name__[:3]}-{scheduler.config.get('prediction_type', 'flow_prediction')}"


def row(scheduler):
    return preconditioning(
        scheduler.config.get("prediction_type", "flow_prediction"), scheduler.config.get("sigma_data")
    )


def draw(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return LAW.sample(5, g), torch.randn(5, 2, 3, dtype=torch.float64, generator=g)


def times(scheduler) -> torch.Tensor:
    if isinstance(scheduler, EDMEulerScheduler):
        return torch.tensor([0.002, 0.1, 1.0, 7.0, 80.0], dtype=torch.float64).log() / 4
    return torch.tensor([1.0, 200.0, 500.0, 777.0, 999.0], dtype=torch.float64)


@pytest.mark.parametrize("scheduler", HOSTS, ids=kind)
def test_a_row_of_the_table_recovers_the_data_from_the_perfect_output_for_them(scheduler) -> None:
    x0, noise = draw()
    time = times(scheduler)
    a, b = host_units(scheduler, time)
    sigma = b / a
    x = x0 + along(sigma, x0) * noise
    _, c_skip, c_out = row(scheduler)(sigma)
    recovered = along(c_skip, x) * x + along(c_out, x) * raw_target(scheduler, x0, noise, time)
    torch.testing.assert_close(recovered, x0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scheduler", HOSTS, ids=kind)
def test_c_in_turns_x_into_the_input_that_the_host_gives_its_network(scheduler) -> None:
    x0, noise = draw()
    a, b = host_units(scheduler, times(scheduler))
    host_input = along(a, x0) * x0 + along(b, x0) * noise
    if isinstance(scheduler, EDMEulerScheduler):
        host_input = scheduler.precondition_inputs(host_input, along(b, x0))
    x = x0 + along(b / a, x0) * noise
    torch.testing.assert_close(along(row(scheduler)(b / a).c_in, x) * x, host_input, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scheduler", HOSTS, ids=kind)
def test_output_weight_makes_the_loss_the_mean_square_error_of_the_raw_output(scheduler) -> None:
    x0, noise = draw()
    time = times(scheduler)
    a, b = host_units(scheduler, time)
    sigma = b / a
    x = x0 + along(sigma, x0) * noise

    def network(h, t):
        return torch.sin(2 * h) + 0.3

    denoiser = Denoiser(network, row(scheduler), lambda s: s)
    loss = score_matching_loss(denoiser, x, x0, sigma, weight=denoiser.output_weight(sigma))
    host_input = x * along(row(scheduler)(sigma).c_in, x)
    error = network(host_input, None) - raw_target(scheduler, x0, noise, time)
    torch.testing.assert_close(loss, error.square().mean((1, 2)), rtol=1e-6, atol=1e-9)


def test_score_and_eps_of_the_exact_denoiser_are_those_of_the_law() -> None:
    denoiser = plain_denoiser(LAW.denoiser)
    x = LAW.sample(5, torch.Generator().manual_seed(1)).requires_grad_()
    (score,) = torch.autograd.grad(LAW.log_prob(x, SIGMA).sum(), x)
    x = x.detach()
    torch.testing.assert_close(denoiser.score(x, SIGMA), score, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(denoiser.eps(x, SIGMA), -along(SIGMA, x) * score, rtol=1e-9, atol=1e-9)


def test_score_error_is_sigma_times_the_distance_of_the_two_scores() -> None:
    denoiser = plain_denoiser(LAW.denoiser)
    x0, noise = draw()
    x = x0 + along(SIGMA, x0) * noise
    expected = along(SIGMA, x) * (denoiser.score(x, SIGMA) - GaussianProcess().target_score(x, x0, SIGMA))
    torch.testing.assert_close(denoiser.score_error(denoiser(x, SIGMA), x, x0, SIGMA), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sigma", [0.7, torch.tensor(0.7), torch.full((3,), 0.7)], ids=["number", "()", "(B,)"])
def test_denoiser_means_the_same_whatever_the_form_of_sigma(sigma) -> None:
    denoiser = plain_denoiser(LAW.denoiser)
    x = LAW.sample(3, torch.Generator().manual_seed(2))
    for value in (denoiser(x, sigma), x + 0.7**2 * denoiser.score(x, sigma), x - 0.7 * denoiser.eps(x, sigma)):
        torch.testing.assert_close(value, LAW.denoiser(x, 0.7), rtol=1e-6, atol=1e-6)


def test_conditions_reach_the_network_through_every_view() -> None:
    def network(x, sigma, *, shift):
        return LAW.denoiser(x, sigma) + shift

    denoiser, x = plain_denoiser(network), LAW.sample(5, torch.Generator().manual_seed(3))
    s = along(SIGMA, x)
    one = torch.ones_like(x)
    torch.testing.assert_close(denoiser(x, SIGMA, shift=1.0) - denoiser(x, SIGMA, shift=0.0), one)
    torch.testing.assert_close(denoiser.eps(x, SIGMA, shift=1.0) - denoiser.eps(x, SIGMA, shift=0.0), -one / s)
    torch.testing.assert_close(denoiser.score(x, SIGMA, shift=1.0) - denoiser.score(x, SIGMA, shift=0.0), one / s**2)


@pytest.mark.parametrize(
    ("prediction_type", "sigma_data"), [("noise", None), ("sample", 0.5), ("flow_prediction", 0.5)]
)
def test_an_unknown_row_is_refused_by_name(prediction_type: str, sigma_data: float | None) -> None:
    with pytest.raises(ValueError, match=f"'{prediction_type}' is not one of epsilon.*v_prediction"):
        preconditioning(prediction_type, sigma_data)
