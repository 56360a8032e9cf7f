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


def attention_keep(seed: Tensor, rows: int, keys: int, dropout_p: float) -> Tensor:
    """As dropout_keep, for the weights of ``keys`` keys: (rows, keys) bool.

    Each 32 keys have four counters; word j of counter t decides keys 8 j + 2 t and 8 j + 2 t + 1.
    """
    blocks = -(-keys // 32)
    keep = dropout_keep(seed, rows, 32 * blocks, dropout_p).view(rows, blocks, 4, 4, 2)
    return keep.transpose(2, 3).reshape(rows, 32 * blocks)[:, :keys]


def random_words(seed: Tensor, rows: int, width: int) -> Tensor:
    """(rows, width) int64 in [0, 2^32): each row has ceil(width / 4) counters, one for 4 columns."""
    groups = -(-width // 4)
    words = torch.stack(_philox(torch.arange(rows * groups, device=seed.device), seed), dim=-1)
    return words.view(rows, groups * 4)[:, :width]


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
