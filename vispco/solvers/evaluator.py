"""Schedules measured on the calibration data, each only once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..budget import Budget
from ..calibration import PreparedBatch, during
from ..config import PruningConfig
from ..evaluate import Record, evaluate
from ..frontier import FrontierPoint
from ..utils.distributed import total
from ..utils.journal import Journal

Schedule = tuple[float, ...]


class Evaluator:
    """Measures hardened schedules of one budget, and counts the forward passes.

    prepared: the calibration data, from `vispco.calibration.prepare`. template: the fields of a
    `PruningConfig` without its keep ratios. objective: what is measured, "kl" or "task". journal:
    where measurements are kept; None: nowhere.
    records: {schedule: what all of the calibration data gave}. passes: forward passes of one
    question so far.
    """

    def __init__(
        self,
        model: nn.Module,
        prepared: Sequence[PreparedBatch],
        template: dict,
        objective: str = "kl",
        journal: Journal | None = None,
    ):
        self.model, self.prepared = model, list(prepared)
        self.template, self.objective = template, objective
        self.journal = journal or Journal()
        self.samples = total(sum(map(len, self.prepared)))
        self.records: dict[Schedule, Record] = {}
        self.passes = 0
        # `method` and `method_options` of a schedule, where they depend on it.
        self.ranked_by: Callable[[Schedule], dict] = lambda schedule: {}

    def config(self, schedule: Schedule) -> PruningConfig:
        """The configuration with these keep ratios."""
        return PruningConfig(keep_ratios=schedule, **{**self.template, **self.ranked_by(schedule)})

    def point(self, limit: Budget) -> FrontierPoint:
        """The best schedule as a point of the frontier, within `limit`."""
        record = self.records[self.best]
        config = replace(self.config(self.best), flops=record.flops)
        share = limit.share(config.tokens(limit.tokens))
        return FrontierPoint(config, limit.value, record.flops, share, self.loss(record))

    def loss(self, record: Record) -> float:
        """The objective's value in a record, in nats."""
        return record.kl if self.objective == "kl" else record.task_loss

    def losses(
        self, schedules: Iterable[Schedule], part: Sequence[int] | None = None
    ) -> list[float]:
        """The objective of each schedule, on all batches, or on those with the numbers `part`."""
        return [self.loss(self._run(schedule, part)) for schedule in schedules]

    def _run(self, schedule: Schedule, part: Sequence[int] | None) -> Record:
        if part is None and schedule in self.records:
            return self.records[schedule]
        batches = self.prepared if part is None else [self.prepared[i] for i in part]
        budget = self.template.get("budget")
        asked = {"schedule": schedule, "batches": part or "all", "budget": budget}
        asked |= self.ranked_by(schedule)
        with during(f"budget {budget!r}, keep ratios {[round(r, 4) for r in schedule]}"):
            found = self.journal.recall(asked, lambda: self._measure(schedule, batches))
        record = Record(**{**found, "correct": torch.tensor(found["correct"], dtype=torch.bool)})
        self.passes += total(sum(map(len, batches)))
        if part is None:
            self.records[schedule] = record
        return record

    def _measure(self, schedule: Schedule, batches: list[PreparedBatch]) -> dict:
        record = evaluate(self.model, batches, self.config(schedule))
        return {**record.to_dict(), "correct": record.correct.int().tolist()}

    @property
    def ranking(self) -> list[Schedule]:
        """The schedules measured on all batches, best first."""
        return sorted(self.records, key=lambda schedule: self.loss(self.records[schedule]))

    @property
    def best(self) -> Schedule:
        """The best schedule measured on all batches."""
        return self.ranking[0]

    @property
    def best_loss(self) -> float:
        """The objective of the best schedule, in nats."""
        return self.loss(self.records[self.best])
