"""Measurements on disk, found by what they are measurements of.

An entry's key is the hash of everything that can change its value: the source code at work, the weights and the
configuration of the model, the questions, the method with its options, the tokens that enter each layer. So an entry
is never stale: what has changed is simply not found. Entries are JSON lines; every process appends to a file of its
own and reads those of the others.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import vispco
from vispco.utils.version import versions

ROOT = Path(vispco.__file__).parent
#: What an answer of a pruned model comes from, that to smaller pictures, and what a search adds: modules, or folders of them.
MEASURING = ("evaluate", "methods", "models", "testbed/data", "testbed/deep", "testbed/model")
SHRINKING = (*MEASURING, "baselines/downsample")
SEARCHING = (*MEASURING, "solvers", "baselines", "solvers")
#: Its numbers reach a measurement as arguments, which are in the key.
SIZES = ROOT / "reproduction" / "sizes.py"


@cache
def code(roots: tuple[str, ...] = MEASURING) -> str:
    """Digest of the source files that `roots` are and import, but the sizes, and of the versions below the library."""
    digest = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode())
    for path in sorted(imported(roots) - {SIZES}):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def imported(roots: Sequence[str]) -> set[Path]:
    """The files of the library that `roots` are and import, those that these import, and so on.

    >>> sorted(path.name for path in imported(["config"]))
    ['config.py', 'files.py', 'registry.py']
    """
    found: set[Path] = set()
    todo = [path for root in roots for path in _files(ROOT / root, ["*"])]
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.ImportFrom) and node.level:
                    place = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                    todo += _files(place, [alias.name for alias in node.names])
    return found


def _files(place: Path, names: Sequence[str]) -> list[Path]:
    """A module's file, or of a folder these modules; and what the folder is itself (the whole library is not meant by that)."""
    if not place.is_dir():
        return [place.with_suffix(".py")] + [place.with_name("__init__.py")] * (place.parent != ROOT)
    inner = [path for name in names for path in place.glob(f"{name}.py")]
    return inner + [place / "__init__.py"] * (place != ROOT)


def of_file(path: str | os.PathLike) -> str:
    """Digest of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class Cache:
    """Values by key, in `folder`. fresh: begin with nothing, and remove what earlier runs have left there.

    Several processes may share a folder. A line that was cut off or damaged is ignored: its checksum tells.
    """

    def __init__(self, folder: str | os.PathLike, fresh: bool = False):
        self.folder = Path(folder)
        self._values: dict[str, Any] = {}
        self._read: dict[Path, int] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hits = self.misses = 0
        if fresh:
            for path in self.folder.glob("measured-*.jsonl"):
                path.unlink()
        self._own = self.folder / f"measured-{uuid.uuid4().hex}.jsonl"
        self._refresh()

    def __contains__(self, name: str) -> bool:
        if name not in self._values:
            self._refresh()  # another process may have it by now
        return name in self._values

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of key `name`; on a miss `make()`, JSON-ready, is kept."""
        if name in self:
            self.hits += 1
        else:
            self.misses += 1
            text = json.dumps([name, make()], allow_nan=False)
            with open(self._own, "a", encoding="utf-8") as file:
                file.write(f"{zlib.crc32(text.encode()):08x} {text}\n")
            self._values[name] = json.loads(text)[1]  # as it will be read
        return self._values[name]

    def _refresh(self) -> None:
        """Read what the files have gained since the last time."""
        for path in sorted(self.folder.glob("measured-*.jsonl")):
            done = self._read.get(path, 0)
            if path == self._own or path.stat().st_size <= done:
                continue
            with open(path, "rb") as file:
                file.seek(done)
                block = file.read()
            whole = block.rfind(b"\n") + 1
            self._read[path] = done + whole
            for line in block[:whole].splitlines():
                check, _, text = line.partition(b" ")
                if check == b"%08x" % zlib.crc32(text):
                    name, self._values[name] = json.loads(text)
