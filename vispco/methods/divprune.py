"""DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175): tokens as far from each other as can be."""

from __future__ import annotations

import torch

from ..pruning.context import take
from ..registry import register_method
from .base import Method
from .shared import cosines, greedy


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

    def score(self, ctx):
        """(B, n_visual): the later a token was picked, the lower."""
        alike = cosines(ctx.embeddings[ctx.visual])
        itself = torch.eye(alike.shape[1], dtype=torch.bool, device=alike.device)
        far = (1 - alike).masked_fill(itself | ~ctx.valid[:, None], float("inf"))  # (B, V, V)
        nearest = torch.full_like(far[:, 0], float("inf"))  # (B, V) distance to the nearest picked

        def update(step, pick):
            nonlocal nearest
            nearest = torch.minimum(nearest, take(far, pick)[:, 0])
            return nearest

        return greedy(ctx, far.amin(-1), update)

    def flops(self, dimensions, n_visual, n_text):
        """FLOPs of the cosines of all pairs of features."""
        return 2 * n_visual * n_visual * dimensions.hidden
