"""EVS, efficient video sampling (vLLM): tokens that differ from the frame before."""

from __future__ import annotations

from ..pruning.context import take
from ..registry import register_method
from .base import Method
from .groups import before
from .pairs import directions
from .strided import mirrored_number


@register_method("evs")
class EVS(Method):
    """Distance of a token to the one at the same place in the frame before. For video.

        s_j = 1 - cos(v_j, v_p(j)),   p(j): same row and column, one frame earlier

    Tokens without one, those of the first frame, come first. v: projected features. Knows nothing
    of the question. Source: efficient video sampling (arXiv 2510.14624) as vLLM has it
    (Apache-2.0). There: before layer 0, a share q of the film's tokens is dropped, but never less
    is kept than one frame has. q is the user's.

    Departs from it: exactly the count, even if that is less than a frame, so that budgets hold.
    Tokens without an earlier one are then as even as `strided`'s. p(j) is of the nearest earlier
    frame, if the one before has lost its token: a schedule may drop more than once. No preset: q
    has no published value. Of pictures that are no video, tiles count as frames: use another
    method.
    """

    first_layer = 0
    reads_grid = True
    reads = "features, grid"

    def score(self, ctx):
        """(B, n_visual) in [0, 2]; more where nothing came before."""
        unit, earlier = directions(ctx.embeddings[ctx.visual]), before(ctx)
        cosine = (unit * take(unit, earlier.clamp(min=0))).sum(-1)
        return (1 - cosine).where(earlier >= 0, 4 - mirrored_number(ctx.slot))
