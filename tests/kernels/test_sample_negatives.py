"""The Triton kernel of sample_negatives: under the interpreter without a GPU, on the GPU with one."""

import pytest
import torch

from qformer_fast import ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OP = torch.ops.qformer_fast.sample_negatives_fwd
# 99.9% points of the chi-square distribution, by degrees of freedom
BEYOND = {3: 16.27, 9: 27.88}


def seed(number=2**40 + 17):
    return torch.tensor([number], device=DEVICE)


def inputs(rows, candidates, dtype=torch.float32):
    """About a third is excluded, in row 0 everything."""
    logits = (torch.randn(rows, candidates) * 3).to(DEVICE, dtype)
    excluded = torch.rand(rows, candidates) < 0.3
    excluded[0] = True
    return logits, excluded.to(DEVICE)


def draw(logits, excluded):
    """On a CPU the formula's, since a row costs the interpreter milliseconds; the kernel's are the same ones."""
    if DEVICE == "cuda":
        return OP(logits, excluded, seed())
    drawn = reference.sample_negatives_fwd(logits, excluded, seed())
    assert torch.equal(OP(logits[:100], excluded[:100], seed()), drawn[:100])
    return drawn


def chi_squared(drawn, probabilities):
    counts = torch.bincount(drawn.cpu(), minlength=len(probabilities)).double()
    expected = probabilities.double().cpu() * len(drawn)
    assert counts[expected == 0].sum() == 0
    return ((counts - expected) ** 2 / expected)[expected > 0].sum()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (40, 33), (9, 128), (4, 2500)], ids=lambda s: "x".join(map(str, s)))
def test_same_draw_as_the_formula(shape, dtype):
    """Which makes its noise of the same random words; what differs by rounding can't be among so few."""
    logits, excluded = inputs(*shape, dtype)
    actual = OP(logits, excluded, seed())
    assert actual.dtype == torch.int64
    assert torch.equal(actual, reference.sample_negatives_fwd(logits, excluded, seed()))
    possible = ~excluded | excluded.all(1, keepdim=True)
    assert possible.gather(1, actual[:, None]).all()


def test_has_the_distribution_of_softmax():
    rows = 1000
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5], device=DEVICE)
    excluded = torch.tensor([False, False, False, True, False], device=DEVICE)
    drawn = draw(logits.expand(rows, -1), excluded.expand(rows, -1))
    assert chi_squared(drawn, logits.masked_fill(excluded, -torch.inf).softmax(0)) < BEYOND[3]


def test_is_uniform_where_everything_is_excluded():
    rows = 1000
    logits = torch.arange(10.0, device=DEVICE).expand(rows, -1)
    drawn = draw(logits, torch.ones_like(logits, dtype=torch.bool))
    assert chi_squared(drawn, torch.full((10,), 0.1)) < BEYOND[9]


def test_draws_of_neighbours_are_independent():
    """Of rows one after another, which have neighbouring counters."""
    logits = torch.zeros(1001, 2, device=DEVICE)
    drawn = draw(logits, torch.zeros_like(logits, dtype=torch.bool))
    assert chi_squared(2 * drawn[:-1] + drawn[1:], torch.full((4,), 0.25)) < BEYOND[3]


def test_noise_is_finite_and_exact_for_every_word():
    words = torch.tensor([0, 1, 2**20, 2**21 - 1, 2**21, 2**31, 2**32 - 257, 2**32 - 1]).double()
    v = (words + 0.5) / 2**32
    exact = -(-torch.log1p(-v)).log()
    v = ((words.float() + 0.5) * 2**-32).clamp_max(1 - 2**-24)
    noise = -torch.where(v < 2**-11, v + 0.5 * v * v, -(1 - v).log()).log()
    assert noise.isfinite().all()
    torch.testing.assert_close(noise[:-2].double(), exact[:-2], rtol=0, atol=1e-4)


def test_the_seed_decides():
    logits, excluded = inputs(16, 40)
    first = OP(logits, excluded, seed())
    assert torch.equal(first, OP(logits, excluded, seed()))
    assert not torch.equal(first, OP(logits, excluded, seed(3)))
    drawn = []
    for number in (0, 0, 1):
        torch.manual_seed(number)
        drawn.append(ops.sample_negatives(logits, excluded, backend="triton"))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_transposed_logits():
    """As the text side's similarities are; strides are read, nothing is copied."""
    logits, excluded = inputs(40, 33)
    found = OP(logits.t().contiguous().t(), excluded.t().contiguous().t(), seed())
    assert torch.equal(found, OP(logits, excluded, seed()))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38, -3e38])
def test_extreme_logits(value):
    logits = torch.full((50, 6), value, device=DEVICE)
    logits[:, 4] = 0.0
    excluded = torch.zeros_like(logits, dtype=torch.bool)
    excluded[:, 0] = True
    drawn = OP(logits, excluded, seed())
    assert (drawn != 0).all()
    assert ((drawn == 4) == (not value > 0)).all()
    only = excluded.clone()
    only[:, [1, 2, 4, 5]] = True
    assert (OP(logits, only, seed()) == 3).all()


def test_no_rows_and_no_candidates():
    logits, excluded = inputs(1, 5)
    assert OP(logits[:0], excluded[:0], seed()).shape == (0,)
    with pytest.raises(ValueError, match=r"logits must have candidates, got \(1, 0\)"):
        ops.sample_negatives(logits[:, :0], excluded[:, :0])


def test_logits_that_require_grad():
    logits, excluded = inputs(4, 5)
    assert not ops.sample_negatives(logits.requires_grad_(), excluded, backend="triton").requires_grad


def test_opcheck():
    torch.library.opcheck(OP.default, (*inputs(5, 33), seed()))


def test_compiles_without_a_graph_break():
    logits, excluded = inputs(64, 33)
    compiled = torch.compile(lambda *x: OP(*x), fullgraph=True)
    assert torch.equal(compiled(logits, excluded, seed()), OP(logits, excluded, seed()))
    public = torch.compile(lambda *x: ops.sample_negatives(*x, backend="triton"), fullgraph=True)
    drawn = public(logits, excluded)
    assert not excluded[1:].gather(1, drawn[1:, None]).any()


@pytest.mark.cuda
def test_has_the_distribution_of_softmax_over_many_draws():
    rows = 2_000_000
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -6.0, 3.0, 0.1, -2.0, 1.5], device=DEVICE)
    drawn = OP(logits.expand(rows, -1), torch.zeros(rows, 10, dtype=torch.bool, device=DEVICE), seed())
    assert chi_squared(drawn, logits.softmax(0)) < BEYOND[9]
