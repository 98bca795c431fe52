"""Claim 3, over depth: random search falls behind as there is more to choose."""

from __future__ import annotations

from statistics import geometric_mean

from vispco.baselines.searchers import random_schedules

from ..benchmark import Benchmark
from ..cache import Cache
from ..searches import RIVAL, SAVING, predictor, refined, refined_ramp
from ..sizes import Size
from ..stats import expected_best, summary
from .base import MET, NOT_TESTABLE, Piece, all_met, met

TITLE = "Depth"
EQUAL = RIVAL // SAVING
TARGET = (
    "On the testbed deepened to 8, 16, 24 and 32 layers, the learned configuration is no worse "
    "than random search of "
    f"equal cost (best of {EQUAL}) at any depth, and its lead does not shrink from the shallowest "
    "to the deepest."
)
METHOD, LEAST = "fastv", 1e-3
#: Other searches of equal cost.
RIVALS = {"predictor": "the paper's predictor, refined", "ramp": "a refined ramp"}


def pieces(size: Size) -> list[Piece]:
    """One per depth."""
    pools, searches = (
        size.depth_pool * len(size.depth_budgets),
        3 * size.depth_seeds * EQUAL * len({*size.depth_budgets, *size.depth_also}),
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
    # Several budgets share what a profile or a predictor costs.
    shared, seeds = sorted({*size.depth_budgets, *size.depth_also}), range(size.depth_seeds)
    found = [refined(benchmark, shared, seed) for seed in seeds]
    rivals = {
        "predictor": [predictor(benchmark, shared, seed, size.batch) for seed in seeds],
        "ramp": [refined_ramp(benchmark, shared, seed) for seed in seeds],
    }
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
                **{
                    name: [benchmark.kl(f.configs[budget]) for f in own]
                    for name, own in rivals.items()
                },
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
                    **{name: summary(one[name]) for name in RIVALS},
                    **{f"gain_{name}": _ratio(summary(one[name]), ours) for name in RIVALS},
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
    grown = met(leads[depths[-1]] >= leads[depths[0]])
    return {
        **made,
        "verdict": all_met([grown, *(t["verdict"] for t in table)]),
        "measured": "KL of random search of equal cost over ours: "
        + ", ".join(f"{leads[d]:.2f} at {d} layers" for d in depths)
        + ("" if grown == MET else " (shrinks)")
        + "".join(f"; of {RIVALS[name]}: {_gains(table, depths, name)}" for name in RIVALS),
    }


def _gains(table: list[dict], depths: list[int], name: str) -> str:
    """A rival's KL over ours, by depth."""
    each = ([t[f"gain_{name}"] for t in table if t["layers"] == depth] for depth in depths)
    return ", ".join(f"{geometric_mean(gains):.2f}" for gains in each)


def _ratio(theirs: dict, ours: dict) -> float:
    """Of two mean KLs; below LEAST all are alike."""
    return max(theirs["mean"], LEAST) / max(ours["mean"], LEAST)
