"""Parquet, read row by row, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..utils.files import brief

#: Rows that are decoded at once: pictures may be large.
_ROWS = 64


def parquet_rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file[row]`, row) of every row of a parquet file.

    Raises ImportError that names the extra; ValueError that names the file if it is damaged.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f'{name}: parquet needs pyarrow: pip install "vispco[data]"') from error
    number = 0
    try:
        with parquet.ParquetFile(name) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                # Arrow trusts its files: with damaged offsets it would read anywhere.
                batch.validate(full=True)
                floats = {field.name: str(field.type) for field in batch.schema}
                for row in batch.to_pylist():
                    yield f"{name}[{number}]", in_words(row, floats)
                    number += 1
    except Exception as error:
        # Readers of damaged files raise anything.
        raise ValueError(
            f"{name}[{number}]: no parquet can be read there: {brief(error)}"
        ) from error


def in_words(row: dict[str, Any], kinds: dict[str, str]) -> dict[str, Any]:
    """A row whose floats of 32 and 16 bits are the shortest text that means them.

    kinds: of each column.

    >>> in_words({"a": 0.10000000149011612, "b": 1}, {"a": "float32", "b": "int64"})
    {'a': '0.1', 'b': 1}
    """
    sizes = {"float": np.float32, "float32": np.float32, "halffloat": np.float16}
    sizes["float16"] = np.float16
    short = {
        column: str(sizes[kinds[column]](value))
        for column, value in row.items()
        if value is not None and kinds.get(column) in sizes
    }
    return {**row, **short}
