"""The Triton kernel that standardises image tokens."""

import pytest
import torch

from qformer_fast import kernels, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("out_dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (1, 4, 64), (2, 3, 1408), (0, 3, 8)], ids=str)
def test_values(shape, dtype, out_dtype, assert_close):
    x = (torch.randn(shape, device=DEVICE) * 3 + 2).to(dtype)
    width = reference.standardized_width(shape[-1])
    assert width % 8 == 0 and shape[-1] < width <= shape[-1] + 8
    out = kernels.standardize_into(torch.empty(*shape[:-1], width, device=DEVICE, dtype=out_dtype), x, 1e-5)
    if not x.numel():
        return
    low = reference.standardize_into(torch.empty_like(out), x, 1e-5)
    high = reference.standardize_into(out.new_empty(out.shape, dtype=torch.float64), x.double(), 1e-5)
    assert_close({"out": out}, {"out": low}, {"out": high})
    ones = torch.zeros_like(out[..., shape[-1] :])
    ones[..., 0] = 1
    assert torch.equal(out[..., shape[-1] :], ones)
