"""PDrop, PyramidDrop (Xing et al., CVPR 2025, arXiv 2410.17247): attention, one layer ahead."""

from __future__ import annotations

from ..registry import register_method
from .base import Method
from .shared import head_mean


@register_method("pdrop")
class PDrop(Method):
    """Attention of the last instruction token with the NEXT layer's norm and projections.

        s_j = 1/H sum_h softmax_n(q_last^h . k_n^h / sqrt(E))_j

    of layer K itself, pruning before layer K. Published: after layers 8, 16, 24 of 32 keep 1/2,
    1/4, 1/8 of the tokens: `PruningConfig.from_pdrop`.

    Departs from the authors' code: works with grouped-query attention, and with padding. The
    softmax runs over all tokens, not the visual ones only; per head that rescales, so the head mean
    weighs heads by how much they look at the image.
    """

    first_layer = 0
    reads_next = True
    reads = "attention of the next layer"

    def score(self, ctx):
        """(B, n_visual) attention probabilities."""
        return head_mean(ctx.attention(ctx.layer))[:, 0][ctx.visual]

    def flops(self, dimensions, n_visual, n_text):
        """FLOPs of the next layer up to its attention function, and of one row of q k^T."""
        return dimensions.ahead(n_visual + n_text)
