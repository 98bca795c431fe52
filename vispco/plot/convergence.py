"""`plot_convergence`: how the search came to meet each budget, step by step."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

from ..utils.files import write_text
from .figure import COLOURS, DASHES, MARKERS, budget_label, picture_kind, plain_log, render, require_matplotlib

_PANELS = {"loss": "loss", "violation": "violation of the budget", "multiplier": "multiplier", "penalty": "penalty",
           "gradient": "norm of the gradient"}


def plot_convergence(steps: Sequence[Mapping], path: str | os.PathLike) -> None:
    """Draw loss, violation, multiplier, penalty and norm of the gradient against the step, a line a budget.

    steps: what `vispco.search` gives its callback, or the lines of `log.jsonl`. Penalty and gradient are on
    logarithmic scales. Raises ValueError for another suffix or no steps, ImportError without matplotlib.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plot_convergence([{"budget": 0.5, "step": 0, "loss": 1.0, "violation": 0.1}], f"{folder}/steps.svg")
    """
    kind = picture_kind(path)
    steps = [step for step in steps if "step" in step]  # the rest is refinement's
    if not steps:
        raise ValueError("there are no steps to plot: the search made none")
    require_matplotlib()
    shown = {name: label for name, label in _PANELS.items() if any(name in s for s in steps)}
    write_text(path, render(lambda figure: _draw(figure, steps, shown), 11.5, 4.6 if len(shown) > 3 else 2.7, kind))


def _draw(figure, steps: Sequence[Mapping], shown: Mapping[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    panels = figure.subplots(math.ceil(len(shown) / 3), min(3, len(shown)), squeeze=False)
    budgets = list(dict.fromkeys(str(s["budget"]) for s in steps))
    labels = {str(s["budget"]): budget_label(s["budget"]) for s in steps}
    for axes, (name, title) in zip(panels.flat, shown.items()):
        for i, budget in enumerate(budgets):
            own = [(s["step"], s[name]) for s in steps if str(s["budget"]) == budget and name in s]
            axes.plot(*zip(*own), color=COLOURS[i % len(COLOURS)], linestyle=DASHES[i % len(DASHES)], linewidth=1.5,
                      marker=MARKERS[i % len(MARKERS)], markersize=4, markevery=max(1, len(own) // 8),
                      label=labels[budget])
        if name in ("penalty", "gradient"):
            axes.set_yscale("log")
            plain_log(axes.yaxis)
        axes.set(title=title, xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in list(panels.flat)[len(shown):]:
        axes.set_axis_off()
    figure.legend(*panels.flat[0].get_legend_handles_labels(), title="budget", loc="outside right upper", alignment="left")
