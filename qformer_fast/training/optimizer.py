"""AdamW with the original's parameter groups, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import AdamW

from qformer_fast.training.config import OptimizerConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters with and without weight decay.

    1-D tensors and biases are not decayed; the 0-dim temperature and the 3-D queries are, as in the original (LAVIS
    506965b, blip2.py:116-121).
    """
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (kept if parameter.ndim == 1 or name.endswith(".bias") else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    groups = parameter_groups(model, config.weight_decay)
    return AdamW(groups, lr=config.warmup_lr, betas=config.betas, fused=True)


def lr_at(step: int, steps: int, config: OptimizerConfig) -> float:
    """Learning rate of optimizer step ``step`` of ``steps``, counted from 0: linear warm-up, then half a cosine.

    The original moves along the cosine once an epoch (optims.py:79-119); here each step does, as the paper says.
    """
    if step < config.warmup_steps:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
