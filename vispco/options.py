"""The command line's options: what may be asked for, and what a budget or a number looks like."""

from __future__ import annotations

import argparse
import contextlib
import inspect
from collections.abc import Callable, Mapping

from .budget import parse_budget
from .search import search
from .version import __version__

LISTS = ("methods", "presets", "kernels", "adapters", "models", "tasks")
_DEFAULTS = {name: p.default for name, p in inspect.signature(search).parameters.items()}
_INTRODUCTION = """\
Find by gradient which fraction of the visual tokens each layer of a
vision-language model needs, for any compute budget; measure it, draw it, try it."""


def build_parser(commands: Mapping[str, Callable]) -> argparse.ArgumentParser:
    """The whole parser; `options.run` will be the command's function. Its errors are ValueErrors."""
    parser = _Parser(prog="vispco", description=_INTRODUCTION,
                     epilog="`vispco COMMAND --help` tells the options of each, with an example.")
    parser.add_argument("--version", action="version", version=f"vispco {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (summary, example, add_options) in _COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.",
                                    epilog=f"example:\n  vispco {name} {example}")
        add_options(sub)
        sub.set_defaults(run=commands[name])
    return parser


class _Parser(argparse.ArgumentParser):
    """One-line errors, and help texts that keep their line breaks."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False,
                            **options})

    def error(self, message: str):
        raise ValueError(f"{message} (see `{self.prog} --help`)")


def budgets(text: str) -> list[float | str]:
    """`0.2,50%`, `0.1:0.9:9`, `1.8TFLOPs` -> shares as numbers, absolute budgets as they are; each once."""
    found: dict[tuple, float | str] = {}
    for item in text.split(","):
        try:
            for budget in _range(item) if ":" in item else [item.strip()]:
                budget = _bare(budget)
                value, absolute = parse_budget(budget)
                value = value if absolute else round(value, 10)
                found[value, absolute] = budget if absolute else value
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return list(found.values())


def _bare(text: str | float) -> float | str:
    """A number where the text is one: `parse_budget` takes both, files read better with numbers."""
    try:
        return float(text)
    except ValueError:
        return text


def _range(text: str) -> list[float]:
    parts = text.split(":")
    if len(parts) != 3 or not 2 <= int(parts[2] if parts[2].isdigit() else 0) <= 1000:
        raise ValueError(f"range {text!r} is not understood: expected start:stop:count, such as 0.1:0.9:9, "
                         "with a count of 2 to 1000")
    (start, absolute), (stop, other) = (parse_budget(_bare(p.strip())) for p in parts[:2])
    if absolute != other:
        raise ValueError(f"range {text!r} mixes a share with absolute FLOPs")
    step = (stop - start) / (int(parts[2]) - 1)
    return [round(start + i * step, 10) for i in range(int(parts[2]))]


def _whole(least: int, most: int = 2**31) -> Callable[[str], int]:
    def number(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= int(text) <= most:
                return int(text)
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {text!r}")

    return number


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _search_options(sub: _Parser) -> None:
    add = sub.add_argument
    add("--method", default=_DEFAULTS["method"], help="who ranks the tokens (default: %(default)s)")
    add("--kernel", default=_DEFAULTS["kernel"], help="the family of schedules (default: %(default)s)")
    add("--budgets", type=budgets, default=list(_DEFAULTS["budgets"]), metavar="LIST",
        help="shares of the prunable compute (0.2,0.5 or 50%%), a range start:stop:count (0.1:0.9:9), or "
             "absolute (1.8TFLOPs); default: " + ",".join(map(str, _DEFAULTS["budgets"])))
    add("--steps", type=_whole(1), default=_DEFAULTS["steps"], metavar="N",
        help="gradient steps per budget (default: %(default)s)")
    add("--learning-rate", type=_positive, default=_DEFAULTS["learning_rate"], metavar="RATE",
        help="of Adam, on the kernel's parameters (default: %(default)s)")
    add("--output", "-o", default="vispco-run", metavar="FOLDER",
        help="for frontier.json, config-<budget>.json and log.jsonl (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace an earlier frontier in that folder")
    _model_and_data(sub, limit=256, what="calibration questions")
    _json(sub)


def _evaluate_options(sub: _Parser) -> None:
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", nargs="+", metavar="FILE", help="pruning configurations")
    what.add_argument("--frontier", metavar="FILE", help="a frontier: all of its configurations")
    sub.add_argument("--per-task", action="store_true", help="a column of accuracy for every task")
    sub.add_argument("--output", "-o", metavar="FILE",
                     help="write the frontier with what was measured, ready to plot")
    sub.add_argument("--split", default="test", help="train, calibration or test (default: %(default)s)")
    _model_and_data(sub, limit=512, what="questions")
    _json(sub)


def _plot_options(sub: _Parser) -> None:
    sub.add_argument("frontiers", nargs="+", metavar="FRONTIER", help="frontier.json files, drawn together")
    sub.add_argument("--output", "-o", action="append", required=True, metavar="FILE",
                     help="picture to write, .svg or .png; may be given several times")
    sub.add_argument("--x", choices=("share", "flops"), default="share", help="(default: %(default)s)")
    sub.add_argument("--y", choices=("accuracy", "kl"), help="(default: accuracy if measured, else kl)")


def _apply_options(sub: _Parser) -> None:
    sub.add_argument("--model", default="testbed", help="testbed-llava (or testbed), testbed-qwen, or a local folder (default: %(default)s)")
    sub.add_argument("--config", required=True, metavar="FILE", help="a pruning configuration")
    sub.add_argument("--index", type=_whole(0, 9999), default=0,
                     help="which question of the testbed (default: the first, 0)")
    sub.add_argument("--split", default="test", help="of which split (default: %(default)s)")
    sub.add_argument("--seed", type=_whole(0), default=0, help="of the questions (default: %(default)s)")
    sub.add_argument("--image", metavar="PATH", help="a picture of your own, with --question")
    sub.add_argument("--question", metavar="TEXT", help="what to ask about it")
    _json(sub)


def _demo_options(sub: _Parser) -> None:
    sub.add_argument("--output", "-o", default="vispco-demo", metavar="FOLDER", help="(default: %(default)s)")
    sub.add_argument("--model", default="testbed-llava", help="testbed-llava or testbed-qwen (default: %(default)s)")
    sub.add_argument("--seed", type=_whole(0), default=0, help="(default: %(default)s)")
    sub.add_argument("--fast", action="store_true", help="a smoke test with tiny sizes")
    sub.add_argument("--quiet", "-q", action="store_true", help="no progress on stderr")


def _model_and_data(sub: _Parser, limit: int, what: str) -> None:
    add = sub.add_argument
    add("--model", default="testbed",
        help="testbed-llava (or testbed), testbed-qwen, or a local folder of a model with their vocabulary "
             "(default: %(default)s)")
    add("--data", default="testbed", help="nothing but testbed so far (default: %(default)s)")
    add("--tasks", type=_names, metavar="LIST",
        help="such as count,digit; `vispco list tasks` has them (default: all)")
    add("--limit", type=_whole(1), default=limit, metavar="N", help=f"{what} (default: %(default)s)")
    add("--batch-size", type=_whole(1), default=32, metavar="N", help="(default: %(default)s)")
    add("--seed", type=_whole(0), default=0, help="draws the questions, and orders the search (default: 0)")
    add("--quiet", "-q", action="store_true", help="no progress bar")


def _list_options(sub: _Parser) -> None:
    sub.add_argument("what", nargs="?", choices=LISTS, metavar="WHAT",
                     help="one of %(choices)s; everything without it")
    _json(sub)


def _json(sub: _Parser) -> None:
    sub.add_argument("--json", action="store_true", help="print JSON on stdout, and nothing else")


_COMMANDS = {
    "search": ("find one configuration per budget by gradient",
               "--model testbed --budgets 0.2,0.5,0.8 --output run", _search_options),
    "evaluate": ("measure configurations on labelled questions",
                 "--model testbed --frontier run/frontier.json --per-task", _evaluate_options),
    "plot": ("draw frontiers and their schedules",
             "run/frontier.json -o frontier.svg -o frontier.png", _plot_options),
    "apply": ("answer one question in full and pruned, side by side",
              "--model testbed --config run/config-0.5.json --index 3", _apply_options),
    "list": ("list what there is to choose from", "kernels", _list_options),
    "demo": ("run everything on the embedded testbed, in minutes on a CPU", "--output vispco-demo",
             _demo_options)}
