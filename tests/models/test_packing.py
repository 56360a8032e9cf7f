"""Stacked weights and their gradients."""

import pytest
import torch

from qformer_fast.models.packing import stack_weights

SHAPES = [(4, 6), (3, 6), (5, 2), (1, 1)]
COUNTS = [2, 1, 1]


def groups_of(weights):
    weights = iter(weights)
    return [tuple(next(weights) for _ in range(count)) for count in COUNTS]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_values_and_gradients(dtype):
    """Against cat and a cast, the first stack used twice."""
    weights = [torch.randn(shape, requires_grad=True) for shape in SHAPES]
    actual = stack_weights(groups_of(weights), dtype)
    expected = [torch.cat(group).to(dtype) for group in groups_of(weights)]
    gradients = [torch.randn_like(x) for x in expected]
    results = []
    for stacks in (actual, expected):
        total = sum((x * g).sum() for x, g in zip(stacks, gradients, strict=True)) + stacks[0].square().sum()
        results.append(torch.autograd.grad(total, weights))
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == dtype and torch.equal(x, y)
    for weight, x, y in zip(weights, *results, strict=True):
        assert x.dtype == weight.dtype and x.is_contiguous()
        torch.testing.assert_close(x, y, rtol=0.02 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_what_is_not_used_or_frozen_has_no_gradient():
    weights = [torch.randn(shape, requires_grad=shape != (3, 6)) for shape in SHAPES]
    stacks = stack_weights(groups_of(weights), torch.bfloat16)
    stacks[0].sum().backward()
    assert torch.equal(weights[0].grad, torch.ones(4, 6))
    assert all(weight.grad is None for weight in weights[1:])


def test_changed_weights_change_the_stack():
    weights = [torch.zeros(shape) for shape in SHAPES]
    first = stack_weights(groups_of(weights), torch.bfloat16)
    weights[0].fill_(1.0)
    assert first[0].abs().max() == 0 and stack_weights(groups_of(weights), torch.bfloat16)[0].sum() == 24
