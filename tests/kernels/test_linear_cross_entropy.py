"""The Triton kernels of linear_cross_entropy: under the interpreter without a GPU, on the GPU with one."""

import math

import pytest
import torch

from qformer_fast import kernels, ops, reference
from qformer_fast.kernels import launch
from qformer_fast.kernels.linear_cross_entropy import chunk_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
# rows, hidden, vocab
SHAPES = [(1, 1, 1), (3, 5, 2), (37, 20, 71), (9, 33, 1000)]
NAMES = "x", "weight", "bias"
OPS = torch.ops.qformer_fast


def inputs(rows, hidden, vocab, dtype):
    """Some labels are ignored."""
    x, weight, bias = torch.randn(rows, hidden), torch.randn(vocab, hidden) * hidden**-0.5, torch.randn(vocab)
    labels = torch.randint(vocab, (rows,))
    labels[1::5] = -100
    return [t.to(DEVICE, dtype) for t in (x, weight, bias)], labels.to(DEVICE)


def run(op, tensors, labels, dout=None, **options):
    """Loss and the gradients of all tensors but None; ``dout`` is random by default."""
    tensors = [t if t is None else t.detach().requires_grad_() for t in tensors]
    out = op(*tensors, labels, **options)
    if dout is None:
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    given = {f"d{name}": t for name, t in zip(NAMES, tensors, strict=True) if t is not None}
    gradients = torch.autograd.grad(out, list(given.values()), dout.to(out))
    return {"out": out.detach(), **dict(zip(given, gradients, strict=True))}


def kernel(*tensors, **options):
    return ops.linear_cross_entropy(*tensors, **options, backend="triton")


def double(tensors):
    return [t if t is None else t.double() for t in tensors]


def compare(assert_close, tensors, labels, dout=None, **options):
    plain = reference.linear_cross_entropy
    actual = run(kernel, tensors, labels, dout, **options)
    low, high = (run(plain, t, labels, dout, **options) for t in (tensors, double(tensors)))
    assert_close(actual, low, high)
    assert actual["out"].dtype == torch.float32
    assert all(actual[f"d{name}"].dtype == t.dtype for name, t in zip(NAMES, tensors, strict=True) if t is not None)
    return actual


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 16 rows."""
    settings = launch.settings

    def with_small_chunks(kernel, device):
        found = settings(kernel, device)
        return found | {"CHUNK_ROWS": 16} if "CHUNK_ROWS" in found else found

    monkeypatch.setattr(launch, "settings", with_small_chunks)


@pytest.mark.usefixtures("poison")
@DTYPES
@REDUCTIONS
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_forward_and_gradients(shape, smoothing, reduction, dtype, assert_close):
    tensors, labels = inputs(*shape, dtype)
    compare(assert_close, tensors, labels, label_smoothing=smoothing, reduction=reduction)


@pytest.mark.usefixtures("poison", "small_chunks")
@DTYPES
@REDUCTIONS
def test_chunks(reduction, dtype, assert_close):
    """Three of 16, 16 and 5 rows; weight gradients are as exact as those of one product."""
    tensors, labels = inputs(37, 20, 71, dtype)
    compare(assert_close, tensors, labels, label_smoothing=0.1, reduction=reduction)


@pytest.mark.parametrize(("rows", "chunks"), [(1, [16]), (3072, [3072]), (3073, [1552] * 2), (11000, [2752] * 4)])
def test_chunks_are_even(rows, chunks):
    chunk = chunk_rows(rows, 3072)
    assert [chunk] * math.ceil(rows / chunk) == chunks


@pytest.mark.usefixtures("poison")
@DTYPES
@REDUCTIONS
def test_without_bias(reduction, dtype, assert_close):
    (x, weight, _), labels = inputs(13, 24, 50, dtype)
    compare(assert_close, [x, weight, None], labels, label_smoothing=0.1, reduction=reduction)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@REDUCTIONS
def test_all_rows_ignored(reduction, smoothing):
    tensors, labels = inputs(7, 8, 30, torch.float32)
    labels[:] = 5
    options = dict(label_smoothing=smoothing, reduction=reduction, ignore_index=5)
    actual = run(kernel, tensors, labels, **options)
    expected = run(reference.linear_cross_entropy, tensors, labels, **options)
    assert torch.equal(actual["out"].isnan(), expected["out"].isnan())
    assert bool(actual["out"].isnan().any()) == (reduction == "mean")
    assert all(actual[f"d{name}"].abs().max() == expected[f"d{name}"].abs().max() == 0 for name in NAMES)


@pytest.mark.usefixtures("poison")
@REDUCTIONS
def test_no_rows(reduction):
    tensors, labels = inputs(0, 8, 30, torch.float32)
    actual = run(kernel, tensors, labels, reduction=reduction)
    expected = run(reference.linear_cross_entropy, tensors, labels, reduction=reduction)
    for name, x in actual.items():
        torch.testing.assert_close(x, expected[name], equal_nan=True)


@pytest.mark.usefixtures("poison")
@DTYPES
def test_large_logits(dtype, assert_close):
    """Where exp overflows unless the largest logit is subtracted first."""
    (x, weight, bias), labels = inputs(11, 16, 40, dtype)
    compare(assert_close, [x * 100, weight * 10, bias * 100], labels, label_smoothing=0.1)


def test_rare_words_keep_their_gradient_under_a_scaled_fp16_loss():
    """Probabilities around 1e-7, and a loss scale as GradScaler's, which comes after the gradients were made."""
    rows, vocab = 64, 200
    x, weight, bias = torch.zeros(rows, 8), torch.zeros(vocab, 8), torch.zeros(vocab)
    x[:, 0], bias[1:] = 1.0, -16.0
    tensors, labels = [t.to(DEVICE, torch.float16) for t in (x, weight, bias)], torch.zeros(rows).long().to(DEVICE)
    dout = torch.tensor(65536.0)
    actual = run(kernel, tensors, labels, dout)["dbias"]
    expected = run(reference.linear_cross_entropy, double(tensors), labels, dout)["dbias"]
    torch.testing.assert_close(actual[1:].double(), expected[1:], rtol=0.05, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_noncontiguous(reduction, assert_close):
    (x, weight, bias), labels = inputs(12, 10, 40, torch.float32)
    wide = torch.stack([bias, bias], dim=1)[:, 0]
    strided = [x.t().contiguous().t(), weight.t().contiguous().t(), wide]
    options = dict(label_smoothing=0.1, reduction=reduction)
    actual = run(kernel, strided, torch.stack([labels, labels], dim=1)[:, 0], **options)
    expected = run(kernel, [x, weight, bias], labels, **options)
    assert_close(actual, expected, run(reference.linear_cross_entropy, double([x, weight, bias]), labels, **options))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)], ids=str)
def test_frozen_inputs(wanted, reduction):
    tensors, labels = inputs(10, 8, 30, torch.float32)
    options = dict(label_smoothing=0.1, reduction=reduction)
    everything = run(kernel, tensors, labels, torch.ones(()).expand(10 if reduction == "none" else ()), **options)
    tensors = [t.requires_grad_(bool(wants)) for t, wants in zip(tensors, wanted, strict=True)]
    kernel(*tensors, labels, **options).sum().backward()
    for name, t, wants in zip(NAMES, tensors, wanted, strict=True):
        assert torch.equal(t.grad, everything[f"d{name}"]) if wants else t.grad is None


def test_no_gradients_without_need(monkeypatch):
    """Forward leaves them out where nothing requires grad and under no_grad."""
    asked = []
    plain = kernels.linear_cross_entropy_fwd

    def recorded(*arguments):
        asked.append(arguments[-1])
        return plain(*arguments)

    monkeypatch.setattr(kernels, "linear_cross_entropy_fwd", recorded)
    tensors, labels = inputs(10, 8, 30, torch.float32)
    losses = [kernel(*tensors, labels)]
    tensors[1].requires_grad_()
    losses.append(kernel(*tensors, labels).detach())
    with torch.no_grad():
        losses.append(kernel(*tensors, labels))
    assert asked == [[False] * 3, [False, True, False], [False] * 3]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fp32_weight_under_autocast_keeps_its_gradient_in_fp32(reduction, assert_close):
    tensors, labels = inputs(20, 16, 60, torch.float32)
    options = dict(label_smoothing=0.1, reduction=reduction)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = run(kernel, tensors, labels, **options)
        low = run(reference.linear_cross_entropy, tensors, labels, **options)
    assert all(x.dtype == torch.float32 for x in actual.values())
    # results are fp32, what is multiplied and exponentiated is not
    high = run(reference.linear_cross_entropy, double(tensors), labels, **options)
    assert_close(actual, low, high, atol=torch.finfo(torch.bfloat16).eps / 2)


def test_backward_twice():
    tensors, labels = inputs(10, 8, 30, torch.float32)
    tensors = [t.requires_grad_() for t in tensors]
    loss = kernel(*tensors, labels)
    first = torch.autograd.grad(loss, tensors, torch.tensor(2.0).to(loss), retain_graph=True)
    second = torch.autograd.grad(loss, tensors)
    assert all(torch.equal(a, 2 * b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("small_chunks")
@DTYPES
@REDUCTIONS
def test_same_result_twice(reduction, dtype):
    tensors, labels = inputs(70, 24, 130, dtype)
    options = dict(label_smoothing=0.1, reduction=reduction)
    first, *others = (run(kernel, tensors, labels, **options) for _ in range(3))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


@REDUCTIONS
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_bias", [True, False])
def test_formula_gradcheck(with_bias, smoothing, reduction):
    """Through the custom op, whose kernels do not run in fp64."""
    tensors, labels = inputs(6, 4, 9, torch.float64)
    tensors = [t.requires_grad_() for t in tensors[: 2 + with_bias]]

    def op(x, weight, bias=None):
        wanted = [True, True, bias is not None]
        return OPS.linear_cross_entropy_fwd(x, weight, bias, labels, smoothing, -100, reduction, wanted, [])[0]

    assert torch.autograd.gradcheck(op, tensors)
    expected = reference.linear_cross_entropy(
        *tensors, *[None] * (not with_bias), labels, label_smoothing=smoothing, reduction=reduction
    )
    torch.testing.assert_close(op(*tensors), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@REDUCTIONS
def test_opcheck(reduction, dtype):
    tensors, labels = inputs(5, 8, 30, dtype)
    dout = torch.randn(5, device=DEVICE)
    rows = dout, *tensors, labels, 0.1, -100, [True, False, True]
    torch.library.opcheck(OPS.linear_cross_entropy_rows_bwd.default, rows)
    tensors = [t.requires_grad_() for t in tensors]
    arguments = *tensors, labels, 0.1, -100, reduction, [True] * 3, []
    torch.library.opcheck(OPS.linear_cross_entropy_fwd.default, arguments)
    with torch.no_grad():
        saved = OPS.linear_cross_entropy_fwd(*arguments)[1:]
    if reduction != "none":
        scaled = torch.ones((), device=DEVICE), *saved, [], dtype, dtype
        torch.library.opcheck(OPS.linear_cross_entropy_bwd.default, scaled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_gradients_are_added_to_what_is_given(dtype):
    """fp32 parameters beside rows of ``dtype``."""
    (x, weight, bias), labels = inputs(10, 8, 30, torch.float32)
    x = x.to(dtype)
    expected = run(kernel, (x, weight, bias), labels, torch.ones(()))
    start = torch.randn_like(weight), torch.randn_like(bias)
    totals = [t.clone() for t in start]
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    for _ in range(2):
        kernel(*leaves, labels, gradients=totals).backward()
    assert leaves[1].grad is None and leaves[2].grad is None
    torch.testing.assert_close(leaves[0].grad, 2 * expected["dx"])
    for name, total, begin in zip(("dweight", "dbias"), totals, start, strict=True):
        torch.testing.assert_close((total - begin) / 2, expected[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="gradients need a bias and a reduced loss"):
        ops.linear_cross_entropy(x, weight, None, labels, gradients=totals)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(reduction):
    tensors, labels = inputs(10, 8, 30, torch.float32)

    def step(*tensors):
        return 2 * kernel(*tensors, labels, label_smoothing=0.1, reduction=reduction)

    compiled = torch.compile(step, fullgraph=True)
    actual, expected = (run(lambda *t, f=f: f(*t[:3]), tensors, labels) for f in (compiled, step))
    for name, x in actual.items():
        torch.testing.assert_close(x, expected[name])


def test_labels_are_checked():
    (x, weight, bias), labels = inputs(5, 8, 30, torch.float32)
    with pytest.raises(TypeError, match=r"labels must be int64, got torch.int32"):
        ops.linear_cross_entropy(x, weight, bias, labels.int())
    if DEVICE == "cuda":
        return
    for label in (30, -1, -100):
        labels[2] = label
        with pytest.raises(ValueError, match=rf"labels must lie in \[0, 30\) or be -7, got {label}"):
            ops.linear_cross_entropy(x, weight, bias, labels.clamp_min(label), ignore_index=-7)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("label", [30, -1, 2**40, -(2**40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_a_label_outside_is_nan_in_its_row_alone(dtype, label):
    """Kernels and formula, past the check of labels on a CPU."""
    tensors, labels = inputs(5, 8, 30, dtype)
    tensors = [t.requires_grad_() for t in tensors]
    labels[:] = torch.arange(5)
    clean = OPS.linear_cross_entropy_fwd(*tensors, labels, 0.1, -100, "none", [True] * 3, [])[0]
    labels[2] = label
    losses = OPS.linear_cross_entropy_fwd(*tensors, labels, 0.1, -100, "none", [True] * 3, [])[0]
    assert losses.isnan().tolist() == [False, False, True, False, False]
    assert torch.equal(losses[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    (dx,) = torch.autograd.grad(losses.sum(), tensors[0])
    assert dx.isnan().all(1).tolist() == [False, False, True, False, False]
    loss = OPS.linear_cross_entropy_fwd(*tensors, labels, 0.1, -100, "mean", [True] * 3, [])[0]
    assert loss.isnan()


@pytest.mark.skipif(DEVICE == "cuda", reason="fp64 runs the formula on any device")
def test_fp64_is_refused_by_the_kernels():
    tensors, labels = inputs(2, 3, 4, torch.float64)
    with pytest.raises(
        RuntimeError, match=r"can't run this linear_cross_entropy: its kernels take fp32, fp16 and bf16"
    ):
        kernel(*tensors, labels)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1400, 11000])
def test_blip2_sizes_with_less_memory_than_plain_pytorch(rows, assert_close):
    """bf16; fp64 in parts of 1,000 rows, whose logits fit."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE)

    tensors = [t.bfloat16() for t in (rand(rows, 768), rand(30523, 768) * 0.03, rand(30523))]
    labels = torch.randint(30523, (rows,), generator=generator, device=DEVICE)
    results, peaks = [], []
    for op in (kernel, reference.linear_cross_entropy):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results.append(run(op, tensors, labels, torch.ones(()), label_smoothing=0.1))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    high = {f"d{name}": torch.zeros_like(t, dtype=torch.float64) for name, t in zip(NAMES, tensors, strict=True)}
    high["out"] = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for part in torch.arange(rows, device=DEVICE).split(1000):
        x, weight, bias = double(tensors)
        options = dict(label_smoothing=0.1, reduction="sum")
        found = run(reference.linear_cross_entropy, [x[part], weight, bias], labels[part], torch.ones(()), **options)
        high["dx"][part] = found["dx"] / rows
        for name in ("out", "dweight", "dbias"):
            high[name] += found[name] / rows
    assert_close(*results, high)
    assert peaks[0] < peaks[1]
