"""`vispco list`: what there is to choose from."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable

from .. import testbed
from ..baselines.presets import presets
from ..utils.console import table
from ..registry import ADAPTERS, KERNELS, METHODS
from .options import add_json
from .output import print_json

SUMMARY = "list what there is to choose from"
EXAMPLES = ("kernels",)


def add_options(sub: argparse.ArgumentParser) -> None:
    """Of `vispco list`."""
    sub.add_argument("what", nargs="?", choices=LISTERS, metavar="WHAT",
                     help="one of %(choices)s; everything without it")
    add_json(sub)


def run(options: argparse.Namespace) -> None:
    """One list, or all."""
    lists = {what: LISTERS[what]() for what in ([options.what] if options.what else LISTERS)}
    if options.json:
        return print_json(lists[options.what] if options.what else lists)
    blocks = [table([what, ""], [*lines.items()]) for what, lines in lists.items()]
    print("\n\n".join(blocks))


def _first_lines(registry) -> dict[str, str]:
    return {name: (inspect.getdoc(registry.get(name)) or "").split("\n")[0] for name in registry.names()}


def _presets() -> dict[str, str]:
    """Published configurations, for 32 layers."""
    return {f"{method} {name}": preset.config.describe().split(": ", 1)[1]
            for method in METHODS.names() for name, preset in presets(method).items()}


def _models() -> dict[str, str]:
    return {"testbed-llava": "embedded, trained on the tasks below: 8 layers; `testbed` for short",
            "testbed-qwen": "embedded, trained on the tasks below: 16 layers, any resolution",
            "FOLDER": "a local Hugging Face model of a family that has an adapter",
            "OWNER/MODEL": "the same by name, from the local cache or the Hugging Face hub"}


def _tasks() -> dict[str, str]:
    return {task: _example(task) for task in testbed.TASKS}


def _example(task: str) -> str:
    try:
        sample = testbed.examples("test", 1, 0, (task,))[0]
    except ImportError as error:  # its questions are another package's
        return str(error)
    return f"such as: {sample.question}? {sample.answer}"


LISTERS: dict[str, Callable[[], dict[str, str]]] = {
    "methods": lambda: _first_lines(METHODS), "presets": _presets, "kernels": lambda: _first_lines(KERNELS),
    "adapters": lambda: _first_lines(ADAPTERS), "models": _models, "tasks": _tasks}
