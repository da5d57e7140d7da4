"""`losses`. Truth: exact laws, for which the martingale D(x, sigma) = E[D(x', sigma') | x] holds, and the closed form
of its defect for linear denoisers D = k(sigma) x. Monte-Carlo means are compared within 5 standard errors."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler
from diffusers.models.embeddings import LabelEmbedding
from oracles import Gaussian, along, image_mixture, plain_denoiser, two_bumps
from torch import Tensor, nn

from diffusers_ext import Denoiser, consistency_loss, denoiser_from, losses, score_matching_loss
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
def test_gradient_flows_through_all_evaluations_and_through_no_draw(steps: int, reuse: bool) -> None:
    """D = theta k x with frozen draws is linear in theta, so the loss is a square in it: gradient = 2 loss / theta."""
    theta = torch.linspace(0.5, 1.5, 64, dtype=torch.float64).requires_grad_()
    denoiser = plain_denoiser(lambda x, sigma: theta * gain(sigma) * x)
    x, sigma, sigma_next = noisy(1.0, 64), full(1.0, 64), full(0.4, 64)
    denoised = denoiser(x, sigma) if reuse else None
    loss = consistency_loss(denoiser, x, sigma, sigma_next, denoised=denoised, steps=steps, generator=seeded())
    (gradient,) = torch.autograd.grad(loss.sum(), theta)
    torch.testing.assert_close(gradient, 2 * loss.detach() / theta.detach(), rtol=1e-9, atol=1e-12)


def test_gradient_is_the_one_assembled_by_hand_from_the_two_draws() -> None:
    theta = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    x, sigma, sigma_next = noisy(1.0, 500), full(1.0, 500), full(0.4, 500)
    denoiser = plain_denoiser(lambda x, sigma: torch.tanh(theta * x) / (1 + along(sigma, x)))
    loss = consistency_loss(denoiser, x, sigma, sigma_next, generator=seeded()).mean()
    g, d = seeded(), denoiser(x, sigma).detach()
    draws = [posterior(denoiser, x, sigma, sigma_next, denoised=d, generator=g) for _ in range(2)]

    def frozen(value: float) -> Tensor:
        start = torch.tanh(value * x) / 2
        first, second = (torch.tanh(value * y) / 1.4 - start for y in draws)
        return (first * second).mean()

    h = 1e-5
    (gradient,) = torch.autograd.grad(loss, theta)
    assert loss.item() == pytest.approx(frozen(0.8).item(), rel=1e-12)
    assert gradient.item() == pytest.approx(((frozen(0.8 + h) - frozen(0.8 - h)) / (2 * h)).item(), rel=1e-6)


# evaluations and randomness


@pytest.mark.parametrize("rollout", ["posterior", "euler_maruyama"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_number_level_and_condition_of_the_evaluations(steps: int, rollout: str) -> None:
    seen = []

    def network(x: Tensor, sigma: Tensor, *, class_labels: Tensor) -> Tensor:
        seen.append((sigma[0].item(), class_labels))
        return gain(sigma) * x

    labels, denoiser = torch.arange(8), plain_denoiser(network)
    x, sigma, sigma_next = noisy(1.0, 8), full(1.0, 8), full(0.4, 8)
    options = {"steps": steps, "rollout": rollout, "class_labels": labels}
    fresh = consistency_loss(denoiser, x, sigma, sigma_next, generator=seeded(), **options)
    assert len(seen) == 1 + 2 + 2 * (steps - 1)
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
    matching = score_matching_loss(linear(), x, x0, sigma)
    for i in range(6):  # every element a sample of its own
        one, data = x[i].reshape(-1), x0[i].reshape(-1)
        elements = score_matching_loss(linear(), one, data, sigma[i].expand(len(one)))
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
        return score_matching_loss(moved, x, x0, sigma)

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
    mean, error = mean_and_error(score_matching_loss(plain_denoiser(law.denoiser), x, x0, full(sigma)))
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
    plain = score_matching_loss(denoiser, x, x0, sigma, shift=0.5)
    assert calls == [0.5]
    target = -(x - x0) / along(sigma, x) ** 2  # of log N(x; x0, sigma^2)
    expected = (along(sigma, x) * (denoiser.score(x, sigma, shift=0.5) - target)).square().mean((1, 2))
    torch.testing.assert_close(plain, expected, rtol=1e-6, atol=1e-9)
    weight = torch.tensor([1.0, 2.0, 0.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(score_matching_loss(denoiser, x, x0, sigma, weight=weight, shift=0.5), weight * plain)
    torch.testing.assert_close(score_matching_loss(denoiser, x, x0, sigma, weight=3.0, shift=0.5), 3 * plain)
    prediction = denoiser(x, sigma, shift=0.5)
    calls.clear()
    torch.testing.assert_close(score_matching_loss(denoiser, x, x0, sigma, prediction=prediction), plain)
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
