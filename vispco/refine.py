"""Refinement: cheap local moves on a hardened schedule, accepted on the divergence that is measured.

A gradient ends in a local minimum, and at small budgets there are many. A move takes some or all of the tokens
that a schedule drops before one layer and drops them before another; the budget is filled up again in whole
tokens. Many moves race on a few questions, the same for all of them; only the winners run on all questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .budget import Budget
from .config import PruningConfig
from .evaluate import Record, evaluate
from .frontier import FrontierPoint
from .teacher import Lesson

Schedule = tuple[float, ...]


class Bench:
    """Hardened schedules, measured on the calibration data, each only once; counts the forward passes.

    template: a configuration whose keep ratios will be replaced.
    """

    def __init__(self, model: nn.Module, lessons: Sequence[Lesson], template: dict):
        self.model, self.lessons, self.template = model, list(lessons), template
        self.records: dict[Schedule, Record] = {}
        self.passes = 0

    def config(self, schedule: Schedule) -> PruningConfig:
        """The configuration with these keep ratios."""
        return PruningConfig(keep_ratios=schedule, **self.template)

    def point(self, limit: Budget) -> FrontierPoint:
        """The best schedule as a point of the frontier."""
        record, config = self.records[self.best], self.config(self.best)
        share = limit.share(config.tokens(limit.tokens))
        return FrontierPoint(replace(config, flops=record.flops), limit.value, record.flops, share, record.kl)

    def kl(self, schedules: Iterable[Schedule], part: Sequence[int] | None = None) -> list[float]:
        """Mean KL of each schedule, on all lessons, or on a part of them (numbers)."""
        return [self._run(schedule, part).kl for schedule in schedules]

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
        """The schedule of least KL among those measured on all lessons."""
        return min(self.records, key=lambda schedule: self.records[schedule].kl)


def refine(bench: Bench, limit: Budget, rounds: int, seed: int = 0, *, racers: int = 8, winners: int = 2,
           share: float = 0.25) -> None:
    """Improve on `bench.best` by `rounds` of local moves within the budget.

    racers: moves a round. share: of the lessons, on which they race. winners: how many of them then run on all.
    Costs at most `rounds * ((racers + 1) * share + winners)` passes over the calibration data.
    """
    generator = torch.Generator().manual_seed(seed)
    size = max(1, round(share * len(bench.lessons)))
    for _ in range(rounds):
        best = bench.best
        near = list(dict.fromkeys(tuple(limit.harden(r)) for r in moves(torch.tensor(best), limit.first_layer, racers, generator)))
        near = [schedule for schedule in near if schedule not in bench.records]
        part = torch.randperm(len(bench.lessons), generator=generator)[:size].tolist()
        raced = dict(zip([best, *near], bench.kl([best, *near], part)))
        better = sorted((s for s in near if raced[s] < raced[best]), key=raced.__getitem__)
        bench.kl(better[:winners])


def moves(ratios: Tensor, first_layer: int, count: int, generator: torch.Generator) -> list[Tensor]:
    """`count` random moves: some or all of what is dropped before one layer (or never) goes to another; or a cut, where
    nothing is left from some layer on.

    >>> [r.tolist() for r in moves(torch.tensor([1.0, 0.5]), 1, 2, torch.Generator().manual_seed(0))]
    [[1.0, 0.0], [1.0, 0.25]]
    """
    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    levels = torch.cat([torch.ones(1, dtype=ratios.dtype), ratios[first_layer:], torch.zeros(1, dtype=ratios.dtype)])
    drops = levels[:-1] - levels[1:]  # (L - first_layer + 1,): before each layer that can be pruned, and never
    full, found = drops.nonzero()[:, 0].tolist(), []
    for _ in range(count):
        moved = drops.clone()
        if draw(3) == 0:
            layer = draw(len(drops))
            moved[layer], moved[layer + 1:] = drops[layer:].sum(), 0
        else:
            source, target = full[draw(len(full))], draw(len(drops) - 1)
            target += target >= source
            amount = drops[source] * (1, 0.5, 0.25)[draw(3)]
            moved[source] -= amount
            moved[target] += amount
        found.append(torch.cat([torch.ones(first_layer, dtype=ratios.dtype), (1 - moved.cumsum(0)[:-1]).clamp(0, 1)]))
    return found
