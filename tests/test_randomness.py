"""Random numbers and seeds. Truth: what torch draws itself from a generator of the same seed; SHA-256 by hand, and the
seeds of version 0.1.0 by NumPy."""

import hashlib
import re
from pathlib import Path

import pytest
import torch

import diffusers_ext
from diffusers_ext.randomness import RULE, Seeds, Stream, categorical, rand, rand_like, randint, randn, randn_like

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


def test_a_seed_is_a_hash_of_the_text_of_its_numbers():
    digest = hashlib.sha256(b"3 2 41").digest()
    assert Seeds(3)(Stream.NOISE, 41) == int.from_bytes(digest[:8], "big") // 2
    assert RULE == 2


def test_no_two_lists_of_numbers_share_a_seed():
    """The first pair shared one by the rule of 0.1.0: the latents of batch 0 had the noise of another batch."""
    lists = [(), (0,), (0, 0), (1,), (2**32,), (0, 1), (10,), (1, 0), (2**64, 3)]
    seeds = [Seeds(seed)(stream, *numbers) for seed in (0, 1, 2**40) for stream in Stream for numbers in lists]
    assert len(set(seeds)) == len(seeds) == 3 * len(Stream) * len(lists)
    assert all(0 <= seed < 2**63 for seed in seeds)
    old = Seeds(0, rule=1)
    assert old(Stream.DISCRIMINATOR) == old(Stream.DISCRIMINATOR, 0)


@pytest.mark.parametrize(("stream", "number"), [(Stream.ORDER, 0), (Stream.NOISE, 7), (Stream.PROJECTION, 12)])
def test_the_old_rule_gives_the_old_seeds(stream, number):
    """NumPy's SeedSequence of (seed, stream, number), without its lowest bit."""
    import numpy as np

    words = np.random.SeedSequence([5, int(stream), number]).generate_state(1, np.uint64)
    assert Seeds(5, rule=1)(stream, number) == int(words[0]) // 2
    assert Seeds(5, rule=1)(Stream.GRID) == 5  # it was the user's own


def test_generators_of_one_seed_draw_alike_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    first, second = (randn((4,), Seeds(1).generator(Stream.NOISE, 3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, randn((4,), Seeds(1).generator(Stream.NOISE, 4)))
    assert torch.equal(torch.get_rng_state(), before)
