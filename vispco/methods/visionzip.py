"""VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467): the tower's attention, and merging."""

from __future__ import annotations

import torch

from ..registry import register_method
from ..relaxation import descending_ranks
from .base import Method
from .pairs import Pairs


@register_method("visionzip")
class VisionZip(Method):
    """Dominant tokens by the tower's attention; the others are averaged into contextual ones.

        dominant   = the k - c tokens of largest a_j,   c = round(contextual k)
        contextual = every (n - k + c) // c -th of the others, from the first on, c in all
        all others are averaged into the contextual token of largest cos(key_i, key_j)

    a_j: attention that the token's patches receive in the tower. keys: of the same layer, mean over
    heads (`vispco.pruning._tower`). Knows nothing of the question. At a later layer, it does the
    same among the tokens present then. Newline tokens were no patches: nothing attends to them.

    contextual: share of the kept tokens. Published, before layer 0: 162 + 30, 108 + 20 and 54 + 10
    of 576 tokens, the default share.

    Departs from the authors' code: merging comes after the projector, and a contextual token
    becomes the mean of itself and all it absorbs (there, the mean of those is added to it). For
    towers without a class token see `vispco.pruning._tower`.
    """

    first_layer = 0
    reads_vision = True
    reads = "tower attention and keys"

    def __init__(self, contextual: float = 5 / 32):
        if not 0 <= contextual <= 1:
            meant = "a share of the kept tokens, 0 to 1"
            raise ValueError(f"contextual must be {meant}, got {contextual!r}")
        self.contextual = contextual

    def score(self, ctx):
        """(B, n_visual): dominant, contextual, then the others, each by attention."""
        place, dominant = self._dominant(ctx)
        rest = ctx.valid & ~dominant
        number, count = rest.cumsum(1) - 1, (ctx.keep - dominant.sum(1))[:, None]
        step = (rest.sum(1, keepdim=True) // count.clamp(min=1)).clamp(min=1)
        contextual = rest & (number % step == 0) & (number // step < count)
        return -(place + place.shape[1] * (rest.long() + (rest & ~contextual).long())).float()

    def merge(self, ctx, kept):
        """(B, n_visual) the contextual slot that each is averaged into."""
        targets = kept & ~self._dominant(ctx)[1]
        into = Pairs(ctx.vision_keys).nearest(targets)
        return torch.arange(kept.shape[1], device=kept.device).where(kept, into)

    def _dominant(self, ctx):
        """Place by attention (B, n_visual), 0 for the most, and which tokens are dominant."""
        place = descending_ranks(ctx.vision_attention, ctx.valid)
        contextual = (ctx.keep.double() * self.contextual + 0.5).floor().long()
        return place, place < (ctx.keep - contextual)[:, None]

    def flops(self, dimensions, n_visual, n_text):
        """FLOPs of the cosines of all pairs of keys."""
        return 2 * n_visual * n_visual * dimensions.vision_head_dim
