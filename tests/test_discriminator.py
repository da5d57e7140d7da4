"""`discriminator`. Truth: numpy for the minibatch statistic, laws that differ by a known amount at a known noise level,
finite differences for the second derivatives."""

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from diffusers_ext import NoiseLevelDiscriminator
from diffusers_ext.discriminator import group_deviation

SMALL = {"in_channels": 2, "block_out_channels": (8, 12, 16), "num_frequencies": 8}
B = 8


def small(**changes) -> NoiseLevelDiscriminator:
    torch.manual_seed(1)
    return NoiseLevelDiscriminator(**SMALL | changes)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = B, size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 2, size, size, generator=seeded(seed), dtype=dtype)


def levels(n: int = B) -> tuple[Tensor, Tensor]:
    sigma = torch.linspace(0.1, 5.0, n)
    return sigma, sigma / 2


# units and conditions


@pytest.mark.parametrize("sigma_next", [0.002, 0.3, 2.0, 80.0])
def test_the_network_sees_unit_variance_at_every_noise_level(sigma_next: float) -> None:
    model, n = small(sigma_data=0.7, group_size=None), 256
    x0, noise = 0.7 * images(n, seed=1), images(n, seed=2)
    seen = []
    model.conv_in.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x0 + sigma_next * noise, 3 * sigma_next, sigma_next)
    assert seen[0].std().item() == pytest.approx(1, abs=5 / (2 * seen[0].numel()) ** 0.5)


def test_the_prompt_turns_the_direction_by_its_embedding_of_mean_0_and_variance_1() -> None:
    model, x, (sigma, sigma_next) = small(pooled_dim=3).double(), images(dtype=torch.float64), levels()
    pooled = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64).expand(B, -1)
    phi = model.features(model.scale(x, sigma_next))
    unit = torch.tensor([-2.0, -1.0, 3.0], dtype=torch.float64) / (14 / 3) ** 0.5
    (a,) = model.prompt_embedding.parameters()
    none = (phi * model.condition(x, sigma, sigma_next, None, 0 * pooled)).sum(1) / 4  # 16 features
    expected = none + phi @ (a @ unit) / 4
    for factor in (1, 100):  # embeddings have any scale
        torch.testing.assert_close(model(x, sigma, sigma_next, pooled=factor * pooled), expected, rtol=1e-4, atol=1e-5)


def test_sigma_and_sigma_next_have_a_role_each() -> None:
    model, x = small().double(), images(dtype=torch.float64)
    sigma, sigma_next = levels()
    phi = model.features(model.scale(x, sigma_next))

    def logit(s: Tensor | float, s_next: Tensor | float) -> Tensor:  # of the same features: only the condition differs
        c = model.condition(x, s, s_next, None)
        return (phi * c).sum(1) / 4  # 16 features

    torch.testing.assert_close(model(x, sigma, sigma_next), logit(sigma, sigma_next))
    base = logit(sigma, sigma_next)
    for other in (logit(1.1 * sigma, sigma_next), logit(sigma, 1.1 * sigma_next), logit(sigma_next, sigma)):
        assert (other - base).norm() > 0.01 * base.norm()


def test_the_first_half_of_the_noise_levels_features_is_that_of_sigma() -> None:
    """Of a network that is loaded, not only of a new one: the order belongs to the file format."""
    model, x, halves = small(), images(), []
    for blind in (slice(None, 16), slice(16, None)):  # sine and cosine of 8 frequencies each
        weight = model.level_embedding.linear_1.weight.detach().clone()
        with torch.no_grad():
            model.level_embedding.linear_1.weight[:, blind] = 0
            halves.append([model.condition(x, a, b, None) for a, b in ((1.0, 0.5), (2.0, 0.5), (1.0, 0.7))])
            model.level_embedding.linear_1.weight.copy_(weight)
    (base, sigma, sigma_next), (other_base, other_sigma, other_sigma_next) = halves
    assert torch.equal(base, sigma)
    assert not torch.equal(base, sigma_next)
    assert not torch.equal(other_base, other_sigma)
    assert torch.equal(other_base, other_sigma_next)


def test_the_conditions_are_smooth_in_the_logarithm_of_the_noise_level() -> None:
    """One per cent of a level changes the condition by a few per cent of what a factor e does, at every level."""
    model = small(num_frequencies=64)
    for sigma in (0.01, 1.0, 50.0):
        x = images(1)
        c = [model.condition(x, sigma * f, sigma / 2, None) for f in (1, 1.01, torch.tensor(1.0).exp().item())]
        assert 1e-4 < (c[1] - c[0]).norm() / (c[2] - c[0]).norm() < 0.05


def test_a_number_and_a_tensor_of_levels_mean_the_same() -> None:
    model, x = small(), images()
    expected = model(x, torch.full((B,), 0.5), torch.full((B,), 0.25))
    assert expected.shape == (B,)
    assert torch.equal(model(x, 0.5, 0.25), expected)
    assert torch.equal(model(x, torch.tensor(0.5), torch.tensor(0.25, dtype=torch.float64)), expected)


def test_each_class_has_its_own_direction() -> None:
    model, x = small(num_class_embeds=3, group_size=None), images(1).expand(B, -1, -1, -1)
    labels = torch.arange(B) % 3
    logits = model(x, 1.0, 0.5, labels)
    torch.testing.assert_close(logits, logits[:3].repeat(3)[:B])
    assert (logits[:3].diff().abs() > 0.01 * logits.norm()).all()
    logits[0].backward()
    used = model.class_embedding.weight.grad.abs().sum(1) > 0
    assert used.tolist() == [True, False, False]


def test_every_parameter_has_a_part_in_the_logits() -> None:
    model = small(num_class_embeds=1)
    model(images(), *levels(), torch.zeros(B, dtype=torch.long)).sum().backward()
    for name, p in model.named_parameters():
        assert (name == "fourier.weight") != (p.grad is not None and p.grad.abs().sum() > 0), name


@pytest.mark.parametrize(
    ("changes", "call", "message"),
    [
        ({"block_out_channels": ()}, None, "block_out_channels"),
        ({"sigma_data": 0.0}, None, "sigma_data must be above 0, got 0.0"),
        ({"group_size": 1}, None, "group_size must be at least 2, got 1"),
        ({}, (torch.zeros(4, 3, 8, 8), 1.0, 0.5), r"x_next has shape \(4, 3, 8, 8\), not \(B, 2, H, W\)"),
        ({}, (torch.zeros(4, 8, 8), 1.0, 0.5), "x_next has shape"),
        ({}, (torch.zeros(4, 2, 8, 8), torch.ones(3), 0.5), r"sigma has shape \(3,\)"),
        ({}, (torch.zeros(1, 2, 8, 8), 1.0, 0.5, torch.zeros(1)), "class_labels are given, with num_class_embeds=None"),
        (
            {"num_class_embeds": 3},
            (torch.zeros(1, 2, 8, 8), 1.0, 0.5),
            "class_labels are missing, with num_class_embeds=3",
        ),
        ({"pooled_dim": 3}, (torch.zeros(1, 2, 8, 8), 1.0, 0.5), "pooled are missing, with pooled_dim=3"),
        ({"pooled_dim": 0}, None, "pooled_dim must be at least 1"),
    ],
)
def test_wrong_input_is_refused(changes: dict, call: tuple | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)(*call)


# groups


@pytest.mark.parametrize(("n", "size"), [(8, 4), (6, 3), (10, 4), (7, 4), (5, 2), (3, 4), (1, 4), (4, 4)])
def test_group_deviation_is_that_of_numpy(n: int, size: int) -> None:
    h = torch.randn(n, 3, 2, 5, generator=seeded(), dtype=torch.float64)
    windows = [range(s, s + size) for s in range(0, n - size + 1, size)] if n >= size else [range(n)]
    expected = np.full(n, np.nan)
    for window in [range(max(n - size, 0), n), *windows]:  # the last one first: full groups overwrite it
        expected[list(window)] = np.std(h.numpy()[list(window)], axis=0).mean()
    np.testing.assert_allclose(group_deviation(h, size).numpy(), expected, atol=1.1e-4 if n == 1 else 1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_deviation_in_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    h = (100 + 0.5 * torch.randn(8, 64, 4, 4, generator=seeded())).to(dtype)
    ours = group_deviation(h, 4)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, group_deviation(h.double(), 4).float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_derivatives_are_finite_where_all_samples_agree(n: int) -> None:
    model, x = small(), images(1).repeat(n, 1, 1, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x, 1.0, 0.5).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert gradient.abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_logit_depends_on_its_group_and_on_no_other_sample() -> None:
    model, n = small(group_size=3), 8  # groups 012 345 and, left over, 67 seeing 567
    x = images(n).requires_grad_()
    logits = model(x, *levels(n))
    for i, seen in enumerate([{0, 1, 2}] * 3 + [{3, 4, 5}] * 3 + [{5, 6, 7}] * 2):
        (gradient,) = torch.autograd.grad(logits[i], x, retain_graph=True)
        assert set(gradient.abs().sum((1, 2, 3)).nonzero().flatten().tolist()) == seen
    torch.testing.assert_close(model(x[:3], *(s[:3] for s in levels(n))), logits[:3])  # as on a process of its own


def test_a_permutation_within_groups_or_of_groups_permutes_the_logits() -> None:
    x, (sigma, sigma_next) = images(), levels()

    def permuted(model: NoiseLevelDiscriminator, order: Tensor) -> bool:
        logits, moved = model(x, sigma, sigma_next), model(x[order], sigma[order], sigma_next[order])
        return torch.allclose(moved, logits[order], atol=1e-6)

    grouped, across = small(group_size=4), torch.tensor([4, 1, 2, 3, 0, 5, 6, 7])
    assert permuted(grouped, torch.tensor([2, 0, 3, 1, 5, 4, 7, 6]))
    assert permuted(grouped, torch.tensor([4, 5, 6, 7, 0, 1, 2, 3]))
    assert not permuted(grouped, across)
    alone = small(group_size=None)
    assert permuted(alone, across)
    torch.testing.assert_close(alone(x[:1], sigma[:1], sigma_next[:1]), alone(x, sigma, sigma_next)[:1])


# the network


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (16, 16)], ids=str)
@pytest.mark.parametrize("channels", [1, 4])
def test_every_pixel_of_every_size_and_channel_is_seen(size: tuple[int, int], channels: int) -> None:
    model = small(in_channels=channels)
    x = torch.randn(4, channels, *size, generator=seeded()).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x, 1.0, 0.5).sum(), x)
    assert (gradient != 0).all()


@pytest.mark.parametrize("block_out_channels", [(64,), (64, 64, 64, 64, 64, 64)], ids=len)
def test_the_features_of_a_new_network_keep_their_size_at_any_depth(block_out_channels: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = NoiseLevelDiscriminator(block_out_channels=block_out_channels, group_size=None)
    y, seen = torch.randn(8, 3, 64, 64, generator=seeded()), []
    model.conv_out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.features(y)
    assert 0.4 < seen[0].square().mean() < 2.5


def test_weights_are_drawn_from_the_global_generator() -> None:
    first, again = small().state_dict(), small().state_dict()
    torch.manual_seed(2)
    other = NoiseLevelDiscriminator(**SMALL).state_dict()
    for name in first:
        assert torch.equal(first[name], again[name]), name
        assert torch.equal(first[name], other[name]) == (name.startswith(("conv", "blocks")) and name.endswith("bias"))


def test_second_derivatives_are_those_of_finite_differences() -> None:
    model = small(num_class_embeds=2).double()
    x, labels = images(dtype=torch.float64), torch.arange(B) % 2
    sigma, sigma_next = (s.double() for s in levels())
    p = model.conv_out.weight

    def penalty() -> Tensor:
        y = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(y, sigma, sigma_next, labels).sum(), y, create_graph=True)
        return g.square().sum()

    (gradient,) = torch.autograd.grad(penalty(), p)
    direction, h = torch.randn(p.shape, dtype=p.dtype, generator=seeded()), 1e-6
    values = []
    for step in (h, -2 * h):
        with torch.no_grad():
            p += step * direction
        values.append(penalty().item())
    assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-4)


def test_gradient_checkpointing_changes_nothing_not_even_second_derivatives() -> None:
    model, calls = small(), []
    model.blocks[0].conv.register_forward_pre_hook(lambda *args: calls.append(1))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        x = images().requires_grad_()
        logits = model(x, *levels())
        (g,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        (g.square().sum() + logits.square().sum()).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = gradients()
    assert len(calls) == 1
    model.enable_gradient_checkpointing()
    again = gradients()
    assert len(calls) > 2  # computed again
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_to_one_graph() -> None:
    model = small(num_class_embeds=2)
    args = (images(6), *levels(6), torch.arange(6) % 2)
    expected = model(*args)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    logits = torch.compile(model, backend="aot_eager", fullgraph=True)(*args)
    logits.sum().backward()
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close([p.grad for p in model.parameters() if p.grad is not None], gradients)


def test_mixed_precision_is_close_and_gives_float32_logits() -> None:
    model = small(num_class_embeds=2)
    args = (images(), *levels(), torch.arange(B) % 2)
    expected = model(*args)
    with torch.autocast("cpu", torch.bfloat16):
        x = args[0].clone().requires_grad_()
        logits = model(x, *args[1:])
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=0.02, rtol=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    halved = model.to(torch.bfloat16)(args[0].bfloat16(), *args[1:])
    assert halved.dtype == torch.float32
    torch.testing.assert_close(halved, expected, atol=0.05, rtol=0.1)


def test_a_saved_discriminator_comes_back(tmp_path) -> None:
    model = small(num_class_embeds=3, group_size=None, sigma_data=0.3, fourier_scale=0.5, pooled_dim=5)
    model.save_pretrained(tmp_path)
    loaded = NoiseLevelDiscriminator.from_pretrained(tmp_path)
    args = (images(), *levels(), torch.arange(B) % 3, torch.randn(B, 5, generator=seeded(4)))
    torch.testing.assert_close(loaded(*args), model.eval()(*args), rtol=1e-5, atol=1e-5)
    assert all(loaded.config[key] == (list(v) if isinstance(v, tuple) else v) for key, v in model.config.items())
    assert diffusers.NoiseLevelDiscriminator is NoiseLevelDiscriminator


def test_training_finds_a_difference_at_the_one_noise_level_where_there_is_one() -> None:
    """White noise of variance sd^2 + sigma_next^2, at sigma_next = 0.5 fake has an amplitude of 0.6."""
    torch.manual_seed(0)
    model = NoiseLevelDiscriminator(in_channels=1, block_out_channels=(8, 16), num_frequencies=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    g, n = seeded(3), 64
    sigma_next = torch.tensor([0.5, 2.0]).repeat_interleave(4).repeat(n // 8)

    def draw(amplitude: float) -> Tensor:
        std = (0.25 + sigma_next**2).sqrt() * torch.where(sigma_next == 0.5, amplitude, 1.0)
        return std[:, None, None, None] * torch.randn(n, 1, 8, 8, generator=g)

    for _ in range(200):
        real, fake = (model(draw(a), 1.5 * sigma_next, sigma_next) for a in (1.0, 0.6))
        loss = torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        real, fake = (model(draw(a), 1.5 * sigma_next, sigma_next) for a in (1.0, 0.6))
    here = sigma_next == 0.5
    assert (real[here] > 0).float().mean() > 0.9
    assert (fake[here] < 0).float().mean() > 0.9
    assert (real[~here].mean() - fake[~here].mean()).abs() < 0.15 * (real[here].mean() - fake[here].mean())
