"""The pieces of all claims, run by a few processes of one thread each."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .cache import Cache
from .claims import CLAIMS
from .claims.base import Piece
from .sizes import Size


def plan(names: Sequence[str], size: Size) -> list[tuple[str, Piece]]:
    """(claim, piece) of all claims asked for, in the order in which they run."""
    return [
        (name, piece) for name in CLAIMS if name in names for piece in CLAIMS[name].pieces(size)
    ]


def announce(todo: Sequence[tuple[str, Piece]], workers: int) -> None:
    """What is about to run, on stderr: an upper estimate, as if nothing were in the cache."""
    for name in dict.fromkeys(name for name, _ in todo):
        own = [piece for other, piece in todo if other == name]
        print(
            f"{name:12} {len(own):3} pieces, about {sum(p.passes for p in own):>10,} forward "
            "passes, "
            f"{sum(p.seconds for p in own) / 60:6.1f} min of one core",
            file=sys.stderr,
        )
    total = sum(piece.seconds for _, piece in todo)
    print(
        f"{'in all':12} {len(todo):3} pieces, about {total / 60:.0f} min of one core, "
        f"{total / 60 / workers:.0f} min with "
        f"{workers} workers, less what is in the cache",
        file=sys.stderr,
        flush=True,
    )


def run(
    todo: Sequence[tuple[str, Piece]], size: Size, folder: Path, workers: int
) -> dict[str, list[Any]]:
    """What every piece found, by claim, in the order of the pieces. Progress on stderr."""
    found: dict[int, Any] = {}
    _cache.cache_clear()  # the folder may have been emptied since
    started, total = time.perf_counter(), sum(piece.seconds for _, piece in todo)
    done = 0.0
    for number, result in _results(todo, size, folder, workers):
        found[number] = result
        name, piece = todo[number]
        done += piece.seconds
        seconds = time.perf_counter() - started
        what = " ".join(f"{v}" for v in piece.args.values())
        print(
            f"[{len(found)}/{len(todo)}] {name} {what} ({seconds:.0f} s, "
            f"{done / max(total, 1e-9):.0%} of the estimate)",
            file=sys.stderr,
            flush=True,
        )
    return {
        name: [found[i] for i, (other, _) in enumerate(todo) if other == name]
        for name in dict.fromkeys(name for name, _ in todo)
    }


def _results(todo, size: Size, folder: Path, workers: int) -> Iterator[tuple[int, Any]]:
    if workers == 1:
        for number, (name, piece) in enumerate(todo):
            yield number, work(name, piece.args, size, folder)
        return
    context = multiprocessing.get_context(
        "spawn"
    )  # a forked copy of a process with threads may hang
    with ProcessPoolExecutor(
        workers, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as executor:
        futures = {
            executor.submit(work, name, piece.args, size, folder): i
            for i, (name, piece) in enumerate(todo)
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def work(name: str, args: dict, size: Size, folder: Path) -> Any:
    """One piece, in this process."""
    return CLAIMS[name].run(_cache(folder), size, **args)


@lru_cache(maxsize=1)
def _cache(folder: Path) -> Cache:
    return Cache(folder)
