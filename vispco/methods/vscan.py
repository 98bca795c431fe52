"""VScan (arXiv 2505.22654): a look at each window, and one at the whole."""

from __future__ import annotations

import torch

from ..registry import register_method
from ..relaxation import descending_ranks
from .base import Method
from .groups import numbered, rounded, shared_out, total
from .pairs import Pairs
from .shared import count, share


@register_method("vscan")
class VScan(Method):
    """Half by a shallow layer's attention, the same from each window; half by a deep layer's.

        local  = the round(k / 2) tokens of largest l_j, equally many from each 6 x 6 window
        global = of the others, those of largest a_j, until there are k
        all others are averaged into the kept token of largest cos(v_i, v_j)

    l, a: attention that the token's patches receive in a shallow layer of the tower, and in the one
    whose output becomes the tokens (`vispco.pruning._tower`). v: projected features. Windows are of
    the grid of each frame. Knows nothing of the question. Source: the authors' code (MIT). There:
    before layer 0, and a second drop in the middle of the language model, layer 16 of 32. How they
    rank that one is not known to us; our choice for it is `fastv`: `vscan+fastv@16`.

    local: share of the kept tokens. window: tokens along its side. depth: of the shallow layer in
    the tower, 0 to 1; theirs: index 5 of CLIP-L's 24. Their deep layer is index -2: in
    LLaVA, the one read here.

    Departs from it: exactly the count, so that budgets hold; windows take turns where it cannot be
    shared equally (`vispco.methods.groups.shared_out`). Our choice: merging is a plain mean after
    the projector, where hidden states are pruned, and cosines are of projected features. No preset:
    the shares of the two drops are not known to us.
    """

    first_layer = 0
    reads_vision = True
    reads_grid = True
    reads = "tower attention of two layers, features, grid"

    def __init__(self, local: float = 0.5, window: int = 6, depth: float = 5 / 24):
        self.local, self.depth = share("local", local), share("depth", depth)
        self.window = count("window", window)
        self.vision_depths = (self.depth,)

    def score(self, ctx):
        """(B, n_visual): minus the rank."""
        frame, row, column = ctx.grid.unbind(-1)
        key = frame << 32 | row // self.window << 16 | column // self.window
        windows = numbered(key, ctx.valid)
        ones = torch.ones_like(key)
        there = total(ones, windows, ctx.valid, int(windows.max()) + 1) > 0
        shallow = ctx.vision_attention_at(self.depth)
        equal = shared_out(shallow, windows, there.double(), ctx.valid)
        # Of windows whose turn it is, the largest attention first.
        turn = descending_ranks(shallow, ctx.valid).argsort(dim=1, stable=True)
        local = torch.zeros_like(key).scatter(
            1, turn, descending_ranks(equal.gather(1, turn), ctx.valid.gather(1, turn))
        )
        rest = local >= rounded(self.local * ctx.keep)[:, None]
        place = descending_ranks(ctx.vision_attention, ctx.valid)
        return -(place + place.shape[1] * rest.long()).float()

    def merge(self, ctx, kept):
        """(B, n_visual) the kept slot of the most similar features."""
        into = Pairs(ctx.embeddings[ctx.visual]).nearest(kept & ctx.valid)
        return torch.arange(kept.shape[1], device=kept.device).where(kept, into)

    def flops(self, dimensions, n_visual, n_text):
        """FLOPs of the cosines of all pairs of features."""
        return 2 * n_visual * n_visual * dimensions.hidden
