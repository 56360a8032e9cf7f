"""The original's own code, unchanged, out of the salesforce-lavis 1.0.2 wheel.

LAVIS does not install beside today's packages, so files of it are loaded by path: Qformer.py, blip2_qformer.py,
blip2_opt.py and blip2_t5.py of lavis/models/blip2_models. What they import of LAVIS and of transformers 4.26 is put in
their way first. Nothing of the wheel is copied into this repository; ``make .cache/lavis`` fetches it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
import transformers.modeling_utils
import transformers.pytorch_utils
from torch import Tensor, nn
from transformers import BertConfig

from qformer_fast import Blip2OPT, Blip2QFormer, QFormerConfig
from qformer_fast.integrations.lavis import BertLMHeadModel

LAVIS = Path(__file__).resolve().parents[1] / ".cache" / "lavis"
FOLDER = LAVIS / "lavis" / "models" / "blip2_models"


def why_missing() -> str | None:
    """None when the original's files are there, else what to do."""
    return (
        None if (FOLDER / "Qformer.py").exists() else "salesforce-lavis 1.0.2 is not unpacked: run `make .cache/lavis`"
    )


def load_qformer_module() -> ModuleType:
    """The original's Qformer.py with the names that transformers 5 moved or dropped."""
    name = "lavis.models.blip2_models.Qformer"
    if name in sys.modules:
        return sys.modules[name]
    modeling_utils, pytorch_utils = transformers.modeling_utils, transformers.pytorch_utils
    for moved in ("apply_chunking_to_forward", "prune_linear_layer"):
        setattr(modeling_utils, moved, getattr(pytorch_utils, moved))
    modeling_utils.find_pruneable_heads_and_indices = None
    module = _load(name, FOLDER / "Qformer.py")
    base = module.BertPreTrainedModel
    base.get_head_mask = lambda self, head_mask, layers: [None] * layers
    base.invert_attention_mask = lambda self, mask: (
        (1.0 - mask[:, None, None, :].to(self.dtype)) * torch.finfo(self.dtype).min
    )
    base.init_weights = lambda self: self.apply(self._init_weights)
    return module


def build_qformer(config: QFormerConfig) -> nn.Module:
    """The original's ``BertLMHeadModel`` at these sizes, decoder tied to the word embeddings."""
    bert_config = BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        hidden_dropout_prob=config.hidden_dropout_prob,
        attention_probs_dropout_prob=config.attention_probs_dropout_prob,
        max_position_embeddings=config.max_position_embeddings,
    )
    bert_config.encoder_width = config.encoder_hidden_size
    bert_config.add_cross_attention = True
    bert_config.cross_attention_freq = config.cross_attention_frequency
    bert_config.query_length = config.num_query_tokens
    qformer = load_qformer_module().BertLMHeadModel(bert_config)
    qformer.cls.predictions.decoder.weight = qformer.bert.embeddings.word_embeddings.weight
    return qformer


def build_stage1(model: Blip2QFormer, drop_in: bool = False) -> nn.Module:
    """The original's ``Blip2Qformer`` with the weights and the training mode of ``model``, over its own Q-Former class
    or over this package's (``drop_in``).

    Its image encoder is the identity, so ``forward({"image": image_embeds, "text_input": (input_ids,
    attention_mask)})``
    takes what :meth:`Blip2QFormer.forward` takes.
    """
    original_class = _load_blip2_qformer_module().Blip2Qformer
    original = original_class.__new__(original_class)
    nn.Module.__init__(original)
    config = model.config
    original.visual_encoder = nn.Identity()
    original.ln_vision = nn.LayerNorm(config.encoder_hidden_size)
    original.Qformer = build_qformer(config)
    if drop_in:
        original.Qformer = BertLMHeadModel(original.Qformer.config)
    original.query_tokens = nn.Parameter(torch.zeros_like(model.query_tokens))
    original.vision_proj = nn.Linear(config.hidden_size, model.embed_dim)
    original.text_proj = nn.Linear(config.hidden_size, model.embed_dim)
    original.itm_head = nn.Linear(config.hidden_size, 2)
    original.temp = nn.Parameter(torch.zeros([]))
    original.max_txt_len = 32
    original.tokenizer = _Tokenizer(model.dec_token_id, config.pad_token_id)
    original.load_state_dict(model.to_lavis_state_dict(), strict=True)
    return original.to(model.temp.device, model.query_tokens.dtype).train(model.training)


def build_stage2(model: Blip2OPT, tokenizer: Callable, prompt: str = "") -> nn.Module:
    """The original's ``Blip2OPT``, or around an encoder-decoder its ``Blip2T5``, with the weights, the language model
    (in the mode that it has) and the training mode of ``model``, which has no text branch.

    Its image encoder is the identity, so ``forward({"image": image_embeds, "text_input": captions})`` takes what
    :meth:`Blip2OPT.encode_images` takes, and captions as strings (T5's prompts, with "text_output" beside them).
    """
    kind = "t5" if model.language_projection.encoder_decoder else "opt"
    original_class = _load_stage2_class(kind)
    original = original_class.__new__(original_class)
    nn.Module.__init__(original)
    config = model.config
    original.visual_encoder = nn.Identity()
    original.ln_vision = nn.LayerNorm(config.encoder_hidden_size, eps=model.ln_vision.eps)
    original.Qformer = build_query_qformer(config)
    original.query_tokens = nn.Parameter(torch.zeros_like(model.query_tokens))
    setattr(original, f"{kind}_proj", nn.Linear(*reversed(model.language_projection.weight.shape)))
    # a buffer that the original keeps without the embeddings it is for
    positions = {"Qformer.bert.embeddings.position_ids": original.Qformer.bert.embeddings.position_ids}
    original.load_state_dict(model.to_lavis_state_dict() | positions, strict=True)
    setattr(original, f"{kind}_tokenizer", tokenizer)
    original.prompt, original.max_txt_len = prompt, 32
    if prompt and kind == "opt":
        original.prompt_length = tokenizer(prompt, return_tensors="pt").attention_mask.sum(1)
    original.to(model.query_tokens.device, model.query_tokens.dtype).train(model.training)
    setattr(original, f"{kind}_model", model.language_model)
    return original


def build_query_qformer(config: QFormerConfig) -> nn.Module:
    """:func:`build_qformer` without its text branch, which blip2_opt.py takes away."""
    qformer = build_qformer(config)
    qformer.cls = None
    qformer.bert.embeddings.word_embeddings = None
    qformer.bert.embeddings.position_embeddings = None
    for layer in qformer.bert.encoder.layer:
        layer.output = None
        layer.intermediate = None
    return qformer


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """The group of one process that the original's forward asks for its rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def fixed_negatives(image_index: Tensor, text_index: Tensor) -> Iterator[None]:
    """Makes the original draw these: it asks multinomial for each text's image first, then for each image's text."""
    draws = iter([*image_index.tolist(), *text_index.tolist()])
    multinomial = torch.multinomial
    torch.multinomial = lambda weights, count: torch.tensor([next(draws)])
    try:
        yield
    finally:
        torch.multinomial = multinomial


class _Tokens(types.SimpleNamespace):
    def to(self, device: torch.device) -> _Tokens:
        return _Tokens(input_ids=self.input_ids.to(device), attention_mask=self.attention_mask.to(device))


class _Tokenizer:
    """Gives back the ids that it is called with."""

    def __init__(self, bos_token_id: int, pad_token_id: int):
        self.bos_token_id, self.pad_token_id = bos_token_id, pad_token_id

    def __call__(self, text: tuple[Tensor, Tensor], **_options) -> _Tokens:
        return _Tokens(input_ids=text[0], attention_mask=text[1])


class _Base(nn.Module):
    def maybe_autocast(self, dtype: torch.dtype | None = None) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


class _Registry:
    @staticmethod
    def register_model(_name: str):
        return lambda registered: registered


def _load_blip2_qformer_module() -> ModuleType:
    name = "lavis.models.blip2_models.blip2_qformer"
    if name not in sys.modules:
        load_qformer_module()
        _stub("lavis.common.registry", registry=_Registry())
        _stub("lavis.models.base_model", all_gather_with_grad=lambda x: x, concat_all_gather=lambda x: x.detach())
        _stub("lavis.models.blip2_models.blip2", Blip2Base=_Base, compute_sim_matrix=None, disabled_train=None)
        _stub("lavis.models.blip_models.blip_outputs", BlipOutput=types.SimpleNamespace, BlipOutputFeatures=None)
        _load(name, FOLDER / "blip2_qformer.py")
    return sys.modules[name]


def _load_stage2_class(kind: str) -> type[nn.Module]:
    """``Blip2OPT`` of "opt", ``Blip2T5`` of "t5"."""
    name = f"lavis.models.blip2_models.blip2_{kind}"
    if name not in sys.modules:
        _load_blip2_qformer_module()
        language = {"opt": "OPTForCausalLM", "t5": "T5ForConditionalGeneration"}[kind]
        _stub(f"lavis.models.blip2_models.modeling_{kind}", **{language: None, f"{kind.upper()}Config": None})
        _load(name, FOLDER / f"blip2_{kind}.py")
    return getattr(sys.modules[name], f"Blip2{kind.upper()}")


def _stub(name: str, **attributes) -> None:
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
