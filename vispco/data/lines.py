"""JSON Lines, or one JSON list, read row by row: a file never has to fit in memory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any, TextIO

#: Characters read at once.
_CHUNK = 1 << 16
#: The most characters that one line, or one item of a list, may have.
_LONGEST = 1 << 24
_BLANK: Any = re.compile(r"\s*")
_DECODE = json.JSONDecoder().raw_decode


def rows(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
    """(`file:line`, row) of every row of a file.

    The file holds a JSON object on each line, or one list of objects (LLaVA-Instruct). Of a list,
    the source also says the number of the item.
    Raises ValueError that names file and line where the JSON is broken; OSError if the file cannot
    be read.

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
        byte = error.object[error.start]
        raise ValueError(
            f"{name}: expected text in UTF-8, got the byte 0x{byte:02x}; is it a JSON file?"
        ) from None


def _lines(file: TextIO, name: str) -> Iterator[tuple[str, Any]]:
    lines = iter(lambda: file.readline(_LONGEST + 1), "")
    for number, line in enumerate(lines, 1):
        source = f"{name}:{number}"
        if len(line) > _LONGEST:
            most = f"{_LONGEST:,} characters on a line"
            raise ValueError(f"{source}: expected at most {most}, got more")
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _broken(source, "a JSON object on one line", line, error) from None
        yield source, row


def _items(file: TextIO, name: str) -> Iterator[tuple[str, Any]]:
    """Objects of a list. Each is complete as soon as it can be decoded: it ends with its brace."""
    # `text` is what has been read and not been given up; what comes next begins at `text[at]`.
    text, at, line, count = "", 0, 1, 0
    wanted = "["
    while True:
        begin = _BLANK.match(text, at).end()
        line += text.count("\n", at, begin)
        at = begin
        if at == len(text):
            text, at = file.read(_CHUNK), 0
            if not text:
                break
            continue
        sign = text[at]
        if sign not in wanted:
            raise ValueError(
                f"{name}:{line}: expected {' or '.join(wanted) or 'nothing more'} in a list of "
                f"objects, got {_start(text[at:])}"
            )
        if sign != "{":
            at += 1
            wanted = {"[": "{]", ",": "{", "]": ""}[sign]
            continue
        count += 1
        source = f"{name}:{line} (item {count})"
        text, at, row, end = _object(file, text, at, source)
        yield source, row
        line += text.count("\n", at, end)
        at, wanted = end, ",]"
    if wanted:
        raise ValueError(f"{name}:{line}: expected {' or '.join(wanted)}, got the end of the file")


def _object(file: TextIO, text: str, at: int, source: str) -> tuple[str, int, Any, int]:
    """Decode the object at `text[at]`, reading on as far as it goes: (text, begin, object, end)."""
    while True:
        try:
            return text, at, *_DECODE(text, at)
        except (ValueError, RecursionError) as error:
            left = len(text) - at
            incomplete = isinstance(error, ValueError) and left < _LONGEST
            more = file.read(max(_CHUNK, left)) if incomplete else ""
            if not more:
                raise _broken(source, "a JSON object", text[at:], error) from None
            text, at = text[at:] + more, 0


def _broken(source: str, what: str, text: str, error: Exception) -> ValueError:
    deep = isinstance(error, RecursionError)
    got = "one too deeply nested" if deep else f"{_start(text)}: {error}"
    return ValueError(f"{source}: expected {what}, got {got}")


def _start(text: str) -> str:
    text = text[:1000].strip()
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
