"""What a frontier plot shows, as plain numbers that are checked before anything is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from statistics import fmean, stdev
from typing import Any

from ..frontier import Frontier, FrontierPoint
from ..pareto import is_non_dominated

Frontiers = Frontier | Sequence[Frontier] | Mapping[str, Frontier]
#: {label: frontiers of the same settings with different seeds}.
Runs = Mapping[str, Sequence[Frontier]]
KINDS = ("grid", "selected", "random", "published", "fitted", "coarse", "blind")
LEAST_KL = 1e-3
# Frontiers that agree in these differ in nothing but their seeds.
_SETTINGS = (
    *("label", "model", "data", "method", "kernel", "objective", "start", "steps"),
    *("learning_rate", "inner", "relative_to", "model_type", "num_layers", "samples"),
)


@dataclass(frozen=True)
class Dot:
    """A configuration in the plane of cost and quality, or the mean of several seeds at one budget.

    bar: (low, high) around y, or None. best: no other dot of its run costs less
    and has a better y. label: of a competitor. group: competitors of one group get one mean.
    """

    x: float
    y: float
    bar: tuple[float, float] | None = None
    best: bool = True
    label: str = ""
    group: str = ""


@dataclass(frozen=True)
class TradeOff:
    """What the left panel shows. Read it with `trade_off`.

    x, y: names of the axes. curves: {label of a run: its dots}. competitors: {kind: its dots}.
    levels: horizontal lines, as (label, height, dashes). held_out: y was measured on held-out data.
    """

    x: str
    y: str
    curves: dict[str, list[Dot]]
    competitors: dict[str, list[Dot]]
    levels: list[tuple[str, float, Any]]
    held_out: bool


def trade_off(named: Runs, x: str, y: str) -> TradeOff:
    """Read everything that the left panel shows. Raises ValueError for malformed numbers."""
    curves = {label: dots(frontiers, x, y) for label, frontiers in named.items()}
    points = [p for f in _all(named) for p in f.points]
    held_out = any(p.metrics.get(y) is not None for p in points)
    return TradeOff(x, y, curves, competitors(named, x, y), levels(named, y), held_out)


def check(frontier: Frontier) -> None:
    """Raise ValueError unless everything that could be drawn of a frontier is well formed."""
    named = runs(frontier)
    trade_off(named, "share", "accuracy")
    trade_off(named, "flops", "kl")


def runs(frontiers: Frontiers) -> dict[str, list[Frontier]]:
    """Frontiers by label. Those that differ in nothing but their seeds are one run.

    Raises ValueError if a frontier is empty, or a point's metrics or budget cannot be read.
    """
    if isinstance(frontiers, Frontier):
        frontiers = [frontiers]
    if not isinstance(frontiers, Mapping):
        pairs = [(_title(frontier), frontier) for frontier in frontiers]
    else:
        pairs = list(frontiers.items())
    if not pairs or not all(len(frontier) for _, frontier in pairs):
        raise ValueError("there is no point to plot: the frontier is empty")
    groups: dict[Any, list[tuple[str, Frontier]]] = {}
    for i, (label, frontier) in enumerate(pairs):
        _check_points(frontier)
        key = _settings(frontier)
        seen = [other.meta["seed"] for _, other in groups.get(key, [])]
        alone = "seed" not in frontier.meta or frontier.meta["seed"] in seen
        groups.setdefault(i if alone else key, []).append((label, frontier))
    named: dict[str, list[Frontier]] = {}
    for group in groups.values():
        label, first = group[0]
        if len(group) > 1:
            label = f"{_title(first)} (mean ± s.d. of {len(group)} seeds)"
        if label in named:
            label = f"{label} ({len(named) + 1})"
        named[label] = [frontier for _, frontier in group]
    return named


def _check_points(frontier: Frontier) -> None:
    for p in frontier.points:
        if not isinstance(p.metrics, Mapping) or not isinstance(p.budget, (str, Real, Mapping)):
            raise ValueError(
                "a point's metrics must be an object and its budget a number or text, got "
                f"{p.metrics!r} and {p.budget!r}"
            )


def _settings(frontier: Frontier) -> str:
    budgets = sorted(str(p.budget) for p in frontier.points)
    return repr([budgets, *(frontier.meta.get(name) for name in _SETTINGS)])


def _title(frontier: Frontier) -> str:
    label, method, kernel = (frontier.meta.get(key) for key in ("label", "method", "kernel"))
    return str(label or (f"{ranker(method)}, {kernel} kernel" if method and kernel else "found"))


def ranker(method: object) -> str:
    """Who ranks, in a few words. method: a name, or several with commas between.

    >>> ranker("fastv"), ranker("fastv, pdrop")
    ('fastv', 'the best of 2 methods')
    """
    names = str(method).split(", ")
    return names[0] if len(names) == 1 else f"the best of {len(names)} methods"


def _all(named: Runs) -> Iterator[Frontier]:
    for frontiers in named.values():
        yield from frontiers


def value(point: FrontierPoint, name: str) -> Any:
    """A point's share, flops, kl, or another of its metrics; None if it was not measured."""
    if name in ("share", "flops"):
        return getattr(point, name)
    return point.metrics.get("kl", point.loss) if name == "kl" else point.metrics.get(name)


def dots(frontiers: Sequence[Frontier], x: str, y: str) -> list[Dot]:
    """The dots of one run, sorted by x: every point that has both x and y.

    With several seeds a dot is the mean at one budget, and its bar is a standard deviation.
    """
    measured = [p for f in frontiers for p in f.points if value(p, y) is not None]
    groups: dict[Any, list[FrontierPoint]] = {}
    for i, point in enumerate(measured):
        groups.setdefault(i if len(frontiers) == 1 else str(point.budget), []).append(point)
    means, bars = [], []
    for points in groups.values():
        xs = [number(value(p, x), x) for p in points]
        ys = [number(value(p, y), y) for p in points]
        means.append((fmean(xs), fmean(ys)))
        bars.append(_deviation(ys, y) if len(points) > 1 else _interval(points[0], y))
    if not means:
        return []
    best = is_non_dominated(means, maximize=(False, y == "accuracy")).tolist()
    found = [Dot(*mean, bar, b) for mean, bar, b in zip(means, bars, best, strict=True)]
    return sorted(found, key=lambda d: (d.x, d.y))


def _deviation(ys: Sequence[float], y: str) -> tuple[float, float] | None:
    middle, deviation = fmean(ys), stdev(ys)
    least = LEAST_KL if y == "kl" else 0.0
    return (max(middle - deviation, least), middle + deviation) if deviation else None


def _interval(point: FrontierPoint, y: str) -> tuple[float, float] | None:
    interval = point.metrics.get("interval")
    if y != "accuracy" or not isinstance(interval, list) or len(interval) != 2:
        return None
    low, high = (number(end, "interval") for end in interval)
    return low, high


def competitors(named: Runs, x: str, y: str) -> dict[str, list[Dot]]:
    """The competitors recorded in all frontiers that have x and y, by kind, each once."""
    found: dict[str, dict[tuple, Dot]] = {kind: {} for kind in KINDS}
    for frontier in _all(named):
        entries = frontier.meta.get("competitors", [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError("meta['competitors'] must be a list of objects")
        for entry in entries:
            kind, label = entry.get("kind"), str(entry.get("label", ""))
            if kind not in KINDS:
                expected = ", ".join(KINDS)
                raise ValueError(f"a competitor's kind must be one of {expected}, got {kind!r}")
            if entry.get(x) is None or entry.get(y) is None:
                continue
            dot = Dot(number(entry[x], x), number(entry[y], y), label=label)
            group = str(entry.get("budget", round(dot.x, 2)))
            found[kind][dot.x, dot.y, label] = Dot(dot.x, dot.y, label=label, group=group)
    return {kind: sorted(d.values(), key=lambda d: (d.x, d.y)) for kind, d in found.items()}


def number(value: Any, name: str) -> float:
    """`value` as a float; a KL of at least LEAST_KL. Raises ValueError unless it is finite."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return max(float(value), LEAST_KL) if name == "kl" else float(value)


def levels(named: Runs, y: str) -> list[tuple[str, float, Any]]:
    """Horizontal reference lines: (label, height, dashes)."""
    metas = [frontier.meta for frontier in _all(named)]
    floor = next((str(m["floor"]) for m in metas if m.get("floor")), "no visual tokens")
    lines = []
    for key, label, dashes in (("full", "full model", (0, (6, 3))), ("floor", floor, (0, (1, 2)))):
        name = f"{key}_{y}"
        heights = [m[name] for m in metas if m.get(name) is not None]
        if heights:
            height = number(heights[0], name)
            shown = f"{100 * height:.1f} %" if y == "accuracy" else f"{height:.3g}"
            lines.append((f"{label}: {shown}", height, dashes))
    return lines
