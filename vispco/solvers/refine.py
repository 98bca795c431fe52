"""Refinement: schedules that a surrogate of the loss expects to be better, measured one after the other.

A gradient ends in a local minimum, and at small budgets there are many. What has been measured so far, at all budgets,
makes a Gaussian process (`vispco.solvers.surrogate`); of many schedules near the best ones, and some from anywhere, the one whose
loss it expects to improve most is measured next, on all calibration data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..budget import Limit
from ..config import PruningConfig
from ..utils.distributed import count
from ..evaluate import Record, evaluate
from ..frontier import FrontierPoint
from ..calibration import PreparedBatch, during
from ..utils.journal import Journal
from .surrogate import Surrogate

Schedule = tuple[float, ...]


class Evaluator:
    """Hardened schedules, measured on the calibration data, each only once; counts the forward passes.

    template: a configuration whose keep ratios will be replaced. objective: what is measured, "kl" or "task". journal: where
    measurements are kept.
    """

    def __init__(self, model: nn.Module, prepared: Sequence[PreparedBatch], template: dict, objective: str = "kl",
                 journal: Journal | None = None):
        self.model, self.prepared, self.template, self.objective = model, list(prepared), template, objective
        self.samples = count(sum(map(len, self.prepared)))
        self.records: dict[Schedule, Record] = {}
        self.passes, self.journal = 0, journal or Journal()

    def config(self, schedule: Schedule) -> PruningConfig:
        """The configuration with these keep ratios."""
        return PruningConfig(keep_ratios=schedule, **self.template)

    def point(self, limit: Limit) -> FrontierPoint:
        """The best schedule as a point of the frontier."""
        record, config = self.records[self.best], self.config(self.best)
        share = limit.share(config.tokens(limit.tokens))
        return FrontierPoint(replace(config, flops=record.flops), limit.value, record.flops, share, self.loss(record))

    def loss(self, record: Record) -> float:
        """The objective's value."""
        return record.kl if self.objective == "kl" else record.task_loss

    def losses(self, schedules: Iterable[Schedule], part: Sequence[int] | None = None) -> list[float]:
        """The objective of each schedule, on all prepared, or on a part of them (numbers)."""
        return [self.loss(self._run(schedule, part)) for schedule in schedules]

    def _run(self, schedule: Schedule, part: Sequence[int] | None) -> Record:
        if part is None and schedule in self.records:
            return self.records[schedule]
        prepared = self.prepared if part is None else [self.prepared[i] for i in part]
        with during(f"budget {self.template.get('budget')!r}, keep ratios {[round(r, 4) for r in schedule]}"):
            found = self.journal.recall({"schedule": schedule, "prepared": part or "all", "budget": self.template.get("budget")},
                                        lambda: _written(evaluate(self.model, prepared, self.config(schedule))))
            record = Record(**{**found, "correct": torch.tensor(found["correct"], dtype=torch.bool)})
        self.passes += count(sum(map(len, prepared)))
        if part is None:
            self.records[schedule] = record
        return record

    @property
    def ranking(self) -> list[Schedule]:
        """The schedules measured on all prepared, best first."""
        return sorted(self.records, key=lambda schedule: self.loss(self.records[schedule]))

    @property
    def best(self) -> Schedule:
        """The best schedule among those measured on all prepared."""
        return self.ranking[0]


def _written(record: Record) -> dict:
    return {**record.to_dict(), "correct": record.correct.int().tolist()}


def refine(evaluators: Sequence[Evaluator], limits: Sequence[Limit], rounds: int, seed: int = 0, *, passes: float = math.inf,
           propose: Callable[[int, torch.Generator], Tensor] | None = None, callback: Callable[[dict], Any] | None = None) -> None:
    """Improve on every `evaluator.best` within its budget, by up to `rounds` more schedules per budget in all.

    limits: budgets in order of size, each with a evaluator that has measured at least one schedule. What is measured next is
    the schedule of the largest expected improvement at the budgets where that is largest; so budgets where nothing is to be
    gained leave their share of the rounds to the others.
    propose: what may be measured, candidates(i, generator) -> schedules (C, L) for budget i; None: `nearby`.
    callback: called with a dict after every schedule (budget, schedule, loss, best).
    Costs at most `rounds` passes over the calibration data for each budget, and never more than `passes` forward passes of
    one question.
    """
    generator = torch.Generator().manual_seed(seed)
    propose = propose or (lambda i, generator: nearby(evaluators, limits, i, generator))
    open_to = [i for i, limit in enumerate(limits) if not limit.holds([limit.tokens] * limit.layers)]
    end = sum(evaluator.passes for evaluator in evaluators) + min(passes, rounds * sum(evaluators[i].samples for i in open_to))
    tried = [0] * len(limits)
    while open_to:
        known = [(schedule, evaluator.loss(record)) for evaluator in evaluators for schedule, record in evaluator.records.items()]
        surrogate = Surrogate(torch.tensor([schedule for schedule, _ in known]), [loss for _, loss in known])
        wanted = []
        for i in open_to:
            gain, schedule = _most_promising(propose(i, generator), evaluators[i], limits[i], surrogate)
            if schedule is not None:
                wanted.append((gain, -i, schedule))
        wanted = sorted(wanted, reverse=True)[:math.ceil(len(open_to) / 2)]
        for _, i, schedule in wanted:
            if sum(evaluator.passes for evaluator in evaluators) + evaluators[-i].samples > end:
                return
            loss, = evaluators[-i].losses([schedule])
            if callback:
                tried[-i] += 1
                callback({"budget": limits[-i].value, "schedule": tried[-i], "loss": loss,
                          "best": evaluators[-i].loss(evaluators[-i].records[evaluators[-i].best])})
        if not wanted:
            return


def _most_promising(candidates: Tensor, evaluator: Evaluator, limit: Limit, surrogate: Surrogate) -> tuple[float, Schedule | None]:
    """(expected improvement, schedule in whole tokens) of the best candidate that has not been measured yet."""
    candidates = (candidates * limit.tokens).round().unique(dim=0) / limit.tokens
    gains = surrogate.expected_improvement(candidates, evaluator.loss(evaluator.records[evaluator.best]))
    for i in gains.argsort(descending=True, stable=True).tolist():
        if tuple(candidates[i].tolist()) not in evaluator.records:
            schedule = tuple(limit.harden(candidates[i]))
            if schedule not in evaluator.records:
                return float(gains[i]), schedule
    return 0.0, None


def nearby(evaluators: Sequence[Evaluator], limits: Sequence[Limit], i: int, generator: torch.Generator, count: int = 64) -> Tensor:
    """Schedules (C, L) on budget i: one or two `moves` from its best and its neighbours' best, mixtures, and random ones."""
    limit = limits[i]
    best = [s for j in (i, i - 1, i + 1) if 0 <= j < len(evaluators) for s in evaluators[j].ranking[:4]]
    near = torch.tensor(best, dtype=torch.float64)
    once = moves(near[torch.randint(len(near), (count,), generator=generator)], limit.first_layer, generator)
    found = torch.cat([near, once, moves(once, limit.first_layer, generator), random_ratios(limit, count, generator)])
    weight = torch.rand(len(found), 1, generator=generator, dtype=torch.float64)
    found = torch.cat([found, weight * found + (1 - weight) * found[torch.randperm(len(found), generator=generator)]])
    return fitted(found, limit)


def random_ratios(limit: Limit, count: int, generator: torch.Generator) -> Tensor:
    """(count, L) schedules of any cost, from drops at few layers to drops at all: powers of uniform ones on the simplex."""
    drops = torch.empty(count, limit.layers - limit.first_layer + 1, dtype=torch.float64).exponential_(generator=generator)
    drops = drops ** (1 + 3 * torch.rand(count, 1, generator=generator, dtype=torch.float64))
    return from_drops(drops / drops.sum(1, keepdim=True), limit.first_layer)


def fitted(ratios: Tensor, limit: Limit, *, hold_cuts: bool = True, lower: bool = True) -> Tensor:
    """Schedules (C, L) brought onto the budget; those that exceed it all the same are left out.

    All drops are scaled by one factor. But scaled down, they would bring back the layers from which a schedule has nothing
    left: with `hold_cuts`, such a schedule grows as `r ** gamma`. And scaled up, they let the steepest one take everything:
    with `lower`, schedules above the budget come a second time, with their ratios scaled down instead.
    """
    over = (limit.slack(ratios) < 0)[:, None]
    cut = (ratios[:, -1:] <= 0) & hold_cuts
    prunable = torch.arange(limit.layers) >= limit.first_layer

    def drops(s: Tensor) -> Tensor:  # each of these grows with s in [0, 1]
        kept = torch.where(cut, torch.where(ratios > 0, ratios ** (1 - s), 0), 1 - (1 - s) * (1 - ratios))
        return torch.where(over, (1 - (1 - ratios) / s.clamp(min=1e-9)).clamp(min=0), kept)

    def lowered(s: Tensor) -> Tensor:
        return torch.where(prunable, s * ratios, ratios)

    def highest(path: Callable[[Tensor], Tensor]) -> Tensor:
        least, most = torch.zeros(len(ratios), 1, dtype=torch.float64), torch.ones(len(ratios), 1, dtype=torch.float64)
        for _ in range(25):
            middle = (least + most) / 2
            fits = limit.slack(path(middle))[:, None] >= 0
            least, most = torch.where(fits, middle, least), torch.where(fits, most, middle)
        return path(least)

    found = torch.cat([highest(drops), highest(lowered)[over[:, 0]]]) if lower else highest(drops)
    return found[limit.slack(found) >= 0]


def moves(ratios: Tensor, first_layer: int, generator: torch.Generator) -> Tensor:
    """One random move away from each schedule (C, L): all, a half or a quarter of what is dropped before one layer (or
    never) goes to another; or, in one of three, a cut: nothing is left from some layer on.

    >>> moves(torch.tensor([[1.0, 0.5, 0.5]]), 1, torch.Generator().manual_seed(0)).tolist()
    [[1.0, 0.5, 0.0]]
    """
    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    levels = pad(pad(ratios[:, first_layer:], (1, 0), value=1.0), (0, 1))
    found = levels[:, :-1] - levels[:, 1:]  # (C, L - first_layer + 1): drops before each layer that can be pruned, and never
    for drops in found:
        if draw(3) == 0:
            layer = draw(len(drops))
            drops[layer], drops[layer + 1:] = drops[layer:].sum(), 0
        else:
            full = drops.nonzero()[:, 0].tolist()
            source, target = full[draw(len(full))], draw(len(drops) - 1)
            target += target >= source
            amount = drops[source] * (1, 0.5, 0.25)[draw(3)]
            drops[source] -= amount
            drops[target] += amount
    return from_drops(found, first_layer)


def from_drops(drops: Tensor, first_layer: int) -> Tensor:
    """Schedules (..., L) from the drops (..., L - first_layer + 1) before each layer that can be pruned, and never."""
    return pad((1 - drops.cumsum(-1)[..., :-1]).clamp(0, 1), (first_layer, 0), value=1.0)
