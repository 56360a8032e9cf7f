"""Swaps the forward of Q-Formers inside Hugging Face models; parameters stay where they are."""

from __future__ import annotations

import contextlib
import itertools
import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from qformer_fast.config import QFormerConfig
from qformer_fast.models import padded
from qformer_fast.models.borrowed import BorrowedQFormer

logger = logging.getLogger(__name__)

# class of a Q-Former -> the LayerNorm of its embeddings
NORMS = {
    "Blip2QFormerModel": "layernorm",
    "InstructBlipQFormerModel": "embeddings.layernorm",
    "InstructBlipVideoQFormerModel": "embeddings.layernorm",
}
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
# arguments of whole models that reach the Q-Former and change nothing there
PASSED_ON = {"use_cache", "labels", "num_items_in_batch", "logits_to_keep", "interpolate_pos_encoding", "pixel_values"}
STATE = "_qformer_fast"


@dataclass(frozen=True)
class ReplaceReport:
    """What :func:`replace_qformer` found.

    Args:
        replaced (list): names of the Q-Formers that run here now; "" is the model itself.
        kept (dict): name -> why it runs as before.
    """

    replaced: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"replaced: {name or 'the model itself'}" for name in self.replaced]
        lines += [f"kept: {name or 'the model itself'}: {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines) or "no Q-Former found"


def replace_qformer(
    model: nn.Module, *, compute_dtype: torch.dtype | None = None, cuda_graphs: bool = True
) -> ReplaceReport:
    """Makes every Q-Former inside a Hugging Face model run on this package's kernels.

    Takes any model that holds a ``Blip2QFormerModel`` (BLIP-2's, Granite Speech's and Granite Vision's), an
    ``InstructBlipQFormerModel`` or an ``InstructBlipVideoQFormerModel``, or is one. Only their ``forward`` changes:
    modules, parameters and their names stay, so checkpoints, optimizers, LoRA on linear layers, gradient checkpointing,
    ``train()`` and ``eval()`` work as before. Rows of hidden text are zeros, which Hugging Face fills with numbers that
    nothing reads.

    A call that can't run here, such as one with ``output_attentions``, runs as before, and a warning says why, once for
    each reason: hidden states and attentions; LoRA with dropout in training or a variant of it; layers of other classes
    (quantised ones); hooks inside the Q-Former; dropout other than the config's; masks of other shapes than
    :meth:`QFormer.forward` lists.

    On a GPU calls run as CUDA graphs: with gradients from the second call of a kind on, texts of a padded width being
    few kinds; without gradients queries without text, on weights packed once. Without gradients a parameter's change is
    seen by its version; writing through ``.data`` is not, unless a call in training mode comes between.

    Args:
        model (nn.Module): changed in place.
        compute_dtype (torch.dtype, Optional): what the Q-Former computes in, whatever its parameters are, as under
            autocast; for models that keep it in fp32 (``_keep_in_fp32_modules``). Default: `None`, the parameters'.
        cuda_graphs (bool): on a CUDA device, in training, and in inference for queries without text; backward can run
            once only after a forward then. Default: True.

    Returns:
        ReplaceReport: what was replaced, and what was not and why.
    """
    report = ReplaceReport()
    for name, module in model.named_modules():
        kind = next((base.__name__ for base in type(module).__mro__ if base.__name__ in NORMS), None)
        if kind is None:
            continue
        _restore(module)
        reason = _why_not_ever(module)
        if reason is not None:
            report.kept[name] = reason
            continue
        _Replacement(module, kind, compute_dtype, cuda_graphs).install()
        report.replaced.append(name)
    return report


def restore_qformer(model: nn.Module) -> list[str]:
    """Undoes :func:`replace_qformer`; returns the names of the Q-Formers that had been replaced."""
    return [name for name, module in model.named_modules() if _restore(module)]


def _restore(module: nn.Module) -> bool:
    replacement = module.__dict__.pop(STATE, None)
    if replacement is not None:
        replacement.uninstall()
    return replacement is not None


def _why_not_ever(module: nn.Module) -> str | None:
    try:
        QFormerConfig.from_hf(module.config)
    except ValueError as error:
        return str(error)
    return None


class _Replacement:
    """What a replaced Q-Former keeps beside its modules."""

    def __init__(self, module: nn.Module, kind: str, compute_dtype: torch.dtype | None, cuda_graphs: bool):
        self.module, self.compute_dtype = module, compute_dtype
        self.qformer = BorrowedQFormer(QFormerConfig.from_hf(module.config), module, norm=NORMS[kind])
        self.qformer.cuda_graphs = cuda_graphs
        self.qformer.follow(module.training)
        self.forward = _blip2_forward if kind == "Blip2QFormerModel" else _instructblip_forward
        inner = [x for x in module.modules() if x is not module]
        self.inner = [vars(x) for x in inner]
        self.hooks = [x.__dict__[kind] for x in inner for kind in HOOKS]
        self.dropouts = [x for x in inner if isinstance(x, nn.Dropout)]
        self.warned: set[str] = set()

    def install(self) -> None:
        # accelerate's hooks on the Q-Former call what they found as its forward
        self.place = "_old_forward" if "_old_forward" in self.module.__dict__ else "forward"
        self.before = self.module.__dict__.get(self.place)
        setattr(self.module, self.place, MethodType(self.forward, self.module))
        self.module.__dict__[STATE] = self

    def uninstall(self) -> None:
        if self.before is None:
            delattr(self.module, self.place)
        else:
            setattr(self.module, self.place, self.before)

    def why_not(self, options: dict[str, Any]) -> str | None:
        """Why this call can't run here, or None."""
        config = self.module.config
        for name in ("output_attentions", "output_hidden_states"):
            asked = options.pop(name, None)
            if asked or (asked is None and getattr(config, name, False)):
                return f"{name} asks for what the kernels do not keep"
        unknown = [name for name, value in options.items() if value is not None and name not in PASSED_ON]
        if unknown:
            return f"arguments {unknown} are not known here"
        if any(map(operator.contains, self.inner, itertools.repeat("forward"))):
            return "a module inside has a forward of its own, as offloading puts there"
        if any(self.hooks) and not all(map(_captures_outputs, self.hooks)):
            return "a module inside has hooks"
        if self.module.training and any(x.p != config.hidden_dropout_prob for x in self.dropouts):
            return f"a dropout inside differs from config.hidden_dropout_prob = {config.hidden_dropout_prob}"
        return None if self.qformer.reads_parameters() else self.qformer.why_not()

    def run_before(self, reason: str, *args: Any, **options: Any) -> Any:
        if reason not in self.warned:
            self.warned.add(reason)
            logger.warning("%s runs as before: %s", type(self.module).__name__, reason)
        before = self.before or MethodType(type(self.module).forward, self.module)
        return before(*args, **options)

    def run(
        self,
        embed: Callable[[], Tensor],
        query_embeds: Tensor | None,
        num_queries: int,
        attention_mask: Tensor | None,
        image_embeds: Tensor | None,
        image_mask: Tensor | None,
    ) -> Tensor:
        """(batch, rows, hidden); ``embed()`` gives the embedded rows (1 or batch, rows, hidden)."""
        qformer, norm = self.qformer, self.qformer.layernorm.weight
        qformer.follow(self.module.training)
        checkpointing = any(getattr(layer, "gradient_checkpointing", False) for layer in self.module.encoder.layer)
        qformer.gradient_checkpointing = "layer" if checkpointing else "none"
        device = norm.device.type
        autocast = torch.is_autocast_enabled(device)
        if num_queries:
            if image_embeds is None:
                raise ValueError("encoder_hidden_states must be given with queries, got None")
            if query_embeds is not None:
                qformer.check_queries(query_embeds[:, :num_queries], image_embeds, len(image_embeds))
            image_embeds = image_embeds if autocast else image_embeds.to(norm.dtype)
            image_mask = padded.image_attention_mask(image_mask, image_embeds, num_queries)
        masks = dict(attention_mask=attention_mask, image_mask=image_mask)
        alone = (
            query_embeds is not None
            and query_embeds.shape[1] == num_queries
            and not any(mask is not None for mask in masks.values())
        )
        in_dtype = (
            contextlib.nullcontext() if self.compute_dtype is None else torch.autocast(device, self.compute_dtype)
        )
        with in_dtype:
            if alone and not (self.module.training or torch.is_grad_enabled()):
                out = qformer.encode_queries(query_embeds.to(norm.dtype), image_embeds)
            else:
                out = qformer.encode_embedded(embed(), num_queries, image_embeds=image_embeds, **masks)
        return out.to(torch.float32 if autocast else norm.dtype)


def _captures_outputs(hooks: dict) -> bool:
    """Whether these are transformers' own, which do nothing unless outputs are asked for."""
    return all(getattr(x, "__module__", "").startswith("transformers.") for x in hooks.values())


def _blip2_forward(
    self: nn.Module,
    query_embeds: Tensor,
    query_length: int | None = None,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **options: Any,
) -> Any:
    """``Blip2QFormerModel.forward`` (transformers, modeling_blip_2.py), see :func:`replace_qformer`."""
    state: _Replacement = self.__dict__[STATE]
    given = dict(
        query_embeds=query_embeds,
        query_length=query_length,
        attention_mask=attention_mask,
        encoder_hidden_states=encoder_hidden_states,
        encoder_attention_mask=encoder_attention_mask,
    )
    return_dict = options.get("return_dict")
    reason = state.why_not({name: value for name, value in options.items() if name != "return_dict"})
    if reason is not None:
        return state.run_before(reason, **given, **options)
    num_queries = query_embeds.shape[1] if query_length is None else query_length
    out = state.run(
        lambda: self.dropout(self.layernorm(query_embeds.to(self.layernorm.weight.dtype))),
        query_embeds,
        num_queries,
        attention_mask,
        encoder_hidden_states,
        encoder_attention_mask,
    )
    return _output(self, out, return_dict)


def _instructblip_forward(
    self: nn.Module,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    query_embeds: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **options: Any,
) -> Any:
    """``InstructBlipQFormerModel.forward`` (transformers, modeling_instructblip.py), see :func:`replace_qformer`."""
    state: _Replacement = self.__dict__[STATE]
    given = dict(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        query_embeds=query_embeds,
        encoder_hidden_states=encoder_hidden_states,
        encoder_attention_mask=encoder_attention_mask,
    )
    return_dict = options.get("return_dict")
    reason = state.why_not({name: value for name, value in options.items() if name != "return_dict"})
    if reason is not None:
        return state.run_before(reason, **given, **options)
    if input_ids is None and query_embeds is None:
        raise ValueError("input_ids or query_embeds must be given, got neither")
    num_queries = 0 if query_embeds is None else query_embeds.shape[1]
    out = state.run(
        lambda: self.embeddings(input_ids=input_ids, position_ids=position_ids, query_embeds=query_embeds),
        query_embeds if input_ids is None else None,
        num_queries,
        attention_mask,
        encoder_hidden_states,
        encoder_attention_mask,
    )
    return _output(self, out, return_dict)


def _output(module: nn.Module, rows: Tensor, return_dict: bool | None) -> Any:
    out = BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=rows, pooler_output=rows[:, 0])
    wanted = getattr(module.config, "return_dict", True) if return_dict is None else return_dict
    return out if wanted else out.to_tuple()
