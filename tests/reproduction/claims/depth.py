"""Claim 3, over depth: random search falls behind as there is more to choose."""

from __future__ import annotations

from statistics import geometric_mean

from vispco.baselines.searchers import random_schedules

from ..benchmark import Benchmark
from ..cache import Cache
from ..searches import RIVAL, SAVING, predictor, refined_ramp
from ..sizes import Size
from ..stats import expected_best, summary
from .base import MET, NOT_TESTABLE, Piece, all_met, met

TITLE = "Depth"
EQUAL = RIVAL // SAVING
TARGET = (
    "On the testbed deepened to 8, 16, 24 and 32 layers, what the paper's predictor learns, "
    "refined, is no worse "
    "than random search of "
    f"equal cost (best of {EQUAL}) at any depth, and its lead does not shrink from the shallowest "
    "to the deepest."
)
METHOD, LEAST = "fastv", 1e-3


def pieces(size: Size) -> list[Piece]:
    """One per depth."""
    pools, searches = (
        size.depth_pool * len(size.depth_budgets),
        2 * size.depth_seeds * EQUAL * len({*size.depth_budgets, *size.depth_also}),
    )
    return [
        Piece({"factor": f}, (pools + searches) * size.depth_questions, depth=f)
        for f in size.depth_factors
    ]


def run(cache: Cache, size: Size, factor: int) -> dict:
    """Learned against random at one depth."""
    benchmark = Benchmark(
        "testbed-llava",
        METHOD,
        cache,
        calibration=size.depth_questions,
        batch=size.batch,
        factor=factor,
    )
    budgets, rows = benchmark.reachable(size.depth_budgets), []
    # Neighbouring budgets help each other, and each pays for itself.
    shared, seeds = sorted({*size.depth_budgets, *size.depth_also}), range(size.depth_seeds)
    found = [predictor(benchmark, shared, seed, size.batch) for seed in seeds]
    blind = [refined_ramp(benchmark, shared, seed) for seed in seeds]
    for budget in budgets:
        configs = random_schedules(
            METHOD, benchmark.limit(budget), size.depth_pool, seed=round(1000 * budget)
        )
        values = [benchmark.kl(c) for c in configs]
        draws = sorted(
            {n for n in (1, EQUAL, 40, 80, RIVAL, 320, 640, len(values)) if n <= len(values)}
        )
        rows.append(
            {
                "budget": budget,
                "kl": [benchmark.kl(f.configs[budget]) for f in found],
                "passes": max(f.each for f in found),
                "ungraded": [benchmark.kl(f.configs[budget]) for f in blind],
                "random": [
                    expected_best(values, n) | {"passes": n * len(benchmark.calibration)}
                    for n in draws
                ],
            }
        )
    return {
        "factor": factor,
        "layers": benchmark.layers,
        "n_calibration": len(benchmark.calibration),
        "budgets": rows,
    }


def conclude(rows: list[dict], size: Size) -> dict:
    """The ratio of random search's KL to ours, by depth."""
    table = []
    for row in sorted(rows, key=lambda r: r["layers"]):
        for one in row["budgets"]:
            equal = max((d for d in one["random"] if d["n"] <= EQUAL), key=lambda d: d["n"])
            most, ours = one["random"][-1], summary(one["kl"])
            table.append(
                {
                    "layers": row["layers"],
                    "budget": one["budget"],
                    "kl": ours,
                    "passes": one["passes"],
                    "random_equal": equal,
                    "random_most": most,
                    "random": one["random"],
                    "ungraded": summary(one["ungraded"]),
                    "gain": _ratio(summary(one["ungraded"]), ours),
                    "lead": _ratio(equal, ours),
                    "lead_most": _ratio(most, ours),
                    "verdict": met(_ratio(equal, ours) >= 0.99),
                }
            )
    depths = sorted({t["layers"] for t in table})
    made = {
        "seeds": [size.depth_seeds],
        "calibration": size.depth_questions,
        "test": 0,
        "rows": table,
    }
    if len(depths) < 2:
        return {**made, "verdict": NOT_TESTABLE, "measured": "one depth only at this size"}
    leads = {d: geometric_mean(t["lead"] for t in table if t["layers"] == d) for d in depths}
    gains = {d: geometric_mean(t["gain"] for t in table if t["layers"] == d) for d in depths}
    grown = met(leads[depths[-1]] >= leads[depths[0]])
    return {
        **made,
        "verdict": all_met([grown, *(t["verdict"] for t in table)]),
        "measured": "KL of random search of equal cost over ours: "
        + ", ".join(f"{leads[d]:.2f} at {d} layers" for d in depths)
        + ("" if grown == MET else " (shrinks)")
        + "; of the same search without its gradient: "
        + ", ".join(f"{gain:.2f}" for gain in gains.values()),
    }


def _ratio(theirs: dict, ours: dict) -> float:
    """Of two mean KLs; below LEAST all are alike."""
    return max(theirs["mean"], LEAST) / max(ours["mean"], LEAST)
