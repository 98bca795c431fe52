"""The searches under test, each at the cost that its claim allows. Results are in the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from vispco import Frontier, search
from vispco.config import PruningConfig
from vispco.profiling import Profile, profile
from vispco.solvers.plan import plans
from vispco.solvers.profiled import PARTS, drawn
from vispco.utils.digest import key

from .benchmark import Benchmark
from .cache import SEARCHING, code
from .paper import GRID
from .sizes import Setting, Size

#: The cheap frontier may cost 1 / CHEAP of a grid of GRID configurations.
CHEAP = 40
#: The refined one may cost, at every budget, 1 / SAVING of random search with RIVAL schedules.
SAVING, RIVAL = 10, 160
#: Questions of its profile, at most; and schedules that it measures on these at each budget before
#: the refinement, at most.
PROFILED, COMPARED = 32, 6
#: The thorough one may cost, at every budget, 1 / SHARE of random search with POOL schedules.
SHARE, POOL = 8, 500
#: Share of the passes that the paper's predictor gets; the rest is refinement's, ROUNDS a budget at
#: most.
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
    """The frontier planned from a profile of 1/40 of the grid's cost, as it comes out, unmeasured.

    It has all budgets that anybody asks for: the frontier's, and the setting's.
    """
    questions = _affordable(benchmark, GRID * len(benchmark.calibration) // CHEAP)
    budgets = _all_budgets(benchmark, setting, size)

    def make() -> dict:
        found, planned = _profiled(benchmark, questions, seed), []
        table = found.table(min(benchmark.tokens, PARTS))
        for budget in budgets:
            counts = plans(table, benchmark.limit(budget), seed)[0]
            planned.append([budget, (counts / benchmark.tokens).tolist()])
        return {"configs": planned, "passes": found.forward_passes}

    return _found(benchmark, "cheap", make, questions=questions, seed=seed, budgets=budgets)


def cheap_predictor(benchmark: Benchmark, setting: Setting, size: Size, seed: int) -> Found:
    """The paper's predictor at the cost of `cheap`: one run of gradient steps for all budgets."""
    n = len(benchmark.calibration)
    budgets = _all_budgets(benchmark, setting, size)
    steps = max(1, int((GRID * n / CHEAP - n) // (3 * size.batch)))

    def make() -> dict:
        shared = _shared(benchmark, steps, seed)
        hardened = [[b, benchmark.limit(b).harden(shared.ratios(b))] for b in budgets]
        return {"configs": hardened, "passes": shared.meta["forward_passes"]}

    return _found(benchmark, "cheap predictor", make, steps=steps, seed=seed, budgets=budgets)


def _all_budgets(benchmark: Benchmark, setting: Setting, size: Size) -> list[float]:
    return benchmark.reachable(sorted({*size.frontier_budgets, *setting.budgets}))


def refined(benchmark: Benchmark, budgets: Sequence[float], seed: int) -> Found:
    """The library's default search: profile, plan, refine.

    It costs at most 1/10 of random best-of-160 a budget.
    """
    n, budgets = len(benchmark.calibration), benchmark.reachable(budgets)
    allowed = _allowed(benchmark, budgets)
    questions = min(PROFILED, _affordable(benchmark, allowed // 2))

    def make() -> dict:
        found = _profiled(benchmark, questions, seed)
        # The full model is measured again; at every budget a plan, its best exit and the ramp.
        begin = 3 * n + COMPARED * questions
        left = allowed - found.forward_passes - n - begin * len(budgets)
        start = {"name": "profile", "profile": found}
        how = {"refinement": {"rounds": ROUNDS, "passes": max(0, left)}}
        points = _points(_search(benchmark, budgets, start, seed, **how))
        return {**points, "passes": points["passes"] + found.forward_passes}

    options = {"rounds": ROUNDS, "allowed": allowed, "questions": questions, "seed": seed}
    options["budgets"] = budgets
    return _found(benchmark, "refined", make, **options)


def predictor(benchmark: Benchmark, budgets: Sequence[float], seed: int, batch: int) -> Found:
    """The paper's predictor for all budgets, then refinement, at the cost of `refined`."""
    allowed = _allowed(benchmark, benchmark.reachable(budgets))
    return _predicted(benchmark, budgets, seed, batch, allowed, GRADIENT)


def thorough(benchmark: Benchmark, budgets: Sequence[float], seed: int, batch: int) -> Found:
    """The same as `predictor` with more refinement.

    It costs at most 1/8 of 500 random configurations a budget.
    """
    allowed = POOL * len(benchmark.calibration) // SHARE * len(benchmark.reachable(budgets))
    return _predicted(benchmark, budgets, seed, batch, allowed, GRADIENT / 2)


def _predicted(
    benchmark: Benchmark,
    budgets: Sequence[float],
    seed: int,
    batch: int,
    allowed: int,
    gradient: float,
) -> Found:
    """allowed: forward passes for all budgets. gradient: the predictor's share of these."""
    n, budgets = len(benchmark.calibration), benchmark.reachable(budgets)
    steps = max(1, int(gradient * allowed // (3 * batch)))

    def make() -> dict:
        shared = _shared(benchmark, steps, seed)
        # The start of every budget is measured, too.
        left = allowed - shared.meta["forward_passes"] - n * len(budgets)
        return _points(shared.frontier(budgets, {"rounds": ROUNDS, "passes": left}, seed))

    options = {"steps": steps, "rounds": ROUNDS, "allowed": allowed, "seed": seed}
    return _found(benchmark, "predictor", make, budgets=budgets, **options)


def refined_ramp(benchmark: Benchmark, budgets: Sequence[float], seed: int) -> Found:
    """Refinement from a ramp, with neither profile nor gradient, at the cost of `refined`."""
    n, budgets = len(benchmark.calibration), benchmark.reachable(budgets)
    allowed = _allowed(benchmark, budgets)
    # The full model is measured, and the ramp of every budget.
    left = {"rounds": ROUNDS, "passes": allowed - n - n * len(budgets)}

    def make() -> dict:
        return _points(_search(benchmark, budgets, "ramp", seed, refinement=left))

    options = {"rounds": ROUNDS, "allowed": allowed, "seed": seed, "budgets": budgets}
    return _found(benchmark, "refined ramp", make, **options)


def _allowed(benchmark: Benchmark, budgets: Sequence[float]) -> int:
    """Forward passes that a refined search may cost for these budgets together."""
    return RIVAL * len(benchmark.calibration) // SAVING * len(budgets)


def _affordable(benchmark: Benchmark, passes: int) -> int:
    """Questions in whole batches, one at least, whose profile costs at most so many passes.

    Six measurements at a layer, and the full model, cost at most 3 L + 7 passes of a question.
    """
    batch = len(benchmark.calibration.prepared[0])
    return max(1, passes // (7 + 3 * benchmark.layers) // batch) * batch


def _profiled(benchmark: Benchmark, questions: int, seed: int) -> Profile:
    """A profile of the benchmark's method on some of its calibration questions."""
    asked = benchmark.calibration
    part = drawn(asked.prepared, questions, seed)
    return profile(benchmark.model, [asked.batches[i] for i in part], benchmark.method)


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
