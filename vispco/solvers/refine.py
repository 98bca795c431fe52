"""Refinement: measure the schedules that a surrogate of the loss expects to be better.

A gradient ends in a local minimum, and at small budgets there are many. All that has been measured
so far, at all budgets, makes a Gaussian process (`vispco.solvers.surrogate`). Candidates are
schedules near the best ones, and some from anywhere. The candidate whose loss the process expects
to improve most is measured next, on all calibration data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..budget import Budget
from ..schedule import fit, from_drops, to_drops
from .evaluator import Evaluator, Schedule
from .surrogate import Prior, Surrogate

#: candidates(i, generator) -> schedules (C, L) that may be measured for budget i.
Propose = Callable[[int, torch.Generator], Tensor]
#: harden(i, ratios (L,)) -> the same on the limit of budget i, in whole tokens.
Harden = Callable[[int, Tensor], list[float]]


def refine(
    evaluators: Sequence[Evaluator],
    limits: Sequence[Budget],
    rounds: int,
    seed: int = 0,
    *,
    passes: float = math.inf,
    propose: Propose | None = None,
    harden: Harden | None = None,
    prior: Prior | None = None,
    callback: Callable[[dict], Any] | None = None,
) -> None:
    """Improve on the best schedule of every budget, by up to `rounds` more schedules per budget.

    limits: budgets in order of size. Each has an evaluator that has measured at least one schedule.
    In each round, the budgets with the largest expected improvements measure their most promising
    schedule. So budgets where nothing is to be gained leave their share of the rounds to the
    others.
    propose: what may be measured; None: `nearby` schedules. harden: how it is brought onto its
    limit in whole tokens; None: `Budget.harden`. prior: what is known of its losses.
    callback: called with a dict after every schedule (budget, schedule, loss, best).
    Costs at most `rounds` passes over the calibration data for each budget, and at most `passes`
    forward passes of one question in all.
    """
    generator = torch.Generator().manual_seed(seed)
    propose = propose or (lambda i, generator: nearby(evaluators, limits, i, generator))
    harden = harden or (lambda i, ratios: limits[i].harden(ratios))
    unsolved = [i for i, limit in enumerate(limits) if not limit.holds(limit.everything)]
    allowed = min(passes, rounds * sum(evaluators[i].samples for i in unsolved))
    most_passes = _spent(evaluators) + allowed
    tried = [0] * len(limits)
    share(evaluators, limits)
    while unsolved:
        surrogate = _fitted(evaluators, prior)
        promising = []
        for i in unsolved:
            candidates = (propose(i, generator) * limits[i].tokens).round() / limits[i].tokens
            own = partial(harden, i)
            gain, schedule = _most_promising(candidates, evaluators[i], own, surrogate)
            if schedule is not None:
                promising.append((gain, i, schedule))
        if not promising:
            return
        promising.sort(key=lambda candidate: (-candidate[0], candidate[1]))
        for _, i, schedule in promising[: math.ceil(len(unsolved) / 2)]:
            evaluator = evaluators[i]
            if _spent(evaluators) + evaluator.samples > most_passes:
                return
            (loss,) = evaluator.losses([schedule])
            share(evaluators, limits)
            tried[i] += 1
            if callback:
                best = evaluator.best_loss
                callback(
                    {"budget": limits[i].value, "schedule": tried[i], "loss": loss, "best": best}
                )


def share(evaluators: Sequence[Evaluator], limits: Sequence[Budget]) -> None:
    """Let each budget know the best schedule of the others that is within it: this costs nothing.

    So a larger budget is never worse off than a smaller one.
    """
    best = [(evaluator.best_loss, evaluator.best, evaluator) for evaluator in evaluators]
    for loss, schedule, owner in best:
        for evaluator, limit in zip(evaluators, limits, strict=True):
            counts = [round(ratio * limit.tokens) for ratio in schedule]
            if loss < evaluator.best_loss and limit.holds(counts):
                evaluator.records[schedule] = owner.records[schedule]


def _spent(evaluators: Sequence[Evaluator]) -> int:
    return sum(evaluator.passes for evaluator in evaluators)


def _fitted(evaluators: Sequence[Evaluator], prior: Prior | None) -> Surrogate:
    """The surrogate of all measurements at all budgets."""
    losses: dict[Schedule, float] = {}
    for evaluator in evaluators:
        losses |= {schedule: evaluator.loss(own) for schedule, own in evaluator.records.items()}
    return Surrogate(torch.tensor(list(losses)), list(losses.values()), prior)


def _most_promising(
    candidates: Tensor, evaluator: Evaluator, harden: Callable, surrogate: Surrogate
) -> tuple[float, Schedule | None]:
    """(expected improvement, schedule in whole tokens) of the best new candidate."""
    candidates = candidates.unique(dim=0)
    gains = surrogate.expected_improvement(candidates, evaluator.best_loss)
    for i in gains.argsort(descending=True, stable=True).tolist():
        if tuple(candidates[i].tolist()) not in evaluator.records:
            schedule = tuple(harden(candidates[i]))
            if schedule not in evaluator.records:
                return float(gains[i]), schedule
    return 0.0, None


def nearby(
    evaluators: Sequence[Evaluator],
    limits: Sequence[Budget],
    i: int,
    generator: torch.Generator,
    count: int = 64,
) -> Tensor:
    """Candidates (C, L) on budget i: near the best schedules, mixtures of these, and random ones.

    The best schedules are those of budget i and of the next smaller and larger budget.
    """
    limit = limits[i]
    neighbours = [j for j in (i, i - 1, i + 1) if 0 <= j < len(evaluators)]
    best = [schedule for j in neighbours for schedule in evaluators[j].ranking[:4]]
    near = torch.tensor(best, dtype=torch.float64)
    drawn = near[torch.randint(len(near), (count,), generator=generator)]
    once = moves(drawn, limit.first_layer, generator)
    twice = moves(once, limit.first_layer, generator)
    found = torch.cat([near, once, twice, random_ratios(limit, count, generator)])
    weight = torch.rand(len(found), 1, generator=generator, dtype=torch.float64)
    other = found[torch.randperm(len(found), generator=generator)]
    mixed = weight * found + (1 - weight) * other
    return fit(torch.cat([found, mixed]), limit)


def random_ratios(limit: Budget, count: int, generator: torch.Generator) -> Tensor:
    """Random schedules (count, L) of any cost, from drops at few layers to drops at all layers.

    The drops are powers of uniform ones on the simplex.
    """
    drops = torch.empty(count, limit.layers - limit.first_layer + 1, dtype=torch.float64)
    drops.exponential_(generator=generator)
    drops = drops ** (1 + 3 * torch.rand(count, 1, generator=generator, dtype=torch.float64))
    return from_drops(drops / drops.sum(1, keepdim=True), limit.first_layer)


def moves(ratios: Tensor, first_layer: int, generator: torch.Generator) -> Tensor:
    """One random move away from each schedule (C, L).

    All, a half or a quarter of what is dropped before one layer (or never) goes to another layer.
    Or, in one of three, a cut:
    nothing is left from some layer on.

    >>> moves(torch.tensor([[1.0, 0.5, 0.5]]), 1, torch.Generator().manual_seed(0)).tolist()
    [[1.0, 0.5, 0.0]]
    """

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    found = to_drops(ratios, first_layer)
    for drops in found:
        if draw(3) == 0:
            layer = draw(len(drops))
            drops[layer] = drops[layer:].sum()
            drops[layer + 1 :] = 0
        else:
            full = drops.nonzero()[:, 0].tolist()
            source = full[draw(len(full))]
            target = draw(len(drops) - 1)
            if target >= source:
                target += 1
            amount = drops[source] * (1, 0.5, 0.25)[draw(3)]
            drops[source] -= amount
            drops[target] += amount
    return from_drops(found, first_layer)
