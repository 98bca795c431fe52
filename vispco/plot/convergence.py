"""`plot_convergence`: how the search came to meet each budget, step by step."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from .figure import COLOURS, DASHES, MARKERS, budget_label, evenly, plain_log, save

#: The budget of a step that serves all budgets together.
ALL = "all"
#: What a step of the gradient records, in the words of a title.
PANELS = {
    "loss": "loss",
    "violation": "violation of the budget",
    "multiplier": "multiplier",
    "penalty": "penalty",
    "gradient": "norm of the gradient",
}


def plot_convergence(steps: Sequence[Mapping], path: str | os.PathLike) -> None:
    """Draw what each step of the search recorded, a panel for each number, a line for each budget.

    steps: what `vispco.search` gives its callback, or the lines of `log.jsonl`. Penalty and
    gradient are on logarithmic scales. Raises ValueError for another suffix or no steps,
    ImportError without matplotlib.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plot_convergence([{"budget": 0.5, "step": 0, "loss": 1.0}], f"{folder}/steps.svg")
    """
    # Records without a step are the refinement's.
    runs: dict[str, list[Mapping]] = {}
    for step in steps:
        if "step" in step:
            runs.setdefault(str(step.get("budget", ALL)), []).append(step)
    if not runs:
        raise ValueError("there are no steps to plot: the search made none")
    recorded = {name for run in runs.values() for step in run for name in step}
    shown = [name for name in PANELS if name in recorded]
    height = 4.6 if len(shown) > 3 else 2.7
    save(path, lambda figure: _draw(figure, list(runs.values()), shown), 11.5, height)


def _draw(figure, runs: Sequence[Sequence[Mapping]], shown: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    rows, columns = math.ceil(len(shown) / 3), min(3, len(shown))
    grid = figure.add_gridspec(rows, columns)
    panels = []
    for i in range(len(shown)):
        axes = figure.add_subplot(grid[i // columns, i % columns])
        panels.append(axes)
        _draw_lines(axes, runs, shown[i])
        axes.set(title=PANELS[shown[i]], xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = panels[0].get_legend_handles_labels()
    pairs = evenly([*zip(handles, labels, strict=True)])
    handles, labels = [handle for handle, _ in pairs], [label for _, label in pairs]
    style = {"title": "budget", "alignment": "left"}
    if len(shown) == rows * columns:
        figure.legend(handles, labels, loc="outside right upper", **style)
        return
    # In the place that the last row leaves.
    rest = figure.add_subplot(grid[rows - 1, len(shown) % columns :])
    rest.set_axis_off()
    rest.legend(handles, labels, loc="upper left", **style)


def _draw_lines(axes, runs: Sequence[Sequence[Mapping]], name: str) -> None:
    for i, run in enumerate(runs):
        xs = [step["step"] for step in run if name in step]
        ys = [step[name] for step in run if name in step]
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "markersize": 4}
        style["linestyle"] = DASHES[i % len(DASHES)]
        style["marker"] = MARKERS[i % len(MARKERS)]
        every = max(1, len(xs) // 8)
        axes.plot(xs, ys, markevery=every, label=budget_label(run[0].get("budget", ALL)), **style)
    if name in ("penalty", "gradient"):
        axes.set_yscale("log")
        plain_log(axes.yaxis)
