"""The look that all figures share, and their bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from vispco.plot.figure import COLOURS, INK, legend_columns, percents as percents, styled

BLUE, RED, GREEN, PINK, ORANGE, SKY = COLOURS
GREY = "#8a8a8a"
#: {competitor: (colour, marker)}, the same in every figure.
LOOKS = {
    "learned": (BLUE, "o"),
    "learned, cheap": (BLUE, "o"),
    "the paper's predictor, refined": ("#555555", "X"),
    "a refined ramp": (SKY, "p"),
    "NSGA-II": (RED, "s"),
    "TPE": (PINK, "D"),
    "a ramp, no search": (INK, "h"),
    "greedy per layer": (GREEN, "^"),
    "FitPrune's fit": ("#117733", "v"),
    "VTW's rule": ("#882255", "P"),
    "random": (ORANGE, "x"),
    "grid": (GREY, "."),
    "pooled": (INK, "1"),
    "strided": (INK, "2"),
    "random tokens": (INK, "3"),
    "smaller pictures": (INK, "4"),
    "published": ("#882255", "*"),
}
#: A single point of a competitor.
DOT: Any = {"linestyle": "none", "markeredgecolor": "white", "markeredgewidth": 0.5}
#: In nats; any KL below it is drawn here.
LEAST = 1e-3

Drawing = Callable[[Mapping[str, dict]], Iterator[tuple[str, Callable]]]


def render(draw: Callable, kind: str) -> bytes:
    """The figure that `draw(new)` makes, as "svg" or "png"; the same input gives the same bytes.

    new(rows, columns, width, height, ...): a figure and its panels, a 2-D array; sizes in inches a
    panel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def new(rows: int, columns: int, width: float = 3.2, height: float = 2.6, **options):
        figure = Figure(
            figsize=(max(7.5, columns * width), rows * height + 1.4), layout="constrained"
        )
        FigureCanvasAgg(figure)
        return figure, figure.subplots(rows, columns, squeeze=False, **options)

    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with styled():
        figure = draw(new)
        figure.savefig(buffer, format=kind, metadata=metadata, dpi=130)
    return buffer.getvalue()


def shape(count: int, columns: int = 3) -> tuple[int, int]:
    """Rows and columns of so many panels.

    >>> shape(5), shape(2)
    ((2, 3), (1, 2))
    """
    columns = min(columns, count)
    return math.ceil(count / columns), columns


def finish(figure, panels, used: int, title: str, result: dict, legend: bool = True):
    """Title, where it ran, one legend below, and no empty panels."""
    for axes in list(panels.flat)[used:]:
        axes.set_axis_off()
    seeds = "–".join(str(s) for s in sorted({min(result["seeds"]), max(result["seeds"])}))
    questions = f"{result['calibration']} calibration" + (
        f" and {result['test']} held-out" if result["test"] else ""
    )
    figure.suptitle(
        f"{title}\n{result['machine']}; seeds: {seeds}; {questions} questions",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    if legend:
        entries: dict[str, Any] = {}
        for axes in panels.flat:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                entries.setdefault(label, handle)
        figure.legend(
            entries.values(),
            entries.keys(),
            loc="outside lower center",
            handlelength=2.4,
            ncols=legend_columns([*entries], figure.get_size_inches()[0]),
        )
    return figure


def level(axes, height: float, name: str, above: bool = False) -> None:
    """A horizontal line with its name and height, above it or below."""
    dashes = (0, (6, 3)) if above else (0, (1, 2))
    axes.axhline(height, color=INK, linestyle=dashes, linewidth=0.9, zorder=1.5)
    place = {"xytext": (-2, 3 if above else -3), "textcoords": "offset points", "ha": "right"}
    place |= {"va": "bottom" if above else "top", "fontsize": 8, "zorder": 1.6}
    text = f"{name}: {100 * height:.1f} %"
    axes.annotate(text, (1, height), xycoords=("axes fraction", "data"), **place)


def plain_log(axis) -> None:
    """A logarithmic axis whose labels are plain numbers: few on a long one, more on a short one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_data_interval()
    # Labels of the x axis stand side by side.
    wide = high > (50 if axis.axis_name == "x" else 2000) * low
    short = high < 5 * low
    subs = (1,) if wide else (1, 1.5, 2, 3, 4, 5, 7) if short else (1, 2, 5)
    axis.set_major_locator(LogLocator(10, subs=subs, numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1000 else f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def share(budget: float) -> str:
    """A budget in percent.

    >>> share(0.7)
    '70 %'
    """
    return f"{100 * budget:.4g} %"


def setting_name(row: Mapping) -> str:
    """Testbed and method of a row."""
    return f"{row['testbed']}, {row['method']}"


def reached(result: dict) -> dict[str, list[dict]]:
    """{setting: rows of the budgets that it reaches, by budget}."""
    groups: dict[str, list[dict]] = {}
    for row in result["rows"]:
        if row["verdict"] != "not reachable":
            groups.setdefault(setting_name(row), []).append(row)
    return {name: sorted(rows, key=lambda row: row["budget"]) for name, rows in groups.items()}


def at_least(values: Iterable[float]) -> list[float]:
    """KLs for a logarithmic axis: what is below LEAST is drawn there."""
    return [max(LEAST, value) for value in values]


def columns(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The x and the y of points."""
    listed = list(points)
    return [x for x, _ in listed], [y for _, y in listed]
