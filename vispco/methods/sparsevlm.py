"""SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417): text tokens that look at the image rate its tokens."""

from __future__ import annotations

from ..context import positions, take
from ..registry import register_method
from .base import Method


@register_method("sparsevlm")
class SparseVLM(Method):
    """Attention averaged over heads and over the RATERS, the text tokens most related to the image.

        R   = softmax_text(V T^t),  a text token is a rater if its mean over V exceeds the mean of that
        s_j = 1/|raters| sum_{t in raters} 1/H sum_h A^h_tj            (of the layer just run)

    V, T: input embeddings of the visual and text tokens. Published: 300, 200, 110 of 576 tokens after layers
    2, 6, 15: `PruningConfig.from_sparsevlm`. Positions are kept (the authors' second version).
    """

    first_layer = 1

    def score(self, ctx):
        """(B, n_visual) attention probabilities."""
        text, real = positions(ctx.text_mask, max(1, int(ctx.text_mask.sum(1).max())))  # (B, T)
        first = ctx.order.masked_fill(~ctx.visual_mask, ctx.order.max() + 1).amin(1, keepdim=True)
        real = real & (take(ctx.order, text[1]) > first)  # text before the image cannot see it
        v, t = ctx.embeddings[ctx.visual].float(), ctx.embeddings[text].float()
        related = (v @ t.transpose(1, 2)).masked_fill(~real[:, None], float("-inf")).softmax(-1)  # (B, n_visual, T)
        share = (related.nan_to_num() * ctx.valid[..., None]).sum(1) / ctx.valid.sum(1, keepdim=True).clamp(min=1)
        mean = share.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        raters = (share >= mean * (1 - 1e-6)) & real  # (B, T)
        rows = ctx.attention(at=text[1]).mean(1)  # (B, T, N)
        rated = (rows * raters[..., None]).sum(1) / raters.sum(1, keepdim=True).clamp(min=1)
        return rated[ctx.visual]

    def flops(self, dimensions, n_visual, n_text):
        """One row of q k^T for each text token, and V T^t."""
        rows = 2 * n_text * dimensions.heads * dimensions.head_dim * (n_visual + n_text)
        return rows + 2 * n_visual * n_text * dimensions.hidden
