"""How many calibration questions: what searches of equal cost find with few and with many.

    python -m tests.reproduction.calibration --model testbed-llava --output FILE

Every search has the same number of forward passes: with few questions it measures many schedules,
with many questions a few. What it finds is measured on held-out questions. What was measured once
is in the cache: run again, the command goes on where it was stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from vispco.solvers.profiled import Profiled

from . import command
from .cache import Cache
from .claims.base import spread
from .markdown import markdown
from .searches import by_start
from .yardstick import BATCH, HELD_OUT, SHALLOW, Draw

SIZES = (16, 32, 64, 128, 256, 512)
#: Forward passes of one search for all budgets, and the most schedules it refines by.
PASSES, ROUNDS = 6000, 40


def measure(model: str, seeds: int, cache: Path, sizes: Sequence[int] = SIZES) -> dict:
    """Held-out KL and accuracy, mean over the budgets, of every number of questions and seed."""
    rows = []
    for questions in sizes:
        for seed in range(seeds):
            own = {"calibration": questions, "test": HELD_OUT, "batch": BATCH, "seed": seed}
            benchmark = Draw(model, "fastv", Cache(cache), **own)
            budgets = benchmark.reachable(SHALLOW)
            start = questions * (1 + 2 * len(budgets))
            start += min(questions, Profiled.questions) * (3 * benchmark.layers + 6)
            refinement = {"rounds": ROUNDS, "passes": max(0, PASSES - start)}
            found = by_start(benchmark, {"name": "profile"}, budgets, seed, refinement)
            there = [benchmark.answers(c, benchmark.test) for c in found.configs.values()]
            seen = [benchmark.kl(config) for config in found.configs.values()]
            row = {"questions": questions, "seed": seed, "passes": found.passes}
            row |= {"kl": _mean(seen), "held_out_kl": _mean([a.kl for a in there])}
            rows.append({**row, "held_out_accuracy": _mean([a.accuracy for a in there])})
            print(f"{questions} questions, seed {seed}: {rows[-1]}", file=sys.stderr, flush=True)
    return {"model": model, "held_out": HELD_OUT, "budgets": list(SHALLOW), "rows": rows}


def table(result: dict) -> str:
    """Markdown: per number of questions the means over the budgets, with the seeds' spread."""
    lines = []
    for questions in dict.fromkeys(row["questions"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["questions"] == questions]
        line = [questions, f"{_mean([row['passes'] for row in own]):,.0f}"]
        for name, factor, digits in (
            ("kl", 1, 3),
            ("held_out_kl", 1, 3),
            ("held_out_accuracy", 100, 1),
        ):
            line.append(spread([factor * row[name] for row in own], digits))
        lines.append(line)
    header = ["questions", "passes", "calibration KL", "held-out KL", "held-out accuracy, %"]
    return markdown(header, lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 with one line on stderr."""
    parser = command.parser("calibration", __doc__)
    parser.add_argument("--model", default="testbed-llava")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of questions")
    parser.add_argument("--cache", type=Path, default=Path(".reproduction"))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    own = options.model, options.seeds, options.cache, options.sizes
    return command.tabled(options, lambda: measure(*own), table)


if __name__ == "__main__":
    sys.exit(main())
