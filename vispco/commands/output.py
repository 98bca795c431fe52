"""What several commands write: JSON, file names, a log of steps."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ..utils.console import budget_text


def print_json(data: Any) -> None:
    """On stdout."""
    print(json.dumps(data, indent=2, allow_nan=False))


def check_file(path: str) -> None:
    """Raise, before any work is done, unless a file can be written there."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: --output needs a file here")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise ValueError(f"{path}: there is no folder {folder}; make it, or choose another --output")
    with tempfile.TemporaryFile(dir=folder):
        pass


def slug(budget: float | str | Mapping) -> str:
    """A budget as a part of a file name.

    >>> slug(0.5), slug("1.8 TFLOPs"), slug({"flops": 0.5, "kv_cache": "40%"})
    ('0.5', '1.8TFLOPs', 'flops-0.5+kv_cache-40')
    """
    return re.sub(r"[^\w.+-]", "", budget_text(budget).replace("=", "-"))


class StepLog:
    """One JSON object per step, written as it happens; of a search that makes none, no file, nor an earlier search's."""

    def __init__(self, path: Path):
        self._path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> StepLog:
        return self

    def __call__(self, record: dict) -> None:
        self._file = self._file or open(self._path, "w", encoding="utf-8")
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def __exit__(self, kind: type | None, *_) -> None:
        if self._file:
            self._file.close()
        elif kind is None:
            self._path.unlink(missing_ok=True)
