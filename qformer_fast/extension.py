"""The CUDA extension ``qformer_fast._C``: why it can't run here, and the launchers of its kernels (csrc/)."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

CAPABILITY = (9, 0)
DTYPES = (torch.float16, torch.bfloat16)
OPERATORS = ("linear", "linear_gelu_fwd", "linear_gelu_bwd", "encode_queries")
ROWS_PER_SUM = 128
# from how many rows on a product with GELU is faster than cuBLAS's and a pass over its result
FWD_ROWS, BWD_ROWS = 2048, 256
# from how many elements of its result on a product with bias is faster than cuBLAS's
LINEAR_SIZE = 8192 * 768


@torch.compiler.assume_constant_result
def why_not() -> str | None:
    """Why the extension can't run here, or None."""
    return _probe()


@functools.cache
def _probe() -> str | None:
    library = next(Path(__file__).parent.glob("_C*.so"), None)
    if library is None:
        return "the extension was not built; QFORMER_FAST_EXT=1 pip install --no-build-isolation . builds it"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} can't be loaded ({error})"
    for name in OPERATORS:
        # they write to tensors that they are given, and return nothing
        torch.library.register_fake(f"qformer_fast_cuda::{name}", lambda *_: None)
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    found = torch.cuda.get_device_capability()
    if found != CAPABILITY:
        return f"it needs compute capability {CAPABILITY}, this device has {found}"
    # torch may be of an older CUDA than the runtime in the extension, which needs a driver of its major version
    runtime, driver = torch.ops.qformer_fast_cuda.cuda_versions()
    if driver // 1000 < runtime // 1000:
        return f"it needs a driver for CUDA {runtime // 1000}, this one is for {driver // 1000}.{driver % 1000 // 10}"
    return None


def _aligned(x: Tensor) -> Tensor:
    """x, copied where it is strided or a view that does not start at 16 bytes, as in a flat parameter."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def linear_is_faster(rows: Tensor, weight: Tensor) -> bool:
    """Whether :func:`linear` can run here on these, and takes less time than cuBLAS's product and what follows it."""
    widths = rows.shape[1] % 8 == weight.shape[0] % 8 == 0
    enough = rows.shape[0] * weight.shape[0] >= LINEAR_SIZE
    return rows.is_cuda and rows.dtype in DTYPES and widths and enough and why_not() is None


def linear(rows: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> Tensor:
    """rows @ weight^T + bias, with ``gelu`` GELU of it.

    rows (rows, inputs), weight (outputs, inputs), bias (outputs,) of their dtype or fp32; widths multiples of 8.
    """
    out = rows.new_empty(rows.shape[0], weight.shape[0])
    rows, weight, bias = map(_aligned, (rows, weight, bias))
    torch.ops.qformer_fast_cuda.linear(rows, weight, bias[None], gelu, out)
    return out


def linear_gelu_fwd(rows: Tensor, weight: Tensor, bias: Tensor, up: Tensor) -> Tensor:
    """up = rows @ weight^T, rounded to its dtype; returns gelu(up + bias), of up before it is rounded.

    rows (rows, inputs), weight (outputs, inputs) and up (rows, outputs) contiguous; bias (outputs,) of their dtype or
    fp32; widths multiples of 8.
    """
    out = rows.new_empty(rows.shape[0], weight.shape[0])
    rows, weight, bias = map(_aligned, (rows, weight, bias))
    torch.ops.qformer_fast_cuda.linear_gelu_fwd(rows, weight, bias[None], up, out)
    return out


def linear_gelu_bwd(
    dout: Tensor,
    weight: Tensor,
    up: Tensor,
    bias: Tensor,
    total: Tensor | None = None,
    out: Tensor | None = None,
    add: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """From dout, the gradient of gelu(up + bias) @ weight^T: dup, dbias, and gelu(up + bias) made again.

    dbias is written to ``total`` where it is given, with ``add`` added; ``out``, which may be up, is written to.

    dout (rows, outputs), weight (outputs, inputs) and up (rows, inputs) contiguous; bias (inputs,).
    """
    from qformer_fast.kernels.layer_norm import sum_parts

    dup = torch.empty_like(up)
    out = torch.empty_like(up) if out is None else out
    dbias = torch.empty_like(bias) if total is None else total
    sums = up.new_empty(-(-up.shape[0] // ROWS_PER_SUM), 1, up.shape[1], dtype=torch.float32)
    dout, weight, bias = map(_aligned, (dout, weight, bias))
    torch.ops.qformer_fast_cuda.linear_gelu_bwd(dout, weight, up, bias[None], dup, out, sums[:, 0])
    sum_parts(sums, dbias, add=total is not None and add)
    return dup, dbias, out


def encode_queries(
    weights: Tensor,
    first_slots: Tensor,
    norm: Tensor,
    rows: Tensor,
    queries: Tensor,
    keys_values: Tensor,
    images: int,
    layers: int,
    cross_layers: int,
    headdim: int,
    eps: float,
    workspace: Tensor,
    out: Tensor,
) -> None:
    """Writes to out the rows after all layers over queries alone, in one launch.

    weights (slots, 768) and first_slots (blocks + 1,) int32 as :func:`qformer_fast.models.one_launch.pack` gives them,
    norm (2, 768) fp32 the last LayerNorm's weight and bias, rows and queries (32, 768), keys_values (images * tokens,
    layers with cross-attention * 2 * 768), workspace (bytes,) uint8, out (images * 32, 768). At most 8 images. Bit i of
    ``cross_layers``: layer i has cross-attention.
    """
    torch.ops.qformer_fast_cuda.encode_queries(
        weights,
        first_slots[None],
        norm,
        rows,
        queries,
        keys_values,
        images,
        layers,
        cross_layers,
        headdim,
        eps,
        workspace[None],
        out,
    )


def encode_queries_clusters(rows: Tensor, headdim: int) -> int:
    """How many clusters of eight of its blocks, which wait for each other, rows' device holds at once; 0: too few."""
    return torch.ops.qformer_fast_cuda.encode_queries_clusters(rows, headdim)


def encode_queries_workspace(rows: Tensor, images: int, layers: int, looking: int) -> int:
    """Bytes that :func:`encode_queries` needs, all ones before their first use, of as many layers and of those
    ``looking`` at the images; enough for fewer images too."""
    return torch.ops.qformer_fast_cuda.encode_queries_workspace(rows, images, layers, looking)
