"""Average pooling: a coarser grid of visual tokens, the baseline that every method has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import register_method
from ..relaxation import descending_ranks
from .base import Method

#: Binary digits of rows, columns and frames.
BITS = 16
#: Beyond any squared distance.
FAR = 2**40
#: Distances that are computed at a time: this bounds the memory.
CHUNK = 2**22


@register_method("pool")
class Pool(Method):
    """Keeps an even grid and averages every token into the nearest one kept of its frame.

        s_j = -place of token j by the binary digits  c0 r0 c1 r1 ... f0 f1 ...
        token j goes to argmin_i (r_j - r_i)^2 + (c_j - c_i)^2,   i kept, of frame f_j

    r0 is the lowest digit of the row r, and so on: the order of a Morton curve, mirrored. So the
    first half are the even columns, the first quarter the even columns of even rows, and any other
    number is as even as a nested order allows. Of one place, frames (tiles, images, those of a
    video) take turns evenly. Keeping 1/4 of an even square is 2 x 2 average pooling. Looks at
    nothing but places. Of tokens equally near, the first is meant; frames of which nothing is kept
    are gone.
    """

    first_layer = 0
    reads_grid = True

    def score(self, ctx):
        """(B, n_visual): minus the place in the order."""
        frame, row, column = ctx.grid.unbind(-1)
        of_row = mirrored(row, 3 * BITS - 2, 2)
        of_column = mirrored(column, 3 * BITS - 1, 2)
        key = of_column + of_row + mirrored(frame, BITS - 1, 1)
        return -descending_ranks(-key, ctx.valid).float()

    def merge(self, ctx, kept):
        """(B, n_visual) the nearest kept slot of the same frame; -1 if there is none."""
        frame, row, column = ctx.grid.unbind(-1)
        slots = kept.shape[1]
        slot = torch.arange(slots, device=kept.device)
        found = []
        for some in slot.split(max(1, CHUNK // kept.numel())):
            far = sum((x[:, some, None] - x[:, None]) ** 2 for x in (row, column))  # (B, some, V)
            same_frame = frame[:, some, None] == frame[:, None]
            far = far.masked_fill(~(kept[:, None] & same_frame), FAR)
            # One minimum for both: the distance, and the first slot of those equally near.
            found.append((far * slots + slot).amin(-1))
        nearest = torch.cat(found, 1)
        return slot.where(kept, (nearest % slots).where(nearest < FAR * slots, -1))


def mirrored(x: Tensor, first: int, step: int) -> Tensor:
    """The binary digits of `x`, the lowest at place `first`, each next one `step` places lower."""
    digits = torch.arange(BITS, device=x.device)
    return ((x[..., None] >> digits & 1) << first - step * digits).sum(-1)
