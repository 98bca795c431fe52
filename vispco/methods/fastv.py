"""FastV: what the last prompt token attends to (Chen et al., ECCV 2024, arXiv 2403.06764)."""

from __future__ import annotations

from ..registry import register_method
from .base import Method
from .shared import head_mean


@register_method("fastv")
class FastV(Method):
    """Attention of the last prompt token, in the layer before, averaged over heads.

        s_j = 1/H sum_h softmax_n(q_last^h . k_n^h / sqrt(E))_j

    of layer K - 1, pruning before layer K. Published: K = 2 with 50 % dropped; K = 3 with 50 % or
    75 %: `PruningConfig.from_fastv`.

    Departs from the authors' code: the last VALID token of each sample (not a padding token), only
    this one row of attention is computed, any attention implementation.
    """

    first_layer = 1

    def score(self, ctx):
        """(B, n_visual) attention probabilities."""
        return head_mean(ctx.attention())[:, 0][ctx.visual]

    def flops(self, dimensions, n_visual, n_text):
        """FLOPs of one row of q k^T."""
        return 2 * dimensions.heads * dimensions.head_dim * (n_visual + n_text)
