"""The dropout masks that the kernels make, bit by bit: Philox 4x32-7 (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3", sec. 3.3) in integer arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 65536
GROUP = 8
ROUNDS = 7
WORD = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85


def threshold_and_scale(dropout_p: float) -> tuple[int, float]:
    """16 random bits below the threshold drop an element; kept ones are multiplied by 1 / the share that is kept.

    So the probability is ``dropout_p`` rounded to 1/65536.
    """
    threshold = min(round(dropout_p * LEVELS), LEVELS - 1)
    return threshold, LEVELS / (LEVELS - threshold)


def dropout_keep(seed: Tensor, rows: int, width: int, dropout_p: float) -> Tensor:
    """Which elements dropout keeps: (rows, width) bool.

    Args:
        seed (Tensor): (1,) int64.
        rows, width (int): each row has ceil(width / 8) counters, one for 8 columns.
        dropout_p (float): probability of dropping.
    """
    groups = -(-width // GROUP)
    counters = torch.arange(rows * groups, device=seed.device)
    words = torch.stack(_philox(counters, seed), dim=-1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).view(rows, groups * GROUP)
    return halves[:, :width] >= threshold_and_scale(dropout_p)[0]


def _philox(counters: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    """Four 32-bit words, as int64, of each 32-bit counter."""
    c0, c1, c2, c3 = counters, *(torch.zeros_like(counters) for _ in range(3))
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high2, low2 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit numbers, in int64 without overflow."""
    low = (x & 0xFFFF) * factor
    high = (x >> 16) * factor + (low >> 16)
    return (high >> 16) & WORD, ((high << 16) | (low & 0xFFFF)) & WORD
