"""Dropout's seeds, drawn one by one and ahead."""

from unittest.mock import patch

import torch

from qformer_fast.ops._seeds import draw_seed, draw_seeds, new_seeds, same_seeds, seeds_ahead

X = torch.zeros(1)


def test_seeds_ahead_are_one_draw():
    with patch("qformer_fast.ops._seeds.new_seeds", wraps=new_seeds) as draw:
        with seeds_ahead(5):
            seeds = [draw_seed(X, 0.1), *draw_seeds(X, 0.1, 0.2), *draw_seeds(X, 0.1, 0.1)]
            assert draw.call_count == 1
            seeds.append(draw_seed(X, 0.1))
        assert draw.call_count == 2
        seeds.append(draw_seed(X, 0.1))
        assert draw.call_count == 3
    assert all(seed.shape == (1,) and seed.dtype == torch.int64 for seed in seeds)
    assert len({int(seed) for seed in seeds}) == 7


def test_what_drops_nothing_has_no_seed_and_draws_none():
    state = torch.get_rng_state()
    with seeds_ahead(4):
        assert draw_seeds(X, 0.0, 0.0) == [None, None]
        assert torch.equal(torch.get_rng_state(), state)
        first, second = draw_seeds(X, 0.0, 0.5)
    assert first is None and second is not None
    assert not torch.equal(torch.get_rng_state(), state)


def test_seeds_left_over_are_not_taken_later():
    torch.manual_seed(0)
    with seeds_ahead(4):
        draw_seed(X, 0.5)
    state = torch.get_rng_state()
    draw_seed(X, 0.5)
    assert not torch.equal(torch.get_rng_state(), state)


def test_a_part_that_is_computed_again_finds_its_seeds():
    """Also one inside another, and where the outer one's are found first."""

    def part(inner):
        first = draw_seed(X, 0.5)
        with inner:
            nested = draw_seeds(X, 0.5, 0.0, 0.5)
        return [first, *nested, draw_seed(X, 0.5)]

    forward, again = same_seeds()
    inner_forward, inner_again = same_seeds()
    with seeds_ahead(4), forward:
        seeds = part(inner_forward)
    with inner_again:
        assert all(a is b for a, b in zip(draw_seeds(X, 0.5, 0.0, 0.5), seeds[1:4], strict=True))
    inner_forward, inner_again = same_seeds()
    with patch("qformer_fast.ops._seeds.new_seeds", side_effect=AssertionError), again:
        assert all(a is b for a, b in zip(part(inner_forward), seeds, strict=True))
    with inner_again:
        assert all(a is b for a, b in zip(draw_seeds(X, 0.5, 0.0, 0.5), seeds[1:4], strict=True))
    assert int(draw_seed(X, 0.5)) not in [int(seed) for seed in seeds if seed is not None]
