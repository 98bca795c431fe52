"""What the commands have in common that measure into a file of results and print its table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from vispco.utils.files import read_json, write_text


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """A parser of `python -m tests.reproduction.NAME`. doc: of the module, begins with its use."""
    prog = f"python -m tests.reproduction.{name}"
    made = argparse.ArgumentParser(prog=prog, description=doc.split("\n")[0])
    made.add_argument("--output", type=Path, required=True, help="a JSON file")
    made.add_argument("--table", action="store_true", help="print the file's tables, run nothing")
    return made


def tabled(
    options: argparse.Namespace, measure: Callable[[], dict], table: Callable[[dict], str]
) -> int:
    """Write what was measured to --output, unless --table, and print its table; the exit code."""

    def action() -> None:
        if not options.table:
            result = measure()
            options.output.parent.mkdir(parents=True, exist_ok=True)
            write_text(options.output, json.dumps(result) + "\n")
        print(table(read_json(options.output, dict)))

    return told(action)


def told(action: Callable[[], None]) -> int:
    """Run it; the exit code: 0, or 2 with one line on stderr for what a user can get wrong."""
    try:
        action()
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
