"""One schedule per question, or one per budget? The shared predictor with and without the prompt.

    python -m tests.reproduction.conditioned --model testbed-llava --output FILE

Both predictors learn for as many steps. Each held-out question has its schedule in whole tokens on
its own budget: what the predictor says of its prompt, or of the budget alone. `hindsight` is what
there is to gain: of the schedules that the plain predictors of all seeds found for the budget, each
question has the one that answers it best.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from vispco import search, testbed
from vispco.budget import Budget
from vispco.calibration import PreparedBatch, shapes
from vispco.config import PruningConfig
from vispco.solvers.shared import Shared, features

from . import command
from .cache import Cache
from .claims.base import spread
from .markdown import markdown
from .measure import Questions, ask
from .yardstick import HELD_OUT, QUESTIONS, SHALLOW, Draw

#: Questions in a batch, and steps: 96 questions are seen 33 times.
BATCH, STEPS = 8, 400
KINDS = {"one per budget": False, "one per question": True}


def measure(model: str, seeds: int, steps: int, cache: Path) -> dict:
    """Held-out KL and accuracy of both predictors, at every budget and seed, and in hindsight."""
    rows, divergences = [], {}
    for seed in range(seeds):
        sizes = {"calibration": QUESTIONS, "test": HELD_OUT, "batch": BATCH, "seed": seed}
        benchmark = Draw(model, "fastv", Cache(cache), **sizes)
        budgets = benchmark.reachable(SHALLOW)
        alone = Questions(benchmark.model, testbed.batches("test", HELD_OUT, 1, model=model))
        for kind, conditioned in KINDS.items():
            start = Shared(steps=steps, conditioned=conditioned)
            batches = benchmark.calibration.batches
            found = search(benchmark.model, batches, "fastv", (), start=start, seed=seed)
            passes = found.meta["forward_passes"]
            for budget in budgets:
                kl, right = answers(benchmark, found, alone, budget)
                row = {"kind": kind, "seed": seed, "budget": budget, "passes": passes}
                total = float(alone.count.sum())
                rows.append({**row, "kl": sum(kl) / total, "accuracy": sum(right) / len(right)})
                if not conditioned:
                    divergences.setdefault(budget, []).append((kl, right))
                print(rows[-1], file=sys.stderr, flush=True)
    for budget, each in divergences.items():
        best = [
            min(options)
            for options in zip(*(zip(*pair, strict=True) for pair in each), strict=True)
        ]
        row = {"kind": "hindsight", "seed": 0, "budget": budget, "passes": 0}
        row |= {"kl": sum(kl for kl, _ in best) / total}
        rows.append({**row, "accuracy": sum(right for _, right in best) / len(best)})
    return {
        "model": model,
        "questions": QUESTIONS,
        "held_out": HELD_OUT,
        "steps": steps,
        "rows": rows,
    }


@torch.no_grad()
def answers(benchmark, found, questions: Questions, budget: float) -> tuple[list, list]:
    """The divergence of each question, and whether it is right, each with its own schedule."""
    predictor, kernel = found.again.predictor, found.problem.kernel
    divergence, right = [], []
    for batch in questions.prepared:
        theta = predictor(torch.tensor([budget]), *features(benchmark.model, batch, predictor))
        ratios = kernel.schedule(theta)[0].double()
        config = PruningConfig("fastv", own_limit(benchmark, batch, budget).harden(ratios))
        answer = ask(benchmark.model, config, [batch])
        divergence += answer["kl"]
        right += [digit == "1" for digit in answer["right"]]
    return divergence, right


def own_limit(benchmark, batch: PreparedBatch, budget: float) -> Budget:
    """The budget of one question alone."""
    return Budget(budget, benchmark.cost, *shapes([batch]), benchmark.first_layer)


def table(result: dict) -> str:
    """Markdown: KL and accuracy by kind and budget, mean and spread over the seeds."""
    rows = result["rows"]
    budgets = sorted({row["budget"] for row in rows})
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        for name, factor, digits in (("kl", 1, 3), ("accuracy", 100, 1)):
            line = [f"{kind}, {name}"]
            for budget in budgets:
                own = [r for r in rows if (r["kind"], r["budget"]) == (kind, budget)]
                line.append(spread([factor * row[name] for row in own], digits))
            lines.append(line)
    return markdown(["held-out", *(f"{budget:.0%}" for budget in budgets)], lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 with one line on stderr."""
    parser = command.parser("conditioned", __doc__)
    parser.add_argument("--model", default="testbed-llava")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--cache", type=Path, default=Path(".reproduction"))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    own = options.model, options.seeds, options.steps, options.cache
    return command.tabled(options, lambda: measure(*own), table)


if __name__ == "__main__":
    sys.exit(main())
