"""Refinement: cheap local moves on a hardened schedule, accepted on the divergence that is measured.

A gradient ends in a local minimum, and at small budgets there are many. A move takes some or all of the tokens
that a schedule drops before one layer and drops them before another; the budget is filled up again in whole
tokens. Many moves race on a few questions, the same for all of them, and the winner goes on; only the last ones run
on all questions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .budget import Limit
from .config import PruningConfig
from .evaluate import Record, evaluate
from .frontier import FrontierPoint
from .teacher import Lesson

Schedule = tuple[float, ...]


class Bench:
    """Hardened schedules, measured on the calibration data, each only once; counts the forward passes.

    template: a configuration whose keep ratios will be replaced. objective: what is measured, "kl" or "task".
    """

    def __init__(self, model: nn.Module, lessons: Sequence[Lesson], template: dict, objective: str = "kl"):
        self.model, self.lessons, self.template, self.objective = model, list(lessons), template, objective
        self.samples = sum(map(len, self.lessons))
        self.records: dict[Schedule, Record] = {}
        self.passes = 0

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
        """The objective of each schedule, on all lessons, or on a part of them (numbers)."""
        return [self.loss(self._run(schedule, part)) for schedule in schedules]

    def _run(self, schedule: Schedule, part: Sequence[int] | None) -> Record:
        if part is None and schedule in self.records:
            return self.records[schedule]
        lessons = self.lessons if part is None else [self.lessons[i] for i in part]
        record = evaluate(self.model, lessons, self.config(schedule))
        self.passes += sum(map(len, lessons))
        if part is None:
            self.records[schedule] = record
        return record

    @property
    def best(self) -> Schedule:
        """The best schedule among those measured on all lessons."""
        return min(self.records, key=lambda schedule: self.loss(self.records[schedule]))


def refine(benches: Sequence[Bench], limits: Sequence[Limit], rounds: int, seed: int = 0, *, passes: float = math.inf,
           racers: int = 8, share: float = 0.125, rest: int = 2) -> None:
    """Improve on every `bench.best` by up to `rounds` of local moves within its budget.

    limits: budgets in order of size, each with a bench that has measured at least one schedule. In a round, `racers` moves
    away from a budget's schedule, and the schedules of the next smaller and the next larger budget brought onto this one,
    race with it on a `share` of the lessons, drawn anew; the best goes on. A budget where `rest` rounds have found nothing
    rests until all do. At the end the last two schedules of each are measured on all lessons.
    Costs at most `rounds * (racers + 3) * share + 2` passes over the calibration data for each budget, and in all never more
    than `passes` forward passes of one question.
    """
    generator = torch.Generator().manual_seed(seed)
    open_to = [i for i, limit in enumerate(limits) if not limit.holds([limit.tokens] * limit.layers)]
    trails, idle = [[bench.best] for bench in benches], [0] * len(benches)
    left = passes + sum(bench.passes for bench in benches) - sum(2 * bench.samples for bench in benches)
    for i in (i for _ in range(rounds) for i in open_to):
        bench, limit = benches[i], limits[i]
        if all(idle[j] >= rest for j in open_to):
            idle = [0] * len(benches)
        if idle[i] >= rest:
            continue
        part = torch.randperm(len(bench.lessons), generator=generator)[:max(1, round(share * len(bench.lessons)))].tolist()
        if sum(b.passes for b in benches) + (racers + 3) * sum(len(bench.lessons[j]) for j in part) > left:
            break
        now = trails[i][-1]
        near = [torch.tensor(trails[j][-1], dtype=torch.float64) for j in (i - 1, i + 1) if 0 <= j < len(trails)]
        near += wandered(torch.tensor(now, dtype=torch.float64), limit, racers, generator)
        fresh = dict.fromkeys(tuple(limit.harden(stretched(r, limit))) for r in near)
        fresh.pop(now, None)
        first, *others = bench.losses([now, *fresh], part)
        idle[i] += 1
        if min(others, default=first) < first:
            trails[i].append(list(fresh)[others.index(min(others))])
            idle[i] = 0
    for bench, trail in zip(benches, trails):
        if left >= 0:
            bench.losses(dict.fromkeys(trail[-2:]))


def wandered(ratios: Tensor, limit: Limit, count: int, generator: torch.Generator) -> list[Tensor]:
    """`count` schedules one or two moves away, the budget filled up after each."""
    found = []
    for _ in range(count):
        there = ratios
        for _ in range(1 + int(torch.randint(2, (), generator=generator))):
            there = stretched(moves(there, limit.first_layer, 1, generator)[0], limit)
        found.append(there)
    return found


def race(bench: Bench, schedules: Sequence[Schedule], winners: int = 1, share: float = 0.125, *,
         generator: torch.Generator) -> None:
    """Measure the few on all lessons that beat the best so far on a random part of them."""
    best = bench.best
    schedules = [schedule for schedule in dict.fromkeys(schedules) if schedule not in bench.records]
    part = torch.randperm(len(bench.lessons), generator=generator)[:max(1, round(share * len(bench.lessons)))].tolist()
    raced = dict(zip([best, *schedules], bench.losses([best, *schedules], part)))
    better = sorted((s for s in schedules if raced[s] < raced[best]), key=raced.__getitem__)
    bench.losses(better[:winners])


def stretched(ratios: Tensor, limit: Limit) -> Tensor:
    """A schedule that ends in layers without visual tokens, `r ** gamma` with the least gamma <= 1 within the budget.

    Scaling its drops, as `Limit.harden` does with what is below the budget, would bring those layers back.
    """
    if ratios[-1] > 0 or float(limit.slack(ratios)) <= 0:
        return ratios
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        grown = torch.where(ratios > 0, ratios**middle, 0)
        low, high = (low, middle) if float(limit.slack(grown)) >= 0 else (middle, high)
    return torch.where(ratios > 0, ratios**high, 0)


def moves(ratios: Tensor, first_layer: int, count: int, generator: torch.Generator) -> list[Tensor]:
    """`count` random moves: some or all of what is dropped before one layer (or never) goes to another; or a cut, where
    nothing is left from some layer on; or half of the way to a random schedule.

    >>> moves(torch.tensor([1.0, 0.5, 0.5]), 1, 1, torch.Generator().manual_seed(0))[0].tolist()
    [1.0, 0.5, 0.0]
    """
    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    levels = torch.cat([torch.ones(1, dtype=ratios.dtype), ratios[first_layer:], torch.zeros(1, dtype=ratios.dtype)])
    drops = levels[:-1] - levels[1:]  # (L - first_layer + 1,): before each layer that can be pruned, and never
    full, found = drops.nonzero()[:, 0].tolist(), []
    for _ in range(count):
        moved, kind = drops.clone(), draw(9)
        if kind < 3:
            layer = draw(len(drops))
            moved[layer], moved[layer + 1:] = drops[layer:].sum(), 0
        elif kind == 3:
            chance = torch.empty_like(drops).exponential_(generator=generator)
            moved = (drops + chance / chance.sum()) / 2
        else:
            source, target = full[draw(len(full))], draw(len(drops) - 1)
            target += target >= source
            amount = drops[source] * (1, 0.5, 0.25)[draw(3)]
            moved[source] -= amount
            moved[target] += amount
        found.append(torch.cat([torch.ones(first_layer, dtype=ratios.dtype), (1 - moved.cumsum(0)[:-1]).clamp(0, 1)]))
    return found
