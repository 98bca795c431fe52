"""FrameFusion (arXiv 2501.01986): merge what repeats the frame before, then attention."""

from __future__ import annotations

import torch

from ..pruning.context import take
from ..registry import register_method
from .base import Method
from .groups import before
from .pairs import directions
from .shared import head_mean, share


@register_method("framefusion")
class FrameFusion(Method):
    """Tokens like the one at the same place a frame earlier are merged into it. For video.

        c_j = cos(h_j, h_p(j)),   p(j): same row and column, the nearest earlier frame
        tokens of c_j >= 0.6 go first, the largest c_j of all; each is averaged into p(j),
            or into what p(j) went into
        the others go by least attention of the last prompt token in the layer just run (`fastv`)

    h: hidden states that enter the layer. If less than 10 % of the tokens have c_j >= 0.6, nothing
    is merged, and attention alone decides. Source: the authors' code (MIT). There: merging layer by
    layer until less than 10 % can be merged, then one drop by attention onto the budget (their
    speeds are for 30 %). When that happens depends on the film, so it is no schedule, and there is
    no preset.

    similarity: 0.6. least: 10 %.

    Departs from it: the schedule says how many go before which layer, so that merging stops where
    the count is reached; p(j) is of an earlier frame, if the one before has lost its token. Our
    choice: whose attention it is, the last prompt token's. Of pictures that are no video, tiles
    count as frames.
    """

    first_layer = 1
    reads_grid = True
    reads = "attention, hidden states, grid"

    def __init__(self, similarity: float = 0.6, least: float = 0.1):
        self.similarity, self.least = share("similarity", similarity), share("least", least)

    def score(self, ctx):
        """(B, n_visual): attention, or minus the cosine where a token may be merged."""
        attention = head_mean(ctx.attention())[:, 0][ctx.visual].float()
        cosine, repeats, _ = self._repeated(ctx)
        return torch.where(repeats, -cosine, attention)

    def merge(self, ctx, kept):
        """(B, n_visual) the kept slot that a repeating token goes into."""
        _, repeats, earlier = self._repeated(ctx)
        slot = torch.arange(kept.shape[1], device=kept.device).expand_as(earlier)
        into = torch.where(kept, slot, earlier.where(repeats, -1))
        # Chains of frames, twice as long each time.
        for _ in range(kept.shape[1].bit_length()):
            into = into.gather(1, into.clamp(min=0)).where(into >= 0, -1)
        return into

    def _repeated(self, ctx):
        """c (B, V), which tokens may be merged (B, V), and p (B, V)."""
        earlier, unit = before(ctx), directions(ctx.hidden[ctx.visual])
        cosine = (unit * take(unit, earlier.clamp(min=0))).sum(-1)
        repeats = (earlier >= 0) & (cosine >= self.similarity) & ctx.valid
        enough = repeats.sum(1, keepdim=True) >= self.least * ctx.valid.sum(1, keepdim=True)
        return cosine, repeats & enough, earlier

    def flops(self, dimensions, n_visual, n_text):
        """FLOPs of one row of q k^T."""
        return 2 * dimensions.heads * dimensions.head_dim * (n_visual + n_text)
