"""Seeds and streams. Truth: SHA-256 by hand, and version 0.1.0's own numbers."""

import hashlib

import pytest
import torch

from diffusers_ext.randomness import RULE, Seeds, Stream, categorical, rand, randint, randn


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


def test_numbers_are_those_of_torch_on_the_device_of_the_generator():
    def fresh():
        return torch.Generator().manual_seed(2)

    assert torch.equal(rand((3, 2), fresh()), torch.rand(3, 2, generator=fresh()))
    assert torch.equal(randint(7, (50,), fresh()), torch.randint(7, (50,), generator=fresh()))
    moved = randn((3,), fresh(), device="meta")
    assert moved.device.type == "meta"
    weights = torch.tensor([0.1, 0.0, 0.6, 0.3])
    counts = torch.bincount(categorical(weights, 20_000, fresh()), minlength=4) / 20_000
    assert (counts - weights).abs().max() < 5 * (0.25 / 20_000) ** 0.5
    assert counts[1] == 0
