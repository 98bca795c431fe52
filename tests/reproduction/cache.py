"""Measurements on disk, found by what they are measurements of.

An entry's key is the hash of everything that can change its value: the source code at work, the
weights and the configuration of the model, the questions, the method with its options, the tokens
that enter each layer. So an entry is never stale: what has changed is simply not found. Entries are
JSON lines. Every process appends to a file of its own and reads those of the others.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import vispco
from vispco.utils.version import versions

#: Where our code is, by package.
HOMES = {"vispco": Path(vispco.__file__).parent, "tests": Path(__file__).parents[1]}
#: What a measurement comes from, as modules or packages of them: an answer of a pruned model, ...
MEASURING = (
    "vispco.methods",
    "vispco.models",
    "vispco.testbed",
    "tests.reproduction.deep",
    "tests.reproduction.measure",
)
#: ... an answer to smaller pictures, ...
SHRINKING = (*MEASURING, "vispco.baselines.downsample")
#: ... and the result of a search.
SEARCHING = (
    *MEASURING,
    "vispco.solvers",
    "vispco.baselines",
    "tests.reproduction.searches",
    "tests.reproduction.estimators",
)
#: Its numbers reach a measurement as arguments, which are in the key.
SIZES = Path(__file__).parent / "sizes.py"


@functools.cache
def code(roots: tuple[str, ...] = MEASURING) -> str:
    """Digest of the source files of `roots` and of all that they import, and of the dependencies.

    The sizes are left out. Of the dependencies, their versions count.
    """
    digest = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode())
    for path in sorted(imported(roots) - {SIZES}):
        digest.update(f"{module_name(path)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def imported(roots: Sequence[str]) -> set[Path]:
    """Files of `roots`, of our modules that these import, of those that these import, and so on.

    >>> sorted(path.name for path in imported(["tests.reproduction.paper"]))
    ['__init__.py', 'paper.py']
    """
    found: set[Path] = set()
    todo = [module_name(path) for root in roots for path in _members(root)]
    while todo:
        for path in _files(todo.pop()):
            if path not in found:
                found.add(path)
                todo += _imports(path)
    return found


def module_name(path: Path) -> str:
    """The dotted name of one of our source files; a package's own file counts as its `__init__`."""
    for package, home in HOMES.items():
        if path.is_relative_to(home):
            return ".".join([package, *path.relative_to(home).with_suffix("").parts])
    raise ValueError(f"{path} is not in {', '.join(HOMES)}")


def _members(root: str) -> list[Path]:
    """The file of a module, or all files of a package."""
    package, *rest = root.split(".")
    place = HOMES[package].joinpath(*rest)
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


def _files(name: str) -> list[Path]:
    """Files that an import of `name` runs: the module's, and those of the packages that hold it.

    `name` may also be of something in a module. The whole library's own file is left out: it
    imports everything, and nothing here needs that.
    """
    package, *rest = name.split(".")
    files: list[Path] = []
    place = HOMES.get(package)
    for part in rest if place else ():
        place = place / part
        if (place / "__init__.py").is_file():
            files.append(place / "__init__.py")
        elif place.with_suffix(".py").is_file():
            files.append(place.with_suffix(".py"))
    return files


def _imports(path: Path) -> Iterator[str]:
    """Dotted names that a source file imports, in functions too."""
    package = module_name(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.module else base
            yield from (".".join([*module, alias.name]) for alias in node.names)


class Cache:
    """Values by key, in `folder`. fresh: remove what earlier runs have left there.

    Several processes may share a folder. A line that was cut off or damaged is ignored: its
    checksum tells. hits, misses: how often a value was there, and was not.
    """

    def __init__(self, folder: str | os.PathLike, fresh: bool = False):
        self.folder = Path(folder)
        self.hits = 0
        self.misses = 0
        self._values: dict[str, Any] = {}
        self._read: dict[Path, int] = {}
        self._own = self.folder / f"measured-{uuid.uuid4().hex}.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            for path in self.folder.glob("measured-*.jsonl"):
                path.unlink()
        self._refresh()

    def __contains__(self, name: str) -> bool:
        if name not in self._values:
            # Another process may have it by now.
            self._refresh()
        return name in self._values

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of key `name`. On a miss it is `make()`, JSON-ready, which is kept."""
        if name in self:
            self.hits += 1
            return self._values[name]
        self.misses += 1
        text = json.dumps([name, make()], allow_nan=False)
        with open(self._own, "a", encoding="utf-8") as file:
            file.write(f"{zlib.crc32(text.encode()):08x} {text}\n")
        # As it will be read.
        self._values[name] = json.loads(text)[1]
        return self._values[name]

    def _refresh(self) -> None:
        """Read what the files of other processes have gained since the last time."""
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
