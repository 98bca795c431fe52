"""The gradient at its best chance: from the plan of a profile, it moves tokens between drops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vispco import search, testbed
from vispco.solvers.descent import Descent, Gradient, fit_budget
from vispco.solvers.profiled import Planned, Profiled

from .benchmark import Benchmark
from .searches import Found

#: Questions in a batch: the gradient does better with small batches and many steps.
BATCH = 4


@dataclass(frozen=True)
class FromPlan(Profiled):
    """A profile, its best plan of each budget, then `steps` of the gradient from there."""

    steps: int = 16

    def solver(self, problem, limits, seed):
        return PlannedDescent(self, problem, limits, seed)


class PlannedDescent(Planned):
    """Plans, then descends from the best schedule of each limit."""

    def run(self, evaluators, limits, journal):
        spent, kernel = super().run(evaluators, limits, journal), self.problem.kernel
        # One measurement of all questions, at the end.
        gradient = Gradient(steps=self.options.steps, inner=self.options.steps, learning_rate=0.1)
        descent = Descent(gradient, self.problem, limits, self.seed)
        for limit, evaluator, lagrangian in zip(
            limits, evaluators, descent.lagrangians, strict=True
        ):
            kernel.theta.data.copy_(kernel.inverse(torch.tensor(evaluator.best)))
            fit_budget(kernel, limit)
            # A backward pass counts two.
            spent += 3 * descent._descend(limit, evaluator, lagrangian)
        return spent


def from_plan(benchmark: Benchmark, budgets: Sequence[float], seed: int) -> Found:
    """About as many passes as `profile` has: the steps cost as much as its refinement."""
    count, name = len(benchmark.calibration), benchmark.name

    def make() -> dict:
        batches = testbed.batches("calibration", count, BATCH, benchmark.seed, model=name)
        how = {"start": FromPlan(), "refinement": 0, "seed": seed}
        found = search(benchmark.model, batches, benchmark.method, budgets, **how)
        configs = [[point.budget, list(point.config.keep_ratios)] for point in found.points]
        return {"configs": configs, "passes": found.meta["forward_passes"]}

    found = benchmark.searched("from plan", make, seed=seed, budgets=list(budgets))
    return Found({b: benchmark.config(own) for b, own in found["configs"]}, found["passes"])
