"""PruMerge (arXiv 2403.15388): outliers of the tower's attention take others in."""

from __future__ import annotations

import torch

from ..registry import register_method
from ..relaxation import descending_ranks
from .base import Method
from .groups import rounded
from .pairs import Pairs
from .shared import count, share


@register_method("prumerge")
class PruMerge(Method):
    """The tokens most attended to in the tower; each takes in dropped tokens that are near it.

        kept = the k - c tokens of largest a_j, then c of the others, evenly spaced,
               c = round(spaced k)
        a dropped token is averaged into the kept one of largest cos(key_i, key_j),
               if it is among the 32 dropped ones nearest to that

    a: attention that the token's patches receive in the tower, and keys of the same layer
    (`vispco.pruning._tower`). Knows nothing of the question. Source: the authors' code of
    LLaVA-PruMerge (Apache-2.0). There: before layer 0, as many as are outliers, with 32 neighbours;
    "PruMerge+" adds evenly spaced tokens.

    adaptive: keep at most the outliers, a_j > Q3 + 1.5 (Q3 - Q1) over the sample's tokens, as the
    authors do, and spaced ones by their share. False: the count alone decides. spaced: share of the
    kept tokens; how many PruMerge+ adds is not known to us. neighbours: how many a kept token may
    take in.

    Departs from it: attention and keys are of the layer whose output becomes the tokens (theirs:
    the tower's last). In LLaVA that is the last but one: the layer after it need not run. Merging
    comes after the projector, where hidden states are pruned. It is a plain mean, not one weighted
    by attention, and each dropped token goes into one kept token at most: merging in vispco says
    which token goes where, and nothing else. So the 32 are counted among the dropped ones. No
    preset: the number kept is the picture's own (`adaptive`).
    """

    first_layer = 0
    reads_vision = True
    reads = "tower attention and keys"

    def __init__(self, adaptive: bool = False, spaced: float = 0.0, neighbours: int = 32):
        if not isinstance(adaptive, bool):
            raise ValueError(f"adaptive must be True or False, got {adaptive!r}")
        self.adaptive, self.spaced = adaptive, share("spaced", spaced)
        self.neighbours = count("neighbours", neighbours)

    def score(self, ctx):
        """(B, n_visual): the most attended to, those evenly spaced, then the others."""
        place = descending_ranks(ctx.vision_attention, ctx.valid)
        keep = self._count(ctx)
        spaced = torch.minimum(rounded(self.spaced * keep), keep)[:, None]
        rest = ctx.valid & (place >= keep[:, None] - spaced)
        number = rest.cumsum(1) - 1
        step = (rest.sum(1, keepdim=True) // spaced.clamp(min=1)).clamp(min=1)
        even = rest & (number % step == 0) & (number // step < spaced)
        return -(place + place.shape[1] * (rest.long() + (rest & ~even).long())).float()

    def limit(self, ctx, scores):
        """(B,) outliers and their share of spaced tokens; None unless `adaptive`."""
        return self._count(ctx) if self.adaptive else None

    def merge(self, ctx, kept):
        """(B, n_visual) the kept slot of the most similar key, if it is near enough."""
        kept, dropped = kept & ctx.valid, ctx.valid & ~kept
        width = min(self.neighbours, kept.shape[1])
        best, alike, least = [], [], []
        for _, cosine in Pairs(ctx.vision_keys).blocks():
            found = cosine.masked_fill(~kept[:, None], float("-inf")).max(-1)
            alike.append(found.values)
            best.append(found.indices)
            nearest = cosine.masked_fill(~dropped[:, None], float("-inf")).topk(width, -1).values
            least.append(nearest[..., -1])
        into, cosine, limit = (torch.cat(parts, 1) for parts in (best, alike, least))
        near = (cosine >= limit.gather(1, into)) & dropped & kept.any(1, keepdim=True)
        return torch.arange(kept.shape[1], device=kept.device).where(kept, into.where(near, -1))

    def _count(self, ctx):
        """Tokens (B,) to keep of each sample: `ctx.keep`, or fewer if so few stand out."""
        if not self.adaptive:
            return ctx.keep
        attention, n = ctx.vision_attention.double(), ctx.valid.sum(1, keepdim=True)
        ordered = attention.masked_fill(~ctx.valid, float("inf")).sort(dim=1).values
        first, third = (_quantile(ordered, n, q) for q in (0.25, 0.75))
        outlying = ctx.valid & (attention > third + 1.5 * (third - first))
        number = outlying.sum(1) / max(1 - self.spaced, 1e-9)
        wanted = rounded(number.clamp(max=ctx.valid.shape[1])).clamp(min=1)
        # A sample that keeps all its tokens has no limit.
        return torch.minimum(ctx.keep, wanted.where(ctx.keep < n[:, 0], ctx.keep))

    def flops(self, dimensions, n_visual, n_text):
        """FLOPs of the cosines of all pairs of keys."""
        return 2 * n_visual * n_visual * dimensions.vision_head_dim


def _quantile(ordered, n, q):
    """The q-quantile (B, 1) of the first n (B, 1) of `ordered` (B, V), between two linearly."""
    at = q * (n - 1).clamp(min=0).double()
    low, high = at.floor().long(), at.ceil().long()
    low, high, part = ordered.gather(1, low), ordered.gather(1, high), at - at.floor()
    return torch.where(low == high, low, low + part * (high - low))
