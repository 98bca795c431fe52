"""Searches on a testbed at equal footing: the same budgets, calibration and held-out questions.

    python -m tests.reproduction.yardstick --model testbed-llava --output yardstick.json

Every contender has one configuration per budget, and says how many forward passes it has cost for
all budgets together. What was measured once is in the cache: run again, the command goes on where
it was stopped, and replaces what the code at work has changed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from vispco import testbed
from vispco.utils.files import read_json, write_text

from . import command
from .benchmark import DEVICE, Benchmark
from .cache import Cache
from .claims.base import spread
from .contenders import CONTENDERS
from .markdown import markdown
from .measure import Questions
from .searches import Found

QUESTIONS, BATCH, HELD_OUT = 96, 16, 320
BUDGETS: Mapping[str, tuple[float, ...]] = {"testbed-smollm": (0.12, 0.2, 0.3, 0.5, 0.7)}
#: Of the two small testbeds.
SHALLOW = (0.2, 0.35, 0.5, 0.7)
#: What a table is of: {value of a row: (title, digits, factor)}.
TABLES = {
    "kl": ("Calibration KL, nats", 4, 1),
    "held_out_kl": ("Held-out KL, nats", 4, 1),
    "held_out_accuracy": ("Held-out accuracy, %", 1, 100),
}


class Draw(Benchmark):
    """A benchmark whose seed draws the calibration questions; the held-out ones stay.

    The draws of two seeds are disjoint, but for a rare question of easy-VQA.
    """

    def questions(
        self, split: str, n: int, batch: int = 64, tasks: Sequence[str] | None = None
    ) -> Questions:
        """Questions of a split, for this model."""
        seed = self.seed if split == "calibration" else 0
        batches = testbed.batches(split, n, batch, seed, tasks=tasks, model=self.name)
        return Questions(self.model, batches)


def measure(
    model: str,
    method: str,
    seeds: Sequence[int],
    output: Path,
    cache: Path,
    only: Sequence[str] = (),
    budgets: Sequence[float] = (),
) -> dict:
    """Run the contenders `only` (none: all) and write each to the file as soon as it is done.

    budgets: none: the model's. Other rows of the file stay. Raises ValueError for a contender that
    there is not, or a file of another model or method.
    """
    if unknown := [name for name in only if name not in CONTENDERS]:
        raise ValueError(f"no contender {unknown[0]!r}: there are {', '.join(CONTENDERS)}")
    check_seeds(seeds)
    result = _load(output, model, method)
    for seed in seeds:
        sizes = {"calibration": QUESTIONS, "test": HELD_OUT, "batch": BATCH, "seed": seed}
        benchmark = Draw(model, method, Cache(cache), **sizes)
        own = benchmark.reachable(budgets or BUDGETS.get(model, SHALLOW))
        if not own:
            raise ValueError(f"no budget is reachable: {method} needs {benchmark.least:.3g}")
        for name in only or CONTENDERS:
            started = time.perf_counter()
            try:
                found = CONTENDERS[name](benchmark, own, seed)
            except ImportError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
            new = _rows(benchmark, name, seed, found)
            # Another process may have written its own contenders.
            result = _load(output, model, method)
            others = [r for r in result["rows"] if (r["contender"], r["seed"]) != (name, seed)]
            result["rows"] = others + new
            write_text(output, json.dumps(result) + "\n")
            took = time.perf_counter() - started
            print(f"seed {seed}, {name}: {found.passes:,.0f} passes, {took:.0f} s", file=sys.stderr)
    return result


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError unless there is a seed, and all are numbers from 0 on."""
    if not seeds or min(seeds) < 0:
        raise ValueError(f"seeds must be numbers from 0 on, got {list(seeds)}")


def _load(output: Path, model: str, method: str) -> dict:
    new: dict = {"model": model, "method": method, "questions": QUESTIONS, "held_out": HELD_OUT}
    if not output.exists():
        return {**new, "rows": []}
    found = read_json(output, dict)
    if different := [name for name, value in new.items() if found.get(name) != value]:
        raise ValueError(f"{output} is of another {', '.join(different)}: choose another file")
    return found


def _rows(benchmark: Benchmark, name: str, seed: int, found: Found) -> list[dict]:
    rows, device = [], torch.cuda.get_device_name() if DEVICE.startswith("cuda") else "cpu"
    for budget, config in found.configs.items():
        held_out = benchmark.answers(config, benchmark.test)
        row = {"contender": name, "seed": seed, "device": device, "budget": budget}
        row["kl"] = benchmark.kl(config)
        row |= {"held_out_kl": held_out.kl, "held_out_accuracy": held_out.accuracy}
        tokens = config.tokens(benchmark.tokens)
        rows.append({**row, "passes": found.passes, "tokens": tokens})
    return rows


def table(result: Mapping) -> str:
    """Markdown: per contender and budget the mean and the spread over the seeds, and the passes."""
    rows = result["rows"]
    budgets = sorted({row["budget"] for row in rows})
    names = [name for name in CONTENDERS if any(row["contender"] == name for row in rows)]
    parts = []
    for value, (title, digits, factor) in TABLES.items():
        lines = []
        for name in names:
            own = [row for row in rows if row["contender"] == name]
            by_seed = {row["seed"]: row["passes"] for row in own}
            line = [name, f"{sum(by_seed.values()) / len(by_seed):,.0f}", len(by_seed)]
            for budget in budgets:
                values = [factor * row[value] for row in own if row["budget"] == budget]
                line.append(spread(values, digits) if values else "–")
            lines.append(line)
        header = ["contender", "passes", "seeds", *(f"{budget:.0%}" for budget in budgets)]
        parts.append(
            f"{title}, {result['model']}, {result['method']}:\n\n{markdown(header, lines)}"
        )
    return "\n\n".join([*parts, *_elsewhere(rows)])


def _elsewhere(rows: Sequence[Mapping]) -> list[str]:
    """A line for each device that is not the CPU: what was measured on it."""
    found: dict[str, dict[str, set[int]]] = {}
    for row in rows:
        if (device := row.get("device", "cpu")) != "cpu":
            found.setdefault(device, {}).setdefault(row["contender"], set()).add(row["seed"])
    return [
        f"On {device}: "
        + "; ".join(f"{name}, seed {', '.join(map(str, sorted(s)))}" for name, s in own.items())
        + "."
        for device, own in found.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 with one line on stderr."""
    parser = command.parser("yardstick", __doc__)
    parser.add_argument("--model", default="testbed-smollm")
    parser.add_argument("--method", default="fastv")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--only", default="", help=f"some of {','.join(CONTENDERS)}")
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=(), metavar="SHARE", help="default: the model's"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path(".reproduction"))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    only = [name.strip() for name in options.only.split(",") if name.strip()]
    own = options.model, options.method, options.seeds, options.output, options.cache
    return command.tabled(options, lambda: measure(*own, only, options.budgets), table)


if __name__ == "__main__":
    sys.exit(main())
