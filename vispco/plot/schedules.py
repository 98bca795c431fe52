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
    order, colours = sorted(shares, key=lambda b: (shares[b], b)), colormaps["viridis"]
    return {budget: (colours(0.88 * i / max(1, len(order) - 1)), MARKERS[i % len(MARKERS)])
            for i, budget in enumerate(order)}


def draw_schedules(axes, frontiers: Sequence[Frontier], looks: dict, crowded: int) -> None:
    """One run: a staircase per configuration, thin ones where there are several seeds.

    Neighbouring staircases are set a point or two apart, so that none hides another where they coincide.
    """
    from matplotlib.ticker import MaxNLocator
    from matplotlib.transforms import ScaledTranslation

    points = [p for f in sorted(frontiers, key=lambda f: str(f.meta.get("seed"))) for p in f.points]
    points.sort(key=lambda p: p.share)
    layers, count = max(p.config.num_layers for p in points), len(points)
    width, labelled = 1.8 if len(frontiers) == 1 else 1.0, set()
    for rank, point in enumerate(points):
        colour, marker = looks[str(point.budget)]
        ratios = point.config.keep_ratios
        inches = (rank - (count - 1) / 2) * min(2.0, 14 / count) / 72 / crowded**0.5
        moved = axes.transData + ScaledTranslation(inches, inches, axes.figure.dpi_scale_trans)
        axes.step([i - 0.5 for i in range(len(ratios) + 1)], [*ratios, ratios[-1]], where="post",
                  color=colour, linewidth=width, transform=moved)
        dots = {"color": colour, "marker": marker, "markersize": 5.5, "markeredgecolor": "white",
                "markeredgewidth": 0.6, "zorder": 3}
        marked = [i for i, r in enumerate(ratios) if r < 1][::max(1, layers // 12)] or [len(ratios) - 1]
        axes.plot(marked, [ratios[i] for i in marked], linestyle="none", transform=moved, **dots)
        if str(point.budget) not in labelled:
            axes.plot([], [], linewidth=1.8, label=budget_label(point.budget), **dots)
            labelled.add(str(point.budget))
    axes.set(ylim=(-0.06, 1.06), xlim=(-0.8, layers - 0.2), ylabel="keep ratio")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    percents(axes.yaxis)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], title="budget", loc="center left", bbox_to_anchor=(1.01, 0.5),
                alignment="left", handlelength=1.6, handletextpad=0.5, borderaxespad=0.2,
                labelspacing=0.5 if crowded == 1 else 0.2)
