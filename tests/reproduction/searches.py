"""The searches under test, each at the cost that its claim allows; results are kept in the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vispco.budget import ramp
from vispco.config import PruningConfig
from vispco.solvers.shared import amortise
from vispco.solvers.descent import search
from vispco.solvers.refine import refine
from .benchmark import Benchmark
from .paper import GRID
from .sizes import TENTHS, Setting, Size

#: The cheap frontier may cost 1 / CHEAP of a grid of GRID configurations; the refined one, at every budget, 1 / SAVING
#: of random search with RIVAL schedules; the thorough one 1 / SHARE of random search with POOL schedules.
CHEAP, SAVING, RIVAL, SHARE, POOL = 40, 10, 160, 8, 500
GRADIENT = 0.2  # share of the passes that the gradient gets; the rest is refinement's, in at most ROUNDS a budget
ROUNDS = 100


@dataclass(frozen=True)
class Found:
    """Configurations by budget, and what they cost in all, in forward passes of one question."""

    configs: dict[float, PruningConfig]
    passes: int

    @property
    def each(self) -> float:
        """Cost of one budget."""
        return self.passes / len(self.configs)


def cheap(benchmark: Benchmark, setting: Setting, size: Size, seed: int) -> Found:
    """The frontier in one amortised run of 1/40 of the grid's cost; the configurations are taken as they come out.

    At all budgets that anybody asks for: of the frontier, and of the setting.
    """
    n, batch = len(benchmark.calibration), size.batch
    budgets = benchmark.reachable(sorted({*size.frontier_budgets, *setting.budgets}))
    steps = max(1, int((GRID * n / CHEAP - n) // (3 * batch)))

    def make() -> dict:
        learned = amortise(benchmark.model, benchmark.calibration.batches, benchmark.method, steps=steps, seed=seed)
        ratios = [[b, benchmark.limit(b).harden(learned.ratios(b))] for b in budgets]
        return {"configs": ratios, "passes": learned.meta["forward_passes"]}

    return _found(benchmark, benchmark.searched("cheap", make, steps=steps, seed=seed, budgets=list(budgets)))


def refined(benchmark: Benchmark, budgets: Sequence[float], seed: int, batch: int, also: Sequence[float] = TENTHS) -> Found:
    """The frontier in one amortised run, then refined at all budgets together: at most 1/10 of random best-of-160 a budget.

    also: budgets that nobody asks for. Neighbours help each other, and each pays for itself.
    """
    return _refined(benchmark, sorted({*budgets, *also}), seed, batch, RIVAL * len(benchmark.calibration) // SAVING, GRADIENT)


def ungraded(benchmark: Benchmark, budgets: Sequence[float], seed: int, also: Sequence[float] = TENTHS) -> Found:
    """What the gradient adds, by leaving it out: refinement from a ramp (`vispco.budget.ramp`), for what `refined` may cost."""
    n, budgets = len(benchmark.calibration), benchmark.reachable(sorted({*budgets, *also}))
    allowed = RIVAL * n // SAVING * len(budgets)

    def make() -> dict:
        limits, evaluators = [benchmark.limit(b) for b in budgets], [benchmark.evaluator() for _ in budgets]
        for evaluator, limit in zip(evaluators, limits):
            evaluator.losses([tuple(limit.harden(ramp(limit)))])
        refine(evaluators, limits, ROUNDS, seed, passes=allowed - n - n * len(budgets))  # the full model's passes count, too
        return {"configs": [[b, list(evaluator.best)] for b, evaluator in zip(budgets, evaluators)],
                "passes": n + sum(evaluator.passes for evaluator in evaluators)}

    return _found(benchmark, benchmark.searched("ungraded", make, rounds=ROUNDS, allowed=allowed, seed=seed, budgets=list(budgets)))


def thorough(benchmark: Benchmark, budgets: Sequence[float], seed: int, batch: int) -> Found:
    """The same with more refinement, at the budgets asked for: at most 1/8 of 500 random configurations a budget."""
    return _refined(benchmark, budgets, seed, batch, POOL * len(benchmark.calibration) // SHARE, GRADIENT / 2)


def _refined(benchmark: Benchmark, budgets: Sequence[float], seed: int, batch: int, each: int, gradient: float) -> Found:
    n, budgets = len(benchmark.calibration), benchmark.reachable(budgets)
    allowed = each * len(budgets)
    steps = max(1, int(gradient * allowed // (3 * batch)))

    def make() -> dict:
        learned = amortise(benchmark.model, benchmark.calibration.batches, benchmark.method, steps=steps, seed=seed)
        left = allowed - learned.meta["forward_passes"] - n * len(budgets)  # every budget's start is measured once
        return _frontier(learned.frontier(budgets, refinement=ROUNDS, seed=seed, passes=left))

    return _found(benchmark, benchmark.searched("refined", make, steps=steps, rounds=ROUNDS, allowed=allowed, seed=seed,
                                        budgets=list(budgets)))


def by_kernel(benchmark: Benchmark, kernel: str, budgets: Sequence[float], seed: int, steps: int) -> Found:
    """One search per budget with the given kernel, within the schedules that it can form."""
    def make() -> dict:
        return _frontier(search(benchmark.model, benchmark.calibration.batches, benchmark.method, kernel, budgets=budgets,
                                steps=steps, seed=seed))

    return _found(benchmark, benchmark.searched("kernel", make, kernel=kernel, steps=steps, seed=seed, budgets=list(budgets)))


def by_estimator(benchmark: Benchmark, estimator: Mapping, budgets: Sequence[float], seed: int, steps: int) -> Found:
    """One search per budget with the given estimator of the gradient, and nothing after it."""
    def make() -> dict:
        return _frontier(search(benchmark.model, benchmark.calibration.batches, benchmark.method, budgets=budgets, steps=steps, seed=seed,
                                estimator=estimator, refinement=0))

    return _found(benchmark, benchmark.searched("estimator", make, estimator=dict(estimator), steps=steps, seed=seed, budgets=list(budgets)))


def history(benchmark: Benchmark, kernel: str, kind: str, budgets: Sequence[float], steps: int) -> list[dict]:
    """What the multipliers do, step by step: records of budget, step, slack, violation, multiplier, ..."""
    def make() -> list[dict]:
        records: list[dict] = []
        search(benchmark.model, benchmark.calibration.batches, benchmark.method, kernel, budgets=budgets, steps=steps, refinement=0,
               constraint={"kind": kind}, callback=records.append)
        names = ("budget", "step", "slack", "violation", "multiplier", "penalty", "gradient", "loss")
        return [{name: float(record[name]) for name in names} for record in records]

    return benchmark.searched("history", make, kernel=kernel, constraint=kind, steps=steps, budgets=list(budgets))


def _frontier(frontier) -> dict:
    return {"configs": [[p.budget, list(p.config.keep_ratios)] for p in frontier.points],
            "passes": frontier.meta["forward_passes"]}


def _found(benchmark: Benchmark, found: dict) -> Found:
    return Found({b: benchmark.config(ratios) for b, ratios in found["configs"]}, found["passes"])
