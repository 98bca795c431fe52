"""Data sets of Hugging Face's `datasets` library: by name, or folders on disk."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Iterator
from typing import Any

from ..utils.files import brief
from .opening import TEXTS
from .parquet import in_words
from .words import parsed

#: What `save_to_disk` writes beside the tables.
_SAVED = ("state.json", "dataset_dict.json")
#: Builders of the library that read text, and of what they make their own values. Of JSON, whole
#: numbers stay as they are written; of CSV, 007 becomes 7, and True a truth value. The metadata of
#: a folder of pictures or videos may be either.
_PARSED: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("json", "webdataset"), (float, datetime.datetime)),
    **dict.fromkeys(("csv", "xml", "imagefolder", "videofolder"), (float, datetime.datetime, int)),
}


def load(name: str, split: str) -> Any:
    """A memory-mapped `datasets.Dataset`, with pictures and videos left encoded.

    name: a folder that `save_to_disk` wrote, or of parquet files; or OWNER/NAME or
        OWNER/NAME:CONFIGURATION, from the local cache or the Hugging Face hub.
    Raises ImportError that names the extra; ValueError with the library's own words.
    """
    datasets = _library(name)
    with _quiet(datasets, name, split):
        tables = _tables(datasets, name, split)
    if split not in tables:
        raise ValueError(
            f"{name} has no split {split!r}: expected one of {', '.join(tables)}, as --split"
        )
    table = tables[split]
    with _quiet(datasets, name, split):
        for column, feature in dict(table.features).items():
            # A cast of what stays the same would write a file beside the data.
            if (encoded := _encoded(datasets, feature)) != feature:
                table = table.cast_column(column, encoded)
    return table


def text_files(name: str, split: str) -> list[str] | None:
    """The files of a split of a folder, if they are CSV or JSON; None if they are others.

    The library would read the cells as numbers: 007 as 7. So these files are read by
    `vispco.data.rows`. Of a folder of pictures (`imagefolder`) they are its metadata.
    Raises what `load` does.
    """
    if any(os.path.exists(os.path.join(name, file)) for file in _SAVED):
        return None
    datasets = _library(name)
    with _quiet(datasets, name, split):
        builder = datasets.load_dataset_builder(os.path.abspath(name))
        found = {str(key): list(files) for key, files in (builder.config.data_files or {}).items()}
    if builder.name not in ("csv", "json", "imagefolder"):
        return None
    if split not in found:
        raise ValueError(
            f"{name} has no split {split!r}: expected one of {', '.join(found)}, as --split"
        )
    files = [file for file in found[split] if file.lower().removesuffix(".gz").endswith(TEXTS)]
    return files or None


def of_metadata(file: str, folder: str, row: Any) -> Any:
    """A row of a metadata file of an `imagefolder`: its `file_name` is the picture.

    file: the metadata file, beside which the pictures lie. folder: that of the data.
    """
    name = os.path.basename(file)
    if not name.startswith("metadata.") or not isinstance(row, dict) or "image" in row:
        return row
    beside = os.path.relpath(os.path.dirname(file), os.path.abspath(folder))
    where = row.get("file_name")
    return {**row, "image": os.path.join(beside, where) if isinstance(where, str) else where}


def row(table: Any, index: int, source: str) -> dict[str, Any]:
    """Row `index` of a table. Raises ValueError that names `source`.

    A row is read only now, so only now may it turn out to be damaged. Of numbers that the library
    has read from text files it is not known how these write them: `vispco.data.words.Parsed`.
    """
    try:
        found = dict(table[index])
    except Exception as error:
        raise ValueError(f"{source}: the data set cannot be read: {brief(error)}") from error
    if table.info.builder_name in _PARSED:
        return parsed(found, *_PARSED[table.info.builder_name])
    return in_words(found, table.features.arrow_schema)


def _library(name: str) -> Any:
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
    return datasets


@contextlib.contextmanager
def _quiet(datasets: Any, name: str, split: str) -> Iterator[None]:
    """Without bars and log; every fault becomes a ValueError that names the data set."""
    logging = datasets.utils.logging
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        # Faults of the network, of files, of builders: anything.
        raise ValueError(
            f"{name}: no data set could be loaded (split {split!r}): {brief(error)}"
        ) from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _tables(datasets: Any, name: str, split: str) -> dict[str, Any]:
    """{split: table}; a table saved without splits stands for the one that is asked for."""
    if os.path.isdir(name):
        path, configuration = os.path.abspath(name), ""
    else:
        path, _, configuration = name.partition(":")
    if any(os.path.exists(os.path.join(path, file)) for file in _SAVED):
        found = datasets.load_from_disk(path)
    else:
        found = datasets.load_dataset(path, configuration or None, split=split)
    tables = found if isinstance(found, datasets.DatasetDict) else {split: found}
    for table in tables.values():
        # Arrow trusts its files: with damaged offsets it would read anywhere.
        table.data.validate(full=True)
    return tables


def _encoded(datasets: Any, feature: Any) -> Any:
    """A feature of which no picture and no video is decoded, however deep it lies."""
    if isinstance(feature, dict):
        return {key: _encoded(datasets, inner) for key, inner in feature.items()}
    if isinstance(feature, list):
        return [_encoded(datasets, inner) for inner in feature]
    media = tuple(getattr(datasets, kind) for kind in ("Image", "Video") if hasattr(datasets, kind))
    if isinstance(feature, media):
        return type(feature)(decode=False)
    if hasattr(feature, "feature"):
        return type(feature)(_encoded(datasets, feature.feature))
    return feature
