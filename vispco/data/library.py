"""Data sets of Hugging Face's `datasets` library: by name, or folders on disk."""

from __future__ import annotations

import os
import re
from typing import Any

from ..utils.files import brief


def load(name: str, split: str) -> Any:
    """A memory-mapped `datasets.Dataset`, with pictures left encoded.

    name: a folder that `save_to_disk` wrote, a folder of parquet, JSON Lines or CSV files, or OWNER/NAME or
    OWNER/NAME:CONFIGURATION, from the local cache or the Hugging Face hub. Raises ImportError that names the extra;
    ValueError with the library's own words.
    """
    here = os.path.isdir(name)
    if not here and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", name):
        raise ValueError(f"{name!r} is no file and no folder here, and not the OWNER/NAME of a data set")
    try:
        import datasets
    except ImportError as error:
        what = "a folder of data" if here else "no file, so it must be the name of a data set"
        raise ImportError(f'{name} is {what}, which needs the datasets library: pip install "vispco[data]"') from error
    path, _, configuration = (os.path.abspath(name), "", "") if here else name.partition(":")
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        saved = any(os.path.exists(os.path.join(path, f)) for f in ("state.json", "dataset_dict.json"))
        found = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, configuration or None, split=split)
        for table in found.values() if isinstance(found, datasets.DatasetDict) else [found]:
            table.data.validate(full=True)  # Arrow trusts its files: with damaged offsets it would read anywhere
    except Exception as error:  # of the network, of files, of builders
        raise ValueError(f"{name}: no data set could be loaded (split {split!r}): {brief(error)}") from error
    finally:
        if bars:
            datasets.utils.logging.enable_progress_bar()
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ValueError(f"{name} has no split {split!r}: expected one of {', '.join(found)}, as --split")
        found = found[split]
    for column, feature in found.features.items():
        inner = getattr(feature, "feature", None)
        if isinstance(feature, datasets.Image):
            found = found.cast_column(column, datasets.Image(decode=False))
        elif isinstance(inner, datasets.Image):
            found = found.cast_column(column, type(feature)(datasets.Image(decode=False)))
    return found


def row(table: Any, index: int, source: str) -> dict[str, Any]:
    """Row `index`, which is read, and may turn out to be damaged, only now. Raises ValueError that names `source`."""
    try:
        return table[index]
    except Exception as error:
        raise ValueError(f"{source}: the data set cannot be read: {brief(error)}") from error
