"""The right panels: the keep ratio entering each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..frontier import Frontier
from .figure import MARKERS, budget_label, evenly, percents
from .read import Runs

#: How the marks on a staircase look, besides colour and shape.
MARKER: dict[str, Any] = {
    "markersize": 5.5,
    "zorder": 3,
    "markeredgecolor": "white",
    "markeredgewidth": 0.6,
}


def looks(named: Runs) -> dict[str, tuple]:
    """{budget: (colour, marker)}, dark to light by share, the same in every panel."""
    from matplotlib import colormaps

    shares = {str(p.budget): p.share for group in named.values() for f in group for p in f.points}
    step = 0.88 / max(1, len(shares) - 1)
    found = {}
    for i, budget in enumerate(sorted(shares, key=lambda b: (shares[b], b))):
        found[budget] = colormaps["viridis"](i * step), MARKERS[i % len(MARKERS)]
    return found


def draw_schedules(axes, frontiers: Sequence[Frontier], looks: dict, crowded: int) -> None:
    """One run: a staircase per configuration, thin ones where there are several seeds.

    Neighbouring staircases are set a point or two apart, so that none hides another where they
    coincide; but no line leaves 0 % or 100 %, nor the range between.
    crowded: how many panels share the height of the picture.
    """
    from matplotlib.ticker import MaxNLocator

    by_seed = sorted(frontiers, key=lambda f: str(f.meta.get("seed")))
    points = sorted((p for f in by_seed for p in f.points), key=lambda p: p.share)
    layers = max(p.config.num_layers for p in points)
    width = 1.8 if len(frontiers) == 1 else 1.0
    apart = min(2.0, 14 / len(points)) / 72 / crowded**0.5
    axes.set(ylim=(-0.06, 1.06), xlim=(-0.8, layers - 0.2), ylabel="keep ratio")
    legend = {}
    for rank, point in enumerate(points):
        colour, marker = looks[str(point.budget)]
        style = {**MARKER, "color": colour, "marker": marker}
        inches = (rank - (len(points) - 1) / 2) * apart
        draw_stairs(axes, point.config.keep_ratios, inches, width, style)
        if str(point.budget) not in legend:
            label = budget_label(point.budget)
            legend[str(point.budget)] = axes.plot([], [], linewidth=1.8, label=label, **style)[0]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    percents(axes.yaxis)
    box = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "alignment": "left"}
    space = {"handlelength": 1.6, "handletextpad": 0.5, "borderaxespad": 0.2}
    space["labelspacing"] = 0.5 if crowded == 1 else 0.2
    axes.legend(handles=evenly([*legend.values()][::-1]), title="budget", **box, **space)


def draw_stairs(
    axes,
    ratios: Sequence[float],
    inches: float,
    width: float,
    style: dict[str, Any],
    halo: float = 0.0,
) -> None:
    """A staircase: the keep ratio entering each layer, marked where tokens are missing.

    inches: how far it is set apart, to the right and, where some tokens are kept and some are not,
        up. width: of the line, in points.
    style: of the marks; line and marks have its colour. halo: points of white beside the line,
    below all other lines.
    """
    from matplotlib.transforms import ScaledTranslation

    moved = axes.transData + ScaledTranslation(inches, 0, axes.figure.dpi_scale_trans)
    low, high = axes.get_ylim()
    up = inches / (axes.get_position().height * axes.figure.get_figheight()) * (high - low)
    ratios = [min(max(r + up, 0.0), 1.0) if 0 < r < 1 else r for r in ratios]
    edges, heights = [i - 0.5 for i in range(len(ratios) + 1)], [*ratios, ratios[-1]]
    line: dict[str, Any] = {"where": "post", "transform": moved}
    # Below the lines and marks of all staircases.
    below, colour = style["zorder"] - 2, style["color"]
    if halo:
        axes.step(edges, heights, color="white", linewidth=width + 2 * halo, zorder=below, **line)
    axes.step(edges, heights, color=colour, linewidth=width, zorder=below + 1, **line)
    marked = [i for i, r in enumerate(ratios) if r < 1][:: max(1, len(ratios) // 12)]
    marked = marked or [len(ratios) - 1]
    heights = [ratios[i] for i in marked]
    axes.plot(marked, heights, linestyle="none", transform=moved, **style)
