"""Claim 4: several steps are at least as good as one layer, which they contain."""

from __future__ import annotations

from collections import defaultdict

import torch

from ..cache import Cache
from ..searches import by_kernel
from ..sizes import Size
from ..stats import compare, paired, summary
from .base import Piece, all_met, benchmark_of, met, named, setting_of

TITLE = "Several steps against one layer"
PAIR = ("multi_step", "single_layer")
TARGET = (
    "The multi-step kernel is at least as good as the single-layer kernel at every budget "
    "(calibration KL; equal: within "
    "two standard errors over the seeds, or 1 %)."
)


def pieces(size: Size) -> list[Piece]:
    """One per setting and seed."""
    per = 3 * size.kernel_steps * size.batch + 17 * size.calibration + size.test
    return [
        Piece({**named(s), "seed": seed}, 2 * per * len(s.budgets), s.testbed)
        for s in size.settings
        for seed in range(s.kernel_seeds)
    ]


def run(cache: Cache, size: Size, testbed: str, method: str, seed: int) -> dict:
    """Both kernels at every budget of a setting, with one seed."""
    setting = setting_of(size, testbed, method)
    benchmark = benchmark_of(setting, cache, size)
    budgets = benchmark.reachable(setting.budgets)
    found = {
        kernel: by_kernel(benchmark, kernel, budgets, seed, size.kernel_steps) for kernel in PAIR
    }
    rows = []
    for budget in budgets:
        configs = {kernel: found[kernel].configs[budget] for kernel in PAIR}
        right = {
            kernel: benchmark.answers(c, benchmark.test).right for kernel, c in configs.items()
        }
        rows.append(
            {
                "budget": budget,
                "paired": paired(right[PAIR[0]], right[PAIR[1]]),
                **{
                    kernel: {
                        "kl": benchmark.kl(c),
                        "accuracy": float(right[kernel].double().mean()),
                        "tokens": c.tokens(benchmark.tokens),
                        "share": benchmark.share(c),
                    }
                    for kernel, c in configs.items()
                },
            }
        )
    return {
        "testbed": testbed,
        "method": method,
        "seed": seed,
        "rows": rows,
        "n_test": len(benchmark.test),
        "passes": {kernel: found[kernel].passes for kernel in PAIR},
        "tokens": benchmark.tokens,
    }


def conclude(rows: list[dict], size: Size) -> dict:
    """Seeds side by side."""
    groups = defaultdict(list)
    for row in rows:
        for one in row["rows"]:
            groups[row["testbed"], row["method"], one["budget"]].append({**one, "of": row})
    table = []
    for (testbed, method, budget), ones in groups.items():
        kl = {kernel: [one[kernel]["kl"] for one in ones] for kernel in PAIR}
        outcome = compare(kl[PAIR[0]], kl[PAIR[1]])
        gains = [one["paired"]["difference"] for one in ones]
        table.append(
            {
                "testbed": testbed,
                "method": method,
                "budget": budget,
                "seeds": len(ones),
                **{
                    kernel: {
                        "kl": summary(kl[kernel]),
                        "accuracy": summary([one[kernel]["accuracy"] for one in ones]),
                        "tokens": min(ones, key=lambda one: one[kernel]["kl"])[kernel]["tokens"],
                    }
                    for kernel in PAIR
                },
                "gain": summary(gains),
                "noise": float(torch.tensor([o["paired"]["error"] for o in ones]).mean()),
                "n_visual": ones[0]["of"]["tokens"],
                "outcome": outcome,
                "verdict": met(outcome != "worse"),
            }
        )
    verdict = all_met(t["verdict"] for t in table)
    seeds = sorted({s.kernel_seeds for s in size.settings} - {0})
    return {"seeds": seeds, "verdict": verdict, "rows": table, "measured": _measured(table)}


def _measured(table: list[dict]) -> str:
    """All budgets in one sentence."""
    outcomes = [t["outcome"] for t in table]
    better, equal = outcomes.count("better"), outcomes.count("equal")
    worse = sum(t["verdict"] != "met" for t in table)
    gain = summary([t["gain"]["mean"] for t in table])
    return (
        f"better at {better}, equal at {equal}, worse at {worse} of {len(table)} "
        f"(testbed, method, budget); held-out accuracy {100 * gain['mean']:+.1f} points "
        f"on average (s.d. {100 * gain['std']:.1f} over the rows)"
    )
