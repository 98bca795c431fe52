"""Run a page of the documentation top to bottom, and write down what its code prints.

    python docs/run.py docs/02-relaxation.md    # runs it in the current folder, pictures included
    python docs/run.py docs/0*.md --write       # ... and puts the output below each block

A page is Markdown. Its ```python blocks run in order, as one program. The `vispco` commands in its
```shell blocks run in between; those in ```sh blocks are for the reader to run. A ```output block
below one holds what it printed when the page was written (never typed by hand). The tests run the
page again and compare: the words must be equal, the numbers close. After a search, the numbers
depend on more than the page: the block then says ```output varies, and only the words count.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import tempfile
from pathlib import Path

from vispco.commands.main import main as vispco

IMAGES = Path(__file__).parent / "images"
CODE = re.compile(r"^```(python|shell)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"^```(?:sh|shell|bash)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
OUTPUT = re.compile(r"\n```output( varies)?\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
# Of a schedule (`2x64 48 5x12`), how many numbers there are is a number too; shades stand for some.
VARIES = re.compile(r"(?:\d+x)?\d+(?: (?:\d+x)?\d+)+|\d+x\d+|[·░▒▓█]")


def run(page: Path) -> list[str]:
    """Run the page in the current folder; what each block printed."""
    text, names, printed = page.read_text(encoding="utf-8"), {"__name__": page.stem}, []
    for block in CODE.finditer(text):
        # Empty lines above it, so that a traceback names the line of the page.
        above = "\n" * text.count("\n", 0, block.start(2))
        with contextlib.redirect_stdout(io.StringIO()) as out:
            if block[1] == "python":
                exec(compile(above + block[2], str(page), "exec"), names)
            for command in commands(block[2]) if block[1] == "shell" else ():
                if code := vispco(command):
                    raise RuntimeError(
                        f"{page.name}: vispco {shlex.join(command)} ended with {code}"
                    )
        printed.append(out.getvalue())
    return printed


def commands(block: str) -> list[list[str]]:
    """The arguments of each `vispco` command in a block of shell.

    >>> commands("pip install vispco\\nvispco list methods   # all\\nvispco plot a \\\\\\n -o b\\n")
    [['list', 'methods'], ['plot', 'a', '-o', 'b']]
    """
    lines = block.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [found[1:] for found in words if found[:1] == ["vispco"]]


def recorded(page: Path) -> list[tuple[str, bool] | None]:
    """For each block of code, what the page says it printed, and whether the numbers may vary.

    None for a block of which the page says nothing.
    """
    text = page.read_text(encoding="utf-8")
    below = [OUTPUT.match(text, block.end()) for block in CODE.finditer(text)]
    return [found and (found[2], bool(found[1])) for found in below]


def differences(was: str, now: str, varies: bool = False, tolerance: float = 0.2) -> list[str]:
    """What makes two outputs differ: other words, or numbers that are too far apart.

    Too far is more than 0.05, and more than `tolerance` times the larger one.

    >>> differences("KL 0.31 of 8", "KL 0.33 of 8"), differences("KL 0.31", "loss 0.31")
    ([], ["words: 'KL #' became 'loss #'"])
    >>> differences("KL 0.31", "KL 0.81"), differences("KL 0.31", "KL 0.81", varies=True)
    (['0.31 became 0.81'], [])
    """
    if varies:
        was, now = (re.sub(r" +", " ", VARIES.sub("0", text)) for text in (was, now))
        was, now = (NUMBER.sub("0", text) for text in (was, now))
        return differences(was, now)
    words = [re.sub(r"\s+", " ", NUMBER.sub("#", text)).strip() for text in (was, now)]
    if words[0] != words[1]:
        return [f"words: {words[0]!r} became {words[1]!r}"]
    numbers = ([float(number) for number in NUMBER.findall(text)] for text in (was, now))
    return [
        f"{a:g} became {b:g}"
        for a, b in zip(*numbers, strict=True)
        if abs(a - b) > max(tolerance * max(abs(a), abs(b)), 0.05)
    ]


def write(page: Path, printed: list[str]) -> None:
    """Replace the recorded outputs of a page. Blocks without one keep none."""
    text, found, end = page.read_text(encoding="utf-8"), [], 0
    for block, lines in zip(CODE.finditer(text), printed, strict=True):
        found.append(text[end : block.end()])
        end = block.end()
        if old := OUTPUT.match(text, end):
            found.append(f"\n```output{old[1] or ''}\n{lines}```\n")
            end = old.end()
    page.write_text("".join(found) + text[end:], encoding="utf-8")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="run pages of the documentation")
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument(
        "--write", action="store_true", help="update the outputs in the pages, and docs/images"
    )
    options = parser.parse_args()
    if missing := [page for page in options.pages if not page.is_file()]:
        parser.error(f"{missing[0]} is not a file: give pages such as docs/00-quickstart.md")
    for page in (page.resolve() for page in options.pages):
        if not options.write:
            print(*run(page), sep="\n")
            continue
        here = os.getcwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                write(page, run(page))
            finally:
                os.chdir(here)
            for picture in Path(folder).glob("*.png"):
                (IMAGES / picture.name).write_bytes(picture.read_bytes())


if __name__ == "__main__":
    main()
