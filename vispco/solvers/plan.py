"""Plan: schedules of few drops that a prediction of the loss likes best, for any budget.

A plan is a staircase: tokens are dropped before one to a few layers, the last drop may take all.
An evolution in this space costs no forward pass (Real et al. 2019, arXiv 1802.01548, of the kind):

    parents:   random plans, each drop before a single layer, and what else is given
    children:  a drop moves, changes, comes, goes, or takes all; or two parents are joined
    filled:    lowered until within the budget, then raised step by step until nothing fits

Dynamic programming would need a loss that is a sum over the drops. The largest of the drops'
losses predicts better (`vispco.Profile.predict`), and is no such sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..budget import Budget

#: Most drops of a plan.
DROPS = 6
#: Plans that live at a time, and generations.
POPULATION, GENERATIONS = 96, 24

#: predict(counts (C, L)) -> losses (C,) that these are expected to have.
Predict = Callable[[Tensor], Tensor]


def plans(
    predict: Predict,
    limit: Budget,
    seed: int = 0,
    *,
    drops: int = DROPS,
    given: Tensor | None = None,
    generations: int = GENERATIONS,
) -> Tensor:
    """Counts (C, L) of whole tokens within the limit, of the least predicted loss first.

    drops: the most drops of a plan, the last one included. given: counts (C, L) to begin with.
    """
    generator = torch.Generator().manual_seed(seed)
    seeds = [single_drops(limit), random_plans(limit, POPULATION, drops, generator)]
    found = fill(torch.cat(seeds if given is None else [*seeds, given]), limit, generator)
    for _ in range(generations):
        children = offspring(found[:POPULATION], limit, POPULATION, drops, generator)
        found = torch.cat([found, fill(children, limit, generator)]).unique(dim=0)
        found = found[predict(found).argsort(stable=True)[: 2 * POPULATION]]
    return found


def single_drops(limit: Budget) -> Tensor:
    """Every plan that drops all tokens before one layer (C, L)."""
    layers = torch.arange(limit.layers)
    at = torch.arange(limit.first_layer, limit.layers)[:, None]
    return torch.where(layers < at, limit.tokens, 0)


def random_plans(limit: Budget, count: int, drops: int, generator: torch.Generator) -> Tensor:
    """Random plans (count, L) of any cost, of one to `drops` drops."""
    drawn = []
    for _ in range(count):
        number = 1 + _draw(drops, generator)
        inside = limit.layers - limit.first_layer
        layers = torch.randperm(inside, generator=generator)[:number].add(limit.first_layer)
        levels = torch.randint(limit.tokens, (len(layers),), generator=generator)
        drawn.append(dict(zip(layers.tolist(), levels.tolist(), strict=True)))
    return staircases(drawn, limit)


def staircases(steps: Sequence[dict[int, int]], limit: Budget) -> Tensor:
    """Counts (C, L) of plans {layer: tokens kept from it on}; more than before changes nothing."""
    counts = torch.full((len(steps), limit.layers), limit.tokens)
    for row, plan in zip(counts, steps, strict=True):
        for layer, tokens in plan.items():
            row[layer:] = row[layer:].clamp(max=tokens)
    return counts


def steps(counts: Sequence[int], tokens: int) -> dict[int, int]:
    """{layer: tokens kept from it on} of counts (L,).

    >>> steps([8, 8, 3, 3, 0], tokens=8)
    {2: 3, 4: 0}
    """
    before = [tokens, *counts]
    return {i: int(n) for i, n in enumerate(counts) if n < before[i]}


def offspring(
    parents: Tensor, limit: Budget, count: int, drops: int, generator: torch.Generator
) -> Tensor:
    """Children (count, L) of plans (C, L), the first of which have most of them. Of any cost."""
    children = []
    rows = parents.tolist()
    for _ in range(count):
        # The smaller of two numbers: better parents more often.
        mother, father = (
            rows[min(_draw(len(rows), generator), _draw(len(rows), generator))] for _ in range(2)
        )
        child = steps(mother, limit.tokens)
        if _draw(4, generator) == 0:
            at = limit.first_layer + _draw(limit.layers - limit.first_layer, generator)
            early = {k: n for k, n in child.items() if k < at}
            child = early | {k: n for k, n in steps(father, limit.tokens).items() if k >= at}
        for _ in range(1 + _draw(2, generator)):
            child = _moved(child, limit, generator)
        while len(child) > drops:
            del child[sorted(child)[_draw(len(child), generator)]]
        children.append(child)
    return staircases(children, limit)


def _moved(plan: dict[int, int], limit: Budget, generator: torch.Generator) -> dict[int, int]:
    """One random change: a drop moves, changes its level, takes all, goes, or a new one comes."""
    inside, what = limit.layers - limit.first_layer, _draw(5, generator)
    plan, layers = dict(plan), sorted(plan)
    if not layers or what == 0:
        before = limit.first_layer + _draw(inside, generator)
        return plan | {before: _draw(limit.tokens, generator)}
    layer = layers[_draw(len(layers), generator)]
    tokens = plan.pop(layer)
    if what == 1 and len(plan):
        return plan
    if what == 2:
        last = layer + _draw(limit.layers - layer, generator)
        return {k: n for k, n in plan.items() if k < last} | {layer: tokens} | {last: 0}
    if what == 3:
        factor = 2 ** float(torch.empty(()).uniform_(-1, 1, generator=generator))
        tokens = min(round(tokens * factor) + _draw(3, generator) - 1, limit.tokens - 1)
        return plan | {layer: max(0, tokens)}
    step = (1 + _draw(3, generator)) * (1 - 2 * _draw(2, generator))
    moved = min(max(layer + step, limit.first_layer), limit.layers - 1)
    return {**plan, moved: tokens}


def fill(counts: Tensor, limit: Budget, generator: torch.Generator) -> Tensor:
    """Plans (C, L) brought onto the limit, steps as steps; those that cannot be are left out.

    Above the limit, all levels are lowered by one factor. Then one step after the other, in random
    order, is raised as far as the limit allows.
    """
    before = torch.cat([torch.full_like(counts[:, :1], limit.tokens), counts[:, :-1]], 1)
    number = (counts < before).cumsum(1)  # (C, L): the step that each layer stands on
    dropped = number > 0

    def scaled(s: Tensor) -> Tensor:
        return torch.where(dropped, (counts * s).floor().long(), counts)

    low = torch.zeros(len(counts), 1, dtype=torch.float64)
    whole = limit.fits(counts)[:, None]
    low, high = low.masked_fill(whole, 1.0), torch.ones_like(low)
    for _ in range(8):
        middle = (low + high) / 2
        within = limit.fits(scaled(middle))[:, None]
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    counts = scaled(low)
    kept = limit.fits(counts)
    counts, number = counts[kept], number[kept]
    if not len(counts):
        return counts
    most = int(number.max())
    for step in (torch.randperm(most, generator=generator) + 1).tolist():
        counts = _raised(counts, number == step, limit)
    return counts


def _raised(counts: Tensor, on: Tensor, limit: Budget) -> Tensor:
    """Counts (C, L) with the layers `on` (C, L), one step of each, raised as far as fits.

    No step rises above the one before it.
    """
    before = torch.cat([torch.full_like(counts[:, :1], limit.tokens), counts[:, :-1]], 1)
    first = on & (on.cumsum(1) == 1)
    room = torch.where(first, before - counts, 0).sum(1, keepdim=True)
    low, high = torch.zeros_like(room), room + 1
    for _ in range(int(room.max()).bit_length()):
        middle = (low + high) // 2
        within = limit.fits(counts + on * middle)[:, None]
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    return counts + on * low


def _draw(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=generator))
