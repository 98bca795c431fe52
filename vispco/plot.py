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

# Okabe and Ito's palette: told apart by every kind of colour vision; markers and dashes differ as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "h", "p", "*")
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
_INK, _GREY, _CHANCE, _CHANCE_MEAN, _PUBLISHED, _OTHERS = "#222222", "#8a8a8a", "#E69F00", "#B26B00", "#882255", "#117733"
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "vispco", "savefig.dpi": 160, "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"], "font.size": 10, "text.color": _INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _INK, "axes.labelcolor": _INK,
    "axes.titlesize": 11, "axes.titlelocation": "left", "axes.grid": True, "axes.axisbelow": True,
    "xtick.color": _INK, "ytick.color": _INK, "grid.color": "#e6e6e6", "grid.linewidth": 0.8,
    "legend.frameon": False, "legend.fontsize": 9}
_X_LABELS = {"share": "compute spent on visual tokens (share of the prunable FLOPs)",
             "flops": "prefill FLOPs of the language model"}
_Y_LABELS = {"accuracy": "accuracy", "kl": "KL to the full model (nats, lower is better)"}
_LEAST_KL = 1e-3
_KINDS = ("grid", "selected", "random", "published", "fitted", "coarse")

Frontiers = Frontier | Sequence[Frontier] | Mapping[str, Frontier]


def plot_frontier(frontiers: Frontiers, path: str | os.PathLike, *, x: str = "share",
                  y: str | None = None) -> None:
    """Draw one or several frontiers, and the competitors recorded in them, to an `.svg` or `.png` file.

    Left: accuracy (`point.metrics["accuracy"]`; KL where no point has one) against compute. Right: the keep
    ratio entering each layer, one panel a frontier. A mapping {label: frontier} names them in the legend.

    x: "share" of the prunable cost, or "flops". y: "accuracy", or "kl" on a logarithmic scale (anything below
    0.001 nats is drawn there); None chooses.
    Read from `frontier.meta`, where present: `full_accuracy`; `floor_accuracy`, `floor_kl` and `floor`, what
    they are the floor of; `competitors`, a list of {"kind": "grid", "selected", "random", "published", "fitted" or "coarse",
    "label", "share", "flops", "accuracy", "kl", "budget"}, where kind and the x and y in use are needed. Grid
    points get their Pareto frontier, random ones their mean and standard deviation per budget.

    The file is written atomically, and the same input gives the same bytes. Raises ValueError for another
    suffix, nothing to draw or malformed numbers, ImportError without matplotlib.

    >>> import tempfile
    >>> from vispco import Frontier, FrontierPoint, PruningConfig
    >>> point = FrontierPoint(PruningConfig("fastv", [1, .5]), 0.75, 1e9, 0.75, 0.1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plot_frontier(Frontier([point]), f"{folder}/frontier.svg")
    """
    kind = picture_kind(path)
    named = _named(frontiers)
    if x not in _X_LABELS:
        raise ValueError(f"x must be one of {', '.join(_X_LABELS)}, got {x!r}")
    y = y or ("accuracy" if any("accuracy" in p.metrics for f in named.values() for p in f.points) else "kl")
    if y not in _Y_LABELS:
        raise ValueError(f"y must be one of {', '.join(_Y_LABELS)}, got {y!r}")
    curves = {label: _curve(frontier, x, y) for label, frontier in named.items()}
    if not any(curves.values()):
        raise ValueError(f"no point has an {y}: measure it with `vispco evaluate --frontier`, or plot the KL")
    rivals = {name: _rivals(named, name, x, y) for name in _KINDS}
    if y == "kl":
        curves = {label: [(a, max(b, _LEAST_KL), p) for a, b, p in curve] for label, curve in curves.items()}
        rivals = {name: [{**r, "y": max(r["y"], _LEAST_KL)} for r in some] for name, some in rivals.items()}
    require_matplotlib()
    write_text(path, _render(named, curves, rivals, x, y, kind))


def picture_kind(path: str | os.PathLike) -> str:
    """"svg" or "png". Raises ValueError for anything else."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".svg", ".png"):
        raise ValueError(f"{os.fspath(path)}: the name of a picture must end in .svg or .png")
    return suffix[1:]


def require_matplotlib() -> None:
    """Raise ImportError, with the command that helps, unless matplotlib is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "vispco[plot]"') from error


# ---- data: plain lists of numbers, checked before anything is drawn -------------------------------------
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
    for point in (p for f in frontiers.values() for p in f.points):
        if not isinstance(point.metrics, Mapping) or not isinstance(point.budget, (str, Real)):
            raise ValueError("a point's metrics must be an object and its budget a number or text, got "
                             f"{point.metrics!r} and {point.budget!r}")
    return dict(frontiers)


def _title(frontier: Frontier) -> str:
    label, method, kernel = (frontier.meta.get(key) for key in ("label", "method", "kernel"))
    return str(label or (f"{method}, {kernel} kernel" if method and kernel else "found"))


def _value(point: FrontierPoint, name: str) -> Any:
    if name in ("share", "flops"):
        return getattr(point, name)
    return point.metrics.get("kl", point.loss) if name == "kl" else point.metrics.get(name)


def _curve(frontier: Frontier, x: str, y: str) -> list[tuple[float, float, FrontierPoint]]:
    """(x, y, point) of every point that has both, by x."""
    found = [(_value(p, x), _value(p, y), p) for p in frontier.points]
    numbers = [(_number(a, x), _number(b, y), p) for a, b, p in found if b is not None]
    return sorted(numbers, key=lambda n: n[:2])


def _rivals(named: Mapping[str, Frontier], kind: str, x: str, y: str) -> list[dict]:
    """Competitors of one kind from all frontiers, each once, with `x` and `y` as numbers."""
    found: dict[tuple, dict] = {}
    for frontier in named.values():
        competitors = frontier.meta.get("competitors", [])
        if not isinstance(competitors, list) or not all(isinstance(c, dict) for c in competitors):
            raise ValueError("meta['competitors'] must be a list of objects")
        for rival in competitors:
            if rival.get("kind") not in _KINDS:
                raise ValueError(f"a competitor's kind must be one of {', '.join(_KINDS)}, "
                                 f"got {rival.get('kind')!r}")
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
    floor = next((str(m["floor"]) for m in metas if m.get("floor")), "no visual tokens")
    for key, label, dashes in (("full", "full model", (0, (6, 3))), ("floor", floor, (0, (1, 2)))):
        heights = [m[f"{key}_{y}"] for m in metas if m.get(f"{key}_{y}") is not None]
        if heights:
            height = _number(heights[0], f"{key}_{y}")
            shown = f"{100 * height:.1f} %" if y == "accuracy" else f"{height:.3g}"
            lines.append((f"{label}: {shown}", height, dashes))
    return lines


# ---- the figure -----------------------------------------------------------------------------------------
def _render(named, curves, rivals, x: str, y: str, kind: str) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's style sheet must not change the picture
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(11.5, max(5.2, 2.4 * len(named) + 1)), layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, wspace=0.04)
        grid = figure.add_gridspec(len(named), 2, width_ratios=(1.25, 1))
        left = figure.add_subplot(grid[:, 0])
        _trade_off(left, named, curves, rivals, x, y)
        handles, labels = _legend(left, curves)
        figure.legend(handles, labels, loc="outside lower left", ncols=_columns(labels), handlelength=2.6,
                      columnspacing=1.8, borderaxespad=1)
        looks = _looks(named)
        for i, (label, frontier) in enumerate(named.items()):
            panel = figure.add_subplot(grid[i, 1])
            _schedules(panel, frontier, looks, crowded=len(named))
            panel.set_title(_short(label) if len(named) > 1 else "Visual tokens entering each layer",
                            color=_COLOURS[i % len(_COLOURS)] if len(named) > 1 else _INK)
            panel.set_xlabel("decoder layer" if i == len(named) - 1 else "")
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def _legend(axes, curves) -> tuple[list, list]:
    """Legend entries, the frontiers first."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: (labels[i] not in curves, i))
    return [handles[i] for i in order], [labels[i] for i in order]


def _short(label: str, most: int = 50) -> str:
    """Both ends of a label that is too long for a panel's title; the legend has it whole."""
    return label if len(label) <= most else f"{label[:most // 2]}…{label[-most // 2:]}"


def _columns(labels: list[str]) -> int:
    """As many columns as fit side by side, four at most; labels run down the columns."""
    def inches(columns: int) -> float:
        rows = -(-len(labels) // columns)
        longest = [max(map(len, labels[i:i + rows])) for i in range(0, len(labels), rows)]
        return sum(0.078 * n + 0.75 for n in longest)

    return next((n for n in (4, 3, 2) if inches(n) < 11), 1)


def _trade_off(axes, named, curves, rivals, x: str, y: str) -> None:
    """The left panel."""
    for label, height, dashes in _levels(named, y):
        axes.axhline(height, color=_INK, linestyle=dashes, linewidth=1, label=label, zorder=1.5)
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
    held_out = any(y in point.metrics for curve in curves.values() for _, _, point in curve)
    axes.set(xlabel=_X_LABELS[x], ylabel=("held-out " if held_out else "") + _Y_LABELS[y],
             title="What the compute buys")
    heights = [c[1] for curve in curves.values() for c in curve]
    _limits(axes, heights + [r["y"] for some in rivals.values() for r in some], x, y)
    others = [c[:2] for curve in curves.values() for c in curve]
    _draw_published(axes, rivals["published"], others + [(r["x"], r["y"]) for r in rivals["selected"]])


def _xy(points: list[dict]) -> tuple[list[float], list[float]]:
    return [p["x"] for p in points], [p["y"] for p in points]


def _draw_curve(axes, label: str, curve, i: int) -> None:
    colour = _COLOURS[i % len(_COLOURS)]
    for at, height, point in curve:
        interval = point.metrics.get("interval")
        if height == point.metrics.get("accuracy") and isinstance(interval, list) and len(interval) == 2:
            axes.plot([at, at], [_number(v, "interval") for v in interval], color=colour, alpha=0.35,
                      linewidth=2.5, solid_capstyle="butt", zorder=3.5)
    axes.plot([c[0] for c in curve], [c[1] for c in curve], color=colour, linestyle=_DASHES[i % len(_DASHES)],
              linewidth=2, marker=_MARKERS[i % len(_MARKERS)], markersize=8, markeredgecolor="white",
              markeredgewidth=1, label=label, zorder=4)


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
        label = str(point.get("label", ""))
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
    from matplotlib.ticker import EngFormatter, FuncFormatter

    if x == "share":
        axes.set_xlim(-0.03, 1.03)
        axes.xaxis.set_major_formatter(_percent())
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    if y == "accuracy":
        heights = heights + [v for line in axes.lines for v in line.get_ydata()]
        axes.set_ylim(max(-0.03, min(heights) - 0.06), min(1.02, max(heights) + 0.05))
        axes.yaxis.set_major_formatter(_percent())
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{'≤ ' if v == _LEAST_KL else ''}{v:g}"))
        axes.set_ylim(min(heights) / 1.5, max(*heights, 10 * _LEAST_KL) * 2)


def _percent():
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1, decimals=0, symbol=" %")


def _looks(named: Mapping[str, Frontier]) -> dict[str, tuple]:
    """{budget: (colour, marker)}, dark to light by share, the same in every panel."""
    from matplotlib import colormaps

    shares = {str(p.budget): p.share for f in named.values() for p in f.points}
    order, colours = sorted(shares, key=lambda b: (shares[b], b)), colormaps["viridis"]
    return {budget: (colours(0.88 * i / max(1, len(order) - 1)), _MARKERS[i % len(_MARKERS)])
            for i, budget in enumerate(order)}


def _schedules(axes, frontier: Frontier, looks: dict, crowded: int) -> None:
    """A right panel: the keep ratio entering each layer, a staircase per configuration.

    Neighbouring staircases are set a point or two apart, so that none hides another where they coincide.
    """
    from matplotlib.ticker import MaxNLocator
    from matplotlib.transforms import ScaledTranslation

    layers, count = max(p.config.num_layers for p in frontier.points), len(frontier)
    for rank, point in enumerate(frontier.points):
        colour, marker = looks[str(point.budget)]
        ratios = point.config.keep_ratios
        inches = (rank - (count - 1) / 2) * min(2.0, 14 / count) / 72 / crowded**0.5
        moved = axes.transData + ScaledTranslation(inches, inches, axes.figure.dpi_scale_trans)
        axes.step([i - 0.5 for i in range(len(ratios) + 1)], [*ratios, ratios[-1]], where="post",
                  color=colour, linewidth=1.8, transform=moved)
        dots = {"color": colour, "marker": marker, "markersize": 5.5, "markeredgecolor": "white",
                "markeredgewidth": 0.6, "zorder": 3}
        marked = [i for i, r in enumerate(ratios) if r < 1][::max(1, layers // 12)] or [len(ratios) - 1]
        axes.plot(marked, [ratios[i] for i in marked], linestyle="none", transform=moved, **dots)
        axes.plot([], [], linewidth=1.8, label=_budget(point.budget), **dots)
    axes.set(ylim=(-0.06, 1.06), xlim=(-0.8, layers - 0.2), ylabel="keep ratio")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.yaxis.set_major_formatter(_percent())
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], title="budget", loc="center left", bbox_to_anchor=(1.01, 0.5),
                alignment="left", handlelength=1.6, handletextpad=0.5, borderaxespad=0.2,
                labelspacing=0.5 if crowded == 1 else 0.2)


def _budget(budget: float | str) -> str:
    """As it reads best: shares in percent, everything else as it was asked for."""
    if isinstance(budget, str):
        return budget
    return f"{budget * 100:.4g} %" if budget <= 1 else f"{budget:.4g}"
