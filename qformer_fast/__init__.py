"""qformer_fast: BLIP-2's Q-Former, made fast without changing what it computes."""

from qformer_fast.backend import available, use_backend
from qformer_fast.config import QFormerConfig
from qformer_fast.evaluation.retrieval import RankOutput
from qformer_fast.integrations.checkpoints import convert, load_checkpoint
from qformer_fast.integrations.hf import ReplaceReport, replace_qformer, restore_qformer
from qformer_fast.layout import Mask, PackedText, SequenceLayout
from qformer_fast.models.blip2 import ImageEncoder
from qformer_fast.models.blip2_joint import Blip2Joint, JointOutput
from qformer_fast.models.blip2_opt import Blip2OPT, Stage2Output
from qformer_fast.models.blip2_qformer import Blip2QFormer, Stage1Output
from qformer_fast.models.image_kv import ImageKV
from qformer_fast.models.qformer import QFormer, QFormerOutput

__version__ = "0.1.0"

__all__ = [
    "Blip2Joint",
    "Blip2OPT",
    "Blip2QFormer",
    "ImageEncoder",
    "ImageKV",
    "JointOutput",
    "Mask",
    "PackedText",
    "QFormer",
    "QFormerConfig",
    "QFormerOutput",
    "RankOutput",
    "ReplaceReport",
    "SequenceLayout",
    "Stage1Output",
    "Stage2Output",
    "available",
    "convert",
    "load_checkpoint",
    "replace_qformer",
    "restore_qformer",
    "use_backend",
]
