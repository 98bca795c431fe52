"""HiPrune (arXiv 2508.00553): the vision tower's attention, of a middle layer and of the last."""

from __future__ import annotations

import torch

from ..pruning.context import take
from ..registry import register_method
from ..relaxation import descending_ranks
from .base import Method
from .groups import rounded
from .shared import share

#: An anchor and its four neighbours on the grid.
CROSS = 5


@register_method("hiprune")
class HiPrune(Method):
    """Anchors of a middle layer with their neighbours; the rest by the last layer's attention.

        anchors   = the round(alpha k / 5) tokens of largest m_j
        neighbours = tokens one row or one column from an anchor, in its frame
        others    = those of largest a_j, until there are k

    m, a: attention that the token's patches receive in a middle layer of the tower, and in the one
    whose output becomes the tokens (`vispco.pruning._tower`). Knows nothing of the question.
    Source: the authors' code (MIT). There: before layer 0.

    alpha: share of the kept tokens that anchors and neighbours may take (theirs: 0.1). depth: of
    the middle layer in the tower, 0 to 1. Theirs: layer 9 of CLIP-L's 24, the default; 16 of
    Qwen2.5-VL's 32, depth=0.5, of which ours reads the nearest layer without windows.

    Departs from it: where the tower has a class token (CLIP), m and a are the attention of that
    token; theirs is the mean over all that attend. Where it has none, ours is that mean. One row of
    attention takes no memory, and all methods that read the tower share it. Exactly the count: of
    neighbours that are too many, those of largest a stay. No preset: which counts were published is
    not known to us.
    """

    first_layer = 0
    reads_vision = True
    reads_grid = True
    reads = "tower attention of two layers, grid"

    def __init__(self, alpha: float = 0.1, depth: float = 0.375):
        self.alpha, self.depth = share("alpha", alpha), share("depth", depth)
        self.vision_depths = (self.depth,)

    def score(self, ctx):
        """(B, n_visual): minus the rank."""
        last = descending_ranks(ctx.vision_attention, ctx.valid)
        middle = descending_ranks(ctx.vision_attention_at(self.depth), ctx.valid)
        anchors = rounded(self.alpha * ctx.keep / CROSS)  # (B,)
        order = middle.argsort(dim=1, stable=True)[:, : int(anchors.max())]  # (B, A)
        real = torch.arange(order.shape[1], device=order.device) < anchors[:, None]
        first = torch.zeros_like(last)
        grid = ctx.grid
        for some, there in zip(order.split(64, 1), real.split(64, 1), strict=True):
            apart = (take(grid, some)[:, :, None] - grid[:, None]).abs()  # (B, a, V, 3)
            near = (apart[..., 0] == 0) & (apart[..., 1] + apart[..., 2] <= 1)
            first = first | (near & there[..., None]).any(1)
        return -(last + last.shape[1] * (first == 0)).float()
