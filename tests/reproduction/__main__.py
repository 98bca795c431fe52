"""The command: `python -m tests.reproduction --size quick --output docs/results`."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vispco.plot import require_matplotlib
from vispco.utils.console import output_folder

from . import jobs
from .cache import Cache
from .claims import CLAIMS
from .report import conclude, load, write
from .sizes import SIZES, Size


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 with one line on stderr for what a user can get
    wrong, 130.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        options = _parser().parse_args(given)
        reproduce(
            options.output,
            options.cache,
            sized(options.size, options.seeds),
            options.claims,
            options.workers,
            options.fresh,
            options.methods,
        )
        return 0
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (ValueError, ImportError, FloatingPointError) as error:
        return _complain(str(error))


def sized(name: str, seeds: int | None = None) -> Size:
    """A size by name, with another number of seeds. Raises ValueError for fewer than 1."""
    size = SIZES[name]
    if seeds is None:
        return size
    if seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {seeds}")
    return replace(
        size,
        depth_seeds=seeds,
        settings=tuple(
            replace(s, seeds=seeds, rivals=seeds, kernel_seeds=seeds) for s in size.settings
        ),
        winners={name: replace(own, seeds=seeds) for name, own in size.winners.items()},
    )


def reproduce(
    output: Path,
    folder: Path,
    size: Size,
    names: Sequence[str] | None = None,
    workers: int = 2,
    fresh: bool = False,
    methods: Sequence[str] | None = None,
) -> dict[str, dict]:
    """Run the claims, write tables and figures to `output`; returns {claim: result}.

    folder: of the cache. Other claims' results in `output` stay, and are in the report with the
    command that made them. methods: these alone race each other, and the rows of the others in
    `output` stay. Raises ValueError for a bad argument, before anything runs.
    """
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}")
    names = list(names or CLAIMS)
    whole, before = size, None
    if methods:
        size, before = racing(size, methods, names, output)
    require_matplotlib()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with output_folder(output) as place:
        Cache(folder, fresh)
        todo = jobs.plan(names, size)
        jobs.announce(todo, workers)
        found = jobs.run(todo, size, Path(folder), workers)
        results = {name: conclude(name, found.get(name, []), size) for name in names}
        if before:
            results = {"winner": again(before, found["winner"], whole, methods or ())}
        write(results, place)
    for name, result in results.items():
        print(f"{name:12} {result['verdict']:12} {result['measured']}")
    print(f"{time.perf_counter() - started:.0f} s; {place / 'README.md'}", file=sys.stderr)
    return results


def racing(
    size: Size, methods: Sequence[str], names: Sequence[str], output: Path
) -> tuple[Size, dict]:
    """The size with these methods alone in the race, and the race's result so far."""
    own = {n: [m for m in w.methods if m in methods] for n, w in size.winners.items()}
    if unknown := set(methods) - {m for each in own.values() for m in each}:
        raise ValueError(f"--methods: {', '.join(sorted(unknown))} is not in the race")
    if list(names) != ["winner"]:
        raise ValueError("--methods is of the race alone: add --claims winner")
    before = load(output).get("winner")
    if before is None or before["size"] != size.name:
        raise ValueError(f"--methods: {output} has no race of size {size.name}: run it whole first")
    some = {
        n: replace(w, methods=tuple(own[n]), smaller=False)
        for n, w in size.winners.items()
        if own[n]
    }
    return replace(size, winners=some), before


def again(before: dict, found: list[dict], size: Size, methods: Sequence[str]) -> dict:
    """The race's result with the rows of `methods` as they were found now."""
    new = {(row["testbed"], row["method"]): row for row in found}
    rows = [new.pop((row["testbed"], row["method"]), row) for row in before["rows"]]
    result = conclude("winner", [*rows, *new.values()], size)
    kept = {name: before[name] for name in ("seeds", "calibration", "test", "versions")}
    more = f"; the same with --methods {' '.join(methods)}"
    return {**result, **kept, "command": before["command"].removesuffix(more) + more}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.reproduction",
        description="Run every claim about the search again, "
        "and write tables and figures beside the paper's.",
    )
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="quick",
        help="quick: within an hour on 2 cores (default); deep: the race of all methods on "
        "testbed-smollm, for --claims winner and a folder of its own, two hours; standard: 3 "
        "seeds, 160 random configurations per budget, hours; full: 5 seeds, 640 random "
        "configurations at nine budgets for every method, 512 held-out "
        "questions, a day and more; smoke: seconds",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("docs/results"),
        metavar="FOLDER",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(".reproduction"),
        metavar="FOLDER",
        help="measurements, found by their content (default: %(default)s)",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="measure everything again and replace what is in the cache",
    )
    parser.add_argument(
        "--claims",
        nargs="+",
        choices=CLAIMS,
        metavar="NAME",
        help=f"only these: {', '.join(CLAIMS)}",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="of the race (--claims winner), these alone, in a folder with the rows of the others",
    )
    parser.add_argument("--seeds", type=int, help="of every search, instead of the size's")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes of one thread each (default: %(default)s)"
    )
    return parser


def _complain(message: str, code: int = 2) -> int:
    print(f"error: {' '.join(message.split())}" if code == 2 else message, file=sys.stderr)
    return code


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
