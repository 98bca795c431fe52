"""SparseVLM (Zhang et al., ICML 2025, arXiv 2410.04417): text that looks at the image rates its tokens."""

from __future__ import annotations

from numbers import Real

import torch

from ..pruning.context import masked_softmax, take
from ..registry import register_method
from ..relaxation import descending_ranks
from .base import Method
from .shared import head_mean, masked_mean, question

NEIGHBOURS = 5  # of DPC-kNN


@register_method("sparsevlm")
class SparseVLM(Method):
    """Attention averaged over heads and over the RATERS, the text tokens most related to the image.

        R   = softmax_text(V T^t),  a text token is a rater if its mean over V exceeds the mean of that
        s_j = 1/|raters| sum_{t in raters} 1/H sum_h A^h_tj            (of the layer just run)

    V, T: input embeddings of the visual and text tokens. Published: 300, 200, 110 of 576 tokens after layers
    2, 6, 15: `PruningConfig.from_sparsevlm`. Positions are kept (the authors' second version).

    adaptive: keep at most `adaptive * rank(P)` tokens, P: the raters' rows of head-mean attention to the
        visual tokens (the authors' first version; published 13.5, after layers 2, 6, 15, 19). None: no limit.
    recycle: of the n - k tokens over the count k, the share, best rated first, that is not dropped but merged
        into a tenth as many means (published 0.3). DPC-kNN on the hidden states h that enter the layer:

            spread_i = mean of d_ij^2 over i's 5 nearest,   d_ij = |h_i - h_j| / sqrt(D)
            gain_i   = exp(-spread_i) min_{j: spread_j < spread_i} d_ij      (least spread of all: infinite)

        The tokens of largest gain are centres, and become the means of the tokens nearest to them. Departs
        from the authors' code: centres are part of the count (with c of them, the best k - c tokens stay as
        they are, and the next are merged) and keep their own positions (there: put after the kept tokens); 5
        neighbours (there: as many as centres); ties go to the better rated token (there: noise).
    """

    first_layer = 1

    def __init__(self, adaptive: float | None = None, recycle: float = 0.0):
        if adaptive is not None and not (is_number(adaptive) and adaptive > 0):
            raise ValueError(
                "adaptive must be None or a positive number of tokens per rank, such as 13.5, "
                f"got {adaptive!r}"
            )
        if not is_number(recycle) or not 0 <= recycle <= 1:
            raise ValueError(
                f"recycle must be a share of the pruned tokens from 0 to 1, got {recycle!r}"
            )
        self.adaptive, self.recycle = adaptive, recycle

    def score(self, ctx):
        """(B, n_visual) attention probabilities; with `recycle`, ranks: the best, the centres, the others."""
        rows, raters = self._rated(ctx)
        scores = masked_mean(rows, raters)
        if not self.recycle:
            return scores
        slots, _, centre, _ = self._clusters(ctx, rows, raters)
        rank, width = descending_ranks(scores, ctx.valid), scores.shape[1]
        chosen = rank < rank.gather(1, slots[:, :1])
        chosen = chosen | (torch.zeros_like(rank).scatter_add(1, slots, centre.long()) > 0)
        return -(rank + width * ~chosen).float()

    def limit(self, ctx, scores):
        """(B,) tokens, or None."""
        return None if self.adaptive is None else self._count(ctx, *self._rated(ctx))

    def merge(self, ctx, kept):
        """(B, n_visual) each recycled token's centre, or None."""
        if not self.recycle:
            return None
        slots, pooled, centre, far = self._clusters(ctx, *self._rated(ctx))
        centre = centre & take(kept, slots)
        nearest = far.masked_fill(~centre[:, None], float("inf")).argmin(-1)  # (B, M)
        into = slots.gather(1, nearest).where(pooled & centre.any(1, keepdim=True), -1)
        into = torch.full_like(ctx.slot, -1).scatter_reduce(1, slots, into, "amax")
        return torch.where(kept, torch.arange(kept.shape[1], device=kept.device), into)

    def flops(self, dimensions, n_visual, n_text):
        """One row of q k^T for each text token, and V T^t; once more for `adaptive`, and for `recycle`."""
        rows = 2 * n_text * dimensions.heads * dimensions.head_dim * (n_visual + n_text)
        times = 1 + (self.adaptive is not None) + (self.recycle > 0)
        return times * (rows + 2 * n_visual * n_text * dimensions.hidden)

    @staticmethod
    def _rated(ctx):
        """Head-mean attention of text to visual tokens (B, T, V), and which text is a rater (B, T)."""
        text, real = question(ctx)
        v, t = ctx.embeddings[ctx.visual].float(), ctx.embeddings[text].float()
        share = masked_mean(
            masked_softmax(v @ t.transpose(1, 2), ~real[:, None]), ctx.valid
        )  # (B, T), of (B, V, T)
        average = share.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        raters = (share >= average * (1 - 1e-6)) & real
        rows = head_mean(ctx.attention(at=text[1]))  # (B, T, N)
        return rows.gather(2, ctx.visual[1][:, None].expand(-1, rows.shape[1], -1)), raters

    def _count(self, ctx, rows, raters):
        """Tokens (B,) to keep of each sample: `ctx.keep`, or fewer if the rank says so.

        Without raters there is no rank; a sample that keeps all it has is only here for its batch mates.
        """
        if self.adaptive is None:
            return ctx.keep
        block = rows * raters[..., None] * ctx.valid[:, None]
        tokens = ctx.valid.sum(1)
        size = torch.maximum(raters.sum(1), tokens)  # of the block without padding
        values = torch.linalg.svdvals(block)  # (B, min(T, V)), descending
        rank = (values > values[:, :1] * size[:, None] * torch.finfo(values.dtype).eps).sum(1)
        limit = (min(self.adaptive, 1e9) * rank + 1e-6).long().clamp(min=1)
        return torch.minimum(ctx.keep, limit.where(raters.any(1) & (ctx.keep < tokens), ctx.keep))

    def _clusters(self, ctx, rows, raters):
        """Slots (B, M) of the tokens to recycle, which are real, which are centres; distances (B, M, M)."""
        rank, keep = (
            descending_ranks(masked_mean(rows, raters), ctx.valid),
            self._count(ctx, rows, raters),
        )
        count = (self.recycle * (ctx.valid.sum(1) - keep) + 1e-6).long()  # (B,)
        centres = torch.minimum((count + 9) // 10, keep)
        place = torch.arange(max(1, int(count.max())), device=rank.device)  # (M,)
        pooled = (place < count[:, None]) & (centres > 0)[:, None]
        slots = rank.argsort(dim=1, stable=True)
        slots = slots.gather(1, ((keep - centres)[:, None] + place).clamp(max=rank.shape[1] - 1))
        x = take(ctx.hidden[ctx.visual], slots).float()
        far = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[-1] ** 0.5
        pairs = pooled[:, None] & pooled[..., None]
        far = far.masked_fill(~pairs, float("inf"))
        near = far.sort(-1).values[..., 1 : 1 + NEIGHBOURS]  # the nearest is the token itself
        spread = near.square().where(near.isfinite(), 0.0).sum(-1) / near.isfinite().sum(-1).clamp(
            min=1
        )
        closer, before = spread[:, None] - spread[..., None], place < place[:, None]
        denser = (
            (closer < 0) | ((closer == 0) & before)
        ) & pairs  # (B, M, M): column denser than row
        height = far.masked_fill(~denser, float("inf")).amin(-1)
        gain = (height.log() - spread).where(
            pooled, float("-inf")
        )  # log: far tokens would underflow
        return slots, pooled, descending_ranks(gain, pooled) < centres[:, None], far


def is_number(x):
    """Real, and no bool."""
    return isinstance(x, Real) and not isinstance(x, bool)
