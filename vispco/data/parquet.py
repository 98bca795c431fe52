"""Parquet, read row by row, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..utils.files import brief

#: Rows that are decoded at once: pictures may be large.
_ROWS = 64
#: Arrow's floats that are written with fewer digits than Python's own.
_SHORT = {"float": np.float32, "halffloat": np.float16}


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
                for row in batch.to_pylist():
                    yield f"{name}[{number}]", in_words(row, batch.schema)
                    number += 1
    except Exception as error:
        # Readers of damaged files raise anything.
        raise ValueError(
            f"{name}[{number}]: no parquet can be read there: {brief(error)}"
        ) from error


def in_words(value: Any, kind: Any) -> Any:
    """A row whose floats of 32 and 16 bits are the shortest text that means them, at any depth.

    kind: Arrow's schema of the row, or its type of the value.

    >>> import pyarrow
    >>> schema = pyarrow.schema({"a": pyarrow.list_(pyarrow.float32()), "b": pyarrow.int64()})
    >>> in_words({"a": [0.10000000149011612], "b": 1}, schema)
    {'a': ['0.1'], 'b': 1}
    """
    kind = getattr(kind, "type", kind)
    if isinstance(value, dict) and hasattr(kind, "field"):
        return {key: in_words(inner, kind.field(key)) for key, inner in value.items()}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [in_words(inner, kind.value_type) for inner in value]
    short = _SHORT.get(str(kind))
    return value if value is None or short is None else str(short(value))
