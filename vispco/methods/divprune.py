"""DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175): tokens as far from each other as can be."""

from __future__ import annotations

import torch

from ..registry import register_method
from .base import Method
from .pairs import HELD, Pairs
from .shared import coarse, greedy


@register_method("divprune")
class DivPrune(Method):
    """Greedy max-min diversity of the projected image features.

        d_ij = 1 - cos(v_i, v_j)
        first = argmax_j min_{i != j} d_ij,   next = argmax_j min_{i picked} d_ij

    The order of picking is the score. Reads features only, neither attention nor text. Published:
    before layer 0, 9.8 % of the tokens kept.

    Departs from the authors' code: batches of any size, and of two tokens equally far the first is
    picked.
    """

    first_layer = 0
    reads = "features"

    def score(self, ctx):
        """(B, n_visual): the later a token was picked, the lower."""
        # Of all distances at once: the least of coarse ones is the coarse one of the least.
        pairs = Pairs(ctx.embeddings[ctx.visual], lambda cosines: coarse(cosines.neg_().add_(1)))
        slot, first = torch.arange(ctx.valid.shape[1], device=ctx.valid.device), []
        for at, far in pairs.blocks():
            others = ctx.valid[:, None] & (slot != at[:, None])
            first.append(far.masked_fill(~others, float("inf")).amin(-1))
        gains = torch.cat(first, 1)
        nearest = torch.full_like(gains, float("inf"))  # (B, V) distance to the nearest picked

        def update(step, pick):
            # Its distance to itself does not count: it is not picked twice.
            return torch.minimum(nearest, pairs.rows(pick)[:, 0], out=nearest)

        return greedy(ctx, gains, update)

    def flops(self, dimensions, n_visual, n_text):
        """FLOPs of the cosines of all pairs; twice where rows are made anew for each pick."""
        return 2 * n_visual * n_visual * dimensions.hidden * (1 + (n_visual > HELD))
