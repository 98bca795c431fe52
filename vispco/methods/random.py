"""Random: the baseline that embarrasses careful methods at hard ratios."""

from __future__ import annotations

import torch

from ..registry import register_method
from .base import Method
from .shared import is_whole


@register_method("random")
class Random(Method):
    """A seeded random ranking of the visual tokens, the same in every layer.

        s_j = hash(seed, j),   j = running number of the token in its sample

    It depends on nothing else: not on the other samples of the batch, on padding or on the device.
    Two samples with one seed draw the same places.
    """

    first_layer = 0
    reads = "nothing"

    def __init__(self, seed: int = 0):
        if not is_whole(seed):
            raise ValueError(f"seed must be an integer, got {seed!r}")
        self.seed = seed

    def score(self, ctx):
        """(B, n_visual) in [0, 1)."""
        return hashed(ctx.slot, self.seed)


def hashed(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Integers to floats in [0, 1), by two rounds of multiply and xor-shift ("lowbias32")."""
    x = (x + ((seed + 1) * 0x9E3779B9 & 0xFFFFFFFF)) & 0xFFFFFFFF
    for multiplier in (0x21F0AAAD, 0x735A2D97):
        x = ((x ^ (x >> 15)) * multiplier) & 0xFFFFFFFF
    return (x ^ (x >> 15)).float() / 2**32
