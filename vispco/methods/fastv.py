"""FastV: what the last prompt token attends to (Chen et al., ECCV 2024, arXiv 2403.06764)."""

from __future__ import annotations

from ..registry import register_method
from .base import Method
from .shared import count, head_mean


@register_method("fastv")
class FastV(Method):
    """Attention of the last prompt token, in the layer before, averaged over heads.

        s_j = 1/H sum_h softmax_n(q_last^h . k_n^h / sqrt(E))_j

    of layer K - 1, pruning before layer K. Published: K = 2 with 50 % dropped; K = 3 with 50 % or
    75 %: `PruningConfig.from_fastv`.

    Departs from the authors' code: the last VALID token of each sample (not a padding token), only
    this one row of attention is computed, any attention implementation.

    rotary, stride: FEATHER (arXiv 2412.13180) is rotary=False and stride=3. rotary=False
    takes q and k before rotary embedding: with it, tokens at the picture's lower edge score more
    than their content says. stride: tokens at every so many rows and columns of each frame come
    first, whatever they score; None: no such grid. There: at layers 8 and 16 of 32; the shares are
    not known to us, so there is no preset. Departs from it: exactly the count, so that budgets
    hold; of a grid of more tokens, the best stay. That the grid comes first at both layers is our
    reading. Layer K - 1 runs once more up to its attention, without positions.
    """

    first_layer = 1
    reads = "attention"

    def __init__(self, rotary: bool = True, stride: int | None = None):
        if not isinstance(rotary, bool):
            raise ValueError(f"rotary must be True or False, got {rotary!r}")
        self.rotary, self.stride = rotary, stride if stride is None else count("stride", stride)
        self.reads_unrotated, self.reads_grid = not rotary, stride is not None

    def score(self, ctx):
        """(B, n_visual) attention probabilities; 1 more on the grid."""
        scores = head_mean(ctx.attention(rotary=self.rotary))[:, 0][ctx.visual]
        if self.stride is None:
            return scores
        return scores + (ctx.grid[..., 1:] % self.stride == 0).all(-1)

    def flops(self, dimensions, n_visual, n_text):
        """FLOPs of one row of q k^T; without rotary, of the layer up to its attention, too."""
        n = n_visual + n_text
        return (
            dimensions.again(n)
            if not self.rotary
            else 2 * dimensions.heads * (dimensions.head_dim) * n
        )
