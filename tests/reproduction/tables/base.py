"""How all tables are written: a column is its title and what a row says there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ..claims.base import spread

#: (titles, rows) -> a table.
Markdown = Callable[[list, list], str]
#: {title of a column: what a row says there}.
Columns = Mapping[str, Callable[[dict], object]]
NOTHING = "–"
HEAD: Columns = {"testbed": lambda row: row["testbed"], "method": lambda row: row["method"]}
HEAD_BUDGET: Columns = {**HEAD, "budget": lambda row: row["budget"]}


def written(rows: Iterable[dict], columns: Columns, table: Markdown) -> str:
    """A table of rows and columns."""
    return table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def kl(values: Mapping) -> str:
    """KL over seeds, of a summary."""
    return spread(values["values"], 4)


def points(values: Mapping) -> str:
    """Accuracy in percent over seeds, of a summary."""
    return in_points(values["values"])


def in_points(accuracies: Sequence[float]) -> str:
    """Accuracies in percent: mean and deviation."""
    return spread([100 * accuracy for accuracy in accuracies], 1)


def one_in(share: float) -> str:
    """A share as 1/n.

    >>> one_in(0.25)
    '1/4.0'
    """
    return f"1/{1 / share:.1f}"
