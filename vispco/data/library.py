"""Data sets of Hugging Face's `datasets` library: by name, or folders on disk."""

from __future__ import annotations

import os
from typing import Any


def load(name: str, split: str) -> Any:
    """A memory-mapped `datasets.Dataset`, with pictures left encoded.

    name: a folder that `save_to_disk` wrote, a folder of parquet, JSON Lines or CSV files, or a name that
    `datasets.load_dataset` knows. Raises ImportError that names the extra; ValueError with the library's own words.
    """
    try:
        import datasets
    except ImportError as error:
        what = "a folder of data" if os.path.isdir(name) else "no file, so it must be the name of a data set"
        raise ImportError(f'{name} is {what}, which needs the datasets library: pip install "vispco[data]"') from error
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        saved = os.path.isdir(name) and any(os.path.exists(os.path.join(name, f)) for f in ("state.json", "dataset_dict.json"))
        found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=split)
    except Exception as error:  # of the network, of files, of builders
        raise ValueError(f"{name}: no data set could be loaded (split {split!r}): {error}") from error
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
