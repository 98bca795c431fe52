"""Which mean of a profile's losses ranks schedules best: the plain one, or an exponential one.

    python -m tests.reproduction.predictions --model testbed-llava --output FILE

Random schedules of few drops are measured on half of the questions, and predicted from the profile
that a search would begin with, of a third of them. What was measured once is in the cache: run
again, the command goes on where it was stopped.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vispco import Profile, Profiled, profile
from vispco.profiling import predicted
from vispco.solvers.profiled import drawn

from . import command
from .cache import Cache
from .claims.base import spread
from .contenders import FEW, few_drops
from .markdown import markdown
from .yardstick import BATCH, BUDGETS, QUESTIONS, SHALLOW, Draw, check_seeds

#: Of the exponential mean, in nats; None: the plain one.
SCALES = (1.0, 2.0, 4.0, 8.0, None)


def measure(
    model: str, seeds: Sequence[int], cache: Path, count: int, budgets: Sequence[float]
) -> dict:
    """Rank correlations of predicted and measured losses, by seed, budget and scale.

    Raises ValueError for a negative seed, or less than two schedules.
    """
    check_seeds(seeds)
    if count < 2:
        raise ValueError(f"a rank correlation needs two schedules or more, got {count}")
    rows = []
    for seed in seeds:
        sizes = {"calibration": QUESTIONS, "test": BATCH, "batch": BATCH, "seed": seed}
        benchmark = Draw(model, "fastv", Cache(cache), **sizes)
        table = _profile(benchmark).table(benchmark.tokens)
        part = list(range((len(benchmark.calibration.prepared) + 1) // 2))
        for budget in benchmark.reachable(budgets or BUDGETS.get(model, SHALLOW)):
            generator = torch.Generator().manual_seed(seed)
            counts = few_drops(benchmark.limit(budget), count, generator)
            ratios = counts.double() / benchmark.tokens
            own = [benchmark.answers(benchmark.config(r), part=part).kl for r in ratios.tolist()]
            for scale in SCALES:
                expected = predicted(table, ratios, scale or math.inf)
                row = {"seed": seed, "budget": budget, "scale": scale, "schedules": len(own)}
                rows.append({**row, "correlation": ranked_alike(expected, torch.tensor(own))})
            print(f"seed {seed}, {budget}: {rows[-1]}", file=sys.stderr, flush=True)
    return {"model": model, "rows": rows}


def _profile(benchmark: Draw) -> Profile:
    """The profile that a search with the benchmark's seed begins with."""
    batches = benchmark.calibration.batches
    part = drawn(benchmark.calibration.prepared, Profiled.questions, benchmark.seed)

    def make() -> dict:
        return profile(benchmark.model, [batches[i] for i in part], benchmark.method).to_dict()

    return Profile.from_dict(benchmark.searched("profile", make, part=part))


def ranked_alike(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors (N,).

    >>> ranked_alike(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 21.0]))
    1.0
    """
    ranks = torch.stack([a.double(), b.double()]).argsort(1).argsort(1).double()
    return round(float(torch.corrcoef(ranks)[0, 1]), 6)


def table(result: dict) -> str:
    """Markdown: the rank correlation by scale and budget, mean and spread over the seeds."""
    rows, lines = result["rows"], []
    budgets = sorted({row["budget"] for row in rows})
    for scale in SCALES:
        own = [row for row in rows if row["scale"] == scale]
        cells = [[r["correlation"] for r in own if r["budget"] == budget] for budget in budgets]
        name = f"{scale:g} nats" if scale else "plain mean"
        lines.append([name, *(spread(cell, 2) for cell in cells)])
    return markdown(["scale", *(f"{budget:.0%}" for budget in budgets)], lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 with one line on stderr."""
    parser = command.parser("predictions", __doc__)
    parser.add_argument("--model", default="testbed-llava")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--schedules", type=int, default=FEW, help="per budget")
    parser.add_argument("--budgets", type=float, nargs="+", default=[], help="none: the model's")
    parser.add_argument("--cache", type=Path, default=Path(".reproduction"))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    own = options.model, options.seeds, options.cache, options.schedules, options.budgets
    return command.tabled(options, lambda: measure(*own), table)


if __name__ == "__main__":
    sys.exit(main())
