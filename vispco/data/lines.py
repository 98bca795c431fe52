"""JSON Lines, or one JSON list, read row by row: a file never has to fit in memory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any, TextIO

_CHUNK, _LONGEST = 1 << 16, 1 << 24  # characters read at once; the most that one item of a list may have


def rows(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
    """(`file:line`, row) of every row of a file: a JSON object per line, or one list of objects (LLaVA-Instruct), of
    which the source also says the number of the item.

    Raises ValueError that names file and line where the JSON is broken; OSError if the file cannot be read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "two.jsonl")
    ...     with open(path, "w") as file:
    ...         _ = file.write('{"a": 1}\\n\\n{"a": 2}\\n')
    ...     [(source.split(":")[-1], row) for source, row in rows(path)]
    [('1', {'a': 1}), ('3', {'a': 2})]
    """
    name = os.fspath(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            start = next((c for c in iter(lambda: file.read(1), "") if not c.isspace()), "")
            file.seek(0)
            yield from _items(file, name) if start == "[" else _lines(file, name)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected text in UTF-8, got the byte 0x{error.object[error.start]:02x}; "
                         "is it a JSON file?") from None


def _lines(file: TextIO, name: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(iter(lambda: file.readline(_LONGEST + 1), ""), 1):
        if len(line) > _LONGEST:
            raise ValueError(f"{name}:{number}: expected at most {_LONGEST:,} characters on a line, got more")
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{name}:{number}: expected a JSON object on one line, got {_start(line)}: {error}") from None
            except RecursionError:
                raise ValueError(f"{name}:{number}: expected a JSON object on one line, got one too deeply nested") from None
            yield f"{name}:{number}", row


def _items(file: TextIO, name: str) -> Iterator[tuple[str, Any]]:
    """Objects of a list. An object ends with its brace, so each is complete as soon as it can be decoded."""
    text, at, line, count, wanted = "", 0, 1, 0, "["
    while True:
        begin = _BLANK.match(text, at).end()
        line, at = line + text.count("\n", at, begin), begin
        if at == len(text):
            text, at = file.read(_CHUNK), 0
            if not text:
                break
            continue
        if (sign := text[at]) not in wanted:
            raise ValueError(f"{name}:{line}: expected {' or '.join(wanted) or 'nothing more'} in a list of objects, got "
                             f"{_start(text[at:])}")
        if sign == "{":
            count += 1
            where = f"{name}:{line} (item {count})"
            text, at, row, end = _object(file, text, at, where)
            yield where, row
            line, at, wanted = line + text.count("\n", at, end), end, ",]"
        else:
            at, wanted = at + 1, {"[": "{]", ",": "{", "]": ""}[sign]
    if wanted:
        raise ValueError(f"{name}:{line}: expected {' or '.join(wanted)}, got the end of the file")


_BLANK: Any = re.compile(r"\s*")
_DECODE = json.JSONDecoder().raw_decode


def _object(file: TextIO, text: str, at: int, where: str) -> tuple[str, int, Any, int]:
    """Decode the object that begins at `text[at]`, reading on as far as it goes: (text, begin, object, end)."""
    while True:
        try:
            return text, at, *_DECODE(text, at)
        except RecursionError:
            raise ValueError(f"{where}: expected a JSON object, got one too deeply nested") from None
        except ValueError as error:
            more = file.read(max(_CHUNK, len(text) - at)) if len(text) - at < _LONGEST else ""
            if not more:
                raise ValueError(f"{where}: expected a JSON object, got {_start(text[at:])}: {error}") from None
            text, at = text[at:] + more, 0


def _start(text: str) -> str:
    text = text[:1000].strip()
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
