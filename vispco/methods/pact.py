"""PACT (arXiv 2504.08966): important tokens, then density peaks among them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pruning.context import masked_softmax, positions, products, take
from ..registry import register_method
from ..relaxation import descending_ranks
from .base import Method
from .pairs import HELD, Pairs
from .shared import head_mean, share

#: Beyond any distance of two directions.
FARTHEST = 4.0


@register_method("pact")
class PACT(Method):
    """The important tokens are clustered by their keys; each cluster becomes one token.

        s_j = |h_j| 1/H sum_h softmax_n(mean_i q_i^h . k_n^h / sqrt(E))_j,   i: visual tokens
        pool = the tokens of largest s_j, `important` of those present, and k at least
        density_j = sum over i in the pool, d_ij <= cutoff, of exp(-d_ij / cutoff)
        reach_j = min d_ij over the pool's denser tokens,   d_ij = 1 - cos(key_i, key_j)
        centres = tokens of the pool with a reach above the cutoff (the densest has any)
        kept = centres by s; if there are fewer than k, others of the pool by reach
        the others of the pool are averaged into the kept one nearest to them, up to the cutoff

    q, k: of layer K, before rotary embedding, pruning before layer K. key: its keys, all heads side
    by side. h: hidden states that enter it. Published: layer 4, 55 % of the tokens important, then
    density peaks on the keys with a cutoff of 0.21; as many stay as there are clusters
    (`adaptive`).

    important, cutoff: as above. adaptive: keep at most as many as there are centres. False: the
    count alone decides.

    Departs from it: exactly the count unless `adaptive`, so that budgets hold; a merged token is
    one token to attention (theirs: as many as it stands for), so that every attention kernel
    serves. Our choice, for details that are not known to us: the distance and the formula
    of the density, which tokens are centres, that keys are compared without positions, and that the
    mean query is of visual tokens; ties in density go to the more important.
    """

    first_layer = 0
    reads_next = True
    reads_unrotated = True
    reads = "queries and keys without positions, hidden states"

    def __init__(self, important: float = 0.55, cutoff: float = 0.21, adaptive: bool = False):
        if not isinstance(adaptive, bool):
            raise ValueError(f"adaptive must be True or False, got {adaptive!r}")
        self.important, self.cutoff = share("important", important), share("cutoff", cutoff)
        if not cutoff:
            raise ValueError("cutoff must be above 0: no two tokens are that near")
        self.adaptive = adaptive

    def score(self, ctx):
        """(B, n_visual): centres by s, others of the pool by reach, then the rest by s."""
        place, pool, index, pairs = self._pool(ctx)
        reach = self._reach(place, pool, index, pairs)
        order = place.argsort(dim=1, stable=True)
        rank = descending_ranks(reach.gather(1, order), pool.gather(1, order))
        rank = torch.zeros_like(place).scatter(1, order, rank) + place.shape[1]
        centre = pool & (reach > self.cutoff)
        rank = torch.where(centre, place, rank).where(pool, place + 2 * place.shape[1])
        return -rank.float()

    def limit(self, ctx, scores):
        """(B,) clusters; None unless `adaptive`."""
        if not self.adaptive:
            return None
        place, pool, index, pairs = self._pool(ctx)
        reach = self._reach(place, pool, index, pairs)
        return (pool & (reach > self.cutoff)).sum(1).clamp(min=1)

    def merge(self, ctx, kept):
        """(B, n_visual) the kept slot nearest to each token of the pool."""
        _, pool, index, pairs = self._pool(ctx)
        stay, found = (kept & pool).gather(1, index), []
        for _, alike in pairs.blocks():
            best = alike.masked_fill(~stay[:, None], float("-inf")).max(-1)
            into = index.gather(1, best.indices)
            found.append(into.where(1 - best.values <= self.cutoff, -1))
        into = torch.full_like(index[:, :1], -1).expand_as(pool)
        into = into.scatter(1, index, torch.cat(found, 1)).where(pool, -1)
        return torch.arange(kept.shape[1], device=kept.device).where(kept, into)

    def flops(self, dimensions, n_visual, n_text):
        """FLOPs of the next layer up to its attention, of rows there, and of all cosines of keys.

        Row and cosines are made for ranking, for merging and for `adaptive`. Of more than HELD
        tokens, those of the pool alone are compared, in two passes to rank: at most so many.
        """
        n, asked = n_visual + n_text, 2 + self.adaptive
        rows = 2 * (asked - 1) * n * dimensions.heads * dimensions.head_dim
        passes = asked + (asked - 1) * (n_visual > HELD)
        return dimensions.ahead(n) + rows + passes * n_visual * n_visual * dimensions.cached

    def _pool(self, ctx):
        """Place by s (B, V), pool (B, V); slots that are compared (B, P), and their pairs of keys.

        Of many tokens, those are the pool's alone, and filler.
        """
        place = descending_ranks(self._importance(ctx), ctx.valid)
        tokens = ctx.valid.sum(1)
        size = torch.maximum((self.important * tokens.double() + 1e-6).long(), ctx.keep)
        pool = ctx.valid & (place < size[:, None])
        many = pool.shape[1] > HELD
        width = int(pool.sum(1).max()) if many else pool.shape[1]
        (_, index), _ = positions(pool if many else torch.ones_like(pool), width)
        keys = ctx.keys(ctx.layer, rotary=False).transpose(1, 2).flatten(2)  # (B, N, G E)
        return place, pool, index, Pairs(take(keys[ctx.visual], index))

    def _reach(self, place, pool, index, pairs):
        """(B, V); anything outside of the pool."""
        place, inside = place.gather(1, index), pool.gather(1, index)
        density = torch.cat([self._near(at, alike, inside) for at, alike in pairs.blocks()], 1)
        # 0 for the densest; of equally dense ones, for the most important.
        order = descending_ranks(place.double().neg(), inside).argsort(dim=1, stable=True)
        rank = descending_ranks(density.gather(1, order), inside.gather(1, order))
        rank = torch.zeros_like(index).scatter(1, order, rank)  # no less than P outside
        found = []
        for at, alike in pairs.blocks():
            sparser = rank[:, None] >= rank[:, at, None]
            found.append((1 - alike).masked_fill_(sparser, FARTHEST).amin(-1))
        reach = torch.cat(found, 1)
        return reach.new_zeros(pool.shape).scatter(1, index, reach)

    def _near(self, at: Tensor, alike: Tensor, inside: Tensor) -> Tensor:
        """Densities (B, R) of the rows `at` (R,) of cosines (B, R, P)."""
        far = (1 - alike).clamp_(min=0).masked_fill_(~inside[:, None], FARTHEST)
        beyond = far > self.cutoff
        near = far.mul_(-1 / self.cutoff).exp_().masked_fill_(beyond, 0.0)
        # Itself, without rounding: two tokens near each other alone are equally dense.
        near[:, torch.arange(len(at)), at] = 1.0
        return near.sum(-1, dtype=torch.float64)

    @staticmethod
    def _importance(ctx):
        """s (B, V)."""
        query = ctx.queries(ctx.layer, at=ctx.visual[1], rotary=False)
        key = ctx.keys(ctx.layer, rotary=False)
        real = ctx.valid[:, None, :, None]
        mean = query.double().masked_fill(~real, 0.0).sum(2, keepdim=True)
        mean = (mean / real.sum(2, keepdim=True).clamp(min=1)).float()  # (B, H, 1, E)
        mean = mean.unflatten(1, (key.shape[1], -1))[..., 0, :]  # (B, G, H / G, E)
        product = products(mean, key).flatten(1, 2)[:, :, None]
        product = product * query.shape[-1] ** -0.5  # (B, H, 1, N)
        # No answer has a say.
        prompt = ctx.visual_mask | ctx.text_mask
        attention = masked_softmax(product, ~prompt[:, None, None])
        size = ctx.hidden[ctx.visual].float().norm(dim=-1)
        return head_mean(attention)[:, 0][ctx.visual] * size
