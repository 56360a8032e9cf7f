"""Bad input is named before anything runs, and a backend asked for never gives way."""

import pytest
import torch

from qformer_fast import Mask, SequenceLayout, available, ops, use_backend


@pytest.fixture
def layout():
    return SequenceLayout.build(
        num_queries=3, image_index=[0, 1], text_lengths=[4, 2], masks=Mask.BIDIRECTIONAL, num_images=2
    )


def test_rows_that_are_not_the_layouts(layout):
    with pytest.raises(ValueError, match="qkv must have the 12 rows of the layout, got 11"):
        ops.query_text_attention(torch.randn(11, 3, 2, 8), layout)
    with pytest.raises(ValueError, match="q must have the 6 rows of the layout, got 5"):
        ops.image_cross_attention(torch.randn(5, 2, 8), torch.randn(2, 4, 2, 8), torch.randn(2, 4, 2, 8), layout)


def test_shapes_dtypes_and_probabilities(layout):
    qkv = torch.randn(12, 3, 2, 8)
    with pytest.raises(ValueError, match=r"qkv must be \(rows, 3, nheads, headdim\), got \(12, 48\)"):
        ops.query_text_attention(qkv.flatten(1), layout)
    with pytest.raises(TypeError, match="qkv must be floating-point, got torch.int64"):
        ops.query_text_attention(qkv.long(), layout)
    with pytest.raises(ValueError, match=r"dropout_p must lie in \[0, 1\), got 1.0"):
        ops.query_text_attention(qkv, layout, dropout_p=1.0)
    with pytest.raises(ValueError, match=r"softmax_scale must be positive, got -0.5"):
        ops.query_text_attention(qkv, layout, softmax_scale=-0.5)
    with pytest.raises(ValueError, match=r"v must be \(2, 4, 2, 8\)"):
        ops.image_cross_attention(torch.randn(6, 2, 8), torch.randn(2, 4, 2, 8), torch.randn(2, 5, 2, 8), layout)
    with pytest.raises(ValueError, match="image_mask must"):
        k = torch.randn(2, 4, 2, 8)
        ops.image_cross_attention(torch.randn(6, 2, 8), k, k, layout, image_mask=torch.ones(2, 2, 4).bool())
    with pytest.raises(ValueError, match=r"bias must be \(7\), got \(6,\)"):
        ops.bias_gelu(torch.randn(2, 7), torch.randn(6))
    with pytest.raises(ValueError, match=r'reduction must be "mean", "sum" or "none", got \'max\''):
        ops.linear_cross_entropy(torch.randn(2, 3), torch.randn(4, 3), None, torch.zeros(2).long(), reduction="max")
    with pytest.raises(ValueError, match="norm_weight and norm_bias must be given together"):
        ops.image_key_value(torch.randn(1, 2, 3), torch.randn(4, 3), torch.randn(4), torch.randn(3))
    with pytest.raises(ValueError, match="text_parameters must be given for 2 rows, got None"):
        ops.split_feed_forward_block(torch.randn(0, 3), torch.randn(2, 3), None, None)
    with pytest.raises(TypeError, match="excluded must be bool"):
        ops.sample_negatives(torch.randn(2, 2), torch.zeros(2, 2))
    with pytest.raises(TypeError, match="input_ids must be integers"):
        ops.embeddings(
            torch.zeros(2), torch.zeros(2).long(), torch.randn(4, 3), torch.randn(4, 3), torch.ones(3), torch.ones(3)
        )


def test_devices_must_agree():
    with pytest.raises(ValueError, match="bias must be on cpu, got meta"):
        ops.bias_gelu(torch.randn(2, 7), torch.randn(7, device="meta"))


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_that_cannot_run_says_why(name):
    reason = available()[name]
    if reason is None:
        pytest.skip(f"{name} can run here")
    with pytest.raises(RuntimeError, match=f"backend '{name}' can't run here: "):
        ops.bias_gelu(torch.randn(2, 7), torch.randn(7), backend=name)
    with pytest.raises(RuntimeError, match=f"backend '{name}' can't run here: "), use_backend(name):
        pass


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of"):
        ops.bias_gelu(torch.randn(2, 7), torch.randn(7), backend="tpu")


def test_use_backend_ends_with_its_block():
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert ops.bias_gelu(torch.zeros(1, 1), torch.zeros(1)).item() == 0
