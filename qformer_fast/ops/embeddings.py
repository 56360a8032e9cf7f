"""Word and position embeddings of packed text rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.ops._autograd import register_autograd, without_totals
from qformer_fast.ops._checks import (
    autocast_dtype,
    check_device,
    check_floating,
    check_probability,
    check_shape,
    check_totals,
)
from qformer_fast.ops._seeds import draw_seed
from qformer_fast.ops.dropout_add_layer_norm import statistics_dtype, unsupported


@torch.library.custom_op("qformer_fast::embeddings_fwd", mutates_args=())
def embeddings_fwd(
    input_ids: Tensor,
    position_ids: Tensor,
    word_weight: Tensor,
    position_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    totals: list[Tensor],
    padding_idx: int | None,
    eps: float,
    dropout_p: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """out of ``dtype``, mean, rstd; ``padding_idx`` and ``totals`` are for the gradient."""
    tables = word_weight, position_weight, weight, bias
    run = backends.kernel_or_formula("embeddings_fwd", word_weight)
    return run(input_ids, position_ids, *tables, seed, eps, dropout_p, dtype)


@embeddings_fwd.register_fake
def _(input_ids: Tensor, position_ids: Tensor, word_weight: Tensor, *others) -> tuple[Tensor, Tensor, Tensor]:
    rows, hidden = input_ids.shape[0], word_weight.shape[1]
    mean, rstd = (word_weight.new_empty(rows, dtype=statistics_dtype(word_weight)) for _ in range(2))
    return word_weight.new_empty(rows, hidden, dtype=others[-1]), mean, rstd


def _bwd(
    dout: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    word_weight: Tensor,
    position_weight: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    totals: list[Tensor],
    padding_idx: int | None,
    dropout_p: float,
) -> list[Tensor]:
    """The gradients of the tables, weight and bias, or none where they are added to ``totals``."""
    tables = word_weight, position_weight, weight
    run = backends.kernel_or_formula("embeddings_bwd", word_weight)
    found = run(dout, input_ids, position_ids, *tables, mean, rstd, seed, padding_idx, dropout_p, totals or None)
    return [] if totals else list(found)


# with totals, backward calls the function itself: an op may not add to its inputs and return others
embeddings_bwd = torch.library.custom_op("qformer_fast::embeddings_bwd", mutates_args=())(_bwd)


@embeddings_bwd.register_fake
def _(dout, input_ids, position_ids, word_weight, position_weight, weight, *_):
    return [torch.empty_like(x) for x in (word_weight, position_weight, weight, weight)]


def _setup_context(ctx, inputs, output) -> None:
    *tables, _, seed, ctx.totals, ctx.padding_idx, _, ctx.dropout_p, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(*tables, mean, rstd, seed)


def _backward(ctx, dout: Tensor) -> tuple[Any, ...]:
    saved = *ctx.saved_tensors, ctx.totals
    run = _bwd if ctx.totals else embeddings_bwd
    gradients = run(dout.contiguous(), *saved, ctx.padding_idx, ctx.dropout_p)
    return None, None, *(gradients or [None] * 4), None, [None] * len(ctx.totals), *[None] * 4


register_autograd(embeddings_fwd, _backward, _setup_context)


def _kernels(
    input_ids: Tensor,
    position_ids: Tensor,
    word_weight: Tensor,
    position_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    padding_idx: int | None,
    dropout_p: float,
    gradients: Sequence[Tensor] | None = None,
) -> Tensor:
    tensors = input_ids, position_ids, word_weight, position_weight, weight, bias
    seed = draw_seed(word_weight, dropout_p)
    dtype = autocast_dtype(word_weight)
    tensors = [x.contiguous() for x in tensors]
    return embeddings_fwd(*tensors, seed, list(gradients or ()), padding_idx, eps, dropout_p, dtype)[0]


IMPLEMENTATIONS = {"reference": without_totals(reference.embeddings), "triton": _kernels}


def embeddings(
    input_ids: Tensor,
    position_ids: Tensor,
    word_weight: Tensor,
    position_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-12,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    gradients: Sequence[Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """dropout(layer_norm(word[input_ids] + position[position_ids]) * weight + bias).

    Replaces LAVIS ``BertEmbeddings`` on text rows (Qformer.py:78-108). Under autocast the kernels return the autocast
    dtype and read the tables as they are. The tables' gradients are dense.

    Args:
        input_ids, position_ids (Tensor): (rows,) int64 or int32, inside their tables. That is checked on a CPU; on a
            device it would cost a host sync, so they are trusted, as :meth:`PackedText.from_padded` made them. The
            kernels take an id outside for a row of zeros.
        word_weight, position_weight (Tensor): (vocab, hidden) and (positions, hidden).
        weight, bias (Tensor): (hidden,), the LayerNorm's.
        eps (float): added to the variance. Default: 1e-12.
        padding_idx (int, Optional): the word that gets no gradient here; a negative one counts from the end.
        dropout_p (float): probability in [0, 1). Default: 0.0.
        gradients (Sequence, Optional): four tensors like the tables, weight and bias, fp32 or of their dtype,
            contiguous. The kernels add the gradients to them in backward and give autograd none. Default: `None`.
        backend (str, Optional): "reference", "triton" or "cuda". Default: `None`, chosen.

    Returns:
        Tensor: (rows, hidden), word_weight.dtype; statistics in fp32.

    Raises:
        ValueError: shapes, devices, probability or ids that do not fit. TypeError: ids that are not integers.
            RuntimeError: the backend asked for can't run, with the reason.
    """
    hidden = word_weight.shape[-1]
    check_shape("input_ids", input_ids, "rows")
    check_shape("position_ids", position_ids, *input_ids.shape)
    check_shape("word_weight", word_weight, "vocab", hidden)
    check_shape("position_weight", position_weight, "positions", hidden)
    check_shape("weight", weight, hidden)
    check_shape("bias", bias, hidden)
    words, positions = word_weight.shape[0], position_weight.shape[0]
    check_floating(word_weight=word_weight, position_weight=position_weight, weight=weight, bias=bias)
    check_device(word_weight, input_ids=input_ids, position_ids=position_ids, position_weight=position_weight)
    check_device(word_weight, weight=weight, bias=bias)
    _check_ids("input_ids", input_ids, words)
    _check_ids("position_ids", position_ids, positions)
    if padding_idx is not None:
        if not -words <= padding_idx < words:
            raise ValueError(f"padding_idx must lie in [{-words}, {words}), got {padding_idx}")
        padding_idx %= words
    check_probability("dropout_p", dropout_p)
    check_totals(gradients, word_weight, position_weight, weight, bias)
    return backends.resolve("embeddings", IMPLEMENTATIONS, backend, word_weight, unsupported(hidden))(
        input_ids,
        position_ids,
        word_weight,
        position_weight,
        weight,
        bias,
        eps=eps,
        padding_idx=padding_idx,
        dropout_p=dropout_p,
        gradients=gradients,
    )


def _check_ids(name: str, ids: Tensor, size: int) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be integers, int64 or int32, got {ids.dtype}")
    if ids.device.type != "cpu" or not ids.numel() or torch.compiler.is_compiling():
        return
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"{name} must lie in [0, {size}), got {low if low < 0 else high}")
