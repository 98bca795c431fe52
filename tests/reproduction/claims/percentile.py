"""Claim 2: where the learned configuration stands among random ones of the same space, at the same
budget.
"""

from __future__ import annotations

from vispco.baselines.searchers import random_schedules
from vispco.config import PruningConfig

from ..benchmark import Benchmark
from ..cache import Cache
from ..searches import POOL, SHARE, thorough
from ..sizes import Setting, Size
from ..stats import paired, percentile, summary
from .base import Piece, all_met, benchmark_of, met, named, setting_of

TITLE = "Percentile among random configurations"
LEAST = 99.0
TARGET = (
    "At every budget what the paper's predictor learns, refined, found for at most "
    f"1/{SHARE} of what {POOL} random ones cost, is at or above "
    f"the {LEAST:.0f}th percentile of random feasible configurations of the same space (free "
    "monotone, filled up to the "
    "budget in whole tokens) on calibration KL, and on held-out accuracy within its noise (95 % "
    "interval of the paired "
    "bootstrap)."
)


def pieces(size: Size) -> list[Piece]:
    """First the searches, one per setting and seed; then one per setting and budget."""
    searches = [
        Piece(
            {**named(s), "seed": seed}, POOL * size.calibration // SHARE * len(s.budgets), s.testbed
        )
        for s in size.settings
        for seed in range(s.seeds)
    ]
    pools = [
        Piece(
            {**named(s), "budget": b},
            s.pool * size.calibration + (s.held_out + s.seeds) * size.test,
            s.testbed,
        )
        for s in size.settings
        for b in s.budgets
    ]
    return searches + pools


def run(
    cache: Cache, size: Size, testbed: str, method: str, budget: float | None = None, seed: int = 0
) -> dict | None:
    """One budget of one setting; with a seed instead of a budget only its search, for the cache."""
    setting = setting_of(size, testbed, method)
    benchmark = benchmark_of(setting, cache, size)
    budgets = benchmark.reachable(setting.budgets)
    if budget is None:
        thorough(benchmark, budgets, seed, size.batch)
        return None
    head = {"testbed": testbed, "method": method, "budget": budget}
    if budget not in budgets:
        return {**head, "reachable": False, "least": benchmark.least}
    configs = pool(benchmark, setting, budget)
    divergence = [benchmark.kl(c) for c in configs][: size.percentile_pool]
    accuracy = [benchmark.accuracy(c) for c in configs[: setting.held_out]]
    found = [thorough(benchmark, budgets, seed, size.batch) for seed in range(setting.seeds)]
    ours = [f.configs[budget] for f in found]
    high = sorted(range(len(accuracy)), key=accuracy.__getitem__)[
        max(0, round(LEAST / 100 * len(accuracy)) - 1)
    ]
    return {
        **head,
        "reachable": True,
        "pool": len(divergence),
        "held_out": len(accuracy),
        "n_test": len(benchmark.test),
        "kl": [benchmark.kl(c) for c in ours],
        "accuracy": [benchmark.accuracy(c) for c in ours],
        "percentiles": [percentile(benchmark.kl(c), divergence) for c in ours],
        "accuracy_percentiles": [
            percentile(-benchmark.accuracy(c), [-a for a in accuracy]) for c in ours
        ],
        "against_best": [
            paired(
                benchmark.answers(c, benchmark.test).right,
                benchmark.answers(configs[high], benchmark.test).right,
            )
            for c in ours
        ],
        "pool_kl": summary(divergence) | {"values": sorted(divergence)},
        "pool_accuracy": summary(accuracy),
        "tokens": [c.tokens(benchmark.tokens) for c in ours],
        "passes": max(f.each for f in found),
    }


def pool(benchmark: Benchmark, setting: Setting, budget: float) -> list[PruningConfig]:
    """The setting's random schedules at a budget."""
    return random_schedules(
        benchmark.method, benchmark.limit(budget), setting.pool, seed=round(1000 * budget)
    )


def conclude(rows: list[dict | None], size: Size) -> dict:
    """By the mean over the seeds."""
    table: list[dict] = []
    outcomes: list[str] = []
    for row in filter(None, rows):
        if not row["reachable"]:
            table.append({**row, "verdict": "not reachable"})
            continue
        kl, noise = summary(row["percentiles"]), [p["high"] for p in row["against_best"]]
        verdicts = {"kl": met(kl["mean"] >= LEAST), "accuracy": met(sum(noise) / len(noise) >= 0)}
        outcomes += verdicts.values()
        table.append(
            {
                **{
                    k: row[k] for k in ("testbed", "method", "budget", "pool", "held_out", "passes")
                },
                "percentile": kl,
                "kl": summary(row["kl"]),
                "accuracy": summary(row["accuracy"]),
                "random_kl": row["pool_kl"]["mean"],
                "random_best_kl": row["pool_kl"]["values"][0],
                "random_accuracy": row["pool_accuracy"],
                "accuracy_percentile": summary(row["accuracy_percentiles"]),
                "against_best": row["against_best"],
                "random_kls": row["pool_kl"]["values"],
                "tokens": row["tokens"][min(range(len(row["kl"])), key=row["kl"].__getitem__)],
                "verdict_kl": verdicts["kl"],
                "verdict_accuracy": verdicts["accuracy"],
                "verdict": all_met(verdicts.values()),
            }
        )
    return {"verdict": all_met(outcomes), "rows": table, "measured": _measured(table)}


def _measured(table: list[dict]) -> str:
    """All budgets in one sentence."""
    tested = [t for t in table if t["verdict"] != "not reachable"]
    good = sum(t["verdict_kl"] == "met" for t in tested)
    fine = sum(t["verdict_accuracy"] == "met" for t in tested)
    least = min((t["percentile"]["mean"] for t in tested), default=float("nan"))
    pools = _range([t["pool"] for t in tested])
    held_out = _range([t["held_out"] for t in tested])
    return (
        f"on KL at or above it at {good} of {len(tested)} (testbed, method, budget), "
        f"the least mean percentile {least:.1f}; "
        f"on held-out accuracy within the noise at {fine} of {len(tested)}; "
        f"pools of {pools} random configurations, "
        f"of which {held_out} answered the held-out questions"
    )


def _range(counts: list[int]) -> str:
    """The least and the largest count."""
    if not counts:
        return "0"
    return " to ".join(map(str, sorted({min(counts), max(counts)})))
