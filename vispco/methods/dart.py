"""DART (Wen et al., EMNLP 2025, arXiv 2502.11494): the tokens that repeat nothing."""

from __future__ import annotations

import torch

from ..pruning.context import take
from ..registry import register_method
from ..relaxation import descending_ranks
from .base import Method
from .pairs import directions
from .shared import is_whole, question


@register_method("dart")
class DART(Method):
    """A few pivots of large keys; each adds the tokens least like it.

        pivots = visual tokens of largest |key_j|_1, then text tokens of largest |key_t|_1
        each pivot p adds, of the visual tokens not chosen yet, those of least cos(h_p, h_j)

    until exactly `ctx.keep` are chosen. Visual pivots are kept themselves. What else there is to
    keep is shared out evenly, one more to the first pivots if there is a remainder. The order of
    choosing is the score; tokens beyond follow by their mean cosine to the pivots.
    key: of the layer just run. h: hidden states that enter the layer. text: after the image's first
    token. Needs no attention weights.

    visual, text: numbers of pivots. Published: 4 and 4, before layer 2, 128 = 4 + 8 * 16 tokens
    (132 in truth).

    Departs from the authors' code: exactly the count; pivots take their turns by size (there: in no
    particular order); keys before rotary embedding, and before their norm in families with one. For
    rotation changes an L1 norm, and so padding would change the pivots.
    """

    first_layer = 1
    reads = "keys, hidden states"

    def __init__(self, visual: int = 4, text: int = 4):
        for name, value in {"visual": visual, "text": text}.items():
            if not is_whole(value, 0):
                raise ValueError(f"{name} must be a number of pivots, 0 or more, got {value!r}")
        if visual + text == 0:
            raise ValueError("visual and text are both 0: at least one pivot is needed")
        self.visual, self.text = visual, text

    def score(self, ctx):
        """(B, n_visual): minus the place in the order of choosing."""
        unit = directions(ctx.hidden)  # (B, N, D)
        size = ctx.projected_keys.float().abs().sum(-1)  # (B, N)
        words, asked = question(ctx)
        features = unit[ctx.visual]  # (B, V, D)
        place = descending_ranks(size[ctx.visual], ctx.valid)  # (B, V)
        chosen = place < min(self.visual, place.shape[1])
        count = chosen.sum(1, keepdim=True)  # (B, 1)
        image = largest(size, ctx.visual[1], ctx.valid, self.visual)
        text = largest(size, words[1], asked, self.text)
        pivots, there = (torch.cat(both, 1) for both in zip(image, text, strict=True))  # (B, P)
        number = there.sum(1, keepdim=True).clamp(min=1)
        wanted = (ctx.keep[:, None] - count).clamp(min=0)
        quota = (wanted // number + (there.cumsum(1) <= wanted % number)) * there  # (B, P)
        total = unit.new_zeros(place.shape)
        for p in range(pivots.shape[1]):
            cosine = (features * take(unit, pivots[:, p : p + 1])).sum(-1)  # (B, V)
            next_place = descending_ranks(-cosine, ctx.valid & ~chosen)
            added = next_place < quota[:, p : p + 1]
            place = torch.where(added, count + next_place, place)
            chosen, count = chosen | added, count + added.sum(1, keepdim=True)
            total = total + cosine * there[:, p : p + 1]
        rest = ctx.valid & ~chosen
        return -torch.where(rest, count + descending_ranks(-total, rest), place).float()


def largest(size, columns, alive, count):
    """The `count` of `columns` (B, K) where `size` (B, N) is largest, and which of them exist.

    alive: (B, K) bool, the columns that count. Both results are (B, count), or (B, K) if K is less.
    """
    wanted = torch.arange(min(count, columns.shape[1]), device=size.device)
    place = descending_ranks(size.gather(1, columns), alive)
    found = alive[:, None] & (place[:, None] == wanted[:, None])  # (B, count, K)
    return columns.gather(1, found.long().argmax(-1)), found.any(-1)
