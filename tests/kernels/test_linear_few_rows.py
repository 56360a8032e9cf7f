"""Products of few rows against PyTorch's in fp64."""

import pytest
import torch
from torch.nn import functional as F

kernels = pytest.importorskip("qformer_fast.kernels")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 33, 64), (32, 96, 300), (70, 40, 128)])
def test_products_with_bias_and_gelu_and_in_parts(rows, outputs, inputs, dtype, assert_close, poison):
    x, weight, bias = (
        torch.randn(size, device=DEVICE).to(dtype) for size in ((rows, inputs), (outputs, inputs), outputs)
    )

    def plain(cast):
        product = F.linear(cast(x), cast(weight))
        biased = F.linear(cast(x), cast(weight), cast(bias))
        return {"biased": biased, "gelu": F.gelu(biased), "parts": product}

    parts = kernels.linear_few_rows(x, weight, in_parts=True)
    assert parts.dtype == torch.float32 and parts.shape[1:] == (rows, outputs)
    found = {
        "biased": kernels.linear_few_rows(x, weight, bias),
        "gelu": kernels.linear_few_rows(x, weight, bias, gelu=True),
        "parts": parts.sum(0).to(dtype),
    }
    assert_close(found, plain(lambda t: t), plain(torch.Tensor.double), atol=1e-5)


def test_the_sum_over_many_inputs_is_taken_in_parts():
    x, weight = torch.randn(2, 1024, device=DEVICE), torch.randn(16, 1024, device=DEVICE)
    assert len(kernels.linear_few_rows(x, weight, in_parts=True)) > 1
    assert kernels.linear_few_rows(x[:0], weight).shape == (0, 16)
