"""Data sets of Hugging Face's `datasets` library: by name, or folders on disk."""

from __future__ import annotations

import os
import re
from typing import Any

from ..utils.files import brief


def load(name: str, split: str) -> Any:
    """A memory-mapped `datasets.Dataset`, with pictures left encoded.

    name: a folder that `save_to_disk` wrote; a folder of parquet, JSON Lines or CSV files; or
        OWNER/NAME or OWNER/NAME:CONFIGURATION, from the local cache or the Hugging Face hub.
    Raises ImportError that names the extra; ValueError with the library's own words.
    """
    here = os.path.isdir(name)
    if not here and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", name):
        raise ValueError(
            f"{name!r} is no file and no folder here, and not the OWNER/NAME of a data set"
        )
    try:
        import datasets
    except ImportError as error:
        what = "a folder of data" if here else "no file, so it must be the name of a data set"
        raise ImportError(
            f'{name} is {what}, which needs the datasets library: pip install "vispco[data]"'
        ) from error
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        tables = _tables(datasets, name, split)
    except Exception as error:
        # Faults of the network, of files, of builders: anything.
        raise ValueError(
            f"{name}: no data set could be loaded (split {split!r}): {brief(error)}"
        ) from error
    finally:
        if bars:
            datasets.utils.logging.enable_progress_bar()
    if split not in tables:
        raise ValueError(
            f"{name} has no split {split!r}: expected one of {', '.join(tables)}, as --split"
        )
    table = tables[split]
    encoded = datasets.Image(decode=False)
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, encoded)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(column, type(feature)(encoded))
    return table


def _tables(datasets: Any, name: str, split: str) -> dict[str, Any]:
    """{split: table}; a table saved without splits stands for the one that is asked for."""
    if os.path.isdir(name):
        path, configuration = os.path.abspath(name), ""
    else:
        path, _, configuration = name.partition(":")
    written = ("state.json", "dataset_dict.json")
    if any(os.path.exists(os.path.join(path, file)) for file in written):
        found = datasets.load_from_disk(path)
    else:
        found = datasets.load_dataset(path, configuration or None, split=split)
    tables = found if isinstance(found, datasets.DatasetDict) else {split: found}
    for table in tables.values():
        # Arrow trusts its files: with damaged offsets it would read anywhere.
        table.data.validate(full=True)
    return tables


def row(table: Any, index: int, source: str) -> dict[str, Any]:
    """Row `index` of a table. Raises ValueError that names `source`.

    A row is read only now, so only now may it turn out to be damaged.
    """
    try:
        return table[index]
    except Exception as error:
        raise ValueError(f"{source}: the data set cannot be read: {brief(error)}") from error
