"""What several commands write: JSON, configurations, metrics; and which process writes."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..evaluate import Record
from ..frontier import Frontier
from ..utils.console import budget_text, standard_error, wilson
from ..utils.distributed import launched, rank


def print_json(data: Any) -> None:
    """Print data as JSON on stdout."""
    print(json.dumps(data, indent=2, allow_nan=False))


def check_file(path: str) -> None:
    """Raise, before any work is done, unless a file can be written there."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: --output needs a file here")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        advice = "make it, or choose another --output"
        raise ValueError(f"{path}: there is no folder {folder}; {advice}")
    with tempfile.TemporaryFile(dir=folder):
        pass


def slug(budget: float | str | Mapping) -> str:
    """A budget as a part of a file name.

    >>> slug(0.5), slug("1.8 TFLOPs"), slug({"flops": 0.5, "kv_cache": "40%"})
    ('0.5', '1.8TFLOPs', 'flops-0.5+kv_cache-40')
    """
    return re.sub(r"[^\w.+-]", "", budget_text(budget).replace("=", "-"))


def save_configs(frontier: Frontier, folder: Path, prefix: str) -> list[Path]:
    """Write each configuration to `<prefix>-<budget>.json`. Returns the paths, point by point."""
    paths = [folder / f"{prefix}-{slug(point.budget)}.json" for point in frontier.points]
    for point, path in zip(frontier.points, paths, strict=True):
        point.config.save(path)
    return paths


def metrics(record: Record) -> dict[str, Any]:
    """What a frontier's point keeps of a held-out record; `share` is of the prunable compute."""
    return {
        "accuracy": record.accuracy,
        "standard_error": standard_error(record.accuracy, record.n),
        "interval": list(wilson(int(record.correct.sum()), record.n)),
        "kl": record.kl,
        "flops": record.flops,
        "share": record.prunable_share,
        "n": record.n,
    }


@contextlib.contextmanager
def first_process(options: argparse.Namespace) -> Iterator[bool]:
    """Join the processes of `torchrun`: is this the first? The others print nothing."""
    with launched(), contextlib.ExitStack() as stack:
        first = rank() == 0
        if not first:
            options.quiet = True
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield first
