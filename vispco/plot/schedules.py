"""The right panels: the keep ratio entering each layer."""

from __future__ import annotations

from collections.abc import Sequence

from ..frontier import Frontier
from .figure import MARKERS, budget_label, percents
from .read import Runs


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
    coincide.
    crowded: how many panels share the height of the picture.
    """
    from matplotlib.ticker import MaxNLocator
    from matplotlib.transforms import ScaledTranslation

    by_seed = sorted(frontiers, key=lambda f: str(f.meta.get("seed")))
    points = sorted((p for f in by_seed for p in f.points), key=lambda p: p.share)
    layers = max(p.config.num_layers for p in points)
    width = 1.8 if len(frontiers) == 1 else 1.0
    apart = min(2.0, 14 / len(points)) / 72 / crowded**0.5
    legend = {}
    for rank, point in enumerate(points):
        colour, marker = looks[str(point.budget)]
        style = {"color": colour, "marker": marker, "markersize": 5.5, "zorder": 3}
        style |= {"markeredgecolor": "white", "markeredgewidth": 0.6}
        ratios = point.config.keep_ratios
        inches = (rank - (len(points) - 1) / 2) * apart
        moved = axes.transData + ScaledTranslation(inches, inches, axes.figure.dpi_scale_trans)
        edges = [i - 0.5 for i in range(len(ratios) + 1)]
        heights = [*ratios, ratios[-1]]
        axes.step(edges, heights, where="post", color=colour, linewidth=width, transform=moved)
        marked = [i for i, r in enumerate(ratios) if r < 1][:: max(1, layers // 12)]
        marked = marked or [len(ratios) - 1]
        heights = [ratios[i] for i in marked]
        axes.plot(marked, heights, linestyle="none", transform=moved, **style)
        if str(point.budget) not in legend:
            label = budget_label(point.budget)
            legend[str(point.budget)] = axes.plot([], [], linewidth=1.8, label=label, **style)[0]
    axes.set(ylim=(-0.06, 1.06), xlim=(-0.8, layers - 0.2), ylabel="keep ratio")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    percents(axes.yaxis)
    box = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "alignment": "left"}
    space = {"handlelength": 1.6, "handletextpad": 0.5, "borderaxespad": 0.2}
    space["labelspacing"] = 0.5 if crowded == 1 else 0.2
    axes.legend(handles=[*legend.values()][::-1], title="budget", **box, **space)
