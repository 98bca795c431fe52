"""What critics of pruning methods found, looked for in our own measurements.

    python -m tests.reproduction.critics --write docs/which-method.md

Reads docs/results/winner.json, which `python -m tests.reproduction --claims winner` writes. At each
budget: which methods are clearly worse than random tokens, and which than smaller pictures. All
cost the same or less. Clearly: by more than two standard errors of a difference.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vispco.utils.files import read_json, write_text

from .markdown import markdown

RESULT = Path(__file__).parents[2] / "docs" / "results" / "winner.json"
RANDOM, SMALLER = "random", "smaller pictures"
#: No methods of their own.
NO_METHODS = ("auto", RANDOM, SMALLER)
BEGIN, END = "<!-- critics: python -m tests.reproduction.critics -->\n", "<!-- /critics -->\n"


def clearly_less(a: float, b: float, n: int) -> bool:
    """Whether accuracy `a` is below `b` by more than two standard errors, of `n` questions each."""
    return b - a > 2 * ((a * (1 - a) + b * (1 - b)) / n) ** 0.5


def found(result: Mapping) -> list[dict]:
    """One dict a testbed and budget: the rivals' accuracy, and the methods clearly worse."""
    rows = []
    for testbed in dict.fromkeys(row["testbed"] for row in result["rows"]):
        own = {row["method"]: row for row in result["rows"] if row["testbed"] == testbed}
        methods = [name for name in own if name not in NO_METHODS]
        for i, budget in enumerate(point["budget"] for point in own[methods[0]]["points"]):
            at = {name: own[name]["points"][i]["accuracy"]["mean"] for name in methods}
            rivals = {SMALLER: smaller(own[SMALLER]["points"], budget)}
            if RANDOM in own:
                rivals[RANDOM] = own[RANDOM]["points"][i]["accuracy"]["mean"]
            n = own[methods[0]]["n_test"]
            worse = {
                rival: sorted(name for name in methods if clearly_less(at[name], accuracy, n))
                for rival, accuracy in rivals.items()
            }
            row = {"testbed": testbed, "budget": budget, "methods": len(methods)}
            rows.append({**row, "rivals": rivals, "worse": worse})
    return rows


def smaller(points: Sequence[Mapping], budget: float) -> float:
    """The best accuracy of smaller pictures that cost no more than the budget."""
    return max(p["accuracy"]["mean"] for p in points if p["share"] <= budget)


def table(result: Mapping) -> str:
    """Markdown: a line a testbed and budget."""
    lines = []
    for row in found(result):
        line = [row["testbed"], f"{100 * row['budget']:.0f} %", row["methods"]]
        for rival in (RANDOM, SMALLER):
            names = row["worse"].get(rival)
            line.append(f"{100 * row['rivals'][rival]:.1f}" if names is not None else "–")
            none = "–" if names is None else "none"
            line.append(", ".join(f"`{name}`" for name in names or ()) or none)
        lines.append(line)
    header = ["testbed", "budget", "methods", "random tokens, %", "clearly worse than these"]
    return markdown([*header, "smaller pictures, %", "clearly worse than these"], lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.reproduction.critics", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--write", type=Path, help="the page whose table is written anew")
    options = parser.parse_args(argv)
    try:
        made = table(read_json(RESULT, dict))
        print(made)
        if options.write:
            text = options.write.read_text(encoding="utf-8")
            if BEGIN not in text or END not in text:
                raise ValueError(f"{options.write} has no place for the table: {BEGIN.strip()}")
            before, rest = text.split(BEGIN)
            after = rest.split(END)[1]
            write_text(options.write, f"{before}{BEGIN}{made}\n{END}{after}")
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
