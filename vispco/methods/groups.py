"""Tokens in groups (frames, crops, windows): who came before, and how groups share a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pruning.context import Context

#: Binary digits of a frame's number.
BITS = 24


def rounded(x: Tensor) -> Tensor:
    """The nearest whole numbers, halves up."""
    return (x.double() + 0.5 + 1e-9).floor().long()


def before(ctx: Context) -> Tensor:
    """The slot of the token at the same place in the nearest earlier frame, (B, V); -1 if none."""
    frame, row, column = ctx.grid.unbind(-1)
    place = (row << 16 | column) << BITS
    key = (place | frame).masked_fill(~ctx.valid, torch.iinfo(torch.long).max)
    order = key.argsort(dim=1, stable=True)
    key = key.gather(1, order)
    same = (key[:, 1:] >> BITS == key[:, :-1] >> BITS) & (key[:, 1:] != key[:, :-1])
    same = same & ctx.valid.gather(1, order)[:, 1:]
    earlier = torch.full_like(order, -1)
    earlier[:, 1:] = order[:, :-1].where(same, -1)
    return torch.full_like(order, -1).scatter(1, order, earlier)


def numbered(keys: Tensor, valid: Tensor) -> Tensor:
    """Groups (B, V) numbered 0, 1, 2, ... by their `keys` (B, V); filler counts as group 0."""
    return torch.unique(
        keys.where(valid, keys[valid].min() if valid.any() else 0), return_inverse=True
    )[1]


def total(x: Tensor, groups: Tensor, valid: Tensor, number: int) -> Tensor:
    """Sums (B, G) of `x` (B, V) over each group's tokens, as if in exact arithmetic."""
    x = x.double().masked_fill(~valid, 0.0)
    return x.new_zeros(len(x), number).scatter_add(1, groups, x)


def shared_out(scores: Tensor, groups: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
    """Scores (B, V) by which the k highest take from each group in proportion to its weight.

        -(i + 1/2) / w_g   of the token that has i tokens of its group above it

    So tokens are handed out as seats of a parliament are, by Sainte-Lague: shares are rounded to
    whole tokens, for every k at once, and what a group cannot take goes to the others.

    scores: (B, V), ties to the first. groups: (B, V), from 0. weights: (B, G), positive where a
    group has tokens.

    >>> scores, groups = torch.tensor([[5.0, 4, 3, 9, 8]]), torch.tensor([[0, 0, 0, 1, 1]])
    >>> shared_out(scores, groups, torch.tensor([[3.0, 1.0]]), torch.ones(1, 5).bool())
    tensor([[-0.1667, -0.5000, -0.8333, -0.5000, -1.5000]], dtype=torch.float64)
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    # Filler comes last, in a group of its own.
    last = weights.shape[1]
    by_score = groups.masked_fill(~valid, last).gather(1, order)
    again = by_score.argsort(dim=1, stable=True)
    order, in_group = order.gather(1, again), by_score.gather(1, again)
    number = torch.arange(order.shape[1], device=order.device).expand_as(order)
    starts = torch.nn.functional.pad(in_group[:, 1:] != in_group[:, :-1], (1, 0), value=True)
    place = number - number.masked_fill(~starts, 0).cummax(1).values
    weight = torch.nn.functional.pad(weights.double(), (0, 1), value=1.0).gather(1, in_group)
    scores = -(place + 0.5) / weight
    return torch.zeros_like(scores).scatter(1, order, scores)
