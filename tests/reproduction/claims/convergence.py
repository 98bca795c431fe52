"""Claim 6: the augmented Lagrangian arrives at the budget, whatever the method, kernel, budget and
form.
"""

from __future__ import annotations

from vispco.kernels import Kernel
from vispco.registry import KERNELS
from vispco.solvers.descent import fit_budget

from ..benchmark import Benchmark
from ..cache import Cache
from ..searches import history
from ..sizes import Size
from .base import Piece, all_met, met

TITLE = "Convergence of the augmented Lagrangian"
EPSILON = 0.01
TARGET = (
    f"In every run, both forms, the violation at the last step is within epsilon = {EPSILON} of "
    "the prunable cost, with the "
    "same default options everywhere, at every budget that the kernel can form."
)
KINDS = ("inequality", "equality")


def pieces(size: Size) -> list[Piece]:
    """One per testbed, method and kernel."""
    per = 3 * size.convergence_steps * size.batch + 8 * size.convergence_questions
    runs = len(KINDS) * len(size.convergence_budgets)
    return [
        Piece({"testbed": name, "method": method, "kernel": kernel}, per * runs, name)
        for name, method in size.convergence_pairs
        for kernel in size.convergence_kernels
    ]


def run(cache: Cache, size: Size, testbed: str, method: str, kernel: str) -> dict:
    """Both forms at all budgets."""
    benchmark = Benchmark(
        testbed, method, cache, calibration=size.convergence_questions, batch=size.batch
    )
    budgets, runs = benchmark.reachable(size.convergence_budgets), []
    formed = [
        b
        for b in budgets
        if _violation(
            KERNELS.get(kernel)(benchmark.layers, benchmark.first_layer), benchmark.limit(b)
        )
        <= EPSILON
    ]
    for kind in KINDS:
        records = history(benchmark, kernel, kind, budgets, size.convergence_steps)
        for budget in formed:
            steps = [r for r in records if r["budget"] == budget]
            runs.append(
                {
                    "kind": kind,
                    "budget": budget,
                    "violation": steps[-1]["violation"],
                    "steps": steps,
                }
            )
    return {
        "testbed": testbed,
        "method": method,
        "kernel": kernel,
        "runs": runs,
        "unreachable": [b for b in size.convergence_budgets if b not in formed],
    }


def _violation(curve: Kernel, limit) -> float:
    """How near to the budget the kernel comes when nothing but the budget counts."""
    found = []
    for theta in curve.starts():
        curve.theta.data.copy_(theta)
        fit_budget(curve, limit, steps=1000)
        found.append(abs(float(limit.slack(curve()).detach())))
    return min(found)


def conclude(rows: list[dict], size: Size) -> dict:
    """The share of runs that arrive, by testbed, method, kernel and form."""
    table = []
    for row in rows:
        for kind in KINDS:
            runs = [r for r in row["runs"] if r["kind"] == kind]
            final = [r["violation"] for r in runs]
            arrived = sum(v <= EPSILON for v in final)
            table.append(
                {
                    **{k: row[k] for k in ("testbed", "method", "kernel", "unreachable")},
                    "kind": kind,
                    "runs": runs,
                    "count": len(runs),
                    "arrived": arrived,
                    "worst": max(final, default=0.0),
                    "verdict": met(arrived == len(runs)),
                }
            )
    runs = sum(t["count"] for t in table)
    arrived = sum(t["arrived"] for t in table)
    worst = max(t["worst"] for t in table)
    return {
        "seeds": [1],
        "calibration": size.convergence_questions,
        "test": 0,
        "verdict": all_met(t["verdict"] for t in table),
        "rows": table,
        "measured": f"{arrived} of {runs} runs within epsilon, the worst violation {worst:.4f}",
    }
