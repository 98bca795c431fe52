"""The `vispco` command: finds the command, runs it, and turns every fault of a user into one line.

Exit codes: 0; 2 with one line on stderr for everything a user can get wrong; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from difflib import get_close_matches

import torch

from ..registry import did_you_mean
from ..utils.files import brief, printable
from ..utils.version import __version__
from . import COMMANDS
from .options import Integer

_INTRODUCTION = """\
Find how many visual tokens each layer of a vision-language model needs, for any
compute budget, by measurements on your data; evaluate it, draw it, deploy it."""

#: What others call our options, without the dashes.
_MEANT = {"prompt": "question", "picture": "image", "n": "limit", "samples": "limit"}
_MEANT |= {"outdir": "output", "out-dir": "output", "output-dir": "output", "folder": "output"}
_MEANT |= {"preset": "config", "frontier": "config", "dataset": "data", "layers": "num-layers"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        # Names and answers may hold what the terminal cannot encode.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        options = build_parser().parse_args(argv)
        options.command = shlex.join(["vispco", *(sys.argv[1:] if argv is None else argv)])
        with _quiet_transformers():
            options.run(options)
        sys.stdout.flush()
        return 0
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        return _complain(str(stop) or "interrupted", 130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}")
    except (ValueError, ImportError, FloatingPointError) as error:
        return _complain(str(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        what = str(error) or "of this machine"
        advice = "take a smaller --batch-size, fewer --limit, smaller pictures, or --dtype bfloat16"
        return _complain(f"out of memory ({what}): {advice}")


def build_parser() -> argparse.ArgumentParser:
    """The whole parser. `options.run` is the command's function; its errors are ValueErrors."""
    epilog = "`vispco COMMAND --help` tells the options of each, with an example."
    parser = _Parser(prog="vispco", description=_INTRODUCTION, epilog=epilog)
    parser.add_argument("--version", action="version", version=f"vispco {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        examples = "\n".join(f"  vispco {name} {example}" for example in command.EXAMPLES)
        description = f"{command.SUMMARY[0].upper()}{command.SUMMARY[1:]}."
        sub = subparsers.add_parser(name, help=command.SUMMARY, description=description)
        sub.epilog = f"example:\n{examples}"
        command.add_options(sub)
        sub.set_defaults(run=command.run)
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help texts that keep their line breaks, tell the default, and call whole numbers N."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        hidden = (None, False, argparse.SUPPRESS)
        if "default:" in text or any(action.default is value for value in hidden):
            return text
        return f"{text} (default: %(default)s)".strip()

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "N" if isinstance(action.type, Integer) else action.dest.upper()


class _Parser(argparse.ArgumentParser):
    """One-line errors, with the help page of the command that was meant."""

    def __init__(self, **options):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        """As ever, but what a command does not know is refused by that command."""
        self._words: list[str] = sys.argv[1:] if args is None else list(args)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._hint(unknown)}")
        return found, unknown

    @property
    def _names(self) -> list[str]:
        """The options, without the dashes, which any two share."""
        return [name[2:] for name in self._option_string_actions if name.startswith("--")]

    def _hint(self, unknown: Sequence[str]) -> str:
        """The option that was probably meant, or how several values are given."""
        if options := [word for word in unknown if word.startswith("-")]:
            return next(filter(None, map(self._meant, options)), "")
        before = self._words[: self._words.index(unknown[0])] if unknown[0] in self._words else []
        if before and "=" in unknown[0] and "=" in before[-1]:
            return f": put it in quotes, {shlex.quote(' '.join([before[-1], *unknown]))}"
        if len(before) > 1 and before[-2][2:] in self._names:
            values = ",".join([before[-1], *unknown])
            return f": several values are joined by commas, {before[-2]} {values}"
        return "" if before else self._nameless(unknown[0])

    def _meant(self, option: str) -> str:
        """The option that was probably meant by an unknown one."""
        name = option.lstrip("-").partition("=")[0]
        if get_close_matches(name, [action.dest for action in self._get_positional_actions()]):
            return f": give the value without {option}"
        near = get_close_matches(name, self._names, n=1) or [_MEANT.get(name, "")]
        return f": did you mean --{near[0]}?" if near[0] in self._names else ""

    def _nameless(self, value: str) -> str:
        """The option that a value was probably meant for: the first one of the command."""
        name = next((name for name in ("config", "model") if name in self._names), "")
        if not name or self._get_positional_actions():
            return ""
        return f": a value needs the name of its option, such as --{name} {value}"

    def _missing(self) -> str:
        """Which option was misspelt, or given without its name, where one is missing."""
        options = (word for word in self._words if word.startswith("--"))
        wrong = [word for word in options if word[2:].partition("=")[0] not in self._names]
        if hint := self._hint(wrong[:1]) if wrong else "":
            return f"; {wrong[0]}{hint}"
        bare = self._words and not self._words[0].startswith("-")
        return self._nameless(self._words[0]) if bare else ""

    def _check_value(self, action: argparse.Action, value: str) -> None:
        """As in every release of Python, with the nearest choice."""
        if action.choices is not None and value not in action.choices:
            hint = did_you_mean(value, action.choices)
            choices = ", ".join(map(str, action.choices))
            message = f"invalid choice: {value!r}: {hint}choose from {choices}"
            raise argparse.ArgumentError(action, message)

    def error(self, message: str):
        if self._subparsers and self._words[:1] and self._words[0].startswith("--"):
            message = f"name a command before {self._words[0]}: one of {', '.join(COMMANDS)}"
        elif message.startswith(("the following arguments are required", "one of the arguments")):
            message += self._missing()
        elif two := re.fullmatch(r"argument (--\S+): expected \d arguments", message):
            message += f", {' '.join(self._option_string_actions[two[1]].metavar or '')}"
        raise ValueError(f"{message} (see `{self.prog} --help`)")


def _complain(message: str, code: int = 2) -> int:
    line = printable(brief(" ".join(message.split()), 1500))
    print(f"vispco: error: {line}" if code == 2 else f"vispco: {line}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _quiet_transformers():
    """No loading bars and hints from transformers: stderr is for our progress and errors."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    heard = hub.get_verbosity()
    hub.set_verbosity_error()
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub.set_verbosity(heard)
        if bars:
            logging.enable_progress_bar()
