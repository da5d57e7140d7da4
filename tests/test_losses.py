"""`losses`. Truth: exact laws, for which the martingale D(x, sigma) = E[D(x', sigma') | x] holds, and the closed form
of its defect for linear denoisers D = k(sigma) x; for observation, the exact denoiser's error in a step and linear
discriminators. Monte-Carlo means are compared within 5 standard errors."""

from collections.abc import Callable
from itertools import pairwise

import numpy
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler
from diffusers.models.embeddings import LabelEmbedding
from oracles import Gaussian, along, image_mixture, plain_denoiser, two_bumps
from torch import Tensor, nn

from diffusers_ext import (
    Denoiser,
    NoiseLevelDiscriminator,
    ambient_loss,
    consistency_loss,
    denoiser_from,
    discriminator_loss,
    look_ahead_sigma,
    losses,
    noise_schedule,
    observation_loss,
    score_matching_loss,
)
from diffusers_ext.shapes import align
from diffusers_ext.solvers import posterior

V = 0.25
N = 200_000
PAIRS = [(0.5, 0.05), (0.5, 0.2), (1.0, 0.5), (2.0, 0.2)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gain(sigma: Tensor | float, shrink: float = 1.0) -> Tensor | float:
    """E[x0 | x]/x for N(0, V), times a fault."""
    return shrink * V / (V + sigma**2)


def linear(shrink: float = 1.0) -> Denoiser:
    return plain_denoiser(lambda x, sigma: along(gain(sigma, shrink), x) * x)


def noisy(sigma: Tensor | float, n: int = N) -> Tensor:
    return (V + torch.as_tensor(sigma) ** 2) ** 0.5 * torch.randn(n, dtype=torch.float64, generator=seeded(1))


def full(value: float, n: int = N) -> Tensor:
    return torch.full((n,), value, dtype=torch.float64)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def defect(sigma: float, sigma_next: float, steps: int, shrink: float, rollout: str) -> float:
    """E[(E[D(x', sigma') | x] - D(x, sigma))^2] of a linear denoiser: each step multiplies the mean of x."""
    grid = EDMEulerScheduler(sigma_min=sigma_next, sigma_max=sigma)
    grid.set_timesteps(steps + 1)
    levels, mean = grid.sigmas[:-1].double(), 1.0
    for s, s_next in pairwise(levels):
        k = gain(s, shrink)
        if rollout == "posterior":  # E[x_next | x, x0 = k x], regression of a point of the bridge on its ends
            mean = mean * ((s_next / s) ** 2 + (1 - (s_next / s) ** 2) * k)
        else:  # reverse SDE: drift 2 sigma score = 2 (D - x)/sigma
            mean = mean * (1 + 2 * (s - s_next) * (k - 1) / s)
    return float((gain(sigma_next, shrink) * mean - gain(sigma, shrink)) ** 2 * (V + sigma**2))


# the consistency loss has the value that it should


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_the_exact_denoiser_has_no_loss(pair: tuple[float, float], steps: int) -> None:
    sigma, sigma_next = pair
    loss = consistency_loss(linear(), noisy(sigma), full(sigma), full(sigma_next), steps=steps, generator=seeded())
    mean, error = mean_and_error(loss)
    assert abs(mean) < 5 * error
    assert error < 0.05 * (gain(sigma) * sigma) ** 2  # small beside the noise of a prediction: the test has power


def test_the_exact_denoiser_has_no_loss_with_a_noise_level_for_each_sample() -> None:
    sigma = torch.linspace(0.1, 3.0, N, dtype=torch.float64)
    sigma_next = sigma * torch.linspace(0.95, 0.2, N, dtype=torch.float64)
    mean, error = mean_and_error(consistency_loss(linear(), noisy(sigma), sigma, sigma_next, generator=seeded()))
    assert abs(mean) < 5 * error


def test_the_exact_denoiser_of_a_mixture_has_no_loss_after_many_small_steps() -> None:
    law, n = two_bumps(), 100_000
    x = law.sample(n, seeded(1)) + 0.4 * torch.randn(n, dtype=torch.float64, generator=seeded(2))
    denoiser = plain_denoiser(law.denoiser)
    loss = consistency_loss(denoiser, x, full(0.4, n), full(0.3, n), steps=8, generator=seeded())
    mean, error = mean_and_error(loss)
    assert abs(mean) < 5 * error


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("pair", [(0.5, 0.05), (0.5, 0.1)], ids=str)
def test_a_denoiser_shrunk_by_a_tenth_is_found_out(pair: tuple[float, float], steps: int) -> None:
    sigma, sigma_next = pair
    loss = consistency_loss(linear(0.9), noisy(sigma), full(sigma), full(sigma_next), steps=steps, generator=seeded())
    mean, error = mean_and_error(loss)
    assert mean > 10 * error


@pytest.mark.parametrize("rollout", ["posterior", "euler_maruyama"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("shrink", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_the_expected_loss_of_a_linear_denoiser(
    pair: tuple[float, float], shrink: float, steps: int, rollout: str
) -> None:
    sigma, sigma_next = pair
    options = {"steps": steps, "rollout": rollout, "generator": seeded()}
    loss = consistency_loss(linear(shrink), noisy(sigma), full(sigma), full(sigma_next), **options)
    mean, error = mean_and_error(loss)
    assert abs(mean - defect(sigma, sigma_next, steps, shrink, rollout)) < 5 * error


def test_the_default_rollout_is_one_posterior_step() -> None:
    args = linear(0.9), noisy(0.5, 1000), full(0.5, 1000), full(0.05, 1000)
    expected = consistency_loss(*args, steps=1, rollout="posterior", generator=seeded())
    assert torch.equal(consistency_loss(*args, generator=seeded()), expected)


def test_euler_maruyama_is_biased_in_one_step_and_less_in_five() -> None:
    sigma, sigma_next = 1.0, 0.5
    one, five = (
        mean_and_error(
            consistency_loss(
                linear(), noisy(sigma), full(sigma), full(sigma_next), steps=n, rollout="euler_maruyama", generator=g
            )
        )
        for n, g in ((1, seeded()), (5, seeded()))
    )
    # one step multiplies x by 1 - 2 (1/2) (4/5) = 1/5, so D' = x/2/5 and D = x/5: (x/10)^2, E x^2 = 5/4
    assert abs(one[0] - 0.0125) < 5 * one[1]
    assert one[0] > 10 * one[1]
    assert abs(five[0]) < 0.2 * one[0]


def test_common_noise_in_the_two_draws_would_be_found_out(monkeypatch) -> None:
    def common(*args, generator=None, **kwargs):
        return posterior(*args, generator=seeded(3), **kwargs)

    monkeypatch.setitem(losses.ROLLOUTS, "posterior", common)
    sigma, sigma_next = 1.0, 0.5
    mean, error = mean_and_error(consistency_loss(linear(), noisy(sigma), full(sigma), full(sigma_next)))
    variance = gain(sigma_next) ** 2 * sigma_next**2 * (1 - (sigma_next / sigma) ** 2)
    assert mean > 10 * error
    assert abs(mean - variance) < 5 * error


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("rollout", ["posterior", "euler_maruyama"])
@pytest.mark.parametrize("gap", [0.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_levels_that_nearly_or_wholly_coincide_have_no_loss(
    dtype: torch.dtype, gap: float, rollout: str, steps: int
) -> None:
    sigma = torch.linspace(0.002, 5, 500, dtype=dtype)
    args = linear(), noisy(sigma.double(), 500).to(dtype), sigma, sigma * (1 - gap)
    loss = consistency_loss(*args, steps=steps, rollout=rollout, generator=seeded())
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-3 * gap + 1e-4)


# its gradient


@pytest.mark.parametrize("reuse", [False, True], ids=["computed", "reused"])
@pytest.mark.parametrize("steps", [1, 3])
def test_gradient_of_the_expectation(steps: int, reuse: bool) -> None:
    """D = theta k x with frozen draws is linear in theta, so the loss is a square in it: gradient = 2 loss / theta, in
    expectation over the draws, whose halves of the gradient have the same law."""
    n = N // 2
    theta = torch.linspace(0.2, 0.5, n, dtype=torch.float64).requires_grad_()
    denoiser = plain_denoiser(lambda x, sigma: theta * gain(sigma) * x)
    x, sigma, sigma_next = noisy(1.0, n), full(1.0, n), full(0.4, n)
    denoised = denoiser(x, sigma) if reuse else None
    loss = consistency_loss(denoiser, x, sigma, sigma_next, denoised=denoised, steps=steps, generator=seeded())
    (gradient,) = torch.autograd.grad(loss.sum(), theta)
    mean, error = mean_and_error(gradient - 2 * loss.detach() / theta.detach())
    assert abs(mean) < 5 * error
    assert error < 0.03 * (2 * loss.detach() / theta.detach()).mean()  # the test has power


def test_gradient_is_the_one_assembled_by_hand_from_the_two_draws() -> None:
    theta = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    x, sigma, sigma_next = noisy(1.0, 500), full(1.0, 500), full(0.4, 500)
    denoiser = plain_denoiser(lambda x, sigma: torch.tanh(theta * x) / (1 + along(sigma, x)))
    loss = consistency_loss(denoiser, x, sigma, sigma_next, generator=seeded()).mean()
    g, d = seeded(), denoiser(x, sigma).detach()
    x_1, x_2 = (posterior(denoiser, x, sigma, sigma_next, denoised=d, generator=g) for _ in range(2))

    def evaluated(value: float, at: Tensor, level: float) -> Tensor:
        return torch.tanh(value * at) / (1 + level)

    def slope(at: Tensor, level: float) -> Tensor:
        h = 1e-5
        return (evaluated(0.8 + h, at, level) - evaluated(0.8 - h, at, level)) / (2 * h)

    r_1, r_2 = (evaluated(0.8, y, 0.4) - evaluated(0.8, x, 1.0) for y in (x_1, x_2))
    expected = (2 * r_1 * (slope(x_2, 0.4) - slope(x, 1.0))).mean()
    (gradient,) = torch.autograd.grad(loss, theta)
    assert loss.item() == pytest.approx((r_1 * r_2).mean().item(), rel=1e-12)
    assert gradient.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_gradient_has_at_most_twice_the_variance_of_that_of_the_product() -> None:
    """Between near levels, where the gradients of the two predictions nearly cancel; they would not with a symmetric
    coefficient of the shared one."""
    law, n, s, s_next = two_bumps(), 20_000, 0.4, 0.38
    theta = torch.ones(n, dtype=torch.float64, requires_grad=True)
    denoiser = plain_denoiser(lambda x, sigma: theta * law.denoiser(x, sigma))
    x = law.sample(n, seeded(1)) + s * torch.randn(n, dtype=torch.float64, generator=seeded(2))
    loss = consistency_loss(denoiser, x, full(s, n), full(s_next, n), generator=seeded())
    (ours,) = torch.autograd.grad(loss.sum(), theta)
    g, d = seeded(), law.denoiser(x, full(s, n))
    d_1, d_2 = (
        law.denoiser(posterior(denoiser, x, full(s, n), full(s_next, n), denoised=d, generator=g), full(s_next, n))
        for _ in range(2)
    )
    r_1, r_2 = d_1 - d, d_2 - d  # D is linear in theta = 1: its gradient is D
    product = r_1 * r_2 + r_2 * r_1
    symmetric = 2 * r_1 * d_2 - (r_1 + r_2) * d
    assert ours.var() < 2.1 * product.var()
    assert symmetric.var() > 4 * product.var()


def test_a_given_prediction_and_autocast_around_the_loss_leave_the_gradient_whole() -> None:
    """Autocast keeps the weights that it has cast: those of an evaluation without a graph must not be the first."""
    network = nn.Linear(4, 4, bias=False)
    denoiser = plain_denoiser(lambda x, sigma: network(x.float()).to(x))
    x, sigma = torch.randn(8, 4, generator=seeded()), torch.ones(8)
    gradients = []
    for enabled in (False, True):
        denoised = denoiser(x, sigma).detach()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = consistency_loss(denoiser, x, sigma, sigma / 2, denoised=denoised, generator=seeded())
        gradients.append(torch.autograd.grad(loss.sum(), network.weight)[0])
    assert gradients[0].norm() > 0
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


# evaluations and randomness


@pytest.mark.parametrize("rollout", ["posterior", "euler_maruyama"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_number_level_and_condition_of_the_evaluations(steps: int, rollout: str) -> None:
    seen, graphs = [], []

    def network(x: Tensor, sigma: Tensor, *, class_labels: Tensor) -> Tensor:
        seen.append((sigma[0].item(), class_labels))
        graphs.append(torch.is_grad_enabled())
        return gain(sigma) * x

    labels, denoiser = torch.arange(8), plain_denoiser(network)
    x, sigma, sigma_next = noisy(1.0, 8), full(1.0, 8), full(0.4, 8)
    options = {"steps": steps, "rollout": rollout, "class_labels": labels}
    fresh = consistency_loss(denoiser, x, sigma, sigma_next, generator=seeded(), **options)
    assert len(seen) == 1 + 2 + 2 * (steps - 1)
    assert graphs == [True, *[False] * 2 * (steps - 1), True, False]
    assert all(label is labels for _, label in seen)
    levels = [level for level, _ in seen]
    assert (levels[0], levels[-2:]) == (1.0, [0.4, 0.4])
    first, second = levels[1:steps], levels[steps : 2 * steps - 1]
    assert first == second == sorted(first, reverse=True)
    assert all(0.4 < level < 1.0 for level in first)

    denoised = denoiser(x, sigma, class_labels=labels)
    seen.clear()
    reused = consistency_loss(denoiser, x, sigma, sigma_next, denoised=denoised, generator=seeded(), **options)
    assert len(seen) == 2 + 2 * (steps - 1)
    assert torch.equal(reused, fresh)


@pytest.mark.parametrize("rollout", ["posterior", "euler_maruyama"])
def test_all_randomness_is_the_generators(rollout: str) -> None:
    args, state = (linear(), noisy(1.0, 64), full(1.0, 64), full(0.4, 64)), torch.get_rng_state()
    options = {"steps": 3, "rollout": rollout}
    first, again, other = (consistency_loss(*args, generator=seeded(s), **options) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(6,), (6, 20), (6, 2, 3, 4), (6, 2, 3, 2, 4)], ids=str)
def test_a_loss_is_the_mean_over_the_elements_of_its_own_sample(shape: tuple[int, ...]) -> None:
    sigma = torch.linspace(0.3, 2, 6, dtype=torch.float64)
    x0 = torch.randn(shape, dtype=torch.float64, generator=seeded(1))
    x = x0 + along(sigma, x0) * torch.randn(shape, dtype=torch.float64, generator=seeded(2))
    flat = consistency_loss(linear(), x.reshape(6, -1), sigma, sigma / 2, generator=seeded())
    torch.testing.assert_close(consistency_loss(linear(), x, sigma, sigma / 2, generator=seeded()), flat)
    matching = score_matching_loss(linear(), x, x0, sigma, weight=1.0)
    for i in range(6):  # every element a sample of its own
        one, data = x[i].reshape(-1), x0[i].reshape(-1)
        elements = score_matching_loss(linear(), one, data, sigma[i].expand(len(one)), weight=1.0)
        assert matching[i].item() == pytest.approx(elements.mean().item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout": "ddim"}, "'ddim' is not one of posterior, euler_maruyama"),
        ({"steps": 0}, "at least 1, got 0"),
    ],
)
def test_a_bad_rollout_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        consistency_loss(linear(), noisy(1.0, 4), full(1.0, 4), full(0.5, 4), **options)


# dropout


class Constant(nn.Module):
    """1 everywhere, in expectation over its dropout mask and without dropout alike."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.active, self.frozen, self.batch_norm = layer, nn.Dropout(0.5).eval(), nn.BatchNorm2d(4)
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.modes.append((self.training, self.batch_norm.training))
        return self.frozen(self.active(torch.ones_like(x)))


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.Dropout2d(0.5)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("reuse", [False, True], ids=["computed", "reused"])
def test_the_variance_of_a_dropout_mask_is_not_in_the_loss(layer: nn.Module, reuse: bool) -> None:
    network = Constant(layer.train())
    denoiser = plain_denoiser(network)
    x, sigma = torch.randn(16, 4, 5, 5, generator=seeded()), torch.full((16,), 1.0)
    denoised = denoiser(x, sigma)
    assert denoised.var() > 0.1  # dropout is on
    loss = consistency_loss(denoiser, x, sigma, sigma / 2, denoised=denoised if reuse else None, steps=2)
    assert torch.equal(loss, torch.zeros(16))
    assert (network.active.training, network.frozen.training) == (True, False)
    assert set(network.modes) == {(True, True)}  # nothing but dropout was switched


def test_label_dropout_of_diffusers_is_not_in_the_loss() -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = LabelEmbedding(5, 20, dropout_prob=0.5)

        def forward(self, x: Tensor, sigma: Tensor, *, class_labels: Tensor) -> Tensor:
            return self.embedding(class_labels)

    network, cond = Labelled().train(), {"class_labels": torch.arange(64) % 5}
    x, sigma, state = torch.zeros(64, 20), torch.ones(64), torch.get_rng_state()
    loss = consistency_loss(plain_denoiser(network), x, sigma, sigma / 2, generator=seeded(), **cond)
    assert torch.equal(loss, torch.zeros(64))
    assert torch.equal(torch.get_rng_state(), state)
    assert network.embedding.training


def test_dropout_comes_back_after_an_error() -> None:
    class Broken(Constant):
        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            raise RuntimeError("broken")

    network = Broken(nn.Dropout(0.5))
    with pytest.raises(RuntimeError, match="broken"):
        consistency_loss(plain_denoiser(network), torch.ones(2, 4), torch.ones(2), torch.full((2,), 0.5))
    assert network.active.training


@pytest.mark.parametrize("layer", [nn.Dropout(0.0), nn.Dropout(0.5).eval()], ids=["p = 0", "eval"])
def test_a_given_prediction_is_used_where_dropout_is_idle(layer: nn.Module) -> None:
    network = Constant(layer)
    x, sigma = torch.zeros(3, 4), torch.ones(3)
    loss = consistency_loss(plain_denoiser(network), x, sigma, sigma / 2, denoised=torch.full((3, 4), -1.0))
    assert torch.equal(loss, torch.full((3,), 4.0))  # (1 - -1)^2
    assert len(network.modes) == 2


# score matching


@pytest.mark.parametrize("fault", [lambda d, x: d, lambda d, x: x, lambda d, x: torch.ones_like(x)], ids="DX1")
def test_the_exact_denoiser_is_a_minimum_of_score_matching(fault: Callable[[Tensor, Tensor], Tensor]) -> None:
    """In the direction of any function of x, the gradient is zero and a step either way raises the loss."""
    law, n = two_bumps(), 100_000
    x0 = law.sample(n, seeded())
    sigma = torch.linspace(0.2, 2, n, dtype=torch.float64)
    x = x0 + sigma * torch.randn(n, dtype=torch.float64, generator=seeded(1))
    theta = torch.zeros(n, dtype=torch.float64, requires_grad=True)

    def loss(amount: Tensor | float) -> Tensor:
        moved = plain_denoiser(lambda x, s: law.denoiser(x, s) + amount * fault(law.denoiser(x, s), x))
        return score_matching_loss(moved, x, x0, sigma, weight=1.0)

    (gradient,) = torch.autograd.grad(loss(theta).sum(), theta)
    mean, error = mean_and_error(gradient)
    assert abs(mean) < 5 * error
    for amount in (-0.2, 0.2):
        mean, error = mean_and_error(loss(amount) - loss(0.0))
        assert mean > 5 * error


@pytest.mark.parametrize("sigma", [0.1, 1.0, 5.0])
def test_the_score_matching_loss_of_the_exact_denoiser_is_the_posterior_variance(sigma: float) -> None:
    law = Gaussian(0.3, V)
    x0 = law.sample(N, seeded())
    x = x0 + sigma * torch.randn(N, dtype=torch.float64, generator=seeded(1))
    mean, error = mean_and_error(score_matching_loss(plain_denoiser(law.denoiser), x, x0, full(sigma), weight=1.0))
    posterior_variance = 1 / (1 / V + 1 / sigma**2)  # precisions add
    assert abs(mean - posterior_variance / sigma**2) < 5 * error


def test_score_matching_weighs_each_sample_reuses_a_prediction_and_passes_conditions() -> None:
    law = image_mixture(2, 3)
    x0 = law.sample(4, seeded())
    sigma = torch.tensor([0.1, 0.5, 1.0, 4.0], dtype=torch.float64)
    x = x0 + along(sigma, x0) * torch.randn(4, 2, 3, dtype=torch.float64, generator=seeded(1))
    calls = []

    def network(x: Tensor, s: Tensor, *, shift: float) -> Tensor:
        calls.append(shift)
        return law.denoiser(x, s) + shift

    denoiser = plain_denoiser(network)
    plain = score_matching_loss(denoiser, x, x0, sigma, shift=0.5, weight=1.0)
    assert calls == [0.5]
    target = -(x - x0) / along(sigma, x) ** 2  # of log N(x; x0, sigma^2)
    expected = (along(sigma, x) * (denoiser.score(x, sigma, shift=0.5) - target)).square().mean((1, 2))
    torch.testing.assert_close(plain, expected, rtol=1e-6, atol=1e-9)
    weight = torch.tensor([1.0, 2.0, 0.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(score_matching_loss(denoiser, x, x0, sigma, weight=weight, shift=0.5), weight * plain)
    torch.testing.assert_close(score_matching_loss(denoiser, x, x0, sigma, weight=3.0, shift=0.5), 3 * plain)
    prediction = denoiser(x, sigma, shift=0.5)
    calls.clear()
    torch.testing.assert_close(score_matching_loss(denoiser, x, x0, sigma, prediction=prediction, weight=1.0), plain)
    assert calls == []


@pytest.mark.parametrize("name", ["x0", "prediction", "denoised", "sigma_next"])
def test_shapes_that_would_broadcast_are_refused(name: str) -> None:
    x, sigma = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)), torch.full((4,), 0.5)
    denoiser = denoiser_from(lambda y, t: 0.1 * y, DDIMScheduler())
    right = {"x0": x, "sigma": sigma} if name in ("x0", "prediction") else {"sigma": sigma, "sigma_next": sigma / 2}
    loss = score_matching_loss if name in ("x0", "prediction") else consistency_loss
    assert loss(denoiser, x, **right).isfinite().all()
    with pytest.raises(ValueError, match=f"{name} has shape"):
        loss(denoiser, x, **right | {name: sigma[:1] if name == "sigma_next" else x[:, :1]})


# observation: what the discriminator is shown


class Recorder:
    """A discriminator of logit 0 that keeps what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __call__(self, x_next: Tensor, sigma: Tensor, sigma_next: Tensor, **cond: Tensor) -> Tensor:
        self.calls.append((x_next, sigma, sigma_next, cond))
        return 0 * x_next.reshape(len(x_next), -1).sum(1)


def shown(denoiser: Denoiser, x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor, **options) -> tuple:
    """(real, fake): real is the one that does not come from the denoiser."""
    disc = Recorder()
    observation_loss(denoiser, disc, x, sigma, sigma_next, **options)
    discriminator_loss(denoiser, disc, x, x0, sigma, sigma_next, sigma_data=0.5, r1_weight=0, **options)
    assert len(disc.calls) == 3
    fake = disc.calls[0][0]
    (real,) = [call[0] for call in disc.calls[1:] if not torch.equal(call[0], fake)]
    assert not real.requires_grad
    return real, fake


def gaussian_draws(law: Gaussian, sigma: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    x0, n = law.sample(len(sigma), seeded(seed)), seeded(seed + 100)
    noise = torch.randn(x0.shape, dtype=torch.float64, generator=n)
    return x0 + along(sigma, x0) * noise, x0, noise


@pytest.mark.parametrize("projection", ["euler", "heun"])
@pytest.mark.parametrize("shape", [(), (20,), (2, 3, 4), (2, 3, 2, 4)], ids=str)
def test_real_has_the_same_noise_at_the_next_level(shape: tuple[int, ...], projection: str) -> None:
    law, sigma = image_mixture(*shape), torch.linspace(0.1, 3, 6, dtype=torch.float64)
    sigma_next = sigma * torch.linspace(0.9, 0.1, 6, dtype=torch.float64)
    x, x0, noise = gaussian_draws(law, sigma)
    real, fake = shown(plain_denoiser(law.denoiser), x, x0, sigma, sigma_next, projection=projection)
    torch.testing.assert_close(real, x0 + along(sigma_next, x0) * noise)
    assert fake.shape == x.shape
    perfect = plain_denoiser(lambda y, s: x0)  # a model that knows x0 is not to be told apart
    disc = Recorder()
    observation_loss(perfect, disc, x, sigma, sigma_next, projection=projection)
    torch.testing.assert_close(disc.calls[0][0], real)


def test_the_published_width_of_one_step_of_the_exact_denoiser() -> None:
    """The longest step from sigma = 0.5 with k = 0.1 narrows the law of the exact denoiser to 0.88 of the true one."""
    sigma = full(0.5)
    longest = look_ahead_sigma(sigma, 0.1, 0.002, 80.0, generator=seeded()).min()
    law = Gaussian(0.0, V)
    x, x0, _ = gaussian_draws(law, sigma)
    real, fake = shown(plain_denoiser(law.denoiser), x, x0, sigma, longest.expand(N))
    assert (fake.std() / real.std()).item() == pytest.approx(0.88, abs=0.005)
    assert real.std().item() == pytest.approx((V + longest.item() ** 2) ** 0.5, rel=5 / (2 * N) ** 0.5)


def test_the_variance_that_fake_lacks_is_that_of_x0_given_x() -> None:
    law, sigma, sigma_next = two_bumps(), 0.6, 0.2
    x0 = law.sample(N, seeded())
    x = x0 + sigma * torch.randn(N, dtype=torch.float64, generator=seeded(1))
    real, fake = shown(plain_denoiser(law.denoiser), x, x0, full(sigma), full(sigma_next))
    assert (real.mean() - fake.mean()).abs() < 5 * (real - fake).std() / N**0.5
    missing = (1 - sigma_next / sigma) ** 2 * (x0 - law.denoiser(x, sigma)) ** 2
    centred = [(v - v.mean()) ** 2 for v in (real, fake)]
    mean, error = mean_and_error(centred[0] - centred[1] - missing)
    assert abs(mean) < 5 * error
    assert missing.mean() > 50 * error  # the test has power


@pytest.mark.parametrize(("projection", "order"), [("euler", 2), ("heun", 3)])
@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_the_law_of_fake_tends_to_that_of_real_with_the_order_of_the_step(
    sigma: float, projection: str, order: int
) -> None:
    """fake = a x, so that its law has the width a (V + sigma^2)^1/2, to be compared with (V + sigma_next^2)^1/2."""
    h = 0.1 * sigma * 0.5 ** torch.arange(4, dtype=torch.float64)
    x, start, end = torch.ones(4, dtype=torch.float64), full(sigma, 4), sigma - h
    _, fake = shown(plain_denoiser(Gaussian(0.0, V).denoiser), x, x / 3, start, end, projection=projection)
    error = (fake * (V + sigma**2) ** 0.5 / (V + end**2) ** 0.5).log().abs()
    orders = (error[:-1] / error[1:]).log2()
    assert orders[-1].item() == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(("k", "visible"), [(0.01, False), (0.1, True)])
def test_a_small_look_ahead_of_the_exact_denoiser_is_invisible(k: float, visible: bool) -> None:
    """Two-sample Kolmogorov-Smirnov distance between halves of the batch that share nothing."""
    law, sigma = Gaussian(0.0, V), full(0.5)
    sigma_next = look_ahead_sigma(sigma, k, 0.002, 80.0, generator=seeded()).min().expand(N)
    x, x0, _ = gaussian_draws(law, sigma)
    real, fake = shown(plain_denoiser(law.denoiser), x, x0, sigma, sigma_next)
    first, second = real[: N // 2].sort().values, fake[N // 2 :].sort().values
    at = torch.cat([first, second])
    distance = (torch.searchsorted(first, at) - torch.searchsorted(second, at)).abs().max() / (N / 2)
    assert (distance > 2.5 * (4 / N) ** 0.5).item() == visible


def test_no_step_shows_the_same_twice_and_teaches_the_denoiser_nothing() -> None:
    theta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x, sigma, disc = noisy(1.0, 8), full(1.0, 8), Recorder()
    discriminator_loss(
        plain_denoiser(lambda y, s: theta * y), disc, x, x / 3, sigma, sigma, sigma_data=0.5, r1_weight=0
    )
    for call in disc.calls:
        torch.testing.assert_close(call[0], x)
    for projection in ("euler", "heun"):
        loss = observation_loss(
            plain_denoiser(lambda y, s: theta * y), lambda y, *_: y, x, sigma, sigma, projection=projection
        )
        assert torch.autograd.grad(loss.sum(), theta)[0] == 0


def test_the_discriminator_is_told_both_levels_in_order_and_its_own_conditions() -> None:
    told = []

    def network(y: Tensor, s: Tensor, *, class_labels: Tensor) -> Tensor:
        told.append(class_labels)
        return y / 2

    x, sigma, sigma_next, dropped, labels = noisy(1.0, 4), full(1.0, 4), full(0.4, 4), torch.zeros(4), torch.arange(4)
    disc, options = Recorder(), {"discriminator_cond": {"class_labels": labels}, "class_labels": dropped}
    observation_loss(plain_denoiser(network), disc, x, sigma, sigma_next, projection="heun", **options)
    discriminator_loss(
        plain_denoiser(network), disc, x, x / 3, sigma, sigma_next, sigma_data=0.5, projection="heun", **options
    )
    assert len(disc.calls) == 3
    assert all(call[1] is sigma and call[2] is sigma_next for call in disc.calls)
    assert all(call[3]["class_labels"] is labels for call in disc.calls)
    assert len(told) == 4
    assert all(label is dropped for label in told)


@pytest.mark.parametrize(("projection", "evaluations"), [("euler", 0), ("heun", 1)])
def test_a_given_prediction_is_used_and_changes_nothing(projection: str, evaluations: int) -> None:
    law, seen = image_mixture(2, 3), []
    theta = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)

    def network(y: Tensor, s: Tensor) -> Tensor:
        seen.append(s)
        return theta * law.denoiser(y, s)

    denoiser, sigma = plain_denoiser(network), torch.linspace(0.3, 2, 6, dtype=torch.float64)
    x, x0, _ = gaussian_draws(law, sigma)
    sigma_next, w = sigma / 2, torch.randn(2, 3, dtype=torch.float64, generator=seeded(5))

    def disc(y: Tensor, s: Tensor, s_next: Tensor) -> Tensor:
        return (w * y.tanh()).sum((1, 2))

    def both(**options) -> tuple[Tensor, Tensor, Tensor]:
        loss = observation_loss(denoiser, disc, x, sigma, sigma_next, projection=projection, **options)
        other = discriminator_loss(
            denoiser, disc, x, x0, sigma, sigma_next, sigma_data=1.0, projection=projection, **options
        ).loss
        return loss, other, torch.autograd.grad(loss.sum(), theta)[0]

    fresh = both()
    assert len(seen) == 2 * (1 + evaluations)
    denoised = denoiser(x, sigma)
    seen.clear()
    reused = both(denoised=denoised)
    assert len(seen) == 2 * evaluations
    torch.testing.assert_close(reused, fresh, rtol=0, atol=0)
    assert fresh[2] != 0


# observation: values and gradients


def test_hinge_by_hand() -> None:
    """sigma = 1, sigma' = 1/2 and x = 0: the logits y + t of real and fake are x0/2 + t and D/2 + t."""
    x0 = torch.tensor([-4.0, 0.0, 1.0, 2.0, 6.0, 6.0])
    denoised = torch.tensor([-6.0, -2.0, 0.0, 2.0, -2.0, -8.0])
    x, sigma = torch.zeros(6), torch.ones(6)
    t = torch.zeros((), requires_grad=True)
    unused = plain_denoiser(lambda y, s: 1 / 0)
    out = discriminator_loss(
        unused, lambda y, *_: y + t, x, x0, sigma, sigma / 2, sigma_data=0.5, r1_weight=0, denoised=denoised
    )
    assert out.real_logits.tolist() == [-2, 0, 0.5, 1, 3, 3]
    assert out.fake_logits.tolist() == [-3, -1, 0, 1, -1, -4]
    assert out.loss.tolist() == [3 + 0, 1 + 0, 0.5 + 1, 0 + 2, 0 + 0, 0 + 0]
    assert out.r1.tolist() == [0] * 6
    slopes = [torch.autograd.grad(v, t, retain_graph=True)[0].item() for v in out.loss[[0, 2, 3, 5]]]
    assert slopes == [-1, 0, 1, 0]
    loss = observation_loss(unused, lambda y, *_: y + t, x, sigma, sigma / 2, denoised=denoised)
    assert loss.tolist() == [3, 1, 0, -1, 1, 4]


def test_r1_of_a_linear_discriminator() -> None:
    """disc = w x'; with respect to y = x'/(sd^2 + sigma'^2)^1/2 its gradient is (sd^2 + sigma'^2)^1/2 w."""
    sigma = torch.tensor([0.1, 1.0, 10.0, 80.0], dtype=torch.float64)
    sigma_next, law = sigma / 2, image_mixture(2, 3)
    x, x0, _ = gaussian_draws(law, sigma)
    w = torch.randn(2, 3, dtype=torch.float64, generator=seeded(5)).requires_grad_()

    def losses_of(weight: float) -> losses.DiscriminatorLoss:
        return discriminator_loss(
            plain_denoiser(law.denoiser), lambda y, *_: (w * y).sum((1, 2)), x, x0, sigma, sigma_next,
            sigma_data=0.7, r1_weight=weight,
        )  # fmt: skip

    without, with_penalty = losses_of(0.0), losses_of(3.0)
    variance = 0.49 + sigma_next**2
    torch.testing.assert_close(with_penalty.r1, variance * (w**2).sum().detach())
    torch.testing.assert_close(with_penalty.loss, without.loss + 1.5 * variance * (w**2).sum())
    (slope,) = torch.autograd.grad((with_penalty.loss - without.loss).sum(), w)
    torch.testing.assert_close(slope, 3 * variance.sum() * w.detach())
    assert torch.equal(losses_of(1.0).loss, discriminator_loss(
        plain_denoiser(law.denoiser), lambda y, *_: (w * y).sum((1, 2)), x, x0, sigma, sigma_next, sigma_data=0.7
    ).loss)  # fmt: skip


def test_r1_is_that_of_the_input_of_the_network() -> None:
    disc = NoiseLevelDiscriminator(1, (4, 6), sigma_data=0.3, num_frequencies=4).double()
    law, sigma = image_mixture(1, 5, 4), torch.tensor([0.1, 1.0, 10.0, 80.0, 3.0], dtype=torch.float64)
    x, x0, noise = gaussian_draws(law, sigma)
    out = discriminator_loss(plain_denoiser(law.denoiser), disc, x, x0, sigma, sigma / 3, sigma_data=0.3)
    y = disc.scale(x0 + along(sigma / 3, x0) * noise, sigma / 3).requires_grad_()
    c = disc.condition(x, sigma, sigma / 3, None)
    (g,) = torch.autograd.grad(((disc.features(y) * c).sum() / 6**0.5), y)
    torch.testing.assert_close(out.r1, g.square().sum((1, 2, 3)))


def generator_and_discriminator() -> tuple[nn.Module, NoiseLevelDiscriminator]:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

        def forward(self, y: Tensor, s: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(y)))

    return Network(), NoiseLevelDiscriminator(2, (4, 8), num_frequencies=4)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("reuse", [False, True], ids=["computed", "reused"])
@pytest.mark.parametrize("projection", ["euler", "heun"])
def test_each_loss_trains_its_own_network_and_only_that(projection: str, reuse: bool, checkpointing: bool) -> None:
    network, disc = generator_and_discriminator()
    if checkpointing:
        disc.enable_gradient_checkpointing()
    denoiser, sigma = plain_denoiser(network), torch.linspace(0.5, 2, 5)
    x = torch.randn(5, 2, 8, 8, generator=seeded())
    trained = [name for name, p in disc.named_parameters() if p.requires_grad]

    def changed(module: nn.Module) -> list[str]:
        return [name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]

    def touched(module: nn.Module) -> list[str]:
        return [name for name, p in module.named_parameters() if p.grad is not None]

    denoised = denoiser(x, sigma) if reuse else None
    loss = observation_loss(denoiser, disc, x, sigma, sigma / 2, projection=projection, denoised=denoised)
    assert [name for name, p in disc.named_parameters() if p.requires_grad] == trained
    loss.sum().backward()
    assert touched(disc) == []
    assert changed(network) == [name for name, _ in network.named_parameters()]

    network.zero_grad()
    denoised = denoiser(x, sigma) if reuse else None
    out = discriminator_loss(
        denoiser, disc, x, 0.5 * x, sigma, sigma / 2, sigma_data=0.5, projection=projection, denoised=denoised
    )
    out.loss.sum().backward()
    assert touched(network) == []
    assert changed(disc) == trained == touched(disc)
    assert not any(v.requires_grad for v in (out.real_logits, out.fake_logits, out.r1))


def test_a_frozen_discriminator_is_released_after_an_error() -> None:
    disc = NoiseLevelDiscriminator(2, (4,), num_frequencies=4)
    with pytest.raises(ValueError, match="x_next has shape"):
        observation_loss(linear(), disc, torch.ones(2, 4), torch.ones(2), torch.full((2,), 0.5))
    assert disc.conv_in.weight.requires_grad
    assert not disc.fourier.weight.requires_grad


@pytest.mark.parametrize("autocast", [False, True])
def test_a_frozen_discriminator_may_compute_its_activations_again(autocast: bool) -> None:
    network, disc = generator_and_discriminator()
    x, sigma, gradients, calls = torch.randn(5, 2, 8, 8, generator=seeded()), torch.linspace(0.5, 2, 5), [], []
    disc.blocks[0].conv.register_forward_pre_hook(lambda *args: calls.append(1))
    for change in (disc.disable_gradient_checkpointing, disc.enable_gradient_checkpointing):
        change()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = observation_loss(plain_denoiser(network), disc, x, sigma, sigma / 2)
        gradients.append(torch.autograd.grad(loss.sum(), list(network.parameters())))
    assert len(calls) == 1 + 2
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("projection", ["euler", "heun"])
def test_the_gradient_goes_through_the_whole_step(projection: str) -> None:
    sigma = torch.linspace(0.3, 3, 6, dtype=torch.float64)
    x = 2 * torch.randn(6, dtype=torch.float64, generator=seeded())
    theta = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def loss(value: Tensor | float) -> Tensor:
        denoiser = plain_denoiser(lambda y, s: torch.sin(value * y) / (1 + s))
        return observation_loss(denoiser, lambda y, *_: y**3, x, sigma, sigma / 3, projection=projection).sum()

    h = 1e-5
    (gradient,) = torch.autograd.grad(loss(theta), theta)
    assert gradient.item() == pytest.approx(((loss(0.8 + h) - loss(0.8 - h)) / (2 * h)).item(), rel=1e-7)


@pytest.mark.parametrize(("shrink", "sign"), [(0.5, -1), (1.0, -1), (2.0, 1)])
def test_a_trained_discriminator_widens_what_is_too_narrow_and_narrows_what_is_too_wide(
    shrink: float, sign: int
) -> None:
    """disc = a x^2 + b learns on which side fake is wrong; the exact denoiser counts as too narrow, by its solver."""
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    theta = torch.tensor(shrink, dtype=torch.float64, requires_grad=True)
    optimizer, n = torch.optim.Adam([weights], lr=0.05), 4000
    denoiser = plain_denoiser(lambda y, s: theta * along(gain(s), y) * y)

    def disc(y: Tensor, s: Tensor, s_next: Tensor) -> Tensor:
        return weights[0] * y**2 + weights[1]

    for seed in range(60):
        x, x0, _ = gaussian_draws(Gaussian(0.0, V), full(0.5, n), seed)
        out = discriminator_loss(denoiser, disc, x, x0, full(0.5, n), full(0.1, n), sigma_data=0.5, r1_weight=0)
        optimizer.zero_grad()
        out.loss.mean().backward()
        optimizer.step()
    assert theta.grad is None
    observation_loss(denoiser, disc, x, full(0.5, n), full(0.1, n)).mean().backward()
    assert theta.grad.sign() == sign
    assert out.real_logits.mean() > out.fake_logits.mean()


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), EDMEulerScheduler()], ids=lambda s: type(s).__name__)
def test_observation_in_mixed_precision(scheduler: object) -> None:
    network, disc = generator_and_discriminator()
    denoiser, sigma = denoiser_from(network, scheduler), torch.tensor([0.05, 0.5, 2.0, 10.0])
    x0 = 0.5 * torch.randn(4, 2, 8, 8, generator=seeded())
    x = x0 + along(sigma, x0).float() * torch.randn(4, 2, 8, 8, generator=seeded(1))
    values = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = observation_loss(denoiser, disc, x, sigma, sigma / 2, projection="heun")
            out = discriminator_loss(denoiser, disc, x, x0, sigma, sigma / 2, sigma_data=0.5)
        (loss + out.loss).sum().backward()
        assert {v.dtype for v in (loss, *out)} == {torch.float32}
        values.append(torch.stack([loss, *out]).detach())
    torch.testing.assert_close(values[1], values[0], rtol=0.1, atol=0.05)
    assert all(p.grad.isfinite().all() for m in (network, disc) for p in m.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["x0", "denoised", "sigma_next", "projection", "r1_weight"])
def test_wrong_arguments_of_observation_are_refused(name: str) -> None:
    x, sigma = torch.randn(4, 3, 2, 2, generator=seeded()), torch.full((4,), 0.5)
    wrong = {"x0": x[:, :1], "denoised": x[:, :1], "sigma_next": sigma[:1], "projection": "ddim", "r1_weight": -1.0}
    right = {"x": x, "sigma": sigma, "sigma_next": sigma / 2}
    messages = {"projection": "'ddim' is not one of euler, heun", "r1_weight": "r1_weight must be at least 0, got -1.0"}
    message = messages.get(name, f"{name} has shape")
    denoiser, disc = plain_denoiser(lambda y, s: y / 2), lambda y, *_: y.sum((1, 2, 3))
    full_set = right | {"x0": x, "sigma_data": 0.5}
    assert discriminator_loss(denoiser, disc, **full_set).loss.isfinite().all()
    with pytest.raises(ValueError, match=message):
        discriminator_loss(denoiser, disc, **full_set | {name: wrong[name]})
    if name not in ("x0", "r1_weight"):
        with pytest.raises(ValueError, match=message):
            observation_loss(denoiser, disc, **right | {name: wrong[name]})


# images with noise


def expected_ambient_loss(k: float, noise: float, sigma: float) -> float:
    """The exact mean over x0 ~ N(0, V) and both noises of the loss of D = k x: Gauss-Hermite nodes integrate the square
    of a sum of Gaussians without error."""
    nodes, weights = numpy.polynomial.hermite_e.hermegauss(3)
    x0, n, z = (torch.from_numpy(one).reshape(-1, 1) for one in numpy.meshgrid(nodes, nodes, nodes))
    p = numpy.einsum("i,j,k->jik", weights, weights, weights).reshape(-1) / weights.sum() ** 3
    noisy = V**0.5 * x0 + noise * n
    x = noisy + (sigma**2 - noise**2) ** 0.5 * z
    return (torch.from_numpy(p) * ambient_loss(k * x, x, noisy, noise, sigma)).sum().item()


@pytest.mark.parametrize(("noise", "sigma"), [(0.5, 0.50001), (0.5, 0.6), (0.5, 3.0), (0.2, 0.3), (0.0, 0.3)])
def test_the_ambient_loss_is_least_at_the_exact_denoiser_of_clean_images(noise, sigma):
    """A parabola in the gain through three points; its minimum is that of E[x0 | x], not of E[x_n | x]."""
    a, b, c = (expected_ambient_loss(k, noise, sigma) for k in (0.0, 0.5, 1.0))
    least = 0.5 - 0.25 * (c - a) / (a - 2 * b + c)
    assert least == pytest.approx(gain(sigma), rel=1e-6)
    curvature = 2 * (a - 2 * b + c)  # of |D - x0|^2 it is (1 - r) / sigma^2, and not less than the floor allows
    share = 1 - noise**2 / sigma**2
    assert curvature == pytest.approx(share**2 / max(share, losses.LEAST) / sigma**2 * (V + sigma**2), rel=1e-4)


def test_the_ambient_loss_of_clean_images_is_score_matching():
    x0, denoised = (torch.randn(3, 1, 4, 4, generator=seeded(i)) for i in range(2))
    sigma, weight = torch.tensor([0.1, 1.0, 10.0]), torch.tensor([1.0, 2.0, 3.0])
    model = plain_denoiser(lambda x, sigma: denoised)
    x = model.process.perturb(x0, sigma, seeded(2))
    found = ambient_loss(denoised, x, x0, torch.zeros(3), sigma, weight=weight)
    truth = score_matching_loss(model, x, x0, sigma, prediction=denoised, weight=weight)
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)


def test_the_ambient_loss_has_no_singularity_at_the_noise_of_the_data():
    noisy = torch.randn(4, 1, 4, 4, generator=seeded())
    denoised = torch.zeros_like(noisy, requires_grad=True)
    data_noise = torch.tensor([0.0, 0.2, 0.5, 0.5])
    loss = ambient_loss(denoised, noisy, noisy, data_noise, data_noise.clamp(min=0.1))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert denoised.grad.isfinite().all()
    with pytest.raises(ValueError, match="noisy"):
        ambient_loss(denoised, noisy, noisy[:2], 0.2, 0.5)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "sample"])
def test_by_default_the_loss_is_that_of_the_networks_own_output(kind) -> None:
    """As diffusers' own training has it: the mean square error of the raw output against its target."""
    scheduler = DDPMScheduler(prediction_type=kind)
    denoiser, schedule = denoiser_from(lambda x, t: torch.tanh(x), scheduler), noise_schedule(scheduler)
    generator = torch.Generator().manual_seed(0)
    x0, t = torch.randn(6, 2, 4, 4, generator=generator), torch.tensor([1, 100, 300, 500, 800, 999])
    noise, sigma = torch.randn(x0.shape, generator=generator), schedule.sigmas[t].float()
    x = x0 + align(sigma, x0) * noise
    raw = torch.tanh(scheduler.add_noise(x0, noise, t))
    target = {"epsilon": noise, "sample": x0, "v_prediction": scheduler.get_velocity(x0, noise, t)}[kind]
    truth = (raw - target).square().flatten(1).mean(1)
    torch.testing.assert_close(score_matching_loss(denoiser, x, x0, sigma), truth, rtol=2e-3, atol=1e-4)
