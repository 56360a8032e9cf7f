"""Image tokens as the keys' and values' product takes them: LayerNorm without its parameters, and a column of ones."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qformer_fast.kernels.layer_norm import row_settings, standardise


@triton.jit
def standardize_kernel(
    x_ptr,  # (M, N)
    out_ptr,  # (M, WIDTH)
    M,
    eps,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program = BLOCK_M whole rows: (x - mean) / sqrt(variance + eps), then a one, then zeros."""
    offs_n = tl.broadcast_to(tl.arange(0, BLOCK_N)[None, :], (BLOCK_M, BLOCK_N))
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    x = tl.load(x_ptr + offs_m * N + offs_n, mask=(offs_m < M) & (offs_n < N), other=0.0).to(tl.float32)
    normed, _, _ = standardise(x, offs_n < N, eps, N)
    out = tl.where(offs_n < N, normed, tl.where(offs_n == N, 1.0, 0.0))
    tl.store(out_ptr + offs_m * WIDTH + offs_n, out, mask=(offs_m < M) & (offs_n < WIDTH))


def standardize_into(out: Tensor, x: Tensor, eps: float) -> Tensor:
    """x (..., width) contiguous, out (..., more) contiguous of any dtype -> out."""
    N, WIDTH = x.shape[-1], out.shape[-1]
    M = x.numel() // N
    settings = row_settings("standardize", N, x.device) | {"BLOCK_N": triton.next_power_of_2(WIDTH)}
    if M:
        standardize_kernel[(triton.cdiv(M, settings["BLOCK_M"]),)](x, out, M, eps, WIDTH=WIDTH, **settings)
    return out
