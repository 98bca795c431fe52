"""SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417): related text rates the tokens."""

from __future__ import annotations

from numbers import Real

import torch

from ..pruning.context import masked_softmax, take
from ..registry import register_method
from ..relaxation import descending_ranks
from .base import Method
from .shared import head_mean, masked_mean, question, visual_columns

#: Nearest neighbours that DPC-kNN looks at.
NEIGHBOURS = 5


@register_method("sparsevlm")
class SparseVLM(Method):
    """Attention averaged over heads and over the RATERS, the text tokens most related to the image.

        R   = softmax_text(V T^t)
        a text token is a rater if its mean of R over V exceeds the mean of these means
        s_j = 1/|raters| sum_{t in raters} 1/H sum_h A^h_tj            (of the layer just run)

    V, T: input embeddings of the visual and text tokens. Published: 300, 200, 110 of 576 tokens
    after layers 2, 6, 15: `PruningConfig.from_sparsevlm`. Positions are kept (the authors' second
    version).

    adaptive: keep at most `adaptive * rank(P)` tokens, P: the raters' rows of head-mean attention
        to the visual tokens (the authors' first version; published 13.5, after layers 2, 6, 15,
        19). None: no limit.
    recycle: of the n - k tokens over the count k, the share, best rated first, that is not dropped
        but merged into a tenth as many means (published 0.3). DPC-kNN on the hidden states h that
        enter the layer:

            sparsity_i = mean of d_ij^2 over i's 5 nearest,   d_ij = |h_i - h_j| / sqrt(D)
            gain_i = exp(-sparsity_i) min_{j: sparsity_j < sparsity_i} d_ij
                     (infinite where the sparsity is least)

        The tokens of largest gain are centres, and become the means of the tokens nearest to them.

        Departs from the authors' code: centres are part of the count (with c of them, the best
        k - c tokens stay as they are, and the next are merged) and keep their own positions (there:
        put after the kept tokens); 5 neighbours (there: as many as centres); ties go to the better
        rated token (there: noise).
    """

    first_layer = 1
    reads = "attention, text embeddings"

    def __init__(self, adaptive: float | None = None, recycle: float = 0.0):
        if adaptive is not None and not (is_number(adaptive) and adaptive > 0):
            meant = "a positive number of tokens per rank, such as 13.5"
            raise ValueError(f"adaptive must be None or {meant}, got {adaptive!r}")
        if not is_number(recycle) or not 0 <= recycle <= 1:
            meant = "a share of the pruned tokens from 0 to 1"
            raise ValueError(f"recycle must be {meant}, got {recycle!r}")
        self.adaptive, self.recycle = adaptive, recycle

    def score(self, ctx):
        """(B, n_visual) attention probabilities.

        With `recycle` the order is: the best tokens, the centres, the others.
        """
        rows, raters = self._rated(ctx)
        scores = masked_mean(rows, raters)
        if not self.recycle:
            return scores
        slots, _, centre, _ = self._clusters(ctx, rows, raters)
        place = descending_ranks(scores, ctx.valid)
        best = place < place.gather(1, slots[:, :1])
        centre = torch.zeros_like(place).scatter_add(1, slots, centre.long()) > 0
        return -(place + place.shape[1] * ~(best | centre)).float()

    def limit(self, ctx, scores):
        """(B,) most tokens to keep of each sample; None without `adaptive`."""
        return None if self.adaptive is None else self._count(ctx, *self._rated(ctx))

    def merge(self, ctx, kept):
        """(B, n_visual) each recycled token's centre; None without `recycle`."""
        if not self.recycle:
            return None
        slots, pooled, centre, far = self._clusters(ctx, *self._rated(ctx))
        centre = centre & take(kept, slots)
        nearest = far.masked_fill(~centre[:, None], float("inf")).argmin(-1)  # (B, M)
        into = slots.gather(1, nearest).where(pooled & centre.any(1, keepdim=True), -1)
        into = torch.full_like(ctx.slot, -1).scatter_reduce(1, slots, into, "amax")
        return torch.where(kept, torch.arange(kept.shape[1], device=kept.device), into)

    def flops(self, dimensions, n_visual, n_text):
        """FLOPs of one row of q k^T for each text token, and of V T^t.

        All of this once more for `adaptive`, and once more for `recycle`.
        """
        rows = 2 * n_text * dimensions.heads * dimensions.head_dim * (n_visual + n_text)
        times = 1 + (self.adaptive is not None) + (self.recycle > 0)
        return times * (rows + 2 * n_visual * n_text * dimensions.hidden)

    @staticmethod
    def _rated(ctx):
        """Attention of text to visual tokens (B, T, V), head mean, and which text rates (B, T)."""
        text, real = question(ctx)
        v, t = ctx.embeddings[ctx.visual].float(), ctx.embeddings[text].float()
        relation = masked_softmax(v @ t.transpose(1, 2), ~real[:, None])  # (B, V, T)
        share = masked_mean(relation, ctx.valid)  # (B, T)
        average = share.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        raters = (share >= average * (1 - 1e-6)) & real
        return visual_columns(ctx, head_mean(ctx.attention(at=text[1]))), raters

    def _count(self, ctx, rows, raters):
        """Tokens (B,) to keep of each sample: `ctx.keep`, or fewer if the rank of P says so.

        Without raters there is no rank. A sample that keeps all its tokens has no limit: it is
        processed only because others in its batch are pruned.
        """
        if self.adaptive is None:
            return ctx.keep
        block = rows * raters[..., None] * ctx.valid[:, None]
        tokens = ctx.valid.sum(1)
        # The longer side of the block without padding.
        size = torch.maximum(raters.sum(1), tokens)
        values = torch.linalg.svdvals(block)  # (B, min(T, V)), descending
        rank = (values > values[:, :1] * size[:, None] * torch.finfo(values.dtype).eps).sum(1)
        limit = (min(self.adaptive, 1e9) * rank + 1e-6).long().clamp(min=1)
        return torch.minimum(ctx.keep, limit.where(raters.any(1) & (ctx.keep < tokens), ctx.keep))

    def _clusters(self, ctx, rows, raters):
        """The M tokens to recycle: slots (B, M), which are real, which are centres (B, M) bool.

        Fourth result: their distances (B, M, M), infinite where one of a pair is not real.
        """
        place = descending_ranks(masked_mean(rows, raters), ctx.valid)
        keep = self._count(ctx, rows, raters)
        count = (self.recycle * (ctx.valid.sum(1) - keep) + 1e-6).long()  # (B,)
        centres = torch.minimum((count + 9) // 10, keep)
        number = torch.arange(max(1, int(count.max())), device=place.device)  # (M,)
        pooled = (number < count[:, None]) & (centres > 0)[:, None]
        chosen = ((keep - centres)[:, None] + number).clamp(max=place.shape[1] - 1)
        slots = place.argsort(dim=1, stable=True).gather(1, chosen)
        x = take(ctx.hidden[ctx.visual], slots).float()
        far = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[-1] ** 0.5
        pairs = pooled[:, None] & pooled[..., None]
        far = far.masked_fill(~pairs, float("inf"))
        # The nearest is the token itself.
        near = far.sort(-1).values[..., 1 : 1 + NEIGHBOURS]
        finite = near.isfinite()
        sparsity = near.square().where(finite, 0.0).sum(-1) / finite.sum(-1).clamp(min=1)
        difference = sparsity[:, None] - sparsity[..., None]
        better = number < number[:, None]
        # (B, M, M): whether the column is denser than the row.
        denser = ((difference < 0) | ((difference == 0) & better)) & pairs
        height = far.masked_fill(~denser, float("inf")).amin(-1)
        # Logarithms: the gain of far tokens would underflow.
        gain = (height.log() - sparsity).where(pooled, float("-inf"))
        return slots, pooled, descending_ranks(gain, pooled) < centres[:, None], far


def is_number(x):
    """Whether `x` is a real number, and no bool."""
    return isinstance(x, Real) and not isinstance(x, bool)
