"""Plan: schedules of few drops that a profile likes best, for any budget, without a forward pass.

A plan is a staircase: tokens are dropped before one to a few layers, the last drop may take all.
g_k(n) is the exponential mean of the answers' losses (`vispco.profiling.average`).

1.  Dynamic programming over (layer, tokens) gives the plans of least

        sum over drops (at k, from n to n') of max(0, g_k(n') - g_k(n))   +   lambda F

    for many prices lambda of the cost F.
2.  The largest loss of a drop predicts better than the sum (`vispco.Profile.predict`), but a sum is
    what dynamic programming needs. So an evolution goes on from these plans, and from random ones:

        children   a drop moves, changes, comes, goes, or takes all; or two parents are joined
        filled     lowered until within the budget, then raised step by step until nothing fits
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..budget import Budget
from ..profiling import average, predicted

#: Most drops of a plan.
DROPS = 6
#: Plans are compared by the exponential mean of their answers' losses, with this scale in nats. It
#: ranks them better than the mean, which a few answers decide.
SCALE = 4.0
#: Plans that live at a time, and generations.
POPULATION, GENERATIONS = 48, 30


def plans(table: Tensor, limit: Budget, seed: int = 0, *, drops: int = DROPS) -> Tensor:
    """Counts (C, L) of whole tokens within the limit, of the least predicted loss first.

    table: (L, parts + 1, A) losses of one drop, see `vispco.Profile.table`. drops: the most drops
    of a plan, the last one included.
    """
    generator = torch.Generator().manual_seed(seed)
    chains = cheapest(average(table, SCALE), limit)
    chains = chains[[len(steps(row, limit.tokens)) <= drops for row in chains.tolist()]]
    drawn = random_plans(limit, POPULATION, drops, generator)
    found = fill(torch.cat([chains, single_drops(limit), drawn]), limit, generator)
    for _ in range(GENERATIONS):
        found = fittest(table, found, limit)
        children = offspring(found[:POPULATION], limit, POPULATION, drops, generator)
        found = torch.cat([found, fill(children, limit, generator)]).unique(dim=0)
    return fittest(table, found, limit)


def fittest(table: Tensor, counts: Tensor, limit: Budget) -> Tensor:
    """The plans (C, L) of least predicted loss, the first the least."""
    losses = predicted(table, counts / limit.tokens, SCALE)
    return counts[losses.argsort(stable=True)[: 2 * POPULATION]]


def cheapest(losses: Tensor, limit: Budget, prices: int = 48, levels: int = 64) -> Tensor:
    """Counts (prices, L) that minimise the sum of the drops' losses and a price of their cost.

        V_k(n) = min over m <= n of   max(0, g_k(m) - g_k(n))  +  lambda f_k(m)  +  V_{k+1}(m)

    losses: (L, parts + 1) g_k(n), n in parts of the tokens. The prices are spread evenly in their
    logarithm. n and m are among 65 numbers of tokens, if there are so many.
    """
    at = torch.linspace(0, limit.tokens, min(levels, limit.tokens) + 1).round().long()
    # f_k(m) of the largest prompt, as a share of what can be pruned: (L, levels)
    largest = int(limit.n_visual.argmax())
    ones = at[:, None].expand(-1, limit.layers)
    cost = limit.cost.layers(ones, limit.n_text[largest]).double().T
    cost = cost / float(limit.full[largest] - limit.text[largest])
    g = losses[:, (at * (losses.shape[1] - 1) / limit.tokens).round().long()].double()
    price = torch.logspace(-4, 2, prices, dtype=torch.float64)[:, None, None]
    rises = at[None, :] > at[:, None]
    value = torch.zeros(prices, len(at), dtype=torch.float64)
    chosen = []
    for k in reversed(range(limit.layers)):
        drop = (g[k][None, :] - g[k][:, None]).clamp(min=0).masked_fill(rises, torch.inf)
        if k < limit.first_layer:
            drop = torch.where(torch.eye(len(at), dtype=torch.bool), 0.0, torch.inf).double()
        value, best = (drop + price * cost[k] + value[:, None]).min(-1)
        chosen.append(best)
    place, counts = torch.full((prices, 1), len(at) - 1), []
    for best in reversed(chosen):
        place = best.gather(1, place)
        counts.append(at[place[:, 0]])
    return torch.stack(counts, 1).unique(dim=0)


def single_drops(limit: Budget) -> Tensor:
    """Every plan that drops all tokens before one layer, or all but one (C, L)."""
    layers = torch.arange(limit.layers)
    at = torch.arange(limit.first_layer, limit.layers)[:, None]
    return torch.cat([torch.where(layers < at, limit.tokens, left) for left in (0, 1)])


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
    order, is raised as far as the limit allows. From its exit on, a plan keeps nothing.
    """
    before = torch.cat([torch.full_like(counts[:, :1], limit.tokens), counts[:, :-1]], 1)
    number = (counts < before).cumsum(1)  # (C, L): the step that each layer stands on
    dropped, rises = number > 0, counts > 0

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
    counts, number = counts[kept], (number * rises)[kept]
    if not len(counts):
        return counts
    first_to_last = list(range(1, int(number.max()) + 1))
    shuffled = [first_to_last[i] for i in torch.randperm(len(first_to_last), generator=generator)]
    # A step that stopped at the one before it may rise once that one has.
    for step in shuffled + first_to_last:
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
