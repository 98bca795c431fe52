"""VTW (Lin et al., AAAI 2025, arXiv 2405.05803): at one layer, all visual tokens are withdrawn."""

from __future__ import annotations

import torch

from ..registry import register_method
from .base import Method


@register_method("vtw")
class VTW(Method):
    """No ranking: every token scores the same.

        s_j = 0

    Meant for keep ratios of 1 before layer K and 0 from it on; a ratio between keeps the first
    tokens. Reads nothing. Published: K = 15 or 16 of 32 layers, the first with a KL to the full
    model of at most 0.003 over 20 samples: `vispco.vtw_schedule`.
    """

    first_layer = 0
    reads = "nothing"

    def score(self, ctx):
        """(B, n_visual) zeros."""
        return torch.zeros_like(ctx.slot, dtype=torch.float32)
