"""What the commands show: tables, units and intervals; and their output folders."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from .files import printable


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns aligned with two spaces between them: numbers to the right, words to the left.

    >>> print(table(["layer", "what"], [[1, "first"], [10, "last"]]))
    layer  what
        1  first
       10  last
    """
    cells = [[*map(printable, row)] for row in (header, *rows)]
    columns = list(zip(*cells, strict=True))
    right = [len(column) > 1 and all(map(_numeric, column[1:])) for column in columns]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in cells:
        places = zip(row, widths, right, strict=True)
        padded = [cell.rjust(w) if number else cell.ljust(w) for cell, w, number in places]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _numeric(cell: str) -> bool:
    return cell in ("", "–", "full") or (cell[1:] if cell[0] in "-+" else cell)[:1].isdigit()


def percent(share: float, digits: int = 1) -> str:
    """`0.5` -> `50.0 %`."""
    return f"{share:.{digits}%}".replace("%", " %")


def flops(number: float) -> str:
    """Four digits and a unit.

    >>> flops(1.8e12), flops(245.6e6)
    ('1.800 TFLOPs', '245.6 MFLOPs')
    """
    power = min(max(int(math.log10(number)) // 3, 0), 5) if number >= 1 else 0
    value = number / 1000**power
    if value >= 999.95 and power < 5:
        power, value = power + 1, value / 1000
    decimals = max(0, 4 - len(str(int(value))))
    return f"{value:.{decimals}f} {['', 'K', 'M', 'G', 'T', 'P'][power]}FLOPs"


def tokens(counts: Sequence[int], longest: int = 12) -> str:
    """Visual tokens entering each layer, on one line; runs are joined for deep models.

    >>> tokens([64, 64, 8]), tokens([576] * 16 + [0] * 16)
    ('64 64 8', '16x576 16x0')
    """
    if len(counts) <= longest:
        return " ".join(map(str, counts))
    runs = [(len(list(run)), value) for value, run in groupby(counts)]
    return " ".join(f"{n}x{value}" if n > 1 else str(value) for n, value in runs)


def budget_text(budget: float | str | Mapping) -> str:
    """A budget as the command line takes it.

    >>> budget_text(0.5), budget_text({"flops": 0.5, "kv_cache": "40%"})
    ('0.5', 'flops=0.5+kv_cache=40%')
    """
    if isinstance(budget, Mapping):
        return "+".join(f"{name}={budget_text(value)}" for name, value in budget.items())
    return f"{budget:g}" if isinstance(budget, float) else str(budget)


#: The columns that every table of configurations begins with.
COST_HEADER = ["budget", "FLOPs", "share", "visual tokens entering each layer"]


def cost_cells(point) -> list[str]:
    """The cells of a `FrontierPoint` under COST_HEADER.

    The tokens are counts, or shares where the configuration does not say of how many.
    """
    config = point.config
    if config.n_visual:
        entering = tokens(config.tokens(config.n_visual))
    else:
        entering = " ".join(percent(ratio, 0) for ratio in config.keep_ratios)
    return [budget_text(point.budget), flops(point.flops), percent(point.share), entering]


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval for a proportion, 95 % at z = 1.96. It stays within [0, 1].

    >>> [round(x, 3) for x in wilson(90, 100)]
    [0.826, 0.945]
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"need 0 <= successes <= n and n >= 1, got {successes} of {n}")
    p, q = successes / n, z * z / n
    middle = (p + q / 2) / (1 + q)
    half = math.sqrt(p * (1 - p) * q + q * q / 4) / (1 + q)
    return max(0.0, middle - half), min(1.0, middle + half)


def standard_error(accuracy: float, n: int) -> float:
    """Binomial standard error of an accuracy over `n` questions."""
    return math.sqrt(accuracy * (1 - accuracy) / n)


def layers_entered(kept: dict[int, torch.Tensor], visual: torch.Tensor, layers: int) -> list[int]:
    """How many layers each visual token of one sample enters.

    kept: {layer: (S,) bool}, what `Pruner.kept()` says of the sample. visual: (S,) bool.
    """
    depth = torch.full_like(visual, layers, dtype=torch.long)
    for layer in sorted(kept, reverse=True):
        depth[~kept[layer]] = layer
    return depth[visual].tolist()


def token_grid(depths: Sequence[int]) -> str:
    """Tokens in raster order as a small picture: `·` leaves first, `█` stays longest.

    >>> print(token_grid([8, 1, 1, 4]))
    █ ·
    · ▒
    """
    side = math.isqrt(len(depths))
    width = side if side * side == len(depths) else 32
    marks = [_shade(d, min(depths), max(depths)) for d in depths]
    return "\n".join(" ".join(marks[i : i + width]) for i in range(0, len(marks), width))


def _shade(depth: int, least: int, most: int) -> str:
    if depth == most:
        return "█"
    return "·" if depth == least else "░▒▓"[3 * (depth - least) // (most - least)]


@contextlib.contextmanager
def output_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Make `path` (with its parents) and try to write there, before the work starts.

    If the block fails, the folders made here are taken away again, unless something was put into
    them. Raises OSError that names the path, ValueError if it is a file.
    """
    folder = Path(path)
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        if folder.is_file():
            raise ValueError(f"{folder} is a file: --output needs a folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            why = f"{error.strerror}; choose an --output that can be written"
            raise OSError(error.errno, why, str(folder)) from None
        yield folder
    except BaseException:
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()
        raise
