"""What pruning saves on a GPU: one command, part by part, in minutes.

    python -m benchmarks.gpu --output gpu              # on a GPU: true shapes, bfloat16
    python -m benchmarks.gpu --output gpu              # again: only what is missing
    python -m benchmarks.gpu --output try --rehearse   # tiny shapes, on the CPU
    python -m benchmarks.gpu --estimate                # no GPU: how long a search may take

DIR/gpu.json has all figures, and is written after each part. DIR/gpu.md shows them. What was
interrupted goes on where it was. What other versions or another GPU measured is refused. What
other code measured is measured anew, unless --keep.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from vispco.utils.version import require, versions

from ..side_by_side import machine
from . import estimate, page, planned
from .parts import Part
from .records import ROOT, Records, code
from .worker import KINDS, MARK

#: Seconds that a process may take until it has its model.
LOADING = 120.0
#: The command of such a process.
WORKER = [sys.executable, "-m", "benchmarks.gpu.worker"]

#: launch(settings, model, parts, deadline) -> events, as `worker.work`.
Launch = Callable[[Mapping[str, Any], str, Sequence[Part], float], Iterator[dict]]


def processes(
    settings: Mapping[str, Any], model: str, parts: Sequence[Part], deadline: float
) -> Iterator[dict]:
    """Measure in a process of its own; it is ended when a part takes too long, or at the deadline.

    The parts after one that ends the process get a new process.
    """
    left = list(parts)
    while left and time.monotonic() < deadline:
        began = "model"
        for event in _process(settings, model, left, deadline):
            began = event.get("begin", began)
            if name := event.get("part"):
                left = [part for part in left if part.name != name]
                began = ""
            yield event
            # Without a model nothing can be measured.
            if "stopped" in event or name == "model":
                return
        left = [part for part in left if part.name != began]


def _process(
    settings: Mapping[str, Any], model: str, parts: Sequence[Part], deadline: float
) -> Iterator[dict]:
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(WORKER, **pipes, text=True, cwd=ROOT)
    lines: queue.Queue = queue.Queue()
    try:
        assert process.stdin is not None and process.stdout is not None
        with process.stdin as given:
            json.dump([dict(settings), model, [astuple(part) for part in parts]], given)
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        began, limit = "model", time.monotonic() + LOADING
        while True:
            try:
                line = lines.get(timeout=max(0, min(limit, deadline) - time.monotonic()))
            except queue.Empty:
                if time.monotonic() >= deadline:
                    yield {"stopped": began}
                else:
                    yield {"part": began, "failed": "took longer than its limit"}
                return
            if line is None:
                process.wait()
                if began:
                    yield {"part": began, "failed": f"the process ended ({process.returncode})"}
                return
            if not line.startswith(MARK):
                sys.stderr.write(line)
                continue
            event = json.loads(line.removeprefix(MARK))
            yield event
            began = event.get("begin", "")
            kind = began.partition(" ")[0]
            limit = time.monotonic() + (KINDS[kind][1] if kind in KINDS else LOADING)
    finally:
        process.kill()
        process.wait()


def _read(stream: Any, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def measure(options: argparse.Namespace, launch: Launch = processes) -> bool:
    """Measure what is missing; whether there are figures of all parts now."""
    settings = {
        "device": options.device,
        "dtype": "bfloat16",
        "tiny": options.rehearse,
        "seed": options.seed,
        "rounds": options.rounds,
    }
    if options.device == "cpu":
        torch.set_num_threads(1)
    made_by = {"versions": versions(), "machine": machine(options.device), **settings}
    options.output.mkdir(parents=True, exist_ok=True)
    records = Records(options.output / "gpu.json", made_by, options.fresh)
    digest, started = code(), time.monotonic()
    counted = None if options.keep else digest
    asked = [p for p in planned.parts(options.rehearse) if fnmatch.fnmatch(p.name, options.only)]
    if not asked:
        known = "; ".join(part.name for part in planned.parts(options.rehearse))
        raise ValueError(f"--only {options.only!r} is none of the parts: {known}")
    missing = [p for p in asked if not records.known(p.name, counted, options.retry)]
    print(f"{len(asked) - len(missing)} of {len(asked)} parts are known already", flush=True)
    deadline = started + 60 * options.minutes
    for model, parts in _groups(missing):
        waiting = [part.name for part in parts]
        for event in launch(settings, model, parts, deadline):
            name = event.get("part")
            if name is None:
                continue
            # Without a model, none of its parts can be measured.
            for each in [name] if name != "model" else list(waiting):
                waiting.remove(each)
                found = {"took": event.get("took"), "code": digest}
                found |= {key: event[key] for key in ("figures", "failed") if key in event}
                records.add(each, found)
                page.write(options.output / "gpu.md", records.to_dict())
                said = found.get("failed") or f"{found['took']} s"
                print(f"{time.monotonic() - started:6.1f} s  {each}: {said}", flush=True)
        if time.monotonic() >= deadline:
            break
    page.write(options.output / "gpu.md", records.to_dict())
    left = [p.name for p in asked if not records.known(p.name, counted)]
    failed = [p.name for p in asked if "failed" in records.parts.get(p.name, ())]
    if left:
        print(f"{len(left)} parts are left; run the same command again: {', '.join(left)}")
    if failed:
        print(f"{len(failed)} parts failed; --retry tries them again: {', '.join(failed)}")
    print(f"written to {options.output / 'gpu.json'} and {options.output / 'gpu.md'}")
    return not left and not failed


def _groups(parts: Sequence[Part]) -> list[tuple[str, list[Part]]]:
    """Neighbours of one model, which share a process."""
    groups = itertools.groupby(parts, key=lambda part: part.model)
    return [(model, list(own)) for model, own in groups]


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = found.add_argument
    add("--output", type=Path, metavar="DIR", help="folder of gpu.json and gpu.md")
    add("--minutes", type=float, default=7.5, help="after which nothing runs (default: 7.5)")
    add("--rehearse", action="store_true", help="tiny shapes, on the CPU: no figure means anything")
    add("--only", default="*", metavar="PATTERN", help="parts by name, such as 'decode*'")
    add("--fresh", action="store_true", help="forget what DIR/gpu.json holds")
    add("--retry", action="store_true", help="try parts that failed again")
    add("--keep", action="store_true", help="keep what other code has measured")
    add("--rounds", type=int, default=7, help="timed rounds, at most")
    add("--seed", type=int, default=0, help="of the random weights and prompts")
    add("--estimate", action="store_true", help="print what a search may take, from FLOPs alone")
    return found


def main(argv: Sequence[str] | None = None, launch: Launch = processes) -> int:
    """Run the command: 0 if there are all figures, 1 if some are missing, 2 for bad input."""
    try:
        options = parser().parse_args(argv)
        require({"transformers": "5.10"})
        if options.estimate:
            print(estimate.table())
            return 0
        if options.output is None:
            raise ValueError("--output DIR: say where the figures go")
        if options.rounds < 2 or options.minutes <= 0:
            raise ValueError("--rounds must be at least 2, and --minutes more than 0")
        options.device = "cpu" if options.rehearse else "cuda"
        if not options.rehearse and not torch.cuda.is_available():
            raise ValueError("torch finds no GPU: try --rehearse, or --estimate")
        return 0 if measure(options, launch) else 1
    except SystemExit as stop:
        return stop.code or 0
    except KeyboardInterrupt:
        print("interrupted: the same command does what is missing", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}".splitlines()[0], file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
