"""Measurements on disk, found by what they are measurements of.

An entry's key is the hash of everything that can change its value: the source code at work, the weights and the
configuration of the model, the questions, the method with its options, the tokens that enter each layer. So an entry
is never stale: what has changed is simply not found. Entries are JSON lines; every process appends to a file of its
own and reads those of the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from ..version import versions

ROOT = Path(__file__).resolve().parent.parent
#: What a forward pass of a pruned model goes through; a search goes through all of the library.
MEASURING = ("config.py", "context.py", "downsample.py", "evaluate.py", "masks.py", "prefill.py", "pruning.py",
             "relaxation.py", "teacher.py", "testbed/*.py", "vision.py", "methods/*.py", "models/*.py")
SEARCHING = ("*.py", "methods/*.py", "models/*.py")
DISPLAY = {"cli.py", "console.py", "demo.py", "files.py", "options.py", "__main__.py", "__init__.py"}


@cache
def code(patterns: tuple[str, ...] = MEASURING) -> str:
    """Digest of the library's source files, and of the versions below it."""
    digest = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode())
    for path in sorted({p for pattern in patterns for p in ROOT.glob(pattern)}):
        if path.name not in DISPLAY:
            digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def of_file(path: str | os.PathLike) -> str:
    """Digest of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class Cache:
    """Values by key, in `folder`. fresh: begin with nothing, and remove what earlier runs have left there.

    Several processes may share a folder. A line that was cut off is ignored.
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
            line = json.dumps({"key": name, "value": make()}, allow_nan=False)
            with open(self._own, "a", encoding="utf-8") as file:
                file.write(line + "\n")
            self._values[name] = json.loads(line)["value"]  # as it will be read
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
                try:
                    entry = json.loads(line)
                    self._values[entry["key"]] = entry["value"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
