"""The left panel: what the compute buys, by the runs and by what competes with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..pareto import is_non_dominated
from .figure import COLOURS, DASHES, INK, MARKERS, clean, percents, plain_log
from .read import LEAST_KL, Dot

X_LABELS = {"share": "compute spent on visual tokens (share of the prunable FLOPs)",
            "flops": "prefill FLOPs of the language model"}
Y_LABELS = {"accuracy": "accuracy", "kl": "KL to the full model (nats, lower is better)"}
_GREY, _CHANCE, _CHANCE_MEAN, _PUBLISHED, _OTHERS = "#8a8a8a", "#E69F00", "#B26B00", "#882255", "#117733"


def draw_trade_off(axes, curves: Mapping[str, Sequence[Dot]], rivals: Mapping[str, list[dict]], levels: Sequence, x: str,
                   y: str, held_out: bool) -> None:
    """curves: of each run. rivals: by kind. levels: horizontal lines, (label, height, dashes)."""
    for label, height, dashes in levels:
        axes.axhline(height, color=INK, linestyle=dashes, linewidth=1, label=label, zorder=1.5)
    _draw_grid(axes, rivals["grid"], y)
    if rivals["selected"]:
        axes.plot(*_xy(rivals["selected"]), color="#444444", linestyle="none", marker="s", markersize=7,
                  markerfacecolor="none", markeredgewidth=1.3, zorder=3, label="the best of them by KL")
    _draw_random(axes, rivals["random"])
    for kind, marker, label in (("fitted", "^", "FitPrune's fit of attention statistics"),
                                ("coarse", "v", "tokens pooled, or smaller pictures")):
        if rivals[kind]:
            axes.plot(*_xy(rivals[kind]), color=_OTHERS, linestyle="none", marker=marker, markersize=7,
                      markeredgecolor="white", zorder=3.2, label=label)
    for i, (label, curve) in enumerate(curves.items()):
        _draw_curve(axes, label, curve, i)
    axes.set(xlabel=X_LABELS[x], ylabel=("held-out " if held_out else "") + Y_LABELS[y], title="What the compute buys")
    heights = [d.y for curve in curves.values() for d in curve]
    _limits(axes, heights + [r["y"] for some in rivals.values() for r in some], x, y)
    others = [(d.x, d.y) for curve in curves.values() for d in curve]
    _draw_published(axes, rivals["published"], others + [(r["x"], r["y"]) for r in rivals["selected"]])


def _xy(points: list[dict]) -> tuple[list[float], list[float]]:
    return [p["x"] for p in points], [p["y"] for p in points]


def _draw_curve(axes, label: str, curve: Sequence[Dot], i: int) -> None:
    """A line through what no other point of the run dominates; those that are dominated stay, faint."""
    colour, best = COLOURS[i % len(COLOURS)], [d for d in curve if d.best]
    look = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "markersize": 8, "markeredgecolor": "white",
            "markeredgewidth": 1}
    for dot in curve:
        if dot.bar:
            axes.plot([dot.x] * 2, dot.bar, color=colour, alpha=0.35 if dot.best else 0.15, linewidth=2.5,
                      solid_capstyle="butt", zorder=3.5)
    faint = [d for d in curve if not d.best]
    axes.plot([d.x for d in faint], [d.y for d in faint], linestyle="none", alpha=0.3, zorder=3.4, **look)
    axes.plot([d.x for d in best], [d.y for d in best], linestyle=DASHES[i % len(DASHES)], linewidth=2, label=label,
              zorder=4, **look)


def _draw_grid(axes, points: list[dict], y: str) -> None:
    if not points:
        return
    keep = is_non_dominated([(p["x"], p["y"]) for p in points], maximize=(False, y == "accuracy")).tolist()
    best = [p for p, k in zip(points, keep) if k]
    axes.scatter(*_xy([p for p, k in zip(points, keep) if not k]), s=9, color=_GREY, alpha=0.22, linewidths=0,
                 label=f"every single-layer configuration ({len(points)})", zorder=2)
    axes.scatter(*_xy(best), s=14, color=_GREY, alpha=0.7, linewidths=0, zorder=2)
    axes.step(*_xy(best), where="post", color=_GREY, linewidth=1, label="their Pareto frontier, in hindsight",
              zorder=2.2)


def _draw_random(axes, points: list[dict]) -> None:
    if not points:
        return
    axes.scatter(*_xy(points), s=22, marker="x", linewidths=0.9, color=_CHANCE, alpha=0.55, zorder=2.5,
                 label=f"random schedules ({len(points)}; bar: mean ± s.d.)")
    groups: dict[str, list[dict]] = {}
    for point in points:
        groups.setdefault(str(point.get("budget", round(point["x"], 2))), []).append(point)
    for group in groups.values():
        xs, ys = _xy(group)
        mean = sum(ys) / len(ys)
        spread = (sum((v - mean) ** 2 for v in ys) / len(ys)) ** 0.5
        axes.errorbar([sum(xs) / len(xs)], [mean], yerr=[spread], color=_CHANCE_MEAN, linewidth=1.4,
                      capsize=4, marker="_", markersize=11, markeredgewidth=1.8, zorder=3)


def _draw_published(axes, points: list[dict], others: list[tuple[float, float]]) -> None:
    """Diamonds with their names beside them, where they cover least."""
    if not points:
        return
    axes.plot(*_xy(points), linestyle="none", marker="D", markersize=7, color=_PUBLISHED,
              markeredgecolor="white", label="published defaults", zorder=4.5)
    to_axes = axes.transData + axes.transAxes.inverted()
    taken = [to_axes.transform((p["x"], p["y"])) for p in points]
    taken += [to_axes.transform(other) for other in others]
    box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    line = {"arrowstyle": "-", "color": _PUBLISHED, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
    for point, start in zip(points, taken[:len(points)]):
        label = clean(str(point.get("label", "")))
        left, middle = _place(start, 0.013 * len(label), taken)
        taken += [(left + 0.013 * i, middle) for i in range(len(label))]
        axes.annotate(label, (point["x"], point["y"]), xytext=(left, middle), textcoords="axes fraction",
                      fontsize=8.5, color=_PUBLISHED, va="center", zorder=5, arrowprops=line, bbox=box)


def _place(start, width: float, taken) -> tuple[float, float]:
    """Left end and middle, in axes fractions, of a text near `start` that covers the fewest taken places."""
    def cost(left: float, middle: float) -> float:
        covered = sum(left - 0.02 < x < left + width + 0.02 and abs(y - middle) < 0.035 for x, y in taken)
        outside = left < 0 or left + width > 1 or not 0.03 < middle < 0.97
        return covered + 100 * outside + abs(middle - start[1])

    rows = [start[1] + side * distance for distance in (0.05, 0.1, 0.15, 0.2) for side in (-1, 1)]
    return min(((left, middle) for middle in rows for left in (start[0] + 0.03, start[0] - 0.03 - width)),
               key=lambda place: cost(*place))


def _limits(axes, heights: list[float], x: str, y: str) -> None:
    """Scales, limits and tick labels of the left panel."""
    from matplotlib.ticker import EngFormatter

    if x == "share":
        axes.set_xlim(-0.03, 1.03)
        percents(axes.xaxis)
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    if y == "accuracy":
        heights = heights + [v for line in axes.lines for v in line.get_ydata()]
        axes.set_ylim(max(-0.03, min(heights) - 0.06), min(1.02, max(heights) + 0.05))
        percents(axes.yaxis)
    else:
        axes.set_yscale("log")
        plain_log(axes.yaxis, LEAST_KL)
        axes.set_ylim(min(heights) / 1.5, max(*heights, 10 * LEAST_KL) * 2)
