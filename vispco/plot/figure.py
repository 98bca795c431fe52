"""The look that the pictures share, and their files."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..utils.console import budget_text
from ..utils.files import write_text

# Okabe and Ito's palette: told apart by every kind of colour vision; markers and dashes differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "h", "p", "*")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
INK = "#222222"
# Groups of matplotlib's settings.
_STYLE: dict[Any, dict[str, Any]] = {
    "svg": {"fonttype": "none", "hashsalt": "vispco"},
    "font": {"size": 10, "sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"]},
    # No formulas: names and questions may hold any number of $.
    "text": {"color": INK, "parse_math": False},
    "axes": {
        "edgecolor": INK,
        "labelcolor": INK,
        "titlesize": 11,
        "titlelocation": "left",
        "grid": True,
        "axisbelow": True,
    },
    "axes.spines": {"top": False, "right": False},
    "xtick": {"color": INK},
    "ytick": {"color": INK},
    "grid": {"color": "#e6e6e6"},
    "lines": {"solid_capstyle": "butt"},
    "legend": {"frameon": False, "fontsize": 9},
}


def picture_kind(path: str | os.PathLike) -> str:
    """ "svg" or "png", as the name of the file says. Raises ValueError for anything else."""
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


@dataclass(frozen=True)
class Picture:
    """A drawing, which a notebook shows at the end of a cell. `save(path)` writes its file."""

    draw: Callable = field(repr=False)
    width: float
    height: float

    def save(self, path: str | os.PathLike) -> None:
        """Write an `.svg` or `.png` file, atomically. Raises ValueError for another suffix."""
        write_text(path, render(self.draw, self.width, self.height, picture_kind(path)))

    def _repr_svg_(self) -> str:
        return render(self.draw, self.width, self.height, "svg").decode()


def save(path: str | os.PathLike | None, draw: Callable, width: float, height: float) -> Picture:
    """What `draw(figure)` draws, as a picture. width, height: inches.

    path: where it is written, atomically; None: nowhere.
    Raises ValueError for another suffix than .svg or .png, ImportError without matplotlib.
    """
    if path is not None:
        picture_kind(path)
    require_matplotlib()
    picture = Picture(draw, width, height)
    if path is not None:
        picture.save(path)
    return picture


@contextmanager
def styled() -> Iterator[None]:
    """Matplotlib with the look of all pictures: a user's style sheet must not change them."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        for group, settings in _STYLE.items():
            matplotlib.rc(group, **settings)
        yield


def render(draw: Callable, width: float, height: float, kind: str) -> bytes:
    """What `draw(figure)` draws, as "svg" or "png"; the same input gives the same bytes.

    width, height: inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with styled():
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(buffer, format=kind, metadata=metadata, dpi=160)
    return buffer.getvalue()


#: The most entries of a legend: more are not told apart.
MOST_ENTRIES = 6


def evenly(entries: list) -> list:
    """At most MOST_ENTRIES of a sequence in order, its ends and some between.

    >>> evenly([1, 2, 3]), evenly([*range(11)])
    ([1, 2, 3], [0, 2, 4, 6, 8, 10])
    """
    if len(entries) <= MOST_ENTRIES:
        return entries
    step = (len(entries) - 1) / (MOST_ENTRIES - 1)
    return [entries[round(i * step)] for i in range(MOST_ENTRIES)]


def legend_columns(labels: list[str], width: float) -> int:
    """As many columns as fit into so many inches; labels run down the columns.

    >>> legend_columns(["a", "b", "c"], 11), legend_columns(["a" * 150, "b"], 11)
    (3, 1)
    """

    def inches(columns: int) -> float:
        rows = -(-len(labels) // columns)
        longest = [max(map(len, labels[i : i + rows])) for i in range(0, len(labels), rows)]
        return sum(0.078 * n + 0.75 for n in longest)

    return next((n for n in range(len(labels), 1, -1) if inches(n) < width), 1)


def percents(axis) -> None:
    """Label an axis of shares in percent."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))


def plain_log(axis, least: float = 0.0) -> None:
    """Plain numbers on a logarithmic axis, once its limits are set: few enough to be read.

    The tick at `least` means "or less".
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if 0 < low < high else 1.0
    subs: tuple[float, ...] = (1, 2, 5) if decades <= 3.5 else (1,)
    if decades < 0.6:
        # Two points close to each other.
        subs = (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    axis.set_major_locator(LogLocator(10, subs=subs, numticks=max(9, int(decades) + 3)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{'≤ ' if v == least else ''}{v:g}"))
    axis.set_minor_locator(NullLocator())


def budget_label(budget: float | str | Mapping) -> str:
    """A budget in a legend: shares in percent, everything else as it was asked for."""
    if isinstance(budget, (str, Mapping)):
        return clean(budget_text(budget))
    return f"{budget * 100:.4g} %" if budget <= 1 else f"{budget:.4g}"


def clean(text: str, longest: int = 50) -> str:
    """A text on one line, without what an SVG cannot hold; of a text that is too long both ends."""
    text = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"
