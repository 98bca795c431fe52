"""JSON Lines, one JSON list, CSV or TSV, read row by row: a file never has to fit in memory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any, TextIO

from .cells import cells
from .opening import is_parquet, is_table, open_text
from .parquet import parquet_rows
from .words import DECODER

#: Characters read at once.
_CHUNK = 1 << 16
#: Characters in which the list of an object must begin.
_START = 1 << 16
#: The most characters that one line, or one item of a list, may have.
_LONGEST = 1 << 24
_BLANK: Any = re.compile(r"\s*")
_DECODE = DECODER.raw_decode
#: The name that a list of questions may have in an object around it.
_LISTS = (
    *("data", "rows", "questions", "annotations", "examples", "samples", "instances", "records"),
    *("items", "train", "validation", "val", "test"),
)


def rows(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
    """(`file:line`, row) of every row of a file.

    The file holds a JSON object on each line; or one list of objects (LLaVA-Instruct), alone or in
    an object, such as `{"data": [...]}`; parquet; or, if its name says so, CSV or TSV. Text may be
    packed by gzip. Of a list, the source also says the number of the item. Cells are texts, and
    numbers remember how the file writes them (`vispco.data.words`).
    Raises ValueError that names file and line where something is broken; OSError if the file cannot
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
    if is_parquet(name):
        yield from parquet_rows(name)
        return
    if is_table(name):
        with open_text(path, newline="") as file:
            yield from cells(file, name)
        return
    with open_text(path) as file:
        start = file.read(_START)
        file.seek(0)
        at = _list_in(start)
        if at is not None:
            yield from _items(file, name, at)
        else:
            yield from _lines(file, name)


def _list_in(start: str) -> int | None:
    """Where the list of objects begins, by the beginning of a file; None if it is no list."""
    at = _BLANK.match(start).end()
    if start[at : at + 1] == "[":
        return 0
    if start[at : at + 1] != "{":
        return None
    sign = "{"
    while start[at : at + 1] == sign:
        try:
            key, at = _DECODE(start, _BLANK.match(start, at + 1).end())
            at = _BLANK.match(start, at).end()
            if start[at : at + 1] != ":":
                return None
            at = _BLANK.match(start, at + 1).end()
            if key in _LISTS and re.compile(r"\[\s*[{\]]").match(start, at):
                return at
            _, at = _DECODE(start, at)
        except (ValueError, RecursionError):
            return None
        at, sign = _BLANK.match(start, at).end(), ","
    return None


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
            row = DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            what = "a JSON object on one line"
            if line.strip() == "{":
                what += f" (or one object with a list under {', '.join(_LISTS[:4])}, ...)"
            raise _broken(source, what, line, error) from None
        yield source, row


def _items(file: TextIO, name: str, start: int) -> Iterator[tuple[str, Any]]:
    """Objects of a list. Each is complete as soon as it can be decoded: it ends with its brace.

    start: characters before the list. If there are any, it lies in an object, whose end is checked.
    """
    # `text` is what has been read and not been given up; what comes next begins at `text[at]`.
    before = file.read(start)
    text, at, line, count = "", 0, 1 + before.count("\n"), 0
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
            if sign == "]" and before:
                _check_end(file, name, before, text[at:], line)
                return
            continue
        count += 1
        source = f"{name}:{line} (item {count})"
        text, at, row, end = _object(file, text, at, source)
        yield source, row
        line += text.count("\n", at, end)
        at, wanted = end, ",]"
    if wanted:
        raise ValueError(f"{name}:{line}: expected {' or '.join(wanted)}, got the end of the file")


def _check_end(file: TextIO, name: str, before: str, after: str, line: int) -> None:
    """Raise ValueError unless the object around a list is whole and holds no other such list."""
    after += file.read(_LONGEST)
    try:
        around = json.loads(f"{before}[]{after}")
    except (ValueError, RecursionError) as error:
        raise _broken(
            f"{name}:{line}", "the end of an object around a list", after, error
        ) from None
    others = [key for key in around if key in _LISTS and around[key]]
    if others:
        raise ValueError(
            f"{name}: expected one list of questions, got others too: {', '.join(others)}; keep "
            "the one that is meant in a file of its own"
        )


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
