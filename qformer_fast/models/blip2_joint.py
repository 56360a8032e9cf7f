"""Both stages of BLIP-2 at once: contrast, matching, captions and a frozen language model on one Q-Former."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from qformer_fast.config import QFormerConfig
from qformer_fast.data.language import LanguageText
from qformer_fast.integrations.checkpoints import StateDict
from qformer_fast.models.blip2_qformer import Blip2QFormer, Stage1Output
from qformer_fast.models.language import LanguageProjection


@dataclass(frozen=True, eq=False, kw_only=True)
class JointOutput(Stage1Output):
    """What :meth:`Blip2Joint.forward` returns: as :class:`Stage1Output`, with ``loss`` the sum of four.

    Args:
        loss_lm (Tensor): 0-dim, nats, of the frozen language model.
    """

    loss_lm: Tensor


class Blip2Joint(Blip2QFormer):
    """Stage 1 and a frozen language model trained together: ``loss = loss_itc + loss_itm + loss_itg + loss_lm``.

    The queries that ITC reads, which saw the image and no text, are also the language model's prefix: the fourth loss
    costs the Q-Former nothing.

    Args:
        config, options: of :class:`Blip2QFormer`.
        language_model, language_model_dropout: of :class:`qformer_fast.models.blip2_opt.Blip2OPT`.
    """

    def __init__(
        self,
        config: QFormerConfig,
        language_model: PreTrainedModel | str,
        *,
        language_model_dropout: bool = False,
        **options,
    ):
        super().__init__(config, **options)
        self.language_projection = LanguageProjection(
            config.hidden_size, language_model, dropout=language_model_dropout
        )

    def init_options(self) -> dict[str, Any]:
        return super().init_options() | self.language_projection.init_options()

    def to_lavis_state_dict(self) -> StateDict:
        """As of :class:`Blip2QFormer`, and the projection as of :class:`qformer_fast.models.blip2_opt.Blip2OPT`."""
        return self.language_projection.as_lavis(super().to_lavis_state_dict())

    def forward(
        self,
        image_embeds: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        language_text: LanguageText,
        image_ids: Sequence[str | int] | Tensor | None = None,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> JointOutput:
        """The four losses of a batch of image-caption pairs.

        Args:
            image_embeds, input_ids, attention_mask, image_ids, negatives: see :meth:`Blip2QFormer.forward`.
            language_text (LanguageText): the captions again, in the language model's tokens.
        """
        stage1 = super().forward(image_embeds, input_ids, attention_mask, image_ids, negatives)
        text = language_text.input_ids, language_text.attention_mask, language_text.labels
        loss_lm = self.language_projection.loss(stage1.query_output, *text)
        values = vars(stage1) | {"loss": stage1.loss + loss_lm, "loss_lm": loss_lm}
        return JointOutput(**values)
