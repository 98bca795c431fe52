"""VisPruner (Zhang et al., ICCV 2025, arXiv 2412.01818): the tower's attention, and diversity."""

from __future__ import annotations

import torch

from ..pruning.context import take
from ..registry import register_method
from ..relaxation import descending_ranks
from .base import Method
from .pairs import HELD, Pairs
from .shared import is_whole

#: Neighbours of each token that are looked through first, then, and before all others are.
FEW, NEIGHBOURS = 6, 32


@register_method("vispruner")
class VisPruner(Method):
    """Important tokens by the tower's attention, and diverse ones: duplicates are removed.

        important = the floor(important k) tokens of largest a_j
        the others, in falling a_j: until k are left in all, number those left 0, 1, 2, ...;
            of the even ones, remove the `step` (at most as many as are too many)
            of largest max_{j odd} cos(v_i, v_j)

    a_j: attention that the token's patches receive in the tower (`vispco.pruning._tower`). v:
    projected features. After the k, a token ranks the higher the later it was removed. Knows
    nothing of the question.

    important: share of the kept tokens. step: tokens to remove at once; with many thousand tokens
    take more. Published, before layer 0: half important, half diverse, 128, 64 or 32 of 576 tokens,
    `step` 8.

    Departs from the authors' code: features after the projector (theirs: before it), and tokens
    stay in the order of attention from one round to the next.
    """

    first_layer = 0
    reads_vision = True
    reads = "tower attention, features"

    def __init__(self, important: float = 0.5, step: int = 8):
        if not is_whole(step, 1):
            meant = "a number of tokens to remove at once, 1 or more"
            raise ValueError(f"step must be {meant}, got {step!r}")
        if not 0 <= important <= 1:
            meant = "a share of the kept tokens, 0 to 1"
            raise ValueError(f"important must be {meant}, got {important!r}")
        self.important, self.step = important, step

    def score(self, ctx):
        """(B, n_visual): minus the rank."""
        # All that follows is in the order of attention.
        order = descending_ranks(ctx.vision_attention, ctx.valid).argsort(dim=1, stable=True)
        real, number = ctx.valid.gather(1, order), torch.arange(order.shape[1], device=order.device)
        important = (ctx.keep.double() * self.important).floor().long()
        left = real & (number >= important[:, None])
        diverse = ctx.keep - important
        # Of many tokens, those that are important in every sample are left out: nobody's twins.
        many = order.shape[1] > HELD
        skipped = min(int(important.min()), order.shape[1] - 1) if many else 0
        near = Neighbours(take(ctx.embeddings[ctx.visual], order[:, skipped:]))
        # The round in which each token was removed; those that stay have more than any. One more
        # place is for filler.
        tokens = order.shape[1]
        stayed = order.new_full((len(order), tokens + 1), tokens)
        listed, there = compact(number.expand_as(order), left, tokens)
        for turn in range(tokens):
            surplus = (there.sum(1) - diverse).masked_fill(diverse == 0, 0).clamp(min=0)
            if not bool((surplus > 0).any()):
                break
            even, alive = listed[:, ::2], there[:, ::2]
            is_odd = torch.zeros_like(stayed, dtype=torch.bool)
            is_odd = is_odd.scatter(1, listed[:, 1::2], there[:, 1::2])[:, skipped:tokens]
            twin = near.twin(even.clamp(max=tokens - 1) - skipped, alive, is_odd)
            gone = torch.zeros_like(there)
            gone[:, ::2] = largest(twin, alive, surplus.clamp(max=self.step))
            stayed = stayed.scatter(1, listed, stayed.gather(1, listed).masked_fill(gone, turn))
            listed, there = compact(listed, there & ~gone, tokens)
        stayed = stayed[:, :tokens].masked_fill(number < important[:, None], tokens + 1)
        place = descending_ranks(stayed.double(), real)
        return torch.zeros(place.shape, device=place.device).scatter(1, order, -place.float())

    def flops(self, dimensions, n_visual, n_text):
        """FLOPs of the cosines of all pairs of features; of more than HELD tokens, at most."""
        return 2 * n_visual * n_visual * dimensions.hidden


def compact(
    listed: torch.Tensor, stay: torch.Tensor, filler: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of `listed` (B, R) that `stay` (B, R), in order, then `filler`; and which are real."""
    count = stay.sum(1, keepdim=True)
    width = int(count.max())
    place = torch.where(stay, stay.cumsum(1) - 1, width)
    short = listed.new_full((len(listed), width + 1), filler).scatter(1, place, listed)[:, :width]
    real = torch.arange(width, device=listed.device) < count
    return short.masked_fill(~real, filler), real


def largest(x: torch.Tensor, alive: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """(B, R) bool: the `number` (B,) largest of the `alive` x (B, R); of equal ones, the first."""
    number = torch.minimum(number, alive.sum(1))
    if not int(number.max()):
        return torch.zeros_like(alive)
    x = x.masked_fill(~alive, float("-inf"))
    least = x.topk(int(number.max()), 1).values.gather(1, (number - 1).clamp(min=0)[:, None])
    above, equal = (x > least) & alive, (x == least) & alive
    more = number[:, None] - above.sum(1, keepdim=True)
    return (above | (equal & (equal.cumsum(1) <= more))) & (number > 0)[:, None]


class Neighbours:
    """The largest cosine of a token to one of a changing set, without looking at all pairs.

    x: (B, V, D). Of each token, the NEIGHBOURS tokens most like it are found once, in falling
    order: the first of them in the set is the one. Where none is, the whole row is looked through.
    """

    def __init__(self, x: torch.Tensor):
        self.pairs = Pairs(x)
        number = min(NEIGHBOURS, x.shape[1])
        found = [alike.topk(number, -1) for _, alike in self.pairs.blocks()]
        self.cosine = torch.cat([values for values, _ in found], 1)  # (B, V, NEIGHBOURS)
        self.token = torch.cat([index for _, index in found], 1)
        self.few = self.token[..., :FEW].contiguous()

    def twin(self, at: torch.Tensor, real: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
        """The largest cosine (B, R) of the `real` tokens `at` (B, R) to `members` (B, V) bool.

        -inf without members.
        """
        token = take(self.few, at)
        inside = members.gather(1, token.flatten(1)).view(token.shape)
        first = inside.to(torch.int8).argmax(-1)
        width = self.cosine.shape[-1]
        twin = self.cosine.flatten(1).gather(1, at * width + first)
        rest = (real & ~inside.any(-1)).nonzero()
        for b in rest[:, 0].unique().tolist():
            columns = rest[rest[:, 0] == b, 1]
            mine = at[b, columns]
            inside = members[b][self.token[b, mine]]  # (rest, NEIGHBOURS)
            first = inside.to(torch.int8).argmax(-1, keepdim=True)
            twin[b, columns] = self.cosine[b, mine].gather(1, first)[:, 0]
            missed = ~inside.any(-1)
            if bool(missed.any()):
                rows = self.pairs.rows_of(b, mine[missed]).masked_fill(~members[b], float("-inf"))
                twin[b, columns[missed]] = rows.amax(-1)
        return twin
