"""Average pooling: a coarser grid of visual tokens, the baseline that every method has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pruning.context import positions, take
from ..registry import register_method
from ..relaxation import descending_ranks
from .base import Method

#: Binary digits of rows, columns and frames.
BITS = 16
#: Beyond any squared distance of 32 bits, and any frame.
FAR = 2**31 - 1
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
    reads = "grid"

    def score(self, ctx):
        """(B, n_visual): minus the place in the order."""
        frame, row, column = ctx.grid.unbind(-1)
        of_row = mirrored(row, 3 * BITS - 2, 2)
        of_column = mirrored(column, 3 * BITS - 1, 2)
        key = of_column + of_row + mirrored(frame, BITS - 1, 1)
        return -descending_ranks(-key, ctx.valid).float()

    def merge(self, ctx, kept):
        """(B, n_visual) the nearest kept slot of the same frame; -1 if there is none."""
        slot = torch.arange(kept.shape[1], device=kept.device)
        stay = kept & ctx.valid
        width = int(stay.sum(1).max())
        if not width:
            return torch.full_like(ctx.slot, -1)
        grid = ctx.grid.int()
        (_, columns), real = positions(stay, width)
        target = take(grid, columns)  # (B, K, 3)
        # Frames never fall from token to token, so those of a run of tokens are a run of targets.
        frame = target[..., 0].masked_fill(~real, FAR)
        found = []
        for some in slot.split(max(1, CHUNK // (len(kept) * width))):
            of, there = grid[:, some], ctx.valid[:, some]
            low = int(of[..., 0].masked_fill(~there, FAR).min())
            high = int(of[..., 0].masked_fill(~there, -1).max())
            inside = ((frame >= low) & (frame <= high)).any(0).nonzero()[:, 0].tolist() or [0]
            run = slice(inside[0], inside[-1] + 1)
            far = (of[:, :, None, 1] - target[:, None, run, 1]).square_()
            far += (of[:, :, None, 2] - target[:, None, run, 2]).square_()
            far.masked_fill_(of[:, :, None, 0] != frame[:, None, run], FAR)
            # argmin takes the first of those equally near.
            nearest = far.argmin(-1, keepdim=True)
            into = columns.gather(1, nearest[..., 0] + run.start)
            found.append(into.where(far.gather(2, nearest)[..., 0] < FAR, -1))
        return slot.where(kept, torch.cat(found, 1))


def mirrored(x: Tensor, first: int, step: int) -> Tensor:
    """The binary digits of `x`, the lowest at place `first`, each next one `step` places lower."""
    digits = torch.arange(BITS, device=x.device)
    return ((x[..., None] >> digits & 1) << first - step * digits).sum(-1)
