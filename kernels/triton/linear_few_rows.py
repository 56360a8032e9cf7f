"""x @ weight^T for few rows, where the time is that of reading the weights: many programs, each with few columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qformer_fast.kernels import launch
from qformer_fast.kernels.bias_gelu import gelu
from qformer_fast.kernels.sequences import precision

MAX_PARTS = 8


@triton.jit
def linear_few_rows_kernel(
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,) or None
    out_ptr,  # (M, N), or (parts, M, N) fp32
    M,
    N,
    K,
    part_k,  # summed over in one part, a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program = one tile (BLOCK_M, BLOCK_N) of one part of the sum over K."""
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(2) * part_k
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(begin, tl.minimum(begin + part_k, K), BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        in_k = offs_k < K
        x = tl.load(
            x_ptr + offs_m[:, None] * K + offs_k[None, :], mask=(offs_m < M)[:, None] & in_k[None, :], other=0.0
        )
        weight = tl.load(
            weight_ptr + offs_n[None, :] * K + offs_k[:, None], mask=in_k[:, None] & (offs_n < N)[None, :], other=0.0
        )
        sums = tl.dot(x, weight, sums, input_precision=PRECISION)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        sums = gelu(sums)
    offs = tl.program_id(2) * M * N + offs_m[:, None] * N + offs_n[None, :]
    tl.store(out_ptr + offs, sums, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def linear_few_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False, in_parts: bool = False
) -> Tensor:
    """gelu(x @ weight^T + bias), as far as asked for.

    Args:
        x (Tensor): (rows, inputs) contiguous.
        weight (Tensor): (outputs, inputs) contiguous.
        bias (Tensor, Optional): (outputs,). Default: `None`.
        gelu (bool): the exact erf form, on top. Default: False.
        in_parts (bool): (parts, rows, outputs) fp32, whose sum over the parts is the product; without bias and GELU.
            Default: False.

    Returns:
        Tensor: (rows, outputs) of x's dtype, or the parts.
    """
    M, K = x.shape
    N = weight.shape[0]
    settings = dict(launch.settings("linear_few_rows", x.device))
    if x.dtype == torch.float32:  # as many bytes of shared memory as in 16 bits
        settings["BLOCK_K"] //= 2
    BLOCK_M = 16 if M <= 16 else 32 if M <= 32 else 64
    tiles = triton.cdiv(N, settings["BLOCK_N"]) * triton.cdiv(M, BLOCK_M)
    blocks_k = triton.cdiv(K, settings["BLOCK_K"])
    parts = 1
    if in_parts:
        parts = min(MAX_PARTS, blocks_k, triton.cdiv(launch.num_multiprocessors(x.device), tiles))
    part_k = triton.cdiv(blocks_k, parts) * settings["BLOCK_K"]
    parts = triton.cdiv(K, part_k)
    out = torch.empty(parts, M, N, device=x.device, dtype=torch.float32 if in_parts else x.dtype)
    if M:
        linear_few_rows_kernel[(triton.cdiv(N, settings["BLOCK_N"]), triton.cdiv(M, BLOCK_M), parts)](
            x, weight, bias, out, M, N, K, part_k, BLOCK_M=BLOCK_M, GELU=gelu, PRECISION=precision(x), **settings
        )
    return out if in_parts else out[0]
