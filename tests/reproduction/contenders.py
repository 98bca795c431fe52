"""What the yardstick compares: (benchmark, budgets, seed) -> a configuration per budget.

The passes count as if nothing had been in the cache, for all budgets together. The full model's own
pass over the calibration questions is among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vispco.baselines import SEARCHERS, paper_grid, published as presets, random_schedules
from vispco.budget import Budget
from vispco.config import PruningConfig
from vispco.solvers.plan import random_plans

from .benchmark import Benchmark
from .from_plan import from_plan
from .searches import Found, by_start

#: Searches of the library: {name: (start, refinement)}.
SEARCHES: dict[str, tuple[dict[str, Any], int]] = {
    "ramp": ({"name": "ramp"}, 0),
    "ramp-refined": ({"name": "ramp"}, 12),
    "gradient": ({"name": "gradient", "steps": 20}, 6),
    "shared": ({"name": "shared", "steps": 60}, 6),
    "profile": ({"name": "profile"}, 3),
    "profile-lean": ({"name": "profile"}, 0),
}
#: Random schedules per budget: of drops at all layers, and of few drops.
DENSE, FEW = 640, 200
#: Of these, how many are measured on all questions; the others on a sixth of them, or on a half.
DENSE_FINALS, FEW_FINALS = 24, 6
#: Most drops of a random schedule of few drops, beside its exit.
DROPS = 3
#: Passes of NSGA-II and TPE, in those of `profile`.
TIMES = 4


def searched(name: str, benchmark: Benchmark, budgets: Sequence[float], seed: int) -> Found:
    """One of the library's own searches."""
    start, refinement = SEARCHES[name]
    return by_start(benchmark, start, budgets, seed, refinement)


def published(benchmark: Benchmark, budgets: Sequence[float], seed: int) -> Found:
    """The best of the method's published configurations; none where none is within the budget."""
    known = presets(benchmark.method, benchmark.layers).values()
    return _best(benchmark, {budget: _within(benchmark, known, budget) for budget in budgets})


def single_layer(benchmark: Benchmark, budgets: Sequence[float], seed: int) -> Found:
    """The best single drop: at every layer, the most tokens of the paper's grid that fit."""
    sizes = benchmark.layers, benchmark.first_layer, benchmark.tokens
    grid = paper_grid(benchmark.method, *sizes)
    offers = {}
    for budget in budgets:
        # Of each layer the grid's last one that fits, which keeps most.
        largest = {min(config.steps): config for config in _within(benchmark, grid, budget)}
        offers[budget] = list(largest.values())
    return _best(benchmark, offers)


def random_dense(benchmark: Benchmark, budgets: Sequence[float], seed: int) -> Found:
    """The best random schedule with drops at all layers."""
    offers = {
        budget: random_schedules(benchmark.method, benchmark.limit(budget), DENSE, seed)
        for budget in budgets
    }
    return _screened(benchmark, offers, 6, DENSE_FINALS)


def random_few(benchmark: Benchmark, budgets: Sequence[float], seed: int) -> Found:
    """The best random schedule of few drops."""
    offers = {}
    for budget in budgets:
        drawn = few_drops(benchmark.limit(budget), FEW, torch.Generator().manual_seed(seed))
        ratios = (drawn.double() / benchmark.tokens).tolist()
        offers[budget] = [benchmark.config(own) for own in ratios]
    return _screened(benchmark, offers, 2, FEW_FINALS)


def _screened(
    benchmark: Benchmark, offers: Mapping[float, Sequence[PruningConfig]], of: int, finals: int
) -> Found:
    """The best of many: all are measured on one in `of` batches, the best `finals` on all."""
    batches = len(benchmark.calibration.prepared)
    part, screened, best = list(range(math.ceil(batches / of))), 0, {}
    for budget, own in offers.items():
        by_ratios = {config.keep_ratios: config for config in own}
        losses = {r: benchmark.answers(c, part=part).kl for r, c in by_ratios.items()}
        screened += len(losses) * len(benchmark.calibration.rows(part))
        best[budget] = [by_ratios[r] for r in sorted(losses, key=losses.__getitem__)[:finals]]
    found = _best(benchmark, best)
    return Found(found.configs, found.passes + screened)


def few_drops(limit: Budget, count: int, generator: torch.Generator) -> Tensor:
    """Different random plans (count, L) of one to three drops, brought onto the budget.

    From its exit on, a layer of the second half, a plan keeps nothing; one may have no exit. All
    other levels are scaled by one factor. Fewer plans where twenty times as many have no more.
    """
    found: dict[tuple, None] = {}
    for _ in range(20):
        counts = random_plans(limit, count, DROPS, generator)
        exits = torch.randint(limit.layers // 2, limit.layers + 1, (count, 1), generator=generator)
        kept = torch.arange(limit.layers) < exits
        dropped = counts < limit.tokens

        def scaled(s: Tensor, counts=counts, kept=kept, dropped=dropped) -> Tensor:
            levels = (counts * s).floor().long().clamp(max=limit.tokens)
            return torch.where(dropped, levels, counts) * kept

        low = torch.zeros(count, 1, dtype=torch.float64)
        high = torch.full_like(low, limit.tokens + 1)
        # A plan that fits with nothing dropped before its exit leaves a part of the budget unused.
        on_budget = limit.fits(scaled(low)) & ~limit.fits(scaled(high))
        for _ in range(24):
            middle = (low + high) / 2
            within = limit.fits(scaled(middle))[:, None]
            low, high = torch.where(within, middle, low), torch.where(within, high, middle)
        found |= dict.fromkeys(map(tuple, scaled(low)[on_budget].tolist()))
        if len(found) >= count:
            break
    return torch.tensor(list(found)[:count])


def rival(name: str, benchmark: Benchmark, budgets: Sequence[float], seed: int) -> Found:
    """One of optuna's searchers, with a multiple of the passes of `profile`.

    Raises ImportError without optuna.
    """
    each = int(TIMES * searched("profile", benchmark, budgets, seed).each)
    configs, passes = {}, len(benchmark.calibration)
    for budget in budgets:
        evaluator = benchmark.evaluator()
        SEARCHERS[name](evaluator, benchmark.limit(budget), each, seed)
        configs[budget] = benchmark.config(evaluator.best)
        passes += evaluator.passes
    return Found(configs, passes)


CONTENDERS: dict[str, Callable[[Benchmark, Sequence[float], int], Found]] = {
    **{name: partial(searched, name) for name in SEARCHES},
    "plan-gradient": from_plan,
    "published": published,
    "single-layer": single_layer,
    "random-dense": random_dense,
    "random-few": random_few,
    "nsga2": partial(rival, "nsga2"),
    "tpe": partial(rival, "tpe"),
}


def _within(
    benchmark: Benchmark, configs: Iterable[PruningConfig], budget: float
) -> list[PruningConfig]:
    """Those of the configurations that hold the budget, in their order."""
    limit = benchmark.limit(budget)
    return [config for config in configs if limit.holds(config.tokens(limit.tokens))]


def _best(benchmark: Benchmark, offers: Mapping[float, Sequence[PruningConfig]]) -> Found:
    """Of each budget's configurations the one of least calibration KL, each measured once."""
    configs = {budget: min(own, key=benchmark.kl) for budget, own in offers.items() if own}
    different = {config.keep_ratios for own in offers.values() for config in own}
    # The full model is measured, too.
    return Found(configs, len(benchmark.calibration) * (1 + len(different)))
