"""The public ops: each checks its input, then runs on the backend that :mod:`qformer_fast.backend` names."""

from qformer_fast.ops.bias_gelu import bias_gelu
from qformer_fast.ops.contrastive_loss import contrastive_loss
from qformer_fast.ops.contrastive_similarity import contrastive_similarity
from qformer_fast.ops.cross_attention_block import cross_attention_block
from qformer_fast.ops.dropout_add_layer_norm import dropout_add_layer_norm
from qformer_fast.ops.embeddings import embeddings
from qformer_fast.ops.image_cross_attention import image_cross_attention
from qformer_fast.ops.image_key_value import image_key_value
from qformer_fast.ops.linear_cross_entropy import linear_cross_entropy
from qformer_fast.ops.query_text_attention import query_text_attention
from qformer_fast.ops.sample_negatives import sample_negatives
from qformer_fast.ops.self_attention_block import self_attention_block
from qformer_fast.ops.split_feed_forward_block import split_feed_forward_block

__all__ = [
    "bias_gelu",
    "contrastive_loss",
    "contrastive_similarity",
    "cross_attention_block",
    "dropout_add_layer_norm",
    "embeddings",
    "image_cross_attention",
    "image_key_value",
    "linear_cross_entropy",
    "query_text_attention",
    "sample_negatives",
    "self_attention_block",
    "split_feed_forward_block",
]
