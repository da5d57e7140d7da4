"""`randomness`. Truth: what torch draws itself from a generator of the same seed."""

import re
from pathlib import Path

import pytest
import torch

import diffusers_ext
from diffusers_ext.randomness import categorical, rand, rand_like, randint, randn, randn_like

WEIGHTS = torch.tensor([0.2, 0.0, 0.5, 0.3])
X = torch.zeros(5, 8, dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


DRAWS = {
    "randn": (lambda g: randn((40,), g), lambda g: torch.randn(40, generator=g)),
    "randn_like": (lambda g: randn_like(X, g), lambda g: torch.randn(5, 8, dtype=X.dtype, generator=g)),
    "rand": (lambda g: rand((40,), g), lambda g: torch.rand(40, generator=g)),
    "rand_like": (lambda g: rand_like(X, g), lambda g: torch.rand(5, 8, dtype=X.dtype, generator=g)),
    "randint": (lambda g: randint(9, (40,), g), lambda g: torch.randint(9, (40,), generator=g)),
    "categorical": (
        lambda g: categorical(WEIGHTS, 400, g),
        lambda g: torch.multinomial(WEIGHTS, 400, replacement=True, generator=g),
    ),
}


@pytest.mark.parametrize(("ours", "theirs"), DRAWS.values(), ids=DRAWS.keys())
def test_a_generator_gives_what_torch_draws_from_it_and_the_global_state_stays(ours, theirs) -> None:
    state = torch.get_rng_state()
    drawn = ours(seeded(3))
    assert torch.equal(drawn, theirs(seeded(3)))
    assert drawn.dtype == theirs(seeded(3)).dtype
    assert not torch.equal(drawn, ours(seeded(4)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("ours", "theirs"), DRAWS.values(), ids=DRAWS.keys())
def test_without_a_generator_the_global_state_is_the_source(ours, theirs) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        drawn = ours(None)
        torch.manual_seed(7)
        assert torch.equal(drawn, theirs(None))


def test_numbers_are_drawn_where_the_generator_lives_and_moved_to_the_device() -> None:
    """The device `meta` has no generators: what is drawn there from a CPU generator moves its state."""
    meta = X.to("meta")
    for draw in (
        lambda g: randn((40,), g, device="meta"),
        lambda g: randn_like(meta, g),
        lambda g: rand((40,), g, device="meta"),
        lambda g: rand_like(meta, g),
        lambda g: randint(9, (40,), g, device="meta"),
        lambda g: categorical(WEIGHTS.to("meta"), 40, g),
    ):
        generator = seeded()
        assert draw(generator).device.type == "meta"
        assert not torch.equal(generator.get_state(), seeded().get_state())


def test_categorical_draws_in_proportion_to_the_weights() -> None:
    n = 100_000
    counts = torch.bincount(categorical(3 * WEIGHTS, n, seeded()), minlength=4)
    assert counts[1] == 0
    assert ((counts / n - WEIGHTS).abs() <= 5 * (WEIGHTS * (1 - WEIGHTS) / n).sqrt()).all()


def test_no_other_module_decides_where_numbers_are_drawn() -> None:
    package = Path(diffusers_ext.__file__).parent
    by_hand = [p.name for p in package.rglob("*.py") if re.search(r"generator\.device", p.read_text())]
    assert by_hand == ["randomness.py"]
