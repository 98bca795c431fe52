"""What critics of pruning methods found, looked for in our own measurements.

    python -m tests.reproduction.critics --write docs/which-method.md

Reads docs/results/winner.json, which `python -m tests.reproduction --claims winner` writes, and of
testbed-smollm docs/results/deep/winner.json, which `--size deep` writes: all methods there. At each
budget: which methods are clearly worse than random tokens, and which than smaller pictures. All
cost the same or less. Clearly: by more than two standard errors of a difference.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vispco.utils.files import read_json, write_text

from . import command
from .markdown import markdown

RESULTS = Path(__file__).parents[2] / "docs" / "results"
DEEP = "testbed-smollm"
RANDOM, SMALLER = "random", "smaller pictures"
#: No methods of their own.
NO_METHODS = ("auto", RANDOM, SMALLER)
#: Where the tables stand on the page.
MARKS = {
    name: (f"<!-- {name}: python -m tests.reproduction.critics -->\n", f"<!-- /{name} -->\n")
    for name in ("deep", "critics")
}


def results() -> dict:
    """The races of the methods on three testbeds."""
    small, deep = (read_json(RESULTS / f"{name}.json", dict) for name in ("winner", "deep/winner"))
    return {"rows": [row for row in small["rows"] if row["testbed"] != DEEP] + deep["rows"]}


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


def deep(result: Mapping) -> str:
    """Markdown: the race on the deep testbed, the largest hypervolume first."""
    own = [row for row in result["rows"] if row["testbed"] == DEEP and row["method"] != SMALLER]
    best = [
        max(column)
        for column in zip(*([_percent(p) for p in r["points"]] for r in own), strict=True)
    ]
    lines = []
    for row in sorted(own, key=lambda row: -row["hypervolume"]["mean"]):
        cells = zip(map(_percent, row["points"]), best, strict=True)
        words = [f"**{x:.1f}**" if x == most else f"{x:.1f}" for x, most in cells]
        lines.append([f"`{row['method']}`", *words])
    budgets = [f"{100 * point['budget']:.0f} %" for point in own[0]["points"]]
    return markdown([f"{DEEP}, budget", *budgets], lines)


def _percent(point: Mapping) -> float:
    return round(100 * point["accuracy"]["mean"], 1)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.reproduction.critics", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--write", type=Path, help="the page whose tables are written anew")
    page = parser.parse_args(argv).write

    def action() -> None:
        found = results()
        made = {"deep": deep(found), "critics": table(found)}
        print("\n\n".join(made.values()))
        if page:
            text = page.read_text(encoding="utf-8")
            for name, own in made.items():
                begin, end = MARKS[name]
                if begin not in text or end not in text:
                    raise ValueError(f"{page} has no place for the table: {begin.strip()}")
                before, rest = text.split(begin)
                text = f"{before}{begin}{own}\n{end}{rest.split(end)[1]}"
            write_text(page, text)

    return command.told(action)


if __name__ == "__main__":
    sys.exit(main())
