"""Figures of competition: cost, percentiles, depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from statistics import fmean

from ..stats import volume
from .base import (
    BLUE,
    DOT,
    INK,
    LOOKS,
    ORANGE,
    at_least,
    columns,
    finish,
    plain_log,
    reached,
    setting_name,
    shape,
    share,
)

#: What a method's paper says of its own schedule: little is measured for it.
RULES = "FitPrune's fit", "VTW's rule"


def cost(results: Mapping[str, dict]) -> Iterator[tuple[str, Callable]]:
    """A figure a setting: KL against passes, one panel a budget, and the volume of all budgets."""
    if "cost" not in results:
        return
    volumes = results.get("hypervolume", {"rows": []})["rows"]
    floors = {setting_name(row): row["floor"] for row in reversed(volumes)}
    for name, rows in reached(results["cost"]).items():

        def draw(new, name=name, rows=rows):
            return _cost(new, results["cost"], name, rows, floors.get(name))

        yield f"cost-{name.replace(', ', '-')}", draw


def _cost(new, result: dict, name: str, rows: list[dict], floor: float | None):
    # One budget makes no frontier.
    floor = floor if len(rows) > 1 else None
    count = len(rows) + (floor is not None)
    figure, panels = new(*shape(count, 4), width=3.3, height=2.7)
    for axes, row in zip(panels.flat, rows, strict=False):
        _random(axes, row["random"])
        for one in row["rivals"]:
            _rival(axes, one)
        axes.set(title=f"budget {share(row['budget'])}", xscale="log", yscale="log")
        plain_log(axes.xaxis)
        plain_log(axes.yaxis)
    if floor is not None:
        _volumes(panels.flat[len(rows)], rows, floor)
    for axes in panels[:, 0]:
        axes.set_ylabel("calibration KL, nats")
    for axes in panels.flat[max(0, len(rows) - panels.shape[1]) : len(rows)]:
        axes.set_xlabel("forward passes for this budget")
    if floor is not None:
        panels.flat[len(rows)].set(xlabel="forward passes for all budgets", ylabel="")
    return finish(figure, panels, count, f"What the same cost finds in other hands: {name}", result)


def _random(axes, draws: list[dict]) -> None:
    """KL of random search against its cost."""
    xs = [draw["passes"] for draw in draws]
    low, mean, high = (at_least(d[key] for d in draws) for key in ("low", "mean", "high"))
    axes.plot(xs, mean, color=ORANGE, label="random, best of N (band: 10th to 90th percentile)")
    axes.fill_between(xs, low, high, color=ORANGE, alpha=0.2, linewidth=0)


def _rival(axes, one: dict) -> None:
    """KL of a competitor, over its seeds."""
    colour = LOOKS[one["name"]][0]
    kls = at_least(one["kl"])
    if not one["passes"]:
        _same_at_any_cost(axes, fmean(kls), one["name"])
        return
    passes = [one["passes"]] * 2
    axes.plot(passes, [min(kls), max(kls)], color=colour, linewidth=1.3, alpha=0.6)
    _mark(axes, one["passes"], fmean(kls), one["name"])


def _same_at_any_cost(axes, height: float, name: str) -> None:
    """What needs no search: a line, with its name on it."""
    axes.axhline(height, color=INK, linestyle=":", linewidth=1)
    place = {"xycoords": ("axes fraction", "data"), "xytext": (-2, 2)}
    look = {"textcoords": "offset points", "ha": "right", "fontsize": 7.5}
    axes.annotate(name, (1, height), **place, **look)


def _mark(axes, passes: float, height: float, name: str) -> None:
    """A competitor's place. The legend names the searches; a rule's name stands beside it."""
    colour, marker = LOOKS[name]
    look = {"color": colour, "marker": marker, "markersize": 6, **DOT}
    if name not in RULES:
        label = "learned, at two costs" if name.startswith("learned") else name
        axes.plot(passes, height, label=label, **look)
        return
    axes.plot(passes, height, **look)
    place = {"xytext": (2, 3), "textcoords": "offset points", "va": "bottom", "fontsize": 7.5}
    axes.annotate(name, (passes, height), **place)


def _volumes(axes, rows: list[dict], floor: float) -> None:
    """Hypervolume on held-out accuracy of the frontier through all budgets, against its cost."""
    known = [{d["n"]: d for d in r["random"] if d["accuracy"] is not None} for r in rows]
    curve = []
    for n in sorted(set.intersection(*map(set, known))):
        found = [by_n[n] for by_n in known]
        points = [(r["budget"], d["accuracy"]) for r, d in zip(rows, found, strict=True)]
        curve.append((sum(d["passes"] for d in found), volume(points, floor)))
    if curve:
        axes.plot(*columns(curve), color=ORANGE, marker="x")
    for name in [one["name"] for one in rows[0]["rivals"]]:
        rivals = [one for r in rows for one in r["rivals"] if one["name"] == name]
        if len(rivals) == len(rows):
            points = [(fmean(one["share"]), fmean(one["accuracy"])) for one in rivals]
            passes, height = sum(one["passes"] for one in rivals), volume(points, floor)
            if passes:
                _mark(axes, passes, height, name)
            else:
                _same_at_any_cost(axes, height, name)
    axes.set(title="hypervolume (higher is better)", xscale="log")
    plain_log(axes.xaxis)


def percentile(results: Mapping[str, dict]) -> Iterator[tuple[str, Callable]]:
    """One panel a setting: the random configurations' KL and ours, budget by budget."""
    if "percentile" in results and reached(results["percentile"]):
        yield "percentile", lambda new: _percentile(new, results["percentile"])


def _percentile(new, result: dict):
    groups = reached(result)
    figure, panels = new(*shape(len(groups), 4), width=3.4, height=2.9)
    cloud = {"s": 5, "alpha": 0.5, "linewidths": 0, "label": "random configurations"}
    bar = {"marker": "_", "markersize": 16, "markeredgewidth": 1.8, "linestyle": "none"}
    for axes, (name, rows) in zip(panels.flat, groups.items(), strict=False):
        for place, row in enumerate(rows):
            values, ours = at_least(row["random_kls"]), at_least(row["kl"]["values"])
            jitter = [place + 0.5 * ((i * 0.618) % 1 - 0.5) for i in range(len(values))]
            axes.scatter(jitter, values, color=ORANGE, **cloud)
            label = "learned, one bar a seed"
            axes.plot([place] * len(ours), ours, color=BLUE, label=label, **bar)
        axes.set(title=name, yscale="log", xlabel="budget")
        axes.set_xticks(range(len(rows)), [share(r["budget"]) for r in rows])
        plain_log(axes.yaxis)
    for axes in panels[:, 0]:
        axes.set_ylabel("calibration KL, nats")
    title = "The learned configuration among random ones of the same space and budget"
    return finish(figure, panels, len(groups), title, result)


def depth(results: Mapping[str, dict]) -> Iterator[tuple[str, Callable]]:
    """Random search's KL over ours, against depth."""
    if results.get("depth", {}).get("rows"):
        yield "depth", lambda new: _depth(new, results["depth"])


def _depth(new, result: dict):
    budgets = sorted({r["budget"] for r in result["rows"]})
    figure, panels = new(1, len(budgets), width=4, height=3)
    for axes, budget in zip(panels.flat, budgets, strict=True):
        rows = [r for r in result["rows"] if r["budget"] == budget]
        layers = [r["layers"] for r in rows]
        most = max(r["random_most"]["n"] for r in rows)
        axes.axhline(1, color=INK, linewidth=0.9)
        equal = {"color": BLUE, "marker": "o", "label": "random search of equal cost"}
        axes.plot(layers, [r["lead"] for r in rows], **equal)
        best = {"color": ORANGE, "marker": "s", "label": f"random search, best of {most}"}
        axes.plot(layers, [r["lead_most"] for r in rows], linestyle="--", **best)
        labels = {"xlabel": "decoder layers", "ylabel": "its KL over ours"}
        axes.set(title=f"budget {share(budget)}", yscale="log", **labels)
        axes.set_xticks(layers)
        plain_log(axes.yaxis)
    title = "How far random search falls behind with depth (above 1: ours is better)"
    return finish(figure, panels, len(budgets), title, result)
