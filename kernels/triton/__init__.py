"""Triton kernels and their launchers, one file an op; imported as ``qformer_fast.kernels``."""

from qformer_fast.kernels.bias_gelu import bias_gelu_bwd, bias_gelu_bwd_in_place, bias_gelu_fwd
from qformer_fast.kernels.contrastive_loss import contrastive_loss_bwd, contrastive_loss_fwd
from qformer_fast.kernels.contrastive_similarity import (
    contrastive_similarity_bwd_image,
    contrastive_similarity_bwd_text,
    contrastive_similarity_fwd,
)
from qformer_fast.kernels.dropout_add_layer_norm import dropout_add_layer_norm_bwd, dropout_add_layer_norm_fwd
from qformer_fast.kernels.embeddings import embeddings_bwd, embeddings_fwd
from qformer_fast.kernels.fold_norm import fold_norm_bwd, fold_norm_fwd
from qformer_fast.kernels.image_cross_attention import (
    image_cross_attention_bwd,
    image_cross_attention_bwd_into,
    image_cross_attention_fwd,
)
from qformer_fast.kernels.layer_norm import sum_parts
from qformer_fast.kernels.linear_cross_entropy import (
    linear_cross_entropy_bwd,
    linear_cross_entropy_fwd,
    linear_cross_entropy_rows_bwd,
)
from qformer_fast.kernels.linear_few_rows import linear_few_rows
from qformer_fast.kernels.query_text_attention import query_text_attention_bwd, query_text_attention_fwd
from qformer_fast.kernels.sample_negatives import sample_negatives_fwd
from qformer_fast.kernels.standardize import standardize_into

__all__ = [
    "bias_gelu_bwd",
    "bias_gelu_bwd_in_place",
    "bias_gelu_fwd",
    "contrastive_loss_bwd",
    "contrastive_loss_fwd",
    "contrastive_similarity_bwd_image",
    "contrastive_similarity_bwd_text",
    "contrastive_similarity_fwd",
    "dropout_add_layer_norm_bwd",
    "dropout_add_layer_norm_fwd",
    "embeddings_bwd",
    "embeddings_fwd",
    "fold_norm_bwd",
    "fold_norm_fwd",
    "image_cross_attention_bwd",
    "image_cross_attention_bwd_into",
    "image_cross_attention_fwd",
    "linear_cross_entropy_bwd",
    "linear_cross_entropy_fwd",
    "linear_cross_entropy_rows_bwd",
    "linear_few_rows",
    "query_text_attention_bwd",
    "query_text_attention_fwd",
    "sample_negatives_fwd",
    "standardize_into",
    "sum_parts",
]
