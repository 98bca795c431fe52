"""Figures of competition: frontiers, cost, percentiles, depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from statistics import fmean

from vispco.pareto import is_non_dominated
from ..stats import volume
from .base import BLUE, GREY, INK, LOOKS, ORANGE, finish, percents, plain_log, shape

LEAST = 1e-3  # nats: anything below is drawn here


def _name(row: Mapping) -> str:
    return f"{row['testbed']}, {row['method']}"


def _reached(result: dict) -> dict[str, list[dict]]:
    """{setting: rows of the budgets that it reaches, by budget}."""
    groups: dict[str, list[dict]] = {}
    for row in result["rows"]:
        if row["verdict"] != "not reachable":
            groups.setdefault(_name(row), []).append(row)
    return {name: sorted(rows, key=lambda r: r["budget"]) for name, rows in groups.items()}


# ---- frontiers ------------------------------------------------------------------------------------------
def frontiers(results: Mapping[str, dict]) -> Iterator[tuple[str, Callable]]:
    """One panel a setting: held-out accuracy against share, everybody in it."""
    if "hypervolume" in results:
        yield "hypervolume", lambda new: _frontiers(new, results["hypervolume"], results.get("cost"))


def _frontiers(new, result: dict, cost: dict | None):
    rows, others = result["rows"], _reached(cost) if cost else {}
    figure, panels = new(*shape(len(rows), 2), width=5.4, height=3.8)
    for axes, row in zip(panels.flat, rows):
        for height, label, dashes in ((row["full"], "full model", (0, (6, 3))), (row["floor"], "nothing visual", (0, (1, 2)))):
            axes.axhline(height, color=INK, linestyle=dashes, linewidth=0.9, label=label)
        points = [(p["share"], p["accuracy"]) for p in row["grid"]]
        axes.scatter(*zip(*points), s=7, color=GREY, alpha=0.3, linewidths=0, label="single-layer grid")
        best = sorted(p for p, keep in zip(points, is_non_dominated(points, (False, True)).tolist()) if keep)
        axes.step(*zip(*best), where="post", color=GREY, linewidth=1.1, label="grid in hindsight")
        chosen = sorted({(p["share"], p["accuracy"]) for p in row["grid_points"] if p})
        axes.plot(*zip(*chosen), color="#444444", linestyle="none", marker="s", markersize=5, markerfacecolor="none",
                  label="grid, chosen by KL")
        for seed in row["learned"]:
            curve = sorted((p["share"], p["accuracy"]) for p in seed["points"])
            axes.plot(*zip(*curve), color=BLUE, linewidth=1.1, marker="o", markersize=3, alpha=1 if seed is row["learned"][0] else 0.35,
                      label="learned, cheap")
        for one in row["published"]:
            axes.plot(one["share"], one["accuracy"], color=LOOKS["published"][0], marker="*", markersize=10, linestyle="none",
                      label="published")
        for at in others.get(_name(row), []):
            _competitors(axes, at)
        axes.set(title=_name(row), xlabel="share of the prunable FLOPs", ylabel="held-out accuracy")
        percents(axes.xaxis)
        percents(axes.yaxis)
    return finish(figure, panels, len(rows), "What the compute buys", result)


def _competitors(axes, row: dict) -> None:
    for one in row["rivals"]:
        if one["name"] != "learned, cheap":
            colour, marker = LOOKS[one["name"]]
            axes.plot(fmean(one["share"]), fmean(one["accuracy"]), color=colour, marker=marker, markersize=5.5, linestyle="none",
                      markeredgecolor="white", markeredgewidth=0.5, label="learned, refined" if one["name"] == "learned" else one["name"])
    known = [d for d in row["random"] if d["accuracy"] is not None and 1 < d["n"] <= 160]
    if known:
        axes.plot(row["budget"], known[-1]["accuracy"], color=ORANGE, marker="x", linestyle="none",
                  label="random, best of the pool (160 at most)")
    for one in row["coarse"]:
        axes.plot(one["share"], one["accuracy"], color=INK, marker=LOOKS[one["name"]][1], markersize=7, linestyle="none",
                  label=one["name"])


# ---- cost -----------------------------------------------------------------------------------------------
def cost(results: Mapping[str, dict]) -> Iterator[tuple[str, Callable]]:
    """A figure a setting: KL against passes, one panel a budget, and the hypervolume of all budgets."""
    if "cost" in results:
        for name, rows in _reached(results["cost"]).items():
            floor = next((r["floor"] for r in results.get("hypervolume", {"rows": []})["rows"] if _name(r) == name), None)
            yield (f"cost-{name.replace(', ', '-')}",
                   lambda new, name=name, rows=rows, floor=floor: _cost(new, results["cost"], name, rows, floor))


def _cost(new, result: dict, name: str, rows: list[dict], floor: float | None):
    floor = floor if len(rows) > 1 else None  # one budget makes no frontier
    count = len(rows) + (floor is not None)
    figure, panels = new(*shape(count, 4), width=3.3, height=2.7)
    for axes, row in zip(panels.flat, rows):
        xs = [d["passes"] for d in row["random"]]
        axes.plot(xs, [max(LEAST, d["mean"]) for d in row["random"]], color=ORANGE, label="random, best of N")
        axes.fill_between(xs, *([max(LEAST, d[k]) for d in row["random"]] for k in ("low", "high")), color=ORANGE, alpha=0.2,
                          linewidth=0, label="its 10th to 90th percentile")
        for one in row["rivals"]:
            colour, marker = LOOKS[one["name"]]
            kls = [max(LEAST, v) for v in one["kl"]]
            if not one["passes"]:  # a rule: the same at any cost
                axes.axhline(fmean(kls), color=colour, linestyle=":", linewidth=1, label=one["name"])
                continue
            axes.plot([one["passes"]] * 2, [min(kls), max(kls)], color=colour, linewidth=1.3, alpha=0.6)
            axes.plot(one["passes"], fmean(kls), color=colour, marker=marker, markersize=6, linestyle="none", markeredgecolor="white",
                      markeredgewidth=0.5, label=one["name"])
        axes.set(title=f"budget {row['budget']:g}", xscale="log", yscale="log")
        plain_log(axes.xaxis)
        plain_log(axes.yaxis)
    if floor is not None:
        _volumes(panels.flat[len(rows)], rows, floor)
    for axes in panels[:, 0]:
        axes.set_ylabel("calibration KL, nats")
    for axes in panels.flat[max(0, len(rows) - panels.shape[1]):len(rows)]:
        axes.set_xlabel("forward passes for this budget")
    if floor is not None:
        panels.flat[len(rows)].set(xlabel="forward passes for all budgets", ylabel="")
    return finish(figure, panels, count, f"What the same cost finds in other hands: {name}", result)


def _volumes(axes, rows: list[dict], floor: float) -> None:
    """Hypervolume on held-out accuracy of the frontier through all budgets, against its whole cost."""
    draws = sorted(set.intersection(*({d["n"] for d in r["random"] if d["accuracy"] is not None} for r in rows)))
    curve = []
    for n in draws:
        found = [next(d for d in r["random"] if d["n"] == n) for r in rows]
        curve.append((sum(d["passes"] for d in found), volume([(r["budget"], d["accuracy"]) for r, d in zip(rows, found)], floor)))
    if curve:
        axes.plot(*zip(*curve), color=ORANGE, marker="x")
    for one in rows[0]["rivals"]:
        found = [next((o for o in r["rivals"] if o["name"] == one["name"]), None) for r in rows]
        if all(found):
            points = [(fmean(o["share"]), fmean(o["accuracy"])) for o in found]
            colour, marker = LOOKS[one["name"]]
            if not one["passes"]:
                axes.axhline(volume(points, floor), color=colour, linestyle=":", linewidth=1)
                continue
            axes.plot(sum(o["passes"] for o in found), volume(points, floor), color=colour, marker=marker, markersize=6,
                      linestyle="none", markeredgecolor="white", markeredgewidth=0.5)
    axes.set(title="hypervolume, all budgets (higher is better)", xscale="log")
    plain_log(axes.xaxis)


# ---- percentile, depth ----------------------------------------------------------------------------------
def percentile(results: Mapping[str, dict]) -> Iterator[tuple[str, Callable]]:
    """One panel a setting: the random configurations' KL and ours, budget by budget."""
    if "percentile" in results and _reached(results["percentile"]):
        yield "percentile", lambda new: _percentile(new, results["percentile"])


def _percentile(new, result: dict):
    groups = _reached(result)
    figure, panels = new(*shape(len(groups), 4), width=3.4, height=2.9)
    for axes, (name, rows) in zip(panels.flat, groups.items()):
        for place, row in enumerate(rows):
            values = [max(LEAST, v) for v in row["random_kls"]]
            jitter = [place + 0.5 * ((i * 0.618) % 1 - 0.5) for i in range(len(values))]
            axes.scatter(jitter, values, s=5, color=ORANGE, alpha=0.5, linewidths=0, label="random configurations")
            axes.plot([place] * len(row["kl"]["values"]), [max(LEAST, v) for v in row["kl"]["values"]], color=BLUE, marker="_",
                      markersize=16, markeredgewidth=1.8, linestyle="none", label="learned, one bar a seed")
        axes.set(title=name, yscale="log", xlabel="budget")
        axes.set_xticks(range(len(rows)), [f"{r['budget']:g}" for r in rows])
        plain_log(axes.yaxis)
    for axes in panels[:, 0]:
        axes.set_ylabel("calibration KL, nats")
    return finish(figure, panels, len(groups), "The learned configuration among random ones of the same space and budget", result)


def depth(results: Mapping[str, dict]) -> Iterator[tuple[str, Callable]]:
    """Random search's KL over ours, against depth."""
    if results.get("depth", {}).get("rows"):
        yield "depth", lambda new: _depth(new, results["depth"])


def _depth(new, result: dict):
    budgets = sorted({r["budget"] for r in result["rows"]})
    figure, panels = new(1, len(budgets), width=4, height=3)
    for axes, budget in zip(panels.flat, budgets):
        rows = [r for r in result["rows"] if r["budget"] == budget]
        layers = [r["layers"] for r in rows]
        axes.axhline(1, color=INK, linewidth=0.9)
        axes.plot(layers, [r["lead"] for r in rows], color=BLUE, marker="o", label="random search of equal cost")
        axes.plot(layers, [r["lead_most"] for r in rows], color=ORANGE, marker="s", linestyle="--",
                  label=f"random search, best of {max(r['random_most']['n'] for r in rows)}")
        axes.set(title=f"budget {budget:g}", xlabel="decoder layers", ylabel="its KL over ours", yscale="log")
        axes.set_xticks(layers)
        plain_log(axes.yaxis)
    return finish(figure, panels, len(budgets), "How far random search falls behind with depth (above 1: ours is better)", result)
