"""Dropout masks of the kernels against their definition, and its statistics."""

import pytest
import torch
import triton
import triton.language as tl

from qformer_fast.kernels.philox import dropout_keep
from qformer_fast.reference import philox

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def keep_kernel(seed_ptr, out_ptr, threshold, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    rows, groups = tl.arange(0, ROWS)[:, None], tl.arange(0, GROUPS)[None, :]
    keep = dropout_keep(tl.load(seed_ptr), rows * GROUPS + groups, threshold)
    columns = tl.arange(0, 8 * GROUPS)
    tl.store(out_ptr + rows * 8 * GROUPS + columns[None, :], keep)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**61 + 12345])
def test_kernel_equals_the_definition(seed):
    seed = torch.tensor([seed], device=DEVICE)
    out = torch.empty(16, 64, dtype=torch.bool, device=DEVICE)
    keep_kernel[(1,)](seed, out, philox.threshold_and_scale(0.3)[0], ROWS=16, GROUPS=8)
    assert torch.equal(out, philox.dropout_keep(seed, 16, 64, 0.3))


def test_known_answer():
    """Salmon et al.'s own vector for counter 0 and key 0, in Triton's order of words."""
    words = philox._philox(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert sorted(int(word) for word in words) == sorted([0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48])


def test_share_and_independence():
    keep = philox.dropout_keep(torch.tensor([7]), 1000, 1000, 0.1).double()
    assert abs(keep.mean() - 0.9) < 3e-3 * 0.3
    assert abs(keep.mean(0) - 0.9).max() < 6 * 0.3 / 1000**0.5
    other = philox.dropout_keep(torch.tensor([8]), 1000, 1000, 0.1).double()
    for shifted in (keep.roll(1, 1), keep.roll(1, 0), keep.roll(8, 1), other):
        assert abs(((keep - 0.9) * (shifted - 0.9)).mean() / 0.09) < 5e-3
