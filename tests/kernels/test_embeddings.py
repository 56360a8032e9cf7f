"""The Triton kernels of embeddings: under the interpreter without a GPU, on the GPU with one."""

import pytest
import torch
from torch.nn import functional as F

from qformer_fast import kernels, ops, reference
from qformer_fast.kernels.embeddings import COUNTED, sort_keys
from qformer_fast.reference.philox import dropout_keep, threshold_and_scale

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
# rows, words, positions, hidden
SHAPES = [(0, 7, 3, 16), (1, 1, 1, 1), (1, 30, 5, 768), (13, 20, 6, 50), (40, 300, 9, 130), (9, 5, 4, 1025)]
EPS = 1e-5
NAMES = "dword", "dposition", "dweight", "dbias"


def inputs(rows, words, positions, hidden, dtype):
    def rand(*shape):
        return torch.randn(*shape, device=DEVICE)

    ids = [torch.randint(size, (rows,), device=DEVICE) for size in (words, positions)]
    tables = [rand(words, hidden), rand(positions, hidden), rand(hidden) + 1, rand(hidden)]
    return ids, [x.to(dtype) for x in tables], rand(rows, hidden).to(dtype)


def run(op, ids, tables, dout):
    tables = [x.detach().requires_grad_() for x in tables]
    out = op(*ids, *tables)
    gradients = torch.autograd.grad(out, tables, dout.to(out.dtype))
    return {"out": out.detach(), **dict(zip(NAMES, gradients, strict=True))}


def kernel(*tensors, padding_idx=None, dropout_p=0.0):
    return ops.embeddings(*tensors, eps=EPS, padding_idx=padding_idx, dropout_p=dropout_p, backend="triton")


def plain(*tensors, padding_idx=None):
    return reference.embeddings(*tensors, eps=EPS, padding_idx=padding_idx)


def double(tensors):
    return [x.double() for x in tensors]


@pytest.mark.usefixtures("poison")
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_forward_and_gradients(shape, dtype, assert_close):
    ids, tables, dout = inputs(*shape, dtype)
    actual = run(kernel, ids, tables, dout)
    if not shape[0]:
        assert actual["out"].shape == (0, 16)
        assert all(actual[name].shape == x.shape for name, x in zip(NAMES, tables, strict=True))
        assert all(actual[name].abs().max() == 0 for name in NAMES)
        return
    if shape[3] == 1:
        # a row of one column is its own mean: these gradients are zero but for rounding, which rstd makes larger
        for name in ("dword", "dposition", "dweight"):
            assert actual.pop(name).abs().max() <= 4 * torch.finfo(dtype).eps * EPS**-0.5
    assert_close(actual, run(plain, ids, tables, dout), run(plain, ids, double(tables), dout.double()))


@pytest.mark.usefixtures("poison")
@DTYPES
@pytest.mark.parametrize("dropout_p", [0.1, 0.6])
@pytest.mark.parametrize("shape", [(1, 9, 3, 768), (13, 20, 6, 50)], ids=lambda s: "x".join(map(str, s)))
def test_dropout(shape, dropout_p, dtype, assert_close):
    """Against plain PyTorch with the mask that the seed stands for."""
    ids, tables, dout = inputs(*shape, dtype)
    seed = torch.tensor([2**40 + 3], device=DEVICE)
    keep = dropout_keep(seed, shape[0], shape[3], dropout_p)

    def dropped(*tensors):
        return torch.where(keep, plain(*tensors) * threshold_and_scale(dropout_p)[1], 0.0)

    def op(*tensors):
        return torch.ops.qformer_fast.embeddings_fwd(*tensors, seed, [], None, EPS, dropout_p, dtype)[0]

    low, high = run(dropped, ids, tables, dout), run(dropped, ids, double(tables), dout.double())
    assert_close(run(op, ids, tables, dout), low, high)


def test_dropout_draws_anew():
    ids, tables, _ = inputs(8, 20, 6, 64, torch.float32)
    first, second = (kernel(*ids, *tables, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)


# places of the sorted ids, in windows of 16: an id inside one, over two, over many, ending where one ends, the last
COUNTS = [
    [1], [15], [16], [17], [32], [5, 11, 16, 1], [15, 2, 15], [1, 300, 3], [40, 0, 0, 55, 1, 1, 63], [2] * 40,
    [0, 700],
]  # fmt: skip


@pytest.mark.usefixtures("poison", "rows_at_once")
@pytest.mark.parametrize("counts", COUNTS, ids=lambda c: "-".join(map(str, c))[:30])
def test_rows_of_the_same_word(counts, assert_close):
    """Ids that occur more often than one program sums."""
    rows = sum(counts)
    ids, tables, dout = inputs(rows, len(counts) + 2, 2, 17, torch.float32)
    words = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    ids[0] = words[torch.randperm(rows)].to(DEVICE)
    assert_close(
        run(kernel, ids, tables, dout), run(plain, ids, tables, dout), run(plain, ids, double(tables), dout.double())
    )


@pytest.mark.parametrize("places", [1, 31, 129, 700, COUNTED + 1])
def test_keys_are_sorted_stably(places):
    """By counting, and by PyTorch where there are too many."""
    keys = torch.randint(-3, 40, (places,), device=DEVICE, dtype=torch.int32)
    actual, expected = sort_keys(keys), keys.sort(stable=True)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("padding_idx", [0, 3, -1])
def test_padding_word_gets_no_gradient(padding_idx, assert_close):
    ids, tables, dout = inputs(90, 5, 4, 24, torch.float32)
    actual, low = (run(lambda *x, op=op: op(*x, padding_idx=padding_idx), ids, tables, dout) for op in (kernel, plain))
    assert actual["dword"][padding_idx].abs().max() == 0
    assert_close(actual, low, run(lambda *x: plain(*x, padding_idx=padding_idx), ids, double(tables), dout.double()))


@pytest.mark.parametrize("wrong", [-1, 5, 2**31 - 1])
def test_an_id_outside_its_table_reads_and_writes_nothing(wrong):
    (words, positions), tables, dout = inputs(40, 5, 4, 24, torch.float32)
    words, positions = words.clone(), positions.clone()
    words[7], positions[30] = wrong, wrong
    word, position, weight, bias = tables
    out, mean, rstd = kernels.embeddings_fwd(words, positions, *tables, None, EPS, 0.0, torch.float32)
    rows = F.layer_norm(torch.stack([position[positions[7]], word[words[30]]]), (24,), weight, bias, EPS)
    torch.testing.assert_close(out[[7, 30]], rows)
    saved = words, positions, word, position, weight, mean, rstd
    dword, dposition, *_ = kernels.embeddings_bwd(dout, *saved, None, None, 0.0)
    drows = kernels.embeddings_bwd(
        dout, torch.arange(40, device=DEVICE), torch.arange(40, device=DEVICE) * 0,
        word[words.clamp(0, 4)] * (words == words.clamp(0, 4))[:, None]
        + position[positions.clamp(0, 3)] * (positions == positions.clamp(0, 3))[:, None],
        torch.zeros(1, 24, device=DEVICE), weight, mean, rstd, None, None, 0.0,
    )[0]  # fmt: skip
    for found, ids, size in ((dword, words, 5), (dposition, positions, 4)):
        expected = torch.stack([drows[ids == i].sum(0) for i in range(size)])
        torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("rows_at_once")
def test_gradients_are_added_to_what_is_given():
    """Longer runs of one word than a window, and a word that is left out."""
    ids, tables, dout = inputs(200, 7, 3, 48, torch.float32)
    options = dict(padding_idx=2, backend="triton", eps=EPS)
    expected = run(lambda *x: ops.embeddings(*x, **options), ids, tables, dout)
    start = [torch.randn_like(x) for x in tables]
    totals = [x.clone() for x in start]
    leaves = [x.detach().requires_grad_() for x in tables]
    for _ in range(2):
        ops.embeddings(*ids, *leaves, **options, gradients=totals).backward(dout)
    assert all(leaf.grad is None for leaf in leaves)
    for name, total, begin in zip(NAMES, totals, start, strict=True):
        torch.testing.assert_close((total - begin) / 2, expected[name], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"gradients must be 4 tensors, got 3"):
        ops.embeddings(*ids, *tables, gradients=totals[1:])


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_fp32_tables_under_autocast_keep_their_gradients_in_fp32(dropout_p):
    ids, tables, dout = inputs(40, 9, 6, 48, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = run(lambda *x: kernel(*x, dropout_p=dropout_p), ids, tables, dout)
    assert found["out"].dtype == torch.bfloat16
    assert {found[name].dtype for name in NAMES} == {torch.float32}
    if not dropout_p:
        high = run(plain, ids, double(tables), dout.double())
        for name, x in found.items():
            torch.testing.assert_close(x.double(), high[name], rtol=0.02, atol=0.05)


def test_int32_ids_and_tables_that_are_not_contiguous():
    ids, tables, dout = inputs(12, 9, 6, 48, torch.float32)
    strided = [x.t().contiguous().t() for x in tables[:2]] + tables[2:]
    actual = run(kernel, [x.int() for x in ids], strided, dout.t().contiguous().t())
    torch.testing.assert_close(actual, run(kernel, ids, tables, dout))


@pytest.mark.usefixtures("rows_at_once")
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_same_result_twice(dropout_p):
    ids, tables, dout = inputs(200, 7, 3, 200, torch.float16)

    def once():
        torch.manual_seed(3)
        return run(lambda *x: kernel(*x, padding_idx=0, dropout_p=dropout_p), ids, tables, dout)

    first, *others = (once() for _ in range(20 if DEVICE == "cuda" else 2))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_formula_gradcheck(dropout_p):
    ids, tables, _ = inputs(7, 4, 3, 6, torch.float64)
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    op = torch.ops.qformer_fast.embeddings_fwd
    tables = [x.requires_grad_() for x in tables]
    # the formula, unlike the kernels, adds rows in any order on a GPU
    assert torch.autograd.gradcheck(
        lambda *x: op(*ids, *x, seed, [], None, EPS, dropout_p, torch.float64)[0], tables, nondet_tol=1e-12
    )


def test_formula_leaves_the_padding_word_out():
    ids, tables, dout = inputs(30, 4, 3, 6, torch.float64)
    op = torch.ops.qformer_fast.embeddings_fwd
    actual = run(lambda *x: op(*x, None, [], 2, EPS, 0.0, torch.float64)[0], ids, tables, dout)
    torch.testing.assert_close(actual, run(lambda *x: plain(*x, padding_idx=2), ids, tables, dout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "formula"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck(dropout_p, dtype):
    ids, tables, _ = inputs(5, 8, 4, 33, dtype)
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    op = torch.ops.qformer_fast.embeddings_fwd.default
    torch.library.opcheck(op, (*ids, *(x.requires_grad_() for x in tables), seed, [], 1, EPS, dropout_p, dtype))


def test_compiles_without_a_graph_break():
    ids, tables, dout = inputs(5, 8, 4, 33, torch.float32)

    def twice(*tensors):
        return 2 * kernel(*tensors, padding_idx=0)

    actual, expected = (run(op, ids, tables, dout) for op in (torch.compile(twice, fullgraph=True), twice))
    torch.testing.assert_close(actual, expected)


def test_what_the_kernels_do_not_take():
    ids, tables, _ = inputs(2, 3, 3, 4097, torch.float32)
    with pytest.raises(RuntimeError, match="its kernels take hidden sizes of 1 to 4096, got 4097"):
        kernel(*ids, *tables)
    assert ops.embeddings(*ids, *tables).shape == (2, 4097)


def test_bad_input_is_refused():
    ids, (word, position, weight, bias), _ = inputs(2, 9, 4, 8, torch.float32)
    with pytest.raises(ValueError, match=r"position_ids must be \(2\), got \(1,\)"):
        ops.embeddings(ids[0], ids[1][:1], word, position, weight, bias)
    with pytest.raises(ValueError, match=r"position_weight must be \(positions, 8\), got \(4, 7\)"):
        ops.embeddings(*ids, word, position[:, :7], weight, bias)
    with pytest.raises(TypeError, match="position_ids must be integers, int64 or int32, got torch.float32"):
        ops.embeddings(ids[0], ids[1].float(), word, position, weight, bias)
    with pytest.raises(ValueError, match=r"padding_idx must lie in \[-9, 9\), got 9"):
        ops.embeddings(*ids, word, position, weight, bias, padding_idx=9)
    with pytest.raises(ValueError, match="bias must be on"):
        ops.embeddings(*ids, word, position, weight, bias.to("meta"))
    with pytest.raises(ValueError, match=r"dropout_p must lie in \[0, 1\), got -0.1"):
        ops.embeddings(*ids, word, position, weight, bias, dropout_p=-0.1)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a device ids are trusted: a look would wait for it")
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("wrong", [-1, 9])
def test_ids_outside_their_table_are_refused_on_a_cpu(wrong, backend):
    (words, positions), tables, _ = inputs(3, 9, 9, 8, torch.float32)
    ids = torch.tensor([0, wrong, 2])
    with pytest.raises(ValueError, match=rf"input_ids must lie in \[0, 9\), got {wrong}"):
        ops.embeddings(ids, positions, *tables, backend=backend)
    with pytest.raises(ValueError, match=rf"position_ids must lie in \[0, 9\), got {wrong}"):
        ops.embeddings(words, ids, *tables, backend=backend)
