"""`plot_frontier`: what the compute buys, and how each configuration spends it, as one SVG or PNG."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from .files import write_text
from .frontier import Frontier, FrontierPoint
from .pareto import is_non_dominated

# Okabe and Ito's palette: told apart by every kind of colour vision; shapes and dashes differ as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "h", "p", "*")
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
_INK, _GREY, _RANDOM, _PUBLISHED = "#222222", "#8a8a8a", "#E69F00", "#882255"
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "vispco", "font.family": "sans-serif", "font.size": 10,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"], "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": _INK, "axes.labelcolor": _INK, "text.color": _INK,
    "xtick.color": _INK, "ytick.color": _INK, "axes.titlesize": 11, "axes.titlelocation": "left",
    "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "legend.frameon": False, "legend.fontsize": 9, "savefig.dpi": 160}
_X_LABELS = {"share": "compute spent on visual tokens (share of the prunable FLOPs)",
             "flops": "prefill FLOPs of the language model"}
_Y_LABELS = {"accuracy": "accuracy", "kl": "KL to the full model (nats, lower is better)"}
_KINDS = ("grid", "selected", "random", "published")

Frontiers = Frontier | Sequence[Frontier] | Mapping[str, Frontier]


def plot_frontier(frontiers: Frontiers, path: str | os.PathLike, *, x: str = "share", y: str | None = None) -> None:
    """Draw one or several frontiers, with the competitors recorded in them, to an `.svg` or `.png` file.

    Left: accuracy (`point.metrics["accuracy"]`; KL where no point has one) against compute. Right: the keep ratio
    entering each layer, one panel a frontier. A mapping {label: frontier} sets the names in the legend.

    x: "share" of the prunable cost, or "flops". y: "accuracy" or "kl"; None chooses.
    Read from `frontier.meta`, where present: `full_accuracy`, `floor_accuracy` (and what `floor` means), and
    `competitors`: a list of {"kind": "grid" | "selected" | "random" | "published", "label", "share", "flops",
    "accuracy", "kl", "budget"}, of which kind, the x and the y in use are needed. Grid points get their Pareto
    frontier, random ones their mean and standard deviation per budget.

    The file is written atomically, and the same input gives the same bytes. Raises ValueError for another suffix,
    nothing to draw or malformed numbers, ImportError without matplotlib.

    >>> from vispco import Frontier, FrontierPoint, PruningConfig
    >>> point = FrontierPoint(PruningConfig("fastv", [1, .5]), 0.75, 1e9, 0.75, 0.1)
    >>> plot_frontier(Frontier([point]), "/tmp/frontier.svg")
    """
    kind = Path(path).suffix.lower()
    if kind not in (".svg", ".png"):
        raise ValueError(f"{os.fspath(path)}: a picture must end in .svg or .png, this ends in {kind or 'nothing'!r}")
    named = _named(frontiers)
    if x not in _X_LABELS:
        raise ValueError(f"x must be one of {', '.join(_X_LABELS)}, got {x!r}")
    y = y or ("accuracy" if any("accuracy" in p.metrics for f in named.values() for p in f.points) else "kl")
    if y not in _Y_LABELS:
        raise ValueError(f"y must be one of {', '.join(_Y_LABELS)}, got {y!r}")
    curves = {label: _curve(frontier, x, y) for label, frontier in named.items()}
    if not any(curves.values()):
        raise ValueError(f"no point has an {y} to plot: run `vispco evaluate --frontier` first, or plot the KL")
    rivals = {kind: _rivals(named, kind, x, y) for kind in _KINDS}
    write_text(path, _render(named, curves, rivals, x, y, kind[1:]))


# ---- data: plain lists of numbers, checked before anything is drawn -----------------------------------------
def _named(frontiers: Frontiers) -> dict[str, Frontier]:
    if isinstance(frontiers, Frontier):
        frontiers = [frontiers]
    if not isinstance(frontiers, Mapping):
        names: dict[str, Frontier] = {}
        for frontier in frontiers:
            label = _title(frontier)
            names[label if label not in names else f"{label} ({len(names) + 1})"] = frontier
        frontiers = names
    if not frontiers or not all(len(f) for f in frontiers.values()):
        raise ValueError("there is no point to plot: the frontier is empty")
    return dict(frontiers)


def _title(frontier: Frontier) -> str:
    method, kernel = (frontier.meta.get(k) for k in ("method", "kernel"))
    return str(frontier.meta.get("label") or (f"{method}, {kernel} kernel" if method and kernel else "learned"))


def _value(point: FrontierPoint, name: str) -> Any:
    if name in ("share", "flops"):
        return getattr(point, name)
    return point.metrics.get("kl", point.loss) if name == "kl" else point.metrics.get(name)


def _curve(frontier: Frontier, x: str, y: str) -> list[tuple[float, float, FrontierPoint]]:
    """(x, y, point) of every point that has both."""
    pairs = [(_value(p, x), _value(p, y), p) for p in frontier.points]
    return sorted(((_number(a, x), _number(b, y), p) for a, b, p in pairs if b is not None), key=lambda t: t[:2])


def _rivals(named: Mapping[str, Frontier], kind: str, x: str, y: str) -> list[dict]:
    """Competitors of one kind from all frontiers, each once, with `x` and `y` as numbers."""
    found: dict[tuple, dict] = {}
    for frontier in named.values():
        competitors = frontier.meta.get("competitors", [])
        if not isinstance(competitors, list) or not all(isinstance(c, dict) for c in competitors):
            raise ValueError("meta['competitors'] must be a list of objects")
        for rival in competitors:
            if rival.get("kind") not in _KINDS:
                raise ValueError(f"a competitor's kind must be one of {', '.join(_KINDS)}, got {rival.get('kind')!r}")
            if rival["kind"] == kind and rival.get(x) is not None and rival.get(y) is not None:
                entry = {**rival, "x": _number(rival[x], x), "y": _number(rival[y], y)}
                found[entry["x"], entry["y"], str(rival.get("label", ""))] = entry
    return sorted(found.values(), key=lambda r: (r["x"], r["y"]))


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not abs(value) < float("inf"):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def _levels(named: Mapping[str, Frontier], y: str) -> list[tuple[str, float, Any]]:
    """Horizontal reference lines: (label, height, dashes)."""
    metas, lines = [f.meta for f in named.values()], []
    for key, dashes, text in (("full", (0, (6, 3)), "full model"), ("floor", (0, (1, 2)), "no visual tokens")):
        values = [m[f"{key}_{y}"] for m in metas if m.get(f"{key}_{y}") is not None]
        if values and (y == "accuracy" or key == "floor"):
            height = _number(values[0], f"{key}_{y}")
            shown = f"{height:.1%}".replace("%", " %") if y == "accuracy" else f"{height:.3g}"
            lines.append((f"{next((str(m[key]) for m in metas if m.get(key)), text)}: {shown}", height, dashes))
    return lines


# ---- drawing -------------------------------------------------------------------------------------------------
def _render(named, curves, rivals, x: str, y: str, kind: str) -> bytes:
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "vispco[plot]"') from error
    buffer = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's style sheet must not change the picture
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(11.5, max(5.2, 2.4 * len(named) + 1)), layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, wspace=0.04)
        grid = figure.add_gridspec(len(named), 2, width_ratios=(1.25, 1))
        _trade_off(figure.add_subplot(grid[:, 0]), named, curves, rivals, x, y)
        figure.legend(*_legend(figure.axes[0], curves), loc="outside lower left", ncols=4, handlelength=2.6,
                      columnspacing=1.8, borderaxespad=1)
        shades, first = _shades(named), None
        for i, (label, frontier) in enumerate(named.items()):
            first = _schedules(figure.add_subplot(grid[i, 1], sharex=first), label, frontier, shades, i, len(named))
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()


def _trade_off(axes, named, curves, rivals, x: str, y: str) -> None:
    """The left panel."""
    for label, height, dashes in _levels(named, y):
        axes.axhline(height, color=_INK, linestyle=dashes, linewidth=1, label=label, zorder=1.5)
    _draw_grid(axes, rivals["grid"], y)
    if rivals["selected"]:
        axes.plot([r["x"] for r in rivals["selected"]], [r["y"] for r in rivals["selected"]], color="#444444",
                  linestyle="none", marker="s", markersize=7, markerfacecolor="none", markeredgewidth=1.3, zorder=3,
                  label="the best of them by calibration KL")
    _draw_random(axes, rivals["random"])
    for i, (label, curve) in enumerate(curves.items()):
        _draw_curve(axes, label, curve, i)
    axes.set(xlabel=_X_LABELS[x], ylabel=("held-out " if _held_out(curves, y) else "") + _Y_LABELS[y],
             title="What the compute buys")
    _limits(axes, curves, rivals, x, y)
    _draw_published(axes, rivals["published"], y)


def _held_out(curves, y: str) -> bool:
    return any(y in point.metrics for curve in curves.values() for _, _, point in curve)


def _draw_curve(axes, label: str, curve, i: int) -> None:
    colour = _COLOURS[i % len(_COLOURS)]
    xs, ys = [c[0] for c in curve], [c[1] for c in curve]
    for a, b, point in curve:
        interval = point.metrics.get("interval")
        if b == point.metrics.get("accuracy") and isinstance(interval, list) and len(interval) == 2:
            axes.plot([a, a], [_number(v, "interval") for v in interval], color=colour, alpha=0.35, linewidth=2.5,
                      solid_capstyle="butt", zorder=3.5)
    axes.plot(xs, ys, color=colour, linestyle=_DASHES[i % len(_DASHES)], linewidth=2, marker=_MARKERS[i], markersize=8,
              markeredgecolor="white", markeredgewidth=1, label=label, zorder=4)


def _draw_grid(axes, points: list[dict], y: str) -> None:
    if not points:
        return
    best = is_non_dominated([(p["x"], p["y"]) for p in points], maximize=(False, y == "accuracy")).tolist()
    for on_frontier, alpha, size in ((False, 0.22, 9), (True, 0.7, 14)):
        some = [p for p, b in zip(points, best) if b is on_frontier]
        label = f"every single-layer configuration ({len(points)})" if not on_frontier else None
        axes.scatter([p["x"] for p in some], [p["y"] for p in some], s=size, color=_GREY, alpha=alpha, linewidths=0,
                     label=label, zorder=2)
    front = [p for p, b in zip(points, best) if b]
    axes.step([p["x"] for p in front], [p["y"] for p in front], where="post", color=_GREY, linewidth=1,
              label="their Pareto frontier, in hindsight", zorder=2.2)


def _draw_random(axes, points: list[dict]) -> None:
    groups: dict[Any, list[dict]] = {}
    for point in points:
        groups.setdefault(str(point.get("budget", round(point["x"], 2))), []).append(point)
    axes.scatter([p["x"] for p in points], [p["y"] for p in points], s=22, marker="x", linewidths=0.9, color=_RANDOM,
                 alpha=0.55, label=f"random schedules ({len(points)}; bar: mean ± s.d.)" if points else None, zorder=2.5)
    for group in groups.values():
        ys = [p["y"] for p in group]
        mean, at = sum(ys) / len(ys), sum(p["x"] for p in group) / len(group)
        spread = (sum((v - mean) ** 2 for v in ys) / len(ys)) ** 0.5
        axes.errorbar([at], [mean], yerr=[spread], color="#B26B00", linewidth=1.4, capsize=4, marker="_", markersize=11,
                      markeredgewidth=1.8, zorder=3)


def _draw_published(axes, points: list[dict], y: str) -> None:
    """Diamonds with their names beside them, on the worse side, moved apart where they would overlap."""
    if not points:
        return
    axes.plot([p["x"] for p in points], [p["y"] for p in points], linestyle="none", marker="D", markersize=7,
              color=_PUBLISHED, markeredgecolor="white", label="published defaults", zorder=4.5)
    to_axes = axes.transData + axes.transAxes.inverted()
    side, last = (-1, 2.0) if y == "accuracy" else (1, -1.0)
    for point in sorted(points, key=lambda p: (side * p["y"], -p["x"])):
        label, (at, height) = str(point.get("label", "")), to_axes.transform((point["x"], point["y"]))
        last = min(height - 0.04, last - 0.05) if side < 0 else max(height + 0.04, last + 0.05)
        last = min(max(last, 0.03), 0.97)
        right = at + 0.03 + 0.013 * len(label) < 1
        axes.annotate(label, (point["x"], point["y"]), xytext=(at + (0.03 if right else -0.03), last),
                      textcoords="axes fraction", fontsize=8.5, color=_PUBLISHED, ha="left" if right else "right",
                      va="center", zorder=5,
                      bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
                      arrowprops={"arrowstyle": "-", "color": _PUBLISHED, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3})


def _limits(axes, curves, rivals, x: str, y: str) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, PercentFormatter

    ys = [c[1] for curve in curves.values() for c in curve] + [r["y"] for some in rivals.values() for r in some]
    if x == "share":
        axes.set_xlim(-0.03, 1.03)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    if y == "accuracy":
        low = min([*ys, *(line.get_ydata()[0] for line in axes.lines)])
        axes.set_ylim(max(-0.03, low - 0.06), 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    elif min((v for v in ys if v > 0), default=1) * 20 < max(ys):
        axes.set_yscale("log", nonpositive="clip")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.set_ylim(min(v for v in ys if v > 0) / 2, max(ys) * 2)
    else:
        axes.set_ylim(bottom=0)


def _legend(axes, curves) -> tuple[list, list]:
    """Legend entries, the learned frontiers first."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: (labels[i] not in curves, i))
    return [handles[i] for i in order], [labels[i] for i in order]


def _shades(named: Mapping[str, Frontier]) -> dict[str, tuple]:
    """{budget: (colour, marker)}, dark to light by share, the same in every panel."""
    from matplotlib import colormaps

    shares = {str(p.budget): p.share for f in named.values() for p in f.points}
    order = sorted(shares, key=lambda b: (shares[b], b))
    colours = colormaps["viridis"]
    return {b: (colours(0.88 * i / max(1, len(order) - 1)), _MARKERS[i % len(_MARKERS)]) for i, b in enumerate(order)}


def _schedules(axes, label: str, frontier: Frontier, shades: dict, index: int, panels: int):
    """One right panel: keep ratio entering each layer, a staircase per configuration.

    Neighbouring staircases are set a point or two apart, so that none hides another where they coincide.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter
    from matplotlib.transforms import ScaledTranslation

    layers, count = max(p.config.num_layers for p in frontier.points), len(frontier)
    for rank, point in enumerate(frontier.points):
        colour, marker = shades[str(point.budget)]
        ratios = point.config.keep_ratios
        nudge = (rank - (count - 1) / 2) * min(2.0, 14 / count) / 72 / panels**0.5
        moved = axes.transData + ScaledTranslation(nudge, nudge, axes.figure.dpi_scale_trans)
        axes.step([i - 0.5 for i in range(len(ratios) + 1)], [*ratios, ratios[-1]], where="post", color=colour,
                  linewidth=1.8, transform=moved)
        dropped = [i for i, r in enumerate(ratios) if r < 1][::max(1, layers // 12)] or [len(ratios) - 1]
        dots = {"color": colour, "marker": marker, "markersize": 5.5, "markeredgecolor": "white",
                "markeredgewidth": 0.6, "zorder": 3}
        axes.plot(dropped, [ratios[i] for i in dropped], linestyle="none", transform=moved, **dots)
        axes.plot([], [], linewidth=1.8, label=_budget(point.budget), **dots)
    last = index == panels - 1
    axes.set(ylim=(-0.06, 1.06), xlim=(-0.8, layers - 0.2), ylabel="keep ratio", xlabel="decoder layer" if last else "")
    axes.set_title("Visual tokens entering each layer" if panels == 1 else label,
                   color=_COLOURS[index % len(_COLOURS)] if panels > 1 else _INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], title="budget", loc="center left", bbox_to_anchor=(1.01, 0.5),
                alignment="left", handlelength=1.6, handletextpad=0.5,
                borderaxespad=0.2, labelspacing=0.5 if panels == 1 else 0.2)
    return axes


def _budget(budget: float | str) -> str:
    """As it is read best: shares in percent, everything else as it was asked for."""
    if isinstance(budget, str):
        return budget
    return f"{budget * 100:.4g} %" if budget <= 1 else f"{budget:.4g}"
