"""What a frontier plot shows, as plain numbers that are checked before anything is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from statistics import fmean, stdev
from typing import Any

from ..frontier import Frontier, FrontierPoint
from ..pareto import is_non_dominated

Frontiers = Frontier | Sequence[Frontier] | Mapping[str, Frontier]
#: {label: frontiers of the same settings with different seeds}.
Runs = Mapping[str, Sequence[Frontier]]
KINDS = ("grid", "selected", "random", "published", "fitted", "coarse")
LEAST_KL = 1e-3
_SETTINGS = ("label", "model", "data", "method", "kernel", "objective", "steps", "learning_rate", "inner", "relative_to",
             "model_type", "num_layers", "samples")


@dataclass(frozen=True)
class Dot:
    """A configuration in the plane, or the mean of several seeds' at one budget. bar: (low, high) around y, or None.
    best: no other of its run has a lower cost and a better y."""

    x: float
    y: float
    bar: tuple[float, float] | None = None
    best: bool = True


def runs(frontiers: Frontiers) -> dict[str, list[Frontier]]:
    """By label; frontiers that differ in nothing but their seeds are one run."""
    if isinstance(frontiers, Frontier):
        frontiers = [frontiers]
    pairs = list(frontiers.items()) if isinstance(frontiers, Mapping) else [(_title(f), f) for f in frontiers]
    if not pairs or not all(len(f) for _, f in pairs):
        raise ValueError("there is no point to plot: the frontier is empty")
    for point in (p for _, f in pairs for p in f.points):
        if not isinstance(point.metrics, Mapping) or not isinstance(point.budget, (str, Real, Mapping)):
            raise ValueError("a point's metrics must be an object and its budget a number or text, got "
                             f"{point.metrics!r} and {point.budget!r}")
    groups: dict[Any, list[tuple[str, Frontier]]] = {}
    for i, (label, frontier) in enumerate(pairs):
        key = _settings(frontier)
        taken = [f.meta["seed"] for _, f in groups.get(key, [])]
        alone = "seed" not in frontier.meta or frontier.meta["seed"] in taken
        groups.setdefault(i if alone else key, []).append((label, frontier))
    named: dict[str, list[Frontier]] = {}
    for group in groups.values():
        label = group[0][0]
        if len(group) > 1:
            label = f"{_title(group[0][1])} (mean ± s.d. of {len(group)} seeds)"
        named[label if label not in named else f"{label} ({len(named) + 1})"] = [f for _, f in group]
    return named


def check(frontier: Frontier) -> None:
    """Raise ValueError unless everything that could be drawn of a frontier is well formed."""
    named = runs(frontier)
    for x, y in (("share", "accuracy"), ("flops", "kl")):
        dots([frontier], x, y), levels(named, y)
        for kind in KINDS:
            rivals(named, kind, x, y)


def _settings(frontier: Frontier) -> str:
    budgets = sorted(str(p.budget) for p in frontier.points)
    return repr([budgets, *(frontier.meta.get(name) for name in _SETTINGS)])


def _title(frontier: Frontier) -> str:
    label, method, kernel = (frontier.meta.get(key) for key in ("label", "method", "kernel"))
    return str(label or (f"{method}, {kernel} kernel" if method and kernel else "found"))


def value(point: FrontierPoint, name: str) -> Any:
    """A point's share, flops, kl, or another of its metrics; None if it was not measured."""
    if name in ("share", "flops"):
        return getattr(point, name)
    return point.metrics.get("kl", point.loss) if name == "kl" else point.metrics.get(name)


def dots(frontiers: Sequence[Frontier], x: str, y: str) -> list[Dot]:
    """Of one run, by x: every point that has both; with several seeds mean and standard deviation per budget."""
    groups: dict[Any, list[FrontierPoint]] = {}
    for i, point in enumerate(p for f in frontiers for p in f.points if value(p, y) is not None):
        groups.setdefault(i if len(frontiers) == 1 else str(point.budget), []).append(point)
    found = []
    for points in groups.values():
        xs, ys = ([_checked(number(value(p, name), name), name) for p in points] for name in (x, y))
        middle, spread = fmean(ys), stdev(ys) if len(ys) > 1 else 0.0
        bar = (max(middle - spread, LEAST_KL if y == "kl" else 0.0), middle + spread)
        found.append((fmean(xs), middle, bar if spread else None if len(ys) > 1 else _interval(points[0], y)))
    best = is_non_dominated([d[:2] for d in found], maximize=(False, y == "accuracy")).tolist() if found else []
    return sorted((Dot(*d, b) for d, b in zip(found, best)), key=lambda d: (d.x, d.y))


def _checked(number: float, name: str) -> float:
    return max(number, LEAST_KL) if name == "kl" else number


def _interval(point: FrontierPoint, y: str) -> tuple[float, float] | None:
    interval = point.metrics.get("interval")
    if y != "accuracy" or not isinstance(interval, list) or len(interval) != 2:
        return None
    low, high = (number(end, "interval") for end in interval)
    return low, high


def rivals(named: Runs, kind: str, x: str, y: str) -> list[dict]:
    """Competitors of one kind from all frontiers, each once, with `x` and `y` as numbers."""
    found: dict[tuple, dict] = {}
    for frontier in (f for group in named.values() for f in group):
        competitors = frontier.meta.get("competitors", [])
        if not isinstance(competitors, list) or not all(isinstance(c, dict) for c in competitors):
            raise ValueError("meta['competitors'] must be a list of objects")
        for rival in competitors:
            if rival.get("kind") not in KINDS:
                raise ValueError(f"a competitor's kind must be one of {', '.join(KINDS)}, "
                                 f"got {rival.get('kind')!r}")
            if rival["kind"] == kind and rival.get(x) is not None and rival.get(y) is not None:
                entry = {**rival, "x": number(rival[x], x), "y": _checked(number(rival[y], y), y)}
                found[entry["x"], entry["y"], str(rival.get("label", ""))] = entry
    return sorted(found.values(), key=lambda r: (r["x"], r["y"]))


def number(value: Any, name: str) -> float:
    """Raises ValueError unless `value` is finite."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def levels(named: Runs, y: str) -> list[tuple[str, float, Any]]:
    """Horizontal reference lines: (label, height, dashes)."""
    metas, lines = [f.meta for group in named.values() for f in group], []
    floor = next((str(m["floor"]) for m in metas if m.get("floor")), "no visual tokens")
    for key, label, dashes in (("full", "full model", (0, (6, 3))), ("floor", floor, (0, (1, 2)))):
        heights = [m[f"{key}_{y}"] for m in metas if m.get(f"{key}_{y}") is not None]
        if heights:
            height = number(heights[0], f"{key}_{y}")
            shown = f"{100 * height:.1f} %" if y == "accuracy" else f"{height:.3g}"
            lines.append((f"{label}: {shown}", height, dashes))
    return lines
