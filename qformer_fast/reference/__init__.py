"""Pure PyTorch definitions of every op and of the original-order stage 1: the truth in tests, the baseline in
benchmarks.
"""

from qformer_fast.reference.attention import (
    MAX_TILE,
    image_attention_probs,
    image_cross_attention,
    image_cross_attention_bwd,
    image_cross_attention_fwd,
    query_text_attention,
    query_text_attention_bwd,
    query_text_attention_fwd,
)
from qformer_fast.reference.blocks import cross_attention_block, self_attention_block, split_feed_forward_block
from qformer_fast.reference.image_kv import image_key_value
from qformer_fast.reference.losses import contrastive_similarity, linear_cross_entropy, sample_negatives
from qformer_fast.reference.rowwise import (
    bias_gelu,
    bias_gelu_bwd,
    bias_gelu_bwd_with_out,
    bias_gelu_fwd,
    dropout_add_layer_norm,
    dropout_add_layer_norm_bwd,
    dropout_add_layer_norm_fwd,
    embeddings,
    embeddings_bwd,
    embeddings_fwd,
)

__all__ = [
    "MAX_TILE",
    "bias_gelu",
    "bias_gelu_bwd",
    "bias_gelu_bwd_with_out",
    "bias_gelu_fwd",
    "contrastive_similarity",
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
    "image_cross_attention_fwd",
    "image_key_value",
    "linear_cross_entropy",
    "query_text_attention",
    "query_text_attention_bwd",
    "query_text_attention_fwd",
    "sample_negatives",
    "self_attention_block",
    "split_feed_forward_block",
]
