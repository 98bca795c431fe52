"""The frontiers beside the grid and beside coarser pictures: held-out accuracy against compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from vispco.pareto import is_non_dominated

from .base import (
    BLUE,
    DOT,
    GREEN,
    GREY,
    LOOKS,
    columns,
    finish,
    level,
    percents,
    reached,
    setting_name,
    shape,
)

COARSE = "pooled, strided or random tokens, smaller pictures"


def frontiers(results: Mapping[str, dict]) -> Iterator[tuple[str, Callable]]:
    """One panel a setting: held-out accuracy against share, with all that costs no search."""
    if "hypervolume" in results:
        yield "hypervolume", lambda new: _draw(new, results["hypervolume"], results.get("cost"))


def _draw(new, result: dict, cost: dict | None):
    rows, others = result["rows"], reached(cost) if cost else {}
    figure, panels = new(*shape(len(rows), 2), width=5.4, height=3.8)
    for axes, row in zip(panels.flat, rows, strict=False):
        level(axes, row["full"], "full model", above=True)
        level(axes, row["floor"], "no visual tokens")
        _grid(axes, row)
        for number, seed in enumerate(row["learned"]):
            curve = sorted((p["share"], p["accuracy"]) for p in seed["points"])
            faint = 0.35 if number else 1
            look = {"marker": "o", "markersize": 3, "linewidth": 1.1, "alpha": faint}
            axes.plot(*columns(curve), color=BLUE, label="learned, cheap (a line a seed)", **look)
        for one in row["published"]:
            look = {
                "marker": "*",
                "markersize": 10,
                "linestyle": "none",
                "label": "published settings",
            }
            axes.plot(one["share"], one["accuracy"], color=LOOKS["published"][0], **look)
        for at in others.get(setting_name(row), []):
            _coarse(axes, at)
        title = setting_name(row)
        axes.set(title=title, xlabel="share of the prunable FLOPs", ylabel="held-out accuracy")
        percents(axes.xaxis)
        percents(axes.yaxis)
    return finish(figure, panels, len(rows), "What the compute buys", result)


def _grid(axes, row: dict) -> None:
    """The single-layer grid: all of it, the best in hindsight, and what its KL chooses."""
    points = [(p["share"], p["accuracy"]) for p in row["grid"]]
    look = {
        "s": 7,
        "alpha": 0.3,
        "linewidths": 0,
        "label": "single-layer grid (line: best in hindsight)",
    }
    axes.scatter(*columns(points), color=GREY, **look)
    kept = is_non_dominated(points, (False, True)).tolist()
    best = sorted(point for point, keep in zip(points, kept, strict=True) if keep)
    look = {"where": "post", "linewidth": 1.1}
    axes.step(*columns(best), color=GREY, **look)
    chosen = sorted({(p["share"], p["accuracy"]) for p in row["grid_points"] if p})
    look = {"linestyle": "none", "marker": "s", "markersize": 5, "markerfacecolor": "none"}
    axes.plot(*columns(chosen), color="#444444", label="of it, chosen by KL", **look)


def _coarse(axes, row: dict) -> None:
    """Tokens pooled, strided or drawn, and smaller pictures, near one budget."""
    for one in row["coarse"]:
        look = {"color": GREEN, "marker": "v", "markersize": 6, "label": COARSE}
        axes.plot(one["share"], one["accuracy"], **look, **DOT)
