"""CSV and TSV, row by row, each cell as the file writes it."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any, TextIO

#: The most characters that one cell, or one line, may have.
LONGEST = 1 << 24
_DELIMITERS = ",\t;|"


def cells(file: TextIO, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, {column: cell}) of every row. The first row names the columns.

    Cells are texts: no number, no date and no word such as None is understood. A row with fewer
    cells has None for the others. The columns may be split by comma, tab, semicolon or bar, which
    is found in the first line.
    Raises ValueError that names file and line.
    """
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    first = file.readline(LONGEST)
    delimiter = max(_DELIMITERS, key=first.count)
    file.seek(0)
    reader = csv.reader(_lines(file, name), delimiter=delimiter, strict=True)
    names: list[str] = []
    line = 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{name}:{line}: expected a row of a table, but {error}") from None
        if row is None:
            return
        source, line = f"{name}:{line}", reader.line_num + 1
        if not row:
            continue
        if not names:
            names = _header(row, source)
            continue
        if len(row) > len(names):
            raise ValueError(
                f"{source}: expected {len(names)} cells, one for each column, got {len(row)}; is "
                "one that holds the delimiter not in quotes?"
            )
        yield source, {**dict.fromkeys(names), **dict(zip(names, row, strict=False))}


def _header(row: list[str], source: str) -> list[str]:
    names = [name.strip() for name in row]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{source}: expected each column once, got {twice[0]!r} twice")
    return names


def _lines(file: TextIO, name: str) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), ""), 1):
        if len(line) > LONGEST:
            raise ValueError(f"{name}:{number}: expected at most {LONGEST:,} characters, got more")
        yield line
