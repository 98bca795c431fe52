"""CDPruner (Zhang et al., NeurIPS 2025, arXiv 2506.10967): diverse tokens, given the question."""

from __future__ import annotations

import torch

from ..registry import register_method
from .base import Method
from .pairs import Pairs, directions
from .shared import coarse, greedy

#: A token with no more than this share of its squared length outside of the span adds nothing.
#: Rounding of float32 stays well below.
SPANNED = 1e-4


@register_method("cdpruner")
class CDPruner(Method):
    """Greedy MAP inference of a determinantal point process, conditioned on relevance to the text.

        L = diag(r) S diag(r),   S_ij = cos(v_i, v_j),   r_j = minmax_j( mean_t cos(v_j, t) )
        next = argmax_j det L_{picked + j} = argmax_j r_j^2 rest_j
        rest_j = |part of v_j outside the span of those picked|^2 / |v_j|^2

    v, t: projected image features and embeddings of the prompt's text. `rest` is kept by
    incremental Cholesky factorisation of S. The order of picking is the score. Tokens that add
    nothing (r = 0, or all but 1e-4 of the squared length in the span: there are no more directions
    than dimensions) come last, the most relevant first. Reads features only, no attention.
    Published: before layer 0, 128, 64 or 32 of 576 tokens.

    Departs from the authors' code: relevance is measured between the language model's own inputs
    (theirs: CLIP's two towers, with the sign turned); min and max are those of the sample, not of
    the batch; r = 1 where all tokens are equally relevant.
    """

    first_layer = 0
    reads = "features, text embeddings"

    def score(self, ctx):
        """(B, n_visual): the later a token was picked, the lower."""
        x = ctx.embeddings
        pairs, relevance = Pairs(x[ctx.visual]), self._relevance(ctx, x)
        rest = ctx.valid.to(pairs.unit)
        rows = ctx.valid.shape[1] if ctx.exhaustive else int(ctx.keep.max())
        # Features of size D have D directions at most; after these, nothing new is left.
        rows = min(rows, x.shape[-1])
        # The rows of the Cholesky factor.
        basis = rest.new_zeros(len(x), rows, rest.shape[1])

        def gains():
            new = (rest > SPANNED) & (relevance > 0)
            return coarse(torch.where(new, relevance**2 * rest, relevance - 2))

        def update(step, pick):
            nonlocal rest
            before = basis[:, :step]
            inside = (before * before.gather(2, pick[:, None].expand(-1, step, 1))).sum(1)  # (B, V)
            height = rest.gather(1, pick)
            row = (pairs.rows(pick)[:, 0] - inside) / height.clamp(min=SPANNED).sqrt()
            basis[:, step] = row.where(height > SPANNED, 0.0)
            rest = rest - basis[:, step] ** 2
            return gains()

        return greedy(ctx, gains(), update, changing=rows)

    @staticmethod
    def _relevance(ctx, x):
        """Relevance to the text, r (B, V)."""
        text = (directions(x) * ctx.text_mask[..., None]).sum(1, keepdim=True)  # (B, 1, D)
        cosine = (directions(x[ctx.visual]) * directions(text)).sum(-1)
        low = cosine.masked_fill(~ctx.valid, float("inf")).amin(1, keepdim=True)
        high = cosine.masked_fill(~ctx.valid, float("-inf")).amax(1, keepdim=True)
        differ = high > low
        return ((cosine - low) / (high - low).where(differ, 1)).where(differ & ctx.valid, 1.0)

    def flops(self, dimensions, n_visual, n_text):
        """FLOPs of the cosines of all pairs of features."""
        return 2 * n_visual * n_visual * dimensions.hidden
