"""Text files as they come: UTF-8 or UTF-16 by their first bytes, packed by gzip or not."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from typing import Any, TextIO

#: How files begin that are no text: what they are.
_OTHERS = {
    b"PK\x03\x04": "a zip archive (or a spreadsheet: save it as CSV)",
    b"BZh": "packed by bzip2",
    b"\xfd7zXZ": "packed by xz",
    b"(\xb5/\xfd": "packed by zstd",
    b"\xff\xfe\0\0": "in UTF-32",
    b"\xd0\xcf\x11\xe0": "a spreadsheet: save it as CSV",
    b"ARROW1": "Arrow's: save it as parquet",
}
_PARQUET, _GZIP = b"PAR1", b"\x1f\x8b"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
#: Names of files that are read here. A table is CSV, or TSV.
TABLES = (".csv", ".tsv", ".tab")
TEXTS = (".json", ".jsonl", ".ndjson", *TABLES)
ENDINGS = (*TEXTS, *(f"{ending}.gz" for ending in TEXTS), ".parquet")


def is_table(name: str) -> bool:
    """Whether a file of this name holds rows of cells."""
    return name.lower().removesuffix(".gz").endswith(TABLES)


def is_parquet(name: str) -> bool:
    """Whether a file begins as parquet does; False if there is none."""
    if not os.path.isfile(name):
        return False
    with open(name, "rb") as file:
        return file.read(4) == _PARQUET


@contextlib.contextmanager
def open_text(path: str | os.PathLike, newline: str | None = None) -> Iterator[TextIO]:
    """The text of a file.

    Raises ValueError that names the file if it is neither UTF-8 nor UTF-16, of another kind, or a
    damaged archive, as far as it is read in the block; OSError if it cannot be read.
    """
    name = os.fspath(path)
    with contextlib.ExitStack() as stack:
        raw: Any = stack.enter_context(open(path, "rb"))
        start = _peek(raw)
        for sign, what in _OTHERS.items():
            if start.startswith(sign):
                raise ValueError(
                    f"{name}: expected JSON, CSV or TSV (plain, or packed by gzip), or parquet, "
                    f"got a file that is {what}"
                )
        try:
            if start.startswith(_GZIP):
                raw = stack.enter_context(gzip.GzipFile(fileobj=raw))
                start = _peek(raw)
                if start.startswith(_PARQUET):
                    raise ValueError(f"{name}: expected parquet as it is, but it is packed by gzip")
            yield stack.enter_context(io.TextIOWrapper(raw, _encoding(start), newline=newline))
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise ValueError(
                f"{name}: expected text in UTF-8, got the byte 0x{byte:02x}; save it as UTF-8 (or "
                "UTF-16); is it a file of questions?"
            ) from None
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{name}: expected a file packed by gzip, but {error}") from None


def _encoding(start: bytes) -> str:
    if start.startswith(_UTF16):
        return "utf-16"
    # Of the first character, which is no letter of another alphabet, one byte is 0.
    if 0 in start[:2]:
        return "utf-16-le" if start[0] else "utf-16-be"
    return "utf-8-sig"


def _peek(file: Any) -> bytes:
    start = file.read(6)
    file.seek(0)
    return start
