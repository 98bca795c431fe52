"""Average pooling: a coarser grid of visual tokens, the baseline that every method has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import register_method
from ..relaxation import descending_ranks
from .base import Method

BITS, FAR = 16, 2**40  # of rows, columns and frames; beyond any squared distance
CHUNK = 2**22  # distances at a time


@register_method("pool")
class Pool(Method):
    """Keeps an even grid and averages every token into the nearest one kept of its frame.

        s_j = -place of token j by the binary digits  c0 r0 c1 r1 ... f0 f1 ...
        token j goes to argmin (r_j - r_i)^2 + (c_j - c_i)^2 over the kept i of frame f_j, ties to the first

    r0 is the lowest digit of the row r, and so on: the order of a Morton curve, mirrored. So the first half
    are the even columns, the first quarter the even columns of even rows, and any other number is as even as
    a nested order allows; of one place, frames (tiles, images, those of a video) take turns evenly. Keeping
    1/4 of an even square is 2 x 2 average pooling. Looks at nothing but places; frames of which nothing is
    kept are gone.
    """

    first_layer = 0
    reads_grid = True

    def score(self, ctx):
        """(B, n_visual): minus the place in the order."""
        frame, row, column = ctx.grid.unbind(-1)
        key = (
            spread(column, 3 * BITS - 1, 2)
            + spread(row, 3 * BITS - 2, 2)
            + spread(frame, BITS - 1, 1)
        )
        return -descending_ranks(-key, ctx.valid).float()

    def merge(self, ctx, kept):
        """(B, n_visual)"""
        frame, row, column = ctx.grid.unbind(-1)
        slot, slots = torch.arange(kept.shape[1], device=kept.device), kept.shape[1]
        found = []
        for part in slot.split(max(1, CHUNK // kept.numel())):
            apart = sum((x[:, part, None] - x[:, None]) ** 2 for x in (row, column))  # (B, part, V)
            apart = apart.masked_fill(
                ~kept[:, None] | (frame[:, part, None] != frame[:, None]), FAR
            )
            found.append((apart * slots + slot).amin(-1))
        nearest = torch.cat(found, 1)
        return slot.where(kept, (nearest % slots).where(nearest < FAR * slots, -1))


def spread(x: Tensor, first: int, apart: int) -> Tensor:
    """The binary digits of `x`, the lowest at place `first`, each next one `apart` places lower."""
    digits = torch.arange(BITS, device=x.device)
    return ((x[..., None] >> digits & 1) << first - apart * digits).sum(-1)
