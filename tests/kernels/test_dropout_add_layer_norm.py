"""The Triton kernels of dropout_add_layer_norm: under the interpreter without a GPU, on the GPU with one."""

import pytest
import torch
from torch.nn import functional as F

from qformer_fast import kernels, ops, reference
from qformer_fast.reference.philox import dropout_keep, threshold_and_scale

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
SHAPES = [(0, 16), (1, 1), (1, 768), (7, 50), (33, 130), (29, 768), (3, 1025)]
EPS = 1e-5


def inputs(rows, hidden, dtype, parameter_dtype=None):
    def rand(*shape):
        return torch.randn(*shape, device=DEVICE)

    parameters = [(rand(hidden) + shift).to(parameter_dtype or dtype) for shift in (1, 0)]
    return [(rand(rows, hidden) + 2).to(dtype), rand(rows, hidden).to(dtype), *parameters], rand(rows, hidden).to(dtype)


def run(op, tensors, dout):
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = op(*tensors)
    gradients = torch.autograd.grad(out, tensors, dout.to(out.dtype))
    return {"out": out.detach(), **dict(zip(("dx", "dresidual", "dweight", "dbias"), gradients, strict=True))}


def kernel(*tensors, dropout_p=0.0):
    return ops.dropout_add_layer_norm(*tensors, eps=EPS, dropout_p=dropout_p, backend="triton")


def plain(*tensors):
    return reference.dropout_add_layer_norm(*tensors, eps=EPS)


def dropped_like(keep, dropout_p):
    """The op in plain PyTorch, with a mask that is given."""

    def op(x, residual, weight, bias):
        x = torch.where(keep, x * threshold_and_scale(dropout_p)[1], 0.0)
        return F.layer_norm(x + residual, weight.shape, weight, bias, EPS)

    return op


def double(tensors):
    return [x.double() for x in tensors]


@pytest.mark.usefixtures("poison")
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_forward_and_gradients(shape, dtype, assert_close):
    tensors, dout = inputs(*shape, dtype)
    actual = run(kernel, tensors, dout)
    if not shape[0]:
        assert {name: x.shape for name, x in actual.items()} == {
            "out": (0, 16), "dx": (0, 16), "dresidual": (0, 16), "dweight": (16,), "dbias": (16,)
        }  # fmt: skip
        assert actual["dweight"].abs().max() == actual["dbias"].abs().max() == 0
        return
    if shape[1] == 1:
        # a row of one column is its own mean: these gradients are zero but for rounding, which rstd makes larger
        for name in ("dx", "dresidual", "dweight"):
            assert actual.pop(name).abs().max() <= 4 * torch.finfo(dtype).eps * EPS**-0.5
    assert_close(actual, run(plain, tensors, dout), run(plain, double(tensors), dout.double()))


@pytest.mark.usefixtures("poison")
@DTYPES
@pytest.mark.parametrize("dropout_p", [0.1, 0.6])
@pytest.mark.parametrize("shape", [(1, 768), (7, 50), (29, 768)], ids=lambda s: "x".join(map(str, s)))
def test_dropout(shape, dropout_p, dtype, assert_close):
    """Against plain PyTorch with the mask that the seed stands for."""
    tensors, dout = inputs(*shape, dtype)
    seed = torch.tensor([2**40 + 3], device=DEVICE)
    op = dropped_like(dropout_keep(seed, *shape, dropout_p), dropout_p)
    actual = run(
        lambda *x: torch.ops.qformer_fast.dropout_add_layer_norm_fwd(*x, seed, EPS, dropout_p)[0], tensors, dout
    )
    assert_close(actual, run(op, tensors, dout), run(op, double(tensors), dout.double()))


def test_dropout_draws_anew():
    tensors, _ = inputs(8, 64, torch.float32)
    first, second = (kernel(*tensors, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@DTYPES
def test_bias_of_x(dtype, dropout_p, assert_close):
    """The launchers' x_bias, rows that are a slice, and an output given."""
    shape = (11, 192)
    tensors, dout = inputs(5 + shape[0], shape[1], dtype)
    rows = [x[5:] if x.ndim == 2 else x for x in (*tensors, dout)]
    *tensors, dout = rows
    x_bias = torch.randn(shape[1], device=DEVICE)
    seed = torch.tensor([9], device=DEVICE) if dropout_p else None
    keep = torch.ones(shape, dtype=torch.bool, device=DEVICE) if seed is None else dropout_keep(seed, *shape, dropout_p)
    op = dropped_like(keep, dropout_p)

    def biased(x, residual, weight, bias, x_bias):
        return op((x + x_bias).to(x.dtype), residual, weight, bias)

    def expected(*tensors):
        tensors = [x.detach().requires_grad_() for x in tensors]
        out = biased(*tensors)
        names = "dx", "dresidual", "dweight", "dbias", "dx_bias"
        return {"out": out, **dict(zip(names, torch.autograd.grad(out, tensors, dout.to(out.dtype)), strict=True))}

    whole = torch.zeros(shape[0] + 2, shape[1], device=DEVICE, dtype=dtype)
    found, mean, rstd = kernels.dropout_add_layer_norm_fwd(*tensors, seed, EPS, dropout_p, x_bias, whole[2:])
    assert found.data_ptr() == whole[2:].data_ptr()
    assert whole[:2].abs().max() == 0
    x, residual, weight, _ = tensors
    gradients = kernels.dropout_add_layer_norm_bwd(dout, x, residual, weight, mean, rstd, seed, dropout_p, x_bias)
    assert (gradients[0] is gradients[1]) == (seed is None)
    actual = dict(zip(("out", "dx", "dresidual", "dweight", "dbias", "dx_bias"), (found, *gradients), strict=True))
    assert_close(actual, expected(*tensors, x_bias), expected(*double(tensors), x_bias.double()))

    formula = reference.dropout_add_layer_norm_fwd(*double(tensors), seed, EPS, dropout_p, x_bias.double())
    torch.testing.assert_close(formula[0].float(), biased(*double(tensors), x_bias.double()).float())
    inside = *double([dout, x, residual, weight]), *formula[1:], seed, dropout_p, x_bias.double()
    high = expected(*double(tensors), x_bias.double())
    for gradient, name in zip(reference.dropout_add_layer_norm_bwd(*inside), list(high)[1:], strict=True):
        torch.testing.assert_close(gradient, high[name], rtol=1e-9, atol=1e-9)


def test_rows_far_from_zero(assert_close):
    """Two passes: the variance of 1000 + noise is the noise's."""
    tensors, dout = inputs(5, 768, torch.float32)
    tensors[1] += 1000
    assert_close(run(kernel, tensors, dout), run(plain, tensors, dout), run(plain, double(tensors), dout.double()))


def test_rows_of_one_value():
    tensors, dout = inputs(3, 768, torch.float32)
    tensors[:2] = torch.zeros(3, 768, device=DEVICE), torch.full((3, 768), 0.5, device=DEVICE)
    out = ops.dropout_add_layer_norm(*tensors, eps=1e-12, backend="triton")
    torch.testing.assert_close(out, tensors[3].expand(3, -1))
    assert all(x.isfinite().all() for x in run(kernel, tensors, dout).values())


def test_rows_that_are_not_contiguous(assert_close):
    tensors, dout = inputs(9, 48, torch.float32)
    strided = [*(x.t().contiguous().t() for x in tensors[:2]), *(torch.stack([x, x], 1)[:, 0] for x in tensors[2:])]
    dout = dout.t().contiguous().t()
    assert_close(run(kernel, strided, dout), run(plain, tensors, dout), run(plain, double(tensors), dout.double()))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_fp32_parameters_under_autocast_keep_their_gradients_in_fp32(dropout_p):
    tensors, dout = inputs(9, 40, torch.float32)
    tensors[0] = tensors[0].bfloat16()
    with torch.autocast(DEVICE, torch.bfloat16):
        found = run(lambda *x: kernel(*x, dropout_p=dropout_p), tensors, dout)
    assert {name: x.dtype for name, x in found.items()} == {
        "out": torch.bfloat16, "dx": torch.bfloat16,
        "dresidual": torch.float32, "dweight": torch.float32, "dbias": torch.float32,
    }  # fmt: skip
    if not dropout_p:
        high = run(plain, double(tensors), dout.double())
        for name, x in found.items():
            torch.testing.assert_close(x.double(), high[name], rtol=0.02, atol=0.05)


@pytest.mark.usefixtures("rows_at_once")
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_same_result_twice(dropout_p):
    tensors, dout = inputs(300, 200, torch.float16, torch.float32)

    def once():
        torch.manual_seed(3)
        return run(lambda *x: kernel(*x, dropout_p=dropout_p), tensors, dout)

    first, *others = (once() for _ in range(20 if DEVICE == "cuda" else 2))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_formula_gradcheck(dropout_p):
    tensors, _ = inputs(4, 6, torch.float64)
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    op = torch.ops.qformer_fast.dropout_add_layer_norm_fwd
    assert torch.autograd.gradcheck(lambda *x: op(*x, seed, EPS, dropout_p)[0], [x.requires_grad_() for x in tensors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "formula"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck(dropout_p, dtype):
    tensors, _ = inputs(5, 33, dtype)
    seed = torch.tensor([5], device=DEVICE) if dropout_p else None
    op = torch.ops.qformer_fast.dropout_add_layer_norm_fwd.default
    torch.library.opcheck(op, (*(x.requires_grad_() for x in tensors), seed, EPS, dropout_p))


def test_compiles_without_a_graph_break():
    tensors, dout = inputs(5, 33, torch.float32)

    def twice(*tensors):
        return 2 * kernel(*tensors)

    actual, expected = (run(op, tensors, dout) for op in (torch.compile(twice, fullgraph=True), twice))
    torch.testing.assert_close(actual, expected)
    dropping = torch.compile(lambda *x: kernel(*x, dropout_p=0.5), fullgraph=True)
    assert run(dropping, tensors, dout)["out"].isfinite().all()


def test_what_the_kernels_do_not_take():
    tensors, _ = inputs(2, 4097, torch.float32)
    with pytest.raises(RuntimeError, match="its kernels take hidden sizes of 1 to 4096, got 4097"):
        kernel(*tensors)
    assert ops.dropout_add_layer_norm(*tensors).shape == (2, 4097)
    if DEVICE == "cpu":
        with pytest.raises(RuntimeError, match="its kernels take fp32, fp16 and bf16, got torch.float64"):
            kernel(*double(inputs(2, 8, torch.float32)[0]))


def test_bad_input_is_refused():
    x, weight = torch.zeros(2, 8, device=DEVICE), torch.zeros(8, device=DEVICE)
    with pytest.raises(ValueError, match=r"residual must be \(2, 8\), got \(3, 8\)"):
        ops.dropout_add_layer_norm(x, torch.zeros(3, 8, device=DEVICE), weight, weight)
    with pytest.raises(ValueError, match=r"weight must be \(8\), got \(7,\)"):
        ops.dropout_add_layer_norm(x, x, weight[:7], weight)
    with pytest.raises(ValueError, match=r"dropout_p must lie in \[0, 1\), got 1.0"):
        ops.dropout_add_layer_norm(x, x, weight, weight, dropout_p=1.0)
    with pytest.raises(ValueError, match="residual must be on"):
        ops.dropout_add_layer_norm(x, x.to("meta"), weight, weight)
    with pytest.raises(TypeError, match="x must be floating-point, got torch.int64"):
        ops.dropout_add_layer_norm(x.long(), x, weight, weight)
