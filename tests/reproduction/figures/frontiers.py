"""The frontiers of all competitors: held-out accuracy against compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from statistics import fmean

from vispco.pareto import is_non_dominated

from .base import (
    BLUE,
    DOT,
    GREY,
    INK,
    LOOKS,
    ORANGE,
    columns,
    finish,
    percents,
    reached,
    setting_name,
    shape,
)

_DASHED, _DOTTED = (0, (6, 3)), (0, (1, 2))


def frontiers(results: Mapping[str, dict]) -> Iterator[tuple[str, Callable]]:
    """One panel a setting: held-out accuracy against share, everybody in it."""
    if "hypervolume" in results:
        yield "hypervolume", lambda new: _draw(new, results["hypervolume"], results.get("cost"))


def _draw(new, result: dict, cost: dict | None):
    rows, others = result["rows"], reached(cost) if cost else {}
    figure, panels = new(*shape(len(rows), 2), width=5.4, height=3.8)
    for axes, row in zip(panels.flat, rows, strict=False):
        line = {"color": INK, "linewidth": 0.9}
        axes.axhline(row["full"], linestyle=_DASHED, label="full model", **line)
        axes.axhline(row["floor"], linestyle=_DOTTED, label="nothing visual", **line)
        _grid(axes, row)
        for number, seed in enumerate(row["learned"]):
            curve = sorted((p["share"], p["accuracy"]) for p in seed["points"])
            faint = 0.35 if number else 1
            look = {"marker": "o", "markersize": 3, "linewidth": 1.1, "alpha": faint}
            axes.plot(*columns(curve), color=BLUE, label="learned, cheap", **look)
        for one in row["published"]:
            look = {"marker": "*", "markersize": 10, "linestyle": "none", "label": "published"}
            axes.plot(one["share"], one["accuracy"], color=LOOKS["published"][0], **look)
        for at in others.get(setting_name(row), []):
            _competitors(axes, at)
        title = setting_name(row)
        axes.set(title=title, xlabel="share of the prunable FLOPs", ylabel="held-out accuracy")
        percents(axes.xaxis)
        percents(axes.yaxis)
    return finish(figure, panels, len(rows), "What the compute buys", result)


def _grid(axes, row: dict) -> None:
    """The single-layer grid: all of it, the best in hindsight, and what its KL chooses."""
    points = [(p["share"], p["accuracy"]) for p in row["grid"]]
    look = {"s": 7, "alpha": 0.3, "linewidths": 0, "label": "single-layer grid"}
    axes.scatter(*columns(points), color=GREY, **look)
    kept = is_non_dominated(points, (False, True)).tolist()
    best = sorted(point for point, keep in zip(points, kept, strict=True) if keep)
    look = {"where": "post", "linewidth": 1.1, "label": "grid in hindsight"}
    axes.step(*columns(best), color=GREY, **look)
    chosen = sorted({(p["share"], p["accuracy"]) for p in row["grid_points"] if p})
    look = {"linestyle": "none", "marker": "s", "markersize": 5, "markerfacecolor": "none"}
    axes.plot(*columns(chosen), color="#444444", label="grid, chosen by KL", **look)


def _competitors(axes, row: dict) -> None:
    """What others find at one budget."""
    for one in row["rivals"]:
        if one["name"] != "learned, cheap":
            colour, marker = LOOKS[one["name"]]
            label = "learned, refined" if one["name"] == "learned" else one["name"]
            look = {"color": colour, "marker": marker, "markersize": 5.5, "label": label}
            axes.plot(fmean(one["share"]), fmean(one["accuracy"]), **look, **DOT)
    known = [d for d in row["random"] if d["accuracy"] is not None and 1 < d["n"] <= 160]
    if known:
        label = "random, best of the pool (160 at most)"
        look = {"color": ORANGE, "marker": "x", "linestyle": "none", "label": label}
        axes.plot(row["budget"], known[-1]["accuracy"], **look)
    for one in row["coarse"]:
        look = {"color": INK, "marker": LOOKS[one["name"]][1], "markersize": 7}
        axes.plot(one["share"], one["accuracy"], linestyle="none", label=one["name"], **look)
