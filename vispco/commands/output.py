"""What several commands write: JSON, configurations, metrics; how they go on; who writes."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..evaluate import Record
from ..frontier import Frontier
from ..utils.console import budget_text, standard_error, wilson
from ..utils.distributed import launched, rank
from ..utils.journal import Journal


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
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        why = f"{error.strerror}; choose an --output that can be written"
        raise OSError(error.errno, why, path) from None


def check_folder(
    folder: Path, result: str, work: str, options: argparse.Namespace, begun: dict | None
) -> None:
    """Raise ValueError if the folder holds earlier work that nobody said what to do with.

    result: the file that the work ends with. work: what it is called. begun: what its journal is
    of, if it has one.
    """
    if options.overwrite or (options.resume and begun):
        return
    done = (folder / result).exists()
    if done or begun:
        what = f"a {result}" if done else f"a {work} that was interrupted"
        resume = "--resume it, " if begun else ""
        advice = f"choose another --output, {resume}or --overwrite it"
        raise ValueError(f"{folder} holds {what}: {advice}")


@contextlib.contextmanager
def resumable(
    folder: Path, work: str, options: argparse.Namespace, journal: Journal
) -> Iterator[None]:
    """Tell how to go on with work that is stopped, or how far it was when it went on."""
    words = shlex.split(options.command)
    command = [word for word in words if word not in ("--overwrite", "--resume")]
    how = f"`{shlex.join([*command, '--resume'])}` goes on where it was"
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {how}") from None
    except OSError as error:  # such as a full disk
        why = f"{error.strerror or error}; {how}"
        raise OSError(error.errno, why, error.filename) from None
    if options.resume and not options.quiet and journal.recalled:
        recalled, computed = journal.recalled, journal.computed
        done = f"went on after {recalled} results, with {computed} more"
        print(f"{folder}: the {work} {done if computed else 'had finished'}", file=sys.stderr)


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
        "agreement": record.agreement,
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
