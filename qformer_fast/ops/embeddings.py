"""Word and position embeddings of packed text rows."""

from __future__ import annotations

from torch import Tensor

from qformer_fast import backend as backends
from qformer_fast import reference
from qformer_fast.ops._checks import check_device, check_floating, check_probability, check_shape

IMPLEMENTATIONS = {"reference": reference.embeddings}


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
    backend: str | None = None,
) -> Tensor:
    """dropout(layer_norm(word[input_ids] + position[position_ids]) * weight + bias).

    Replaces LAVIS ``BertEmbeddings`` on text rows (Qformer.py:78-108).

    Args:
        input_ids, position_ids (Tensor): (rows,) int64, inside their tables.
        word_weight, position_weight (Tensor): (vocab, hidden) and (positions, hidden).
        weight, bias (Tensor): (hidden,), the LayerNorm's.
        eps (float): added to the variance. Default: 1e-12.
        padding_idx (int, Optional): the word that gets no gradient here.
        dropout_p (float): probability in [0, 1). Default: 0.0.
        backend (str, Optional): "reference", "triton" or "cuda". Default: `None`, chosen.

    Returns:
        Tensor: (rows, hidden).

    Raises:
        ValueError: shapes, devices or probability that do not fit. TypeError: floating-point ids. RuntimeError: the
            backend asked for can't run, with the reason.
    """
    hidden = word_weight.shape[-1]
    check_shape("input_ids", input_ids, "rows")
    check_shape("position_ids", position_ids, *input_ids.shape)
    check_shape("word_weight", word_weight, "vocab", hidden)
    check_shape("position_weight", position_weight, "positions", hidden)
    check_shape("weight", weight, hidden)
    check_shape("bias", bias, hidden)
    for name, ids in (("input_ids", input_ids), ("position_ids", position_ids)):
        if ids.is_floating_point():
            raise TypeError(f"{name} must be integers, got {ids.dtype}")
    check_floating(word_weight=word_weight, position_weight=position_weight, weight=weight, bias=bias)
    check_device(word_weight, input_ids=input_ids, position_ids=position_ids, position_weight=position_weight)
    check_probability("dropout_p", dropout_p)
    return backends.resolve("embeddings", IMPLEMENTATIONS, backend, word_weight)(
        input_ids,
        position_ids,
        word_weight,
        position_weight,
        weight,
        bias,
        eps=eps,
        padding_idx=padding_idx,
        dropout_p=dropout_p,
    )
