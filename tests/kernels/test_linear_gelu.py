"""The products with GELU in their epilogue against plain PyTorch, fused and not."""

import pytest
import torch
from torch.nn import functional as F

from qformer_fast.kernels import launch, linear_gelu_bwd, linear_gelu_fwd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(5, 64, 48), (130, 128, 300), (1, 64, 40)]


@pytest.fixture(params=[True, False], ids=["fused", "cublas"])
def fused(request, monkeypatch):
    plain = launch.settings
    small = {"BLOCK_M": 64, "BLOCK_N": 64} if DEVICE == "cpu" else {}

    def settings(kernel, device):
        chosen = plain(kernel, device)
        return chosen | small | {"fused": request.param} if kernel.startswith("linear_gelu") else chosen

    monkeypatch.setattr(launch, "settings", settings)


def plain_forward_and_backward(x, weight, bias, down, dy):
    up = x @ weight.t()
    y = (up + bias).requires_grad_()
    out = F.gelu(y)
    (dup,) = torch.autograd.grad(out, y, dy @ down)
    return {"up": up, "out": out.detach(), "dup": dup, "dbias": dup.sum(0), "again": out.detach()}


@pytest.mark.usefixtures("poison", "fused")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_forward_and_gradients(shape, dtype, assert_close):
    rows, hidden, wide = shape
    x, dy = torch.randn(2, rows, hidden, device=DEVICE).to(dtype)
    weight = (torch.randn(wide, hidden, device=DEVICE) * hidden**-0.5).to(dtype)
    down = (torch.randn(hidden, wide, device=DEVICE) * hidden**-0.5).to(dtype)
    bias = torch.randn(wide, device=DEVICE).to(dtype)
    up = torch.empty(rows, wide, device=DEVICE, dtype=dtype)
    out = linear_gelu_fwd(x, weight, bias, up)
    dup, dbias, again = linear_gelu_bwd(dy, down, up, bias)
    actual = {"up": up, "out": out, "dup": dup, "dbias": dbias, "again": again}
    exact = plain_forward_and_backward(*(t.double() for t in (x, weight, bias, down, dy)))
    assert_close(actual, plain_forward_and_backward(x, weight, bias, down, dy), exact)


@pytest.mark.usefixtures("fused")
def test_same_result_twice():
    x, dy = torch.randn(2, 200, 64, device=DEVICE).half()
    weight, bias = torch.randn(96, 64, device=DEVICE).half(), torch.randn(96, device=DEVICE)
    up = torch.empty(200, 96, device=DEVICE).half()

    def once():
        out = linear_gelu_fwd(x, weight, bias, up)
        return [up.clone(), out, *linear_gelu_bwd(dy, weight.t().contiguous(), up, bias)]

    first, *others = (once() for _ in range(20 if DEVICE == "cuda" else 2))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
