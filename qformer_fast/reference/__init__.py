"""Pure PyTorch definitions of every op and of the original-order stage 1: the truth in tests, the baseline in
benchmarks.
"""

from qformer_fast.reference.attention import (
    MAX_TILE,
    image_attention_probs,
    image_cross_attention,
    image_cross_attention_bwd,
    image_cross_attention_bwd_into,
    image_cross_attention_fwd,
    query_text_attention,
    query_text_attention_bwd,
    query_text_attention_fwd,
)
from qformer_fast.reference.blocks import cross_attention_block, self_attention_block, split_feed_forward_block
from qformer_fast.reference.image_kv import image_key_value
from qformer_fast.reference.losses import (
    contrastive_similarity,
    contrastive_similarity_bwd_image,
    contrastive_similarity_bwd_text,
    contrastive_similarity_fwd,
    linear_cross_entropy,
    linear_cross_entropy_bwd,
    linear_cross_entropy_fwd,
    linear_cross_entropy_rows_bwd,
    sample_negatives,
    sample_negatives_fwd,
)
from qformer_fast.reference.rowwise import (
    bias_gelu,
    bias_gelu_bwd,
    bias_gelu_bwd_in_place,
    bias_gelu_fwd,
    dropout_add_layer_norm,
    dropout_add_layer_norm_bwd,
    dropout_add_layer_norm_fwd,
    embeddings,
    embeddings_bwd,
    embeddings_fwd,
    sum_parts,
)

__all__ = [
    "MAX_TILE",
    "bias_gelu",
    "bias_gelu_bwd",
    "bias_gelu_bwd_in_place",
    "bias_gelu_fwd",
    "contrastive_similarity",
    "contrastive_similarity_bwd_image",
    "contrastive_similarity_bwd_text",
    "contrastive_similarity_fwd",
    "cross_attention_block",
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_bwd",
    "dropout_add_layer_norm_fwd",
    "embeddings",
    "embeddings_bwd",
    "embeddings_fwd",
    "image_attention_probs",
    "image_cross_attention",
    "image_cross_attention_bwd",
    "image_cross_attention_bwd_into",
    "image_cross_attention_fwd",
    "image_key_value",
    "linear_cross_entropy",
    "linear_cross_entropy_bwd",
    "linear_cross_entropy_fwd",
    "linear_cross_entropy_rows_bwd",
    "query_text_attention",
    "query_text_attention_bwd",
    "query_text_attention_fwd",
    "sample_negatives",
    "sample_negatives_fwd",
    "self_attention_block",
    "split_feed_forward_block",
    "sum_parts",
]
