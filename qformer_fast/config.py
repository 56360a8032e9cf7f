"""The one description of a Q-Former's sizes that every part reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Checkpointing = Literal["none", "feed_forward", "layer"]
"""What backward computes again instead of keeping: nothing, the feed-forward sub-layers, or whole layers."""


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes of a Q-Former; the fields of Hugging Face's ``Blip2QFormerConfig`` and ``num_query_tokens``.

    The defaults are BLIP-2's: bert-base with the ``[DEC]`` token added, 32 queries, cross-attention in every other
    layer to image tokens of EVA-CLIP ViT-g (1408 wide).

    Args:
        vocab_size (int): words of the text branch, ``[DEC]`` included.
        hidden_size, intermediate_size (int): widths of the rows and of the feed-forward layers.
        num_hidden_layers, num_attention_heads (int): ``hidden_size`` must be a multiple of the heads.
        hidden_act (str): "gelu", the exact erf form; the original has no other.
        hidden_dropout_prob, attention_probs_dropout_prob (float): probabilities in [0, 1).
        max_position_embeddings (int): longest text, in tokens.
        initializer_range (float): standard deviation of fresh weights and queries.
        layer_norm_eps (float): added to the variance.
        cross_attention_frequency (int): layers ``i`` with ``i % cross_attention_frequency == 0`` look at the image.
        encoder_hidden_size (int): width of the image tokens.
        use_qformer_text_input (bool): with False the text branch (embeddings, text feed-forward layers) is not built.
        num_query_tokens (int): queries an image, 1 to 256.

    Raises:
        ValueError: a size out of range; the message names the field.
    """

    vocab_size: int = 30523
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    cross_attention_frequency: int = 2
    encoder_hidden_size: int = 1408
    use_qformer_text_input: bool = True
    num_query_tokens: int = 32

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "cross_attention_frequency",
            "encoder_hidden_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 1 <= self.num_query_tokens <= 256:
            raise ValueError(f"num_query_tokens must be 1 to 256, got {self.num_query_tokens}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.hidden_act != "gelu":
            raise ValueError(f'hidden_act must be "gelu" (exact erf), got {self.hidden_act!r}')

    @property
    def headdim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def has_cross_attention(self, layer: int) -> bool:
        return layer % self.cross_attention_frequency == 0

    @property
    def cross_attention_layers(self) -> list[int]:
        return [i for i in range(self.num_hidden_layers) if self.has_cross_attention(i)]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_hf(cls, config: Any) -> QFormerConfig:
        """Reads a Hugging Face config.

        Args:
            config: ``Blip2QFormerConfig`` or ``InstructBlipQFormerConfig``, or a whole ``Blip2Config`` /
                ``InstructBlipConfig``, whose ``num_query_tokens`` is then taken too. InstructBLIP's module always has a
                text branch.
        """
        qformer = getattr(config, "qformer_config", config)
        names = {field.name for field in dataclasses.fields(cls)}
        values = {name: getattr(qformer, name) for name in names if hasattr(qformer, name)}
        if "instructblip" in getattr(qformer, "model_type", ""):
            values["use_qformer_text_input"] = True
        if hasattr(config, "num_query_tokens"):
            values["num_query_tokens"] = config.num_query_tokens
        return cls(**values)
