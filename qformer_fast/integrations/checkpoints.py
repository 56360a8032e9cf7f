"""State dicts of LAVIS, Hugging Face and this package, into each other and into models.

The names of this package are the middle: each other format has a way in and a way out, and every tensor keeps its bits.
A name without a home in the target format is kept as it is, so nothing is dropped on the way.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig

from qformer_fast.config import QFormerConfig

StateDict = dict[str, Tensor]
Model = TypeVar("Model", bound="CheckpointMixin")

WORD_EMBEDDINGS = "qformer.embeddings.word_embeddings.weight"
POSITION_EMBEDDINGS = "qformer.embeddings.position_embeddings.weight"

# (pattern, replacement), tried in order, the first that matches renames
_FROM_LAVIS = [
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"^Qformer\.cls\.predictions\.", "lm_head."),
    (r"^Qformer\.bert\.(.*\.(?:cross)?attention)\.self\.", r"qformer.\1.attention."),
    (r"^Qformer\.bert\.", "qformer."),
    (r"^(?:opt|t5|llm)_proj\.", "language_projection."),
    (r"^(?:opt|t5|llm)_model\.", "language_model."),
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
]
_TO_LAVIS = [
    (r"^qformer\.layernorm\.", "Qformer.bert.embeddings.LayerNorm."),
    (r"^lm_head\.", "Qformer.cls.predictions."),
    (r"^qformer\.(.*\.(?:cross)?attention)\.attention\.", r"Qformer.bert.\1.self."),
    (r"^qformer\.", "Qformer.bert."),
    (r"^language_projection\.", "opt_proj."),
    (r"^language_model\.", "opt_model."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.", r"visual_encoder.blocks.\1.norm\2."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.", r"visual_encoder.blocks.\1.attn.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"visual_encoder.blocks.\1.attn.qkv."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp\.", r"visual_encoder.blocks.\1.mlp."),
]
_FROM_HF = [
    (r"^embeddings\.", "qformer.embeddings."),
    (r"^qformer\.embeddings\.layernorm\.", "qformer.layernorm."),
    (r"^vision_projection\.", "vision_proj."),
    (r"^text_projection\.", "text_proj."),
    (r"^vision_model\.post_layernorm\.", "ln_vision."),
]
_TO_HF = [
    (r"^qformer\.embeddings\.", "embeddings."),
    (r"^vision_proj\.", "vision_projection."),
    (r"^text_proj\.", "text_projection."),
    (r"^ln_vision\.", "vision_model.post_layernorm."),
]
_TO_INSTRUCTBLIP = [(r"^qformer\.layernorm\.", "qformer.embeddings.layernorm."), *_TO_HF[1:]]


def _rename(state_dict: Mapping[str, Tensor], rules: list[tuple[str, str]]) -> StateDict:
    def new_name(name: str) -> str:
        for pattern, replacement in rules:
            renamed, count = re.subn(pattern, replacement, name)
            if count:
                return renamed
        return name

    return {new_name(name): tensor for name, tensor in state_dict.items()}


def _from_lavis(state_dict: Mapping[str, Tensor]) -> StateDict:
    out = _rename(state_dict, _FROM_LAVIS)
    out.pop("qformer.embeddings.position_ids", None)
    for tied, original in (("lm_head.decoder.weight", WORD_EMBEDDINGS), ("lm_head.decoder.bias", "lm_head.bias")):
        copy = out.pop(tied, None)
        if copy is not None and not torch.equal(copy, out.setdefault(original, copy)):
            raise ValueError(f"{tied} must equal {original}, to which it is tied, but they differ")
    for name in [name for name in out if name.endswith(".attn.q_bias")]:
        block = re.fullmatch(r"visual_encoder\.blocks\.(\d+)\.attn\.q_bias", name).group(1)
        q_bias, v_bias = out.pop(name), out.pop(f"visual_encoder.blocks.{block}.attn.v_bias")
        qkv_bias = torch.cat([q_bias, torch.zeros_like(v_bias), v_bias])
        out[f"vision_model.encoder.layers.{block}.self_attn.qkv.bias"] = qkv_bias
    return out


def _to_lavis(state_dict: Mapping[str, Tensor]) -> StateDict:
    out = _rename(state_dict, _TO_LAVIS)
    if WORD_EMBEDDINGS in state_dict and "lm_head.bias" in state_dict:
        out["Qformer.cls.predictions.decoder.weight"] = state_dict[WORD_EMBEDDINGS]
        out["Qformer.cls.predictions.decoder.bias"] = state_dict["lm_head.bias"]
    if POSITION_EMBEDDINGS in state_dict:
        out["Qformer.bert.embeddings.position_ids"] = torch.arange(len(state_dict[POSITION_EMBEDDINGS]))[None]
    for name in [name for name in out if re.fullmatch(r"visual_encoder\.blocks\.\d+\.attn\.qkv\.bias", name)]:
        q_bias, k_bias, v_bias = out.pop(name).chunk(3)
        if k_bias.count_nonzero():
            raise ValueError(f"{name} has a key bias, which LAVIS's encoder has no place for")
        block = name.removesuffix("qkv.bias")
        out[block + "q_bias"], out[block + "v_bias"] = q_bias.clone(), v_bias.clone()
    return out


_INTO_OURS: dict[str, Callable[[Mapping[str, Tensor]], StateDict]] = {
    "qformer_fast": dict,
    "lavis": _from_lavis,
    "hf": lambda state_dict: _rename(state_dict, _FROM_HF),
}
_OUT_OF_OURS: dict[str, Callable[[Mapping[str, Tensor]], StateDict]] = {
    "qformer_fast": dict,
    "lavis": _to_lavis,
    "hf": lambda state_dict: _rename(state_dict, _TO_HF),
    "instructblip": lambda state_dict: _rename(state_dict, _TO_INSTRUCTBLIP),
}


def convert(state_dict: Mapping[str, Tensor], source: str, target: str) -> StateDict:
    """Renames a whole-model state dict from one format to another; tensors are shared, not copied.

    Args:
        state_dict (Mapping): of LAVIS ``Blip2Qformer``, ``Blip2OPT`` or ``Blip2T5``, of Hugging Face
            ``Blip2ForImageTextRetrieval``, ``Blip2ForConditionalGeneration`` or ``InstructBlip*``, or of
            :class:`Blip2QFormer` or :class:`Blip2OPT`.
        source (str): "lavis", "hf" (BLIP-2's or InstructBLIP's) or "qformer_fast".
        target (str): "lavis" (a language model and its projection under ``Blip2OPT``'s names), "hf", "instructblip" or
            "qformer_fast". What has no home in Hugging Face's models
            (``temp``, ``lm_head.*``) keeps its name here, which their ``load_state_dict(strict=False)`` reports as
            unexpected.

    Raises:
        ValueError: an unknown format; tied tensors that differ; an image-encoder key bias that LAVIS can't hold.

    Source: the key map of transformers' convert_blip_2_original_to_pytorch.py.
    """
    if source not in _INTO_OURS:
        raise ValueError(f"source must be one of {sorted(_INTO_OURS)}, got {source!r}")
    if target not in _OUT_OF_OURS:
        raise ValueError(f"target must be one of {sorted(_OUT_OF_OURS)}, got {target!r}")
    return _OUT_OF_OURS[target](_INTO_OURS[source](state_dict))


def load_checkpoint(path: str | os.PathLike) -> StateDict:
    """Reads a state dict: ``.safetensors``, a ``torch.save`` file (LAVIS's {"model": ...} is unwrapped), or a folder
    of them.

    Raises:
        FileNotFoundError: nothing there. ValueError: a file that is truncated or no checkpoint; the message names it.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        if not files:
            raise FileNotFoundError(f"path: no *.safetensors or *.bin in {path}")
        return {name: tensor for file in files for name, tensor in load_checkpoint(file).items()}
    if not path.exists():
        raise FileNotFoundError(f"path: no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is truncated or no checkpoint: {error}") from error
    state_dict = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state_dict, dict) or not all(isinstance(x, Tensor) for x in state_dict.values()):
        raise ValueError(f"{path} holds no state dict")
    return state_dict


def checksum(state_dict: Mapping[str, Tensor]) -> int:
    """CRC-32 of the names and bits of tensors on any device."""
    found = 0
    for name, x in state_dict.items():
        content = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found = zlib.crc32(content, zlib.crc32(name.encode(), found))
    return found


@dataclass(frozen=True)
class LoadReport:
    """What loading a state dict found.

    Args:
        missing (list): parameters that the state dict lacks; they keep the values they had, fresh draws on a new model.
        unexpected (list): names that the model has no place for.
        frozen (list): names of the frozen image encoder or language model, which live outside this model.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [
            f"{len(self.missing)} missing, left randomly initialised: {_some(self.missing)}" if self.missing else "",
            f"{len(self.unexpected)} unexpected: {_some(self.unexpected)}" if self.unexpected else "",
            f"{len(self.frozen)} of the frozen models passed over: {_some(self.frozen)}" if self.frozen else "",
        ]
        return "; ".join(part for part in parts if part) or "every tensor found its place"


def _some(names: list[str], shown: int = 8) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


_FROZEN = re.compile(r"^(vision_model|visual_encoder|language_model)\.")


def load_into(module: nn.Module, state_dict: Mapping[str, Tensor], *, strict: bool) -> LoadReport:
    """Copies a state dict with this package's names into ``module`` and reports what did not fit.

    Raises:
        ValueError: a shape that differs, or, when ``strict``, anything missing or unexpected. Nothing is copied then.
    """
    own = module.state_dict()
    frozen = sorted(name for name in state_dict if name not in own and _FROZEN.match(name))
    unexpected = sorted(name for name in state_dict if name not in own and not _FROZEN.match(name))
    report = LoadReport(sorted(own.keys() - state_dict.keys()), unexpected, frozen)
    for name in own.keys() & state_dict.keys():
        if own[name].shape != state_dict[name].shape:
            have, want = tuple(state_dict[name].shape), tuple(own[name].shape)
            raise ValueError(f"state_dict[{name!r}] must be {want}, got {have}")
    if strict and (report.missing or report.unexpected):
        raise ValueError(f"state_dict does not fit: {report}")
    module.load_state_dict({name: state_dict[name] for name in own.keys() & state_dict.keys()}, strict=False)
    warn_identical_queries(module)
    return report


def warn_identical_queries(module: nn.Module) -> None:
    """Identical queries stay identical in eval mode; Hugging Face's models are built with zeros
    (modeling_blip_2.py:442).
    """
    queries = getattr(module, "query_tokens", None)
    if queries is not None and queries.shape[1] > 1 and bool((queries == queries[:, :1]).all()):
        warnings.warn(
            "all query_tokens are identical, so all queries compute the same; draw them from N(0, 0.02)", stacklevel=3
        )


class CheckpointMixin:
    """Loading and saving of models; ``name_prefixes`` says where in a whole model's state dict this one's names are."""

    config: QFormerConfig
    name_prefixes: ClassVar[dict[str, str]] = {"lavis": "", "hf": "", "qformer_fast": ""}

    def load_lavis_state_dict(self, state_dict: Mapping[str, Tensor], *, strict: bool = True) -> LoadReport:
        """Loads a state dict of the original; see :func:`load_into`."""
        return load_into(self, self._convert(state_dict, "lavis", "qformer_fast"), strict=strict)

    def load_hf_state_dict(self, state_dict: Mapping[str, Tensor], *, strict: bool = True) -> LoadReport:
        """Loads a state dict of Hugging Face's BLIP-2 or InstructBLIP twin of this model; see :func:`load_into`.

        Their whole models have no ``temp`` and no LM head: ``strict`` refuses what those save themselves and accepts
        what :meth:`to_hf_state_dict` gave.
        """
        return load_into(self, self._convert(state_dict, "hf", "qformer_fast"), strict=strict)

    def to_lavis_state_dict(self) -> StateDict:
        """This model under the original's names, with its tied decoder and position buffer."""
        return self._convert(self.state_dict(), "qformer_fast", "lavis")

    def to_hf_state_dict(self) -> StateDict:
        """This model under Hugging Face's BLIP-2 names; ``temp`` and ``lm_head.*``, unknown there, keep theirs."""
        return self._convert(self.state_dict(), "qformer_fast", "hf")

    def _convert(self, state_dict: Mapping[str, Tensor], source: str, target: str) -> StateDict:
        into, out_of = self.name_prefixes[source], self.name_prefixes[target]
        converted = convert({into + name: tensor for name, tensor in state_dict.items()}, source, target)
        return {name.removeprefix(out_of): tensor for name, tensor in converted.items()}

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes ``config.json`` and ``model.safetensors``; each appears whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = {"model_type": "qformer_fast", "class": type(self).__name__, "qformer": self.config.to_dict()}
        description |= self.init_options()
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
            save_file(tensors, Path(scratch) / "model.safetensors", metadata={"format": "pt"})
            (Path(scratch) / "config.json").write_text(json.dumps(description, indent=2) + "\n")
            # safetensors creates files that only their owner may read
            shutil.copymode(Path(scratch) / "config.json", Path(scratch) / "model.safetensors")
            for name in ("model.safetensors", "config.json"):
                os.replace(Path(scratch) / name, folder / name)

    @classmethod
    def from_pretrained(cls: type[Model], path_or_id: str | os.PathLike, **options: Any) -> Model:
        """A model in eval mode from :meth:`save_pretrained`'s folder, or from a Hugging Face BLIP-2 checkpoint.

        Args:
            path_or_id (str or path): a folder, or the id of a model on the Hugging Face hub. What a checkpoint lacks
                keeps fresh values, and a warning names it.
            options: arguments of the constructor beside ``config``, instead of those that were saved.

        Raises:
            FileNotFoundError: no config there. ValueError: another class's checkpoint, a truncated file.
        """
        folder = Path(path_or_id)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(path_or_id), allow_patterns=["*.json", "*.safetensors", "*.bin"]))
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"no config.json in {folder}")
        description = json.loads((folder / "config.json").read_text())
        if description.pop("model_type") == "qformer_fast":
            if description.pop("class") != cls.__name__:
                raise ValueError(f"{folder} must hold a {cls.__name__}, but its config.json names another class")
            model = cls(QFormerConfig(**description.pop("qformer")), **(description | options))
            load_into(model, load_checkpoint(folder / "model.safetensors"), strict=True)
        else:
            model = cls.from_hf_folder(folder, **options)
        return model.eval()

    @classmethod
    def from_hf_folder(cls: type[Model], folder: Path, **options: Any) -> Model:
        """:meth:`from_pretrained` of a Hugging Face checkpoint."""
        config = AutoConfig.from_pretrained(folder)
        model = cls(QFormerConfig.from_hf(config), **(cls.options_from_hf(config) | options))
        report = model.load_hf_state_dict(load_checkpoint(folder), strict=False)
        if report.missing or report.unexpected:
            warnings.warn(f"{folder}: {report}", stacklevel=3)
        return model

    def init_options(self) -> dict[str, Any]:
        """Arguments of the constructor beside ``config``."""
        return {}

    @classmethod
    def options_from_hf(cls, config: Any) -> dict[str, Any]:
        """Arguments of the constructor as a Hugging Face config tells them."""
        return {}
