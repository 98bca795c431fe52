"""The left panel: what the compute buys, by the runs and by what competes with them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev

import numpy as np

from ..pareto import is_non_dominated
from .figure import COLOURS, DASHES, INK, MARKERS, clean, percents, plain_log
from .read import LEAST_KL, Dot, TradeOff

X_LABELS = {
    "share": "compute spent on visual tokens (share of the prunable FLOPs)",
    "flops": "prefill FLOPs of the language model",
}
Y_LABELS = {"accuracy": "accuracy", "kl": "KL to the full model (nats, lower is better)"}
_GREY, _ORANGE, _BROWN, _PURPLE, _GREEN = "#8a8a8a", "#E69F00", "#B26B00", "#882255", "#117733"
# By kind: marker, colours of face and edge, legend. The grid and the random schedules are clouds.
_SINGLE_DOTS: dict[str, tuple[str, str, str, str | None]] = {
    "selected": ("s", "none", "#444444", None),
    "fitted": ("^", _GREEN, "white", "FitPrune's fit of attention statistics"),
    "coarse": ("v", _GREEN, "white", "tokens pooled, or smaller pictures"),
    "published": ("D", _PURPLE, "white", "published defaults"),
    "blind": ("X", _ORANGE, "white", "random tokens, same schedule"),
}


def draw_trade_off(axes, shown: TradeOff) -> None:
    """Draw curves, competitors and levels, with their legend entries."""
    others = shown.competitors
    for _, height, dashes in shown.levels:
        axes.axhline(height, color=INK, linestyle=dashes, linewidth=1, zorder=1.5)
    if others["grid"]:
        _draw_grid(axes, others["grid"], shown.y, bool(others["selected"]))
    for kind, (marker, face, edge, name) in _SINGLE_DOTS.items():
        if others[kind]:
            style = {"markersize": 7, "markerfacecolor": face, "markeredgecolor": edge}
            axes.plot(*_xy(others[kind]), marker, label=name, zorder=4.5, **style)
    if others["random"]:
        _draw_random(axes, others["random"])
    for i, (label, curve) in enumerate(shown.curves.items()):
        _draw_curve(axes, label, curve, i)
    held_out = "held-out " if shown.held_out else ""
    axes.set(xlabel=X_LABELS[shown.x], ylabel=held_out + Y_LABELS[shown.y])
    axes.set_title("What the compute buys")
    _set_limits(axes, shown)
    taken = [dot for curve in shown.curves.values() for dot in curve] + others["selected"]
    bars = [Dot(dot.x, y) for dot in taken if dot.bar for y in np.linspace(*dot.bar, 9).tolist()]
    _name_levels(axes, shown, [*taken, *bars, *(dot for dots in others.values() for dot in dots)])
    _name_published(axes, others["published"], taken + bars + others["random"])


def _xy(dots: Sequence[Dot]) -> tuple[list[float], list[float]]:
    return [dot.x for dot in dots], [dot.y for dot in dots]


def _draw_curve(axes, label: str, curve: Sequence[Dot], i: int) -> None:
    """A line through the dots that no other of the run dominates. The dominated ones are faint."""
    colour = COLOURS[i % len(COLOURS)]
    style = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "zorder": 4}
    style |= {"markersize": 8, "markeredgecolor": "white"}
    dominated = [dot for dot in curve if not dot.best]
    best = [dot for dot in curve if dot.best]
    axes.plot(*_xy(dominated), linestyle="none", alpha=0.3, **style)
    axes.plot(*_xy(best), linestyle=DASHES[i % len(DASHES)], linewidth=2, label=label, **style)
    for dot in curve:
        if dot.bar:
            alpha = 0.35 if dot.best else 0.15
            axes.plot([dot.x] * 2, dot.bar, color=colour, alpha=alpha, linewidth=2.5, zorder=3.5)


def _draw_grid(axes, dots: Sequence[Dot], y: str, selected: bool) -> None:
    """A cloud of all single-layer configurations, and the staircase of the best."""
    maximize = (False, y == "accuracy")
    keep = is_non_dominated([(dot.x, dot.y) for dot in dots], maximize=maximize).tolist()
    best = [dot for dot, kept in zip(dots, keep, strict=True) if kept]
    rest = [dot for dot, kept in zip(dots, keep, strict=True) if not kept]
    label = f"every single-layer configuration ({len(dots)}; line: best in hindsight"
    label += "; square: by KL)" if selected else ")"
    style = {"color": _GREY, "linewidths": 0, "zorder": 2}
    axes.scatter(*_xy(rest), s=9, alpha=0.22, label=label, **style)
    axes.scatter(*_xy(best), s=14, alpha=0.7, **style)
    axes.step(*_xy(best), where="post", color=_GREY, linewidth=1, zorder=2.2)


def _draw_random(axes, dots: Sequence[Dot]) -> None:
    """A cross for each random schedule; for each budget the mean and a standard deviation."""
    label = f"random schedules ({len(dots)}; bar: mean ± s.d.)"
    axes.scatter(*_xy(dots), s=22, marker="x", color=_ORANGE, alpha=0.55, zorder=2.5, label=label)
    for group in dict.fromkeys(dot.group for dot in dots):
        xs, ys = _xy([dot for dot in dots if dot.group == group])
        style = {"color": _BROWN, "capsize": 4, "marker": "_", "markersize": 11, "zorder": 3}
        axes.errorbar([fmean(xs)], [fmean(ys)], yerr=[pstdev(ys)], **style)


def _set_limits(axes, shown: TradeOff) -> None:
    """Scales, limits and tick labels."""
    from matplotlib.ticker import EngFormatter

    parts = [*shown.curves.values(), *shown.competitors.values()]
    heights = [dot.y for dots in parts for dot in dots]
    if shown.x == "share":
        axes.set_xlim(-0.03, 1.03)
        percents(axes.xaxis)
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    if shown.y == "accuracy":
        heights += [height for line in axes.lines for height in line.get_ydata()]
        axes.set_ylim(max(-0.03, min(heights) - 0.06), min(1.02, max(heights) + 0.05))
        percents(axes.yaxis)
    else:
        axes.set_yscale("log")
        axes.set_ylim(min(heights) / 1.5, max(heights) * 1.5)
        plain_log(axes.yaxis, LEAST_KL)


def _name_levels(axes, shown: TradeOff, others: Sequence[Dot]) -> None:
    """Write the names of the horizontal lines where they cover least, above the line if equal."""
    to_axes = axes.transData + axes.transAxes.inverted()
    taken = [to_axes.transform((dot.x, dot.y)) for dot in others]
    for label, height, _ in shown.levels:
        text = clean(label)
        side, up = _side(to_axes.transform((0, height))[1], 0.014 * len(text), taken)
        place = {"xytext": (-2 if side == "right" else 2, 3 * up), "textcoords": "offset points"}
        look = {"fontsize": 8.5, "color": INK, "zorder": 1.6}
        look |= {"ha": side, "va": "bottom" if up > 0 else "top"}
        at = float(side == "right"), height
        axes.annotate(text, at, xycoords=("axes fraction", "data"), **place, **look)


def _side(middle: float, width: float, taken) -> tuple[str, int]:
    """Where a text on a line covers the fewest taken places: ("left" or "right", 1 above or -1)."""

    def covered(place: tuple[str, int]) -> int:
        side, up = place
        left = 1 - width if side == "right" else 0
        near = [x for x, y in taken if -0.02 < up * (y - middle) < 0.06]
        return sum(left - 0.01 < x < left + width + 0.01 for x in near)

    return min(((side, up) for up in (1, -1) for side in ("right", "left")), key=covered)


def _name_published(axes, dots: Sequence[Dot], others: Sequence[Dot]) -> None:
    """Write the names of published configurations beside them, where they cover least."""
    to_axes = axes.transData + axes.transAxes.inverted()
    names: dict[tuple[float, float], list[str]] = {}
    for dot in dots:
        names.setdefault((dot.x, dot.y), []).append(dot.label)
    taken = [to_axes.transform(xy) for xy in (*names, *((dot.x, dot.y) for dot in others))]
    box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    line = {"arrowstyle": "-", "color": _PURPLE, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
    style = {"fontsize": 8.5, "color": _PURPLE, "va": "center", "zorder": 5}
    for xy, labels in names.items():
        text = clean(", ".join(labels))
        left, middle = _place(to_axes.transform(xy), 0.013 * len(text), taken)
        taken += [(left + 0.013 * i, middle) for i in range(len(text))]
        place = {"xytext": (left, middle), "textcoords": "axes fraction"}
        axes.annotate(text, xy, **place, arrowprops=line, bbox=box, **style)


def _place(start, width: float, taken) -> tuple[float, float]:
    """Where a text near `start` covers the fewest taken places: (left, middle), axes fractions."""

    def cost(place: tuple[float, float]) -> float:
        left, middle = place
        right = left + width
        covered = sum(left - 0.02 < x < right + 0.02 and abs(y - middle) < 0.035 for x, y in taken)
        outside = left < 0 or right > 1 or not 0.03 < middle < 0.97
        return covered + 100 * outside + abs(middle - start[1])

    heights = [start[1] + side * d for d in (0.05, 0.1, 0.15, 0.2) for side in (-1, 1)]
    sides = (start[0] + 0.03, start[0] - 0.03 - width)
    return min(((left, middle) for middle in heights for left in sides), key=cost)
