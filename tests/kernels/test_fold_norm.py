"""The Triton kernels that fold a LayerNorm into the linear layer after it."""

import pytest
import torch

from qformer_fast import kernels, ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = "weight", "bias", "norm_weight", "norm_bias"


def parameters(out, inputs, dtype):
    return [torch.randn(size, device=DEVICE).to(dtype) for size in ((out, inputs), out, inputs, inputs)]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [(FP32, FP32), (FP32, FP16), (FP32, BF16), (FP16, FP16), (BF16, BF16)],
    ids=lambda d: str(d)[6:],
)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (70, 300), (9, 1408)], ids=str)
def test_forward_and_gradients(shape, dtype, out_dtype, assert_close):
    given = parameters(*shape, dtype)
    width = reference.standardized_width(shape[1])
    dout = torch.randn(shape[0], width, device=DEVICE).to(out_dtype)

    def run(module, dout, *given, dtype=out_dtype):
        out = module.fold_norm_fwd(*given, width, dtype)
        gradients = module.fold_norm_bwd(dout, *given)
        return {"out": out} | {f"d{name}": x for name, x in zip(NAMES, gradients, strict=True)}

    actual, low = run(kernels, dout, *given), run(reference, dout, *given)
    high = run(reference, *(x.double() for x in (dout, *given)), dtype=torch.float64)
    assert not actual["out"][:, shape[1] + 1 :].any()
    assert_close(actual, low, high)


@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("module", [kernels, reference], ids=["kernels", "reference"])
def test_gradients_are_added_to_what_is_there_or_written(module, rows):
    """Of some rows after others: these are written, and the norm's are added."""
    given = parameters(rows, 300, torch.float16)
    dout = torch.randn(rows, 304, device=DEVICE).half()
    gradients = [x.float() for x in module.fold_norm_bwd(dout, *given)]
    for add, add_norm in ((True, True), (False, False), (False, True)):
        there = [float(number) if flag else torch.nan for number, flag in enumerate((add, add, add_norm, add_norm), 1)]
        totals = [torch.full_like(x, value) for x, value in zip(gradients, there, strict=True)]
        module.fold_norm_bwd(dout, *given, totals, add, add_norm)
        for total, gradient, value in zip(totals, gradients, there, strict=True):
            expected = gradient if value != value else gradient + value
            torch.testing.assert_close(total, expected, rtol=2e-3, atol=2e-3)


def test_same_result_twice():
    given, dout = parameters(70, 300, torch.float32), torch.randn(70, 304, device=DEVICE)
    first, *others = (kernels.fold_norm_bwd(dout, *given) for _ in range(3))
    assert all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True))


def test_backward_of_standardized_rows_is_that_of_the_layer_norm():
    x, dout = torch.randn(2, 3, 12, device=DEVICE), torch.randn(2, 3, 9, device=DEVICE)
    given = [p.requires_grad_() for p in parameters(9, 12, torch.float32)]
    standardized = reference.standardize_into(x.new_empty(2, 3, 16), x, 1e-5)
    expected = torch.autograd.grad(ops.image_key_value(x, *given, backend="reference"), given, dout)
    out = ops.image_key_value(standardized, *given, standardized=True, backend="triton")
    found = torch.autograd.grad(out, given, dout)
    for name, *values in zip(NAMES, expected, found, strict=True):
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_parameters_that_are_not_contiguous():
    rows = torch.randn(2, 3, 40, device=DEVICE)
    given = parameters(5, 33, torch.float32)
    strided = [torch.stack([p, torch.full_like(p, torch.nan)], dim=-1)[..., 0] for p in given]
    expected, found = (ops.image_key_value(rows, *x, standardized=True, backend="triton") for x in (given, strided))
    assert torch.equal(found, expected)


def test_formula():
    given = [p.requires_grad_() for p in parameters(4, 6, torch.float64)]
    op = torch.ops.qformer_fast.fold_norm_fwd
    assert torch.autograd.gradcheck(lambda *p: op(*p, 8, torch.float64), given)


def test_opcheck():
    given = [p.requires_grad_() for p in parameters(5, 33, torch.float32)]
    torch.library.opcheck(torch.ops.qformer_fast.fold_norm_fwd.default, (*given, 40, torch.float32))


def test_compiles_without_a_graph_break():
    given, rows = parameters(5, 33, torch.float32), torch.randn(2, 3, 40, device=DEVICE)

    def twice(rows, *given):
        return 2 * ops.image_key_value(rows, *given, standardized=True, backend="triton")

    torch.testing.assert_close(torch.compile(twice, fullgraph=True)(rows, *given), twice(rows, *given))
