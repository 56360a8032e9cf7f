"""The Triton kernels of bias_gelu: under the interpreter without a GPU, on the GPU with one."""

import pytest
import torch

from qformer_fast import ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1), (7, 50), (33, 130), (5, 3072)]


def inputs(rows, width, dtype, bias_dtype):
    x = torch.randn(rows, width, device=DEVICE).to(dtype)
    bias = torch.randn(width, device=DEVICE).to(bias_dtype)
    return x, bias, torch.randn(rows, width, device=DEVICE).to(dtype)


def run(op, x, bias, dout):
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    out = op(x, bias)
    dx, dbias = torch.autograd.grad(out, (x, bias), dout.to(out.dtype))
    return {"out": out.detach(), "dx": dx, "dbias": dbias}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_forward_and_gradients(shape, dtype, assert_close):
    x, bias, dout = inputs(*shape, dtype, dtype)
    actual = run(lambda *a: ops.bias_gelu(*a, backend="triton"), x, bias, dout)
    low = run(reference.bias_gelu, x, bias, dout)
    high = run(reference.bias_gelu, x.double(), bias.double(), dout.double())
    assert_close(actual, low, high)


def test_fp32_bias_under_autocast_keeps_its_gradient_in_fp32():
    x, bias, dout = inputs(9, 40, torch.float32, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = run(lambda *a: ops.bias_gelu(*a, backend="triton"), x, bias, dout)
    assert found["out"].dtype == torch.bfloat16
    assert found["dx"].dtype == found["dbias"].dtype == torch.float32


def test_same_result_twice():
    x, bias, dout = inputs(300, 200, torch.float16, torch.float32)
    first, *others = (run(lambda *a: ops.bias_gelu(*a, backend="triton"), x, bias, dout) for _ in range(3))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_formula_gradcheck():
    x, bias = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    op = torch.ops.qformer_fast.bias_gelu_fwd
    assert torch.autograd.gradcheck(op, (x.requires_grad_(), bias.requires_grad_()))


def test_opcheck():
    x, bias, _ = inputs(5, 33, torch.float32, torch.float32)
    torch.library.opcheck(torch.ops.qformer_fast.bias_gelu_fwd.default, (x.requires_grad_(), bias.requires_grad_()))


def test_compiles_without_a_graph_break():
    x, bias, _ = inputs(5, 33, torch.float32, torch.float32)

    def twice(x, bias):
        return 2 * ops.bias_gelu(x, bias, backend="triton")

    torch.testing.assert_close(torch.compile(twice, fullgraph=True)(x, bias), twice(x, bias))


@pytest.mark.skipif(DEVICE == "cuda", reason="fp64 runs the formula on any device")
def test_fp64_is_refused_by_the_kernels():
    with pytest.raises(RuntimeError, match=r"can't run this bias_gelu: its kernels take fp32, fp16 and bf16"):
        ops.bias_gelu(torch.zeros(2, 3).double(), torch.zeros(3).double(), backend="triton")
