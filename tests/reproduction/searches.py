"""The searches under test, each at the cost that its claim allows. Results are in the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from vispco import Frontier, search
from vispco.config import PruningConfig
from vispco.utils.digest import key

from .benchmark import Benchmark
from .cache import SEARCHING, code
from .paper import GRID
from .sizes import TENTHS, Setting, Size

#: The cheap frontier may cost 1 / CHEAP of a grid of GRID configurations.
CHEAP = 40
#: The refined one may cost, at every budget, 1 / SAVING of random search with RIVAL schedules.
SAVING, RIVAL = 10, 160
#: The thorough one may cost, at every budget, 1 / SHARE of random search with POOL schedules.
SHARE, POOL = 8, 500
#: Share of the passes that the gradient gets; the rest is refinement's, ROUNDS a budget at most.
GRADIENT = 0.2
ROUNDS = 100
#: What `history` keeps of each step.
RECORDED = ("budget", "step", "slack", "violation", "multiplier", "penalty", "gradient", "loss")


@dataclass(frozen=True)
class Found:
    """Configurations by budget, and what they cost in all, in forward passes of one question.

    shares: by budget, of the prunable cost, where the search said them.
    """

    configs: dict[float, PruningConfig]
    passes: int
    shares: dict[float, float] = field(default_factory=dict)

    @property
    def each(self) -> float:
        """Cost of one budget."""
        return self.passes / len(self.configs)


def cheap(benchmark: Benchmark, setting: Setting, size: Size, seed: int) -> Found:
    """The frontier in one shared run of 1/40 of the grid's cost, as it comes out, unmeasured.

    It has all budgets that anybody asks for: the frontier's, and the setting's.
    """
    n = len(benchmark.calibration)
    budgets = benchmark.reachable(sorted({*size.frontier_budgets, *setting.budgets}))
    steps = max(1, int((GRID * n / CHEAP - n) // (3 * size.batch)))

    def make() -> dict:
        shared = _shared(benchmark, steps, seed)
        hardened = [[b, benchmark.limit(b).harden(shared.ratios(b))] for b in budgets]
        return {"configs": hardened, "passes": shared.meta["forward_passes"]}

    return _found(benchmark, "cheap", make, steps=steps, seed=seed, budgets=budgets)


def refined(
    benchmark: Benchmark,
    budgets: Sequence[float],
    seed: int,
    batch: int,
    also: Sequence[float] = TENTHS,
) -> Found:
    """A shared run, then refinement at all budgets together.

    It costs at most 1/10 of random best-of-160 a budget. also: budgets that nobody asks for;
    neighbours help each other, and each pays for itself.
    """
    each = RIVAL * len(benchmark.calibration) // SAVING
    return _refined(benchmark, sorted({*budgets, *also}), seed, batch, each, GRADIENT)


def thorough(benchmark: Benchmark, budgets: Sequence[float], seed: int, batch: int) -> Found:
    """The same as `refined` with more refinement, at the budgets asked for alone.

    It costs at most 1/8 of 500 random configurations a budget.
    """
    each = POOL * len(benchmark.calibration) // SHARE
    return _refined(benchmark, budgets, seed, batch, each, GRADIENT / 2)


def ungraded(
    benchmark: Benchmark, budgets: Sequence[float], seed: int, also: Sequence[float] = TENTHS
) -> Found:
    """Refinement from a ramp, without a gradient, at the cost of `refined`."""
    n = len(benchmark.calibration)
    budgets = benchmark.reachable(sorted({*budgets, *also}))
    allowed = RIVAL * n // SAVING * len(budgets)
    # The full model is measured, and the ramp of every budget.
    left = {"rounds": ROUNDS, "passes": allowed - n - n * len(budgets)}

    def make() -> dict:
        return _points(_search(benchmark, budgets, "ramp", seed, refinement=left))

    options = {"rounds": ROUNDS, "allowed": allowed, "seed": seed, "budgets": budgets}
    return _found(benchmark, "ungraded", make, **options)


def _refined(
    benchmark: Benchmark,
    budgets: Sequence[float],
    seed: int,
    batch: int,
    each: int,
    gradient: float,
) -> Found:
    """A shared run, then refinement.

    each: forward passes that one budget may cost. gradient: share of these for the shared run.
    """
    n = len(benchmark.calibration)
    budgets = benchmark.reachable(budgets)
    allowed = each * len(budgets)
    steps = max(1, int(gradient * allowed // (3 * batch)))

    def make() -> dict:
        shared = _shared(benchmark, steps, seed)
        # The start of every budget is measured, too.
        left = allowed - shared.meta["forward_passes"] - n * len(budgets)
        return _points(shared.frontier(budgets, {"rounds": ROUNDS, "passes": left}, seed))

    options = {"steps": steps, "rounds": ROUNDS, "allowed": allowed, "seed": seed}
    return _found(benchmark, "refined", make, budgets=budgets, **options)


def by_start(
    benchmark: Benchmark, start: Mapping, budgets: Sequence[float], seed: int, refinement: int
) -> Found:
    """A search from a start, and refinement. Killed, it goes on where it was.

    Its journal is beside the cache until it ends.
    """
    options = {"start": dict(start), "refinement": refinement, "seed": seed}
    options["budgets"] = list(budgets)

    def make() -> dict:
        of = {"code": code(SEARCHING), "model": benchmark.digest, "method": benchmark.method}
        of |= {"data": benchmark.calibration.digest, "threads": torch.get_num_threads()}
        journal = benchmark.cache.folder / f"{key(**of, **options)}.journal"
        how = {"refinement": refinement, "options": {"journal": journal}}
        found = _points(_search(benchmark, budgets, start, seed, **how))
        journal.unlink()
        return found

    return _found(benchmark, "start", make, **options)


def by_methods(
    benchmark: Benchmark, method: str, budgets: Sequence[float], seed: int, refinement: int
) -> Found:
    """A search with one method or "auto", planned from a profile."""

    def make() -> dict:
        batches, how = benchmark.calibration.batches, {"refinement": refinement, "seed": seed}
        found = search(benchmark.model, batches, method, budgets, start="profile", **how)
        points = [[point.budget, point.share, point.config.to_dict()] for point in found.points]
        return {"points": points, "passes": found.meta["forward_passes"]}

    options = {"methods": method, "seed": seed, "budgets": list(budgets)}
    made = benchmark.searched("methods", make, **options, refinement=refinement)
    configs = {budget: PruningConfig.from_dict(config) for budget, _, config in made["points"]}
    return Found(configs, made["passes"], {budget: share for budget, share, _ in made["points"]})


def by_kernel(
    benchmark: Benchmark, kernel: str, budgets: Sequence[float], seed: int, steps: int
) -> Found:
    """A search per budget with the given kernel, within the schedules that it can form."""
    start = {"name": "gradient", "steps": steps}

    def make() -> dict:
        return _points(_search(benchmark, budgets, start, seed, kernel=kernel))

    options = {"kernel": kernel, "steps": steps, "seed": seed, "budgets": list(budgets)}
    return _found(benchmark, "kernel", make, **options)


def by_estimator(
    benchmark: Benchmark, estimator: Mapping, budgets: Sequence[float], seed: int, steps: int
) -> Found:
    """A search per budget with the given estimator of the gradient, and nothing after it."""
    start = {"name": "gradient", "steps": steps, "estimator": estimator}

    def make() -> dict:
        return _points(_search(benchmark, budgets, start, seed, refinement=0))

    options = {"estimator": dict(estimator), "steps": steps, "seed": seed}
    return _found(benchmark, "estimator", make, budgets=list(budgets), **options)


def history(
    benchmark: Benchmark, kernel: str, kind: str, budgets: Sequence[float], steps: int
) -> list[dict]:
    """What the multipliers do, step by step: records of budget, step, slack, violation, ..."""
    start = {"name": "gradient", "steps": steps, "constraint": {"kind": kind}}

    def make() -> list[dict]:
        records: list[dict] = []
        options = {"kernel": kernel, "refinement": 0, "callback": records.append}
        _search(benchmark, budgets, start, 0, **options)
        return [{name: float(record[name]) for name in RECORDED} for record in records]

    options = {"kernel": kernel, "constraint": kind, "steps": steps, "budgets": list(budgets)}
    return benchmark.searched("history", make, **options)


def _search(
    benchmark: Benchmark, budgets: Sequence[float], start: str | Mapping, seed: int, **options
) -> Frontier:
    """`vispco.search` with the benchmark's model, method and calibration questions."""
    batches = benchmark.calibration.batches
    return search(
        benchmark.model, batches, benchmark.method, budgets, start=start, seed=seed, **options
    )


def _shared(benchmark: Benchmark, steps: int, seed: int):
    """A predictor for all budgets, with no budget asked for yet."""
    start = {"name": "shared", "steps": steps}
    return _search(benchmark, (), start, seed, refinement=0)


def _points(frontier: Frontier) -> dict:
    """A frontier's configurations and cost, JSON-ready."""
    configs = [[point.budget, list(point.config.keep_ratios)] for point in frontier.points]
    return {"configs": configs, "passes": frontier.meta["forward_passes"]}


def _found(benchmark: Benchmark, what: str, make: Callable[[], dict], **options) -> Found:
    """A search's result, from the cache if it is there."""
    found = benchmark.searched(what, make, **options)
    configs = {budget: benchmark.config(ratios) for budget, ratios in found["configs"]}
    return Found(configs, found["passes"])
