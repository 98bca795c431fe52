"""`plot_frontier`: what the compute buys, and how each configuration spends it."""

from __future__ import annotations

import os

from .figure import COLOURS, INK, MOST_ENTRIES, Picture, clean, legend_columns, save
from .read import Frontiers, Runs, runs, trade_off
from .schedules import draw_schedules, looks
from .trade_off import X_LABELS, Y_LABELS, draw_trade_off


def plot_frontier(
    frontiers: Frontiers,
    path: str | os.PathLike | None = None,
    *,
    x: str = "share",
    y: str | None = None,
) -> Picture:
    """Draw frontiers, and the competitors recorded in them, to an `.svg` or `.png` file.

    path: the file; None: a notebook shows the picture that is returned.

    Left: accuracy (`point.metrics["accuracy"]`; KL where no point has one) against compute. Right:
    the keep ratio entering each layer, one panel a frontier. A mapping {label: frontier} names them
    in the legend. Frontiers that differ in nothing but their seeds are drawn as one: means, with a
    bar of a standard deviation, per budget. Otherwise bars are `point.metrics["interval"]`. Points
    that another of their frontier dominates are faint.

    x: "share" of the prunable cost, or "flops". y: "accuracy", or "kl" on a logarithmic scale
    (anything below 0.001 nats is drawn there); None chooses.
    Read from `frontier.meta`, where present: `full_accuracy`; `floor_accuracy`, `floor_kl` and
    `floor`, what they are the floor of; `competitors`, a list of {"kind": "grid", "selected",
    "random", "published", "fitted", "coarse" or "blind", "label", "share", "flops", "accuracy",
    "kl", "budget"}, where kind and the x and y in use are needed. Grid points get their Pareto
    frontier, random ones their mean and standard deviation per budget. Published configurations at
    the same place get one marker with all their names.

    The file is written atomically, and the same input gives the same bytes. Raises ValueError for
    another suffix, nothing to draw or malformed numbers, ImportError without matplotlib.

    >>> import tempfile
    >>> from vispco import Frontier, FrontierPoint, PruningConfig
    >>> point = FrontierPoint(PruningConfig("fastv", [1, .5]), 0.75, 1e9, 0.75, 0.1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     picture = plot_frontier(Frontier([point]), f"{folder}/frontier.svg")
    """
    named = runs(frontiers)
    if x not in X_LABELS:
        raise ValueError(f"x must be one of {', '.join(X_LABELS)}, got {x!r}")
    points = [p for group in named.values() for f in group for p in f.points]
    y = y or ("accuracy" if any("accuracy" in p.metrics for p in points) else "kl")
    if y not in Y_LABELS:
        raise ValueError(f"y must be one of {', '.join(Y_LABELS)}, got {y!r}")
    shown = trade_off(named, x, y)
    if not any(shown.curves.values()):
        measure = "measure it with `vispco evaluate --frontier`, or plot the KL"
        raise ValueError(f"no point has an {y}: {measure}")

    def draw(figure) -> None:
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, wspace=0.04)
        grid = figure.add_gridspec(len(named), 2, width_ratios=(1.25, 1))
        left = figure.add_subplot(grid[:, 0])
        draw_trade_off(left, shown)
        if about := subject(named):
            figure.suptitle(about, x=0.012, ha="left", fontsize=11, color=INK)
        _draw_legend(figure, left, first=shown.curves)
        _draw_panels(figure, grid, named)

    return save(path, draw, 11.5, max(5.2, 2.4 * len(named) + 1))


def subject(named: Runs) -> str:
    """Of which model and data the frontiers are, if they say so."""
    metas = [frontier.meta for group in named.values() for frontier in group]
    models = dict.fromkeys(str(m["model"]) for m in metas if m.get("model"))
    data = dict.fromkeys(str(m["data"]) for m in metas if m.get("data"))
    parts = {"model": models, "data": data}
    return clean("; ".join(f"{k}: {', '.join(names)}" for k, names in parts.items() if names), 110)


def _draw_panels(figure, grid, named: Runs) -> None:
    """The right side: a panel of schedules for each run."""
    shared, several = looks(named), len(named) > 1
    for i, (label, group) in enumerate(named.items()):
        panel = figure.add_subplot(grid[i, 1])
        draw_schedules(panel, group, shared, crowded=len(named))
        title = clean(label) if several else "Visual tokens entering each layer"
        panel.set_title(title, color=COLOURS[i % len(COLOURS)] if several else INK)
    panel.set_xlabel("decoder layer")


def _draw_legend(figure, axes, first) -> None:
    """One legend below the picture, in which the labels in `first` come first."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] not in first)
    if len(order) > MOST_ENTRIES:
        # Several runs: the titles of their panels name them, in their colours.
        order = [i for i in order if labels[i] not in first][:MOST_ENTRIES]
    handles = [handles[i] for i in order]
    labels = [clean(labels[i], 110) for i in order]
    style = {"handlelength": 2.6, "columnspacing": 1.8, "borderaxespad": 1}
    figure.legend(
        handles, labels, loc="outside lower left", ncols=legend_columns(labels, 11), **style
    )
