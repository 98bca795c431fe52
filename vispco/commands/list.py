"""`vispco list`: what there is to choose from."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable

from .. import testbed
from ..baselines.presets import presets
from ..registry import ADAPTERS, KERNELS, METHODS, Registry
from ..utils.console import table
from .configs import PRESET
from .options import add_json
from .output import print_json

SUMMARY = "list what there is to choose from"
EXAMPLES = ("kernels",)


def add_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of `vispco list`."""
    which = "one of %(choices)s; everything without it"
    sub.add_argument("what", nargs="?", choices=LISTERS, metavar="WHAT", help=which)
    add_json(sub)


def run(options: argparse.Namespace) -> None:
    """Print one list, or all."""
    lists = {what: LISTERS[what]() for what in ([options.what] if options.what else LISTERS)}
    if options.json:
        print_json(lists[options.what] if options.what else lists)
    else:
        print("\n\n".join(table([what, ""], [*lines.items()]) for what, lines in lists.items()))


def _first_lines(registry: Registry) -> dict[str, str]:
    documented = {name: inspect.getdoc(registry.get(name)) or "" for name in registry.names()}
    return {name: text.split("\n")[0] for name, text in documented.items()}


def _methods() -> dict[str, str]:
    """Where each ranks, what it looks at, and its first line."""
    lines = {}
    for name, first in _first_lines(METHODS).items():
        cls = METHODS.get(name)
        before = not cls.first_layer and not cls.reads_next
        where = "before the language model" if before else "inside"
        lines[name] = f"{where}; reads {cls.reads or 'what its `score` asks for'}: {first}"
    return lines


def _presets() -> dict[str, str]:
    """Published configurations, by the names that `--config` takes."""
    lines = {}
    for method in METHODS.names():
        for name, preset in presets(method).items():
            steps = preset.config.describe().split(": ", 1)[1]
            layers = preset.published.num_layers
            lines[f"{PRESET}{method}/{name}"] = f"published for {layers} layers: {steps}"
    return lines


def _tasks() -> dict[str, str]:
    lines = {}
    for task in testbed.TASKS:
        try:
            example = testbed.examples("test", 1, 0, (task,))[0]
            lines[task] = f"such as: {example.question}? {example.answer}"
        except ImportError as error:  # its questions are another package's
            lines[task] = str(error)
    return lines


_MODELS = {
    "testbed-llava": "embedded, trained on the tasks below: 8 layers; `testbed` for short",
    "testbed-qwen": "embedded, trained on the tasks below: 16 layers, any resolution",
    "testbed-smollm": "a pretrained language model of 30 layers, trained on the tasks below",
    "FOLDER": "a local Hugging Face model that reads pictures as tokens",
    "OWNER/MODEL": "the same by name, from the local cache or the Hugging Face hub",
}
LISTERS: dict[str, Callable[[], dict[str, str]]] = {
    "methods": _methods,
    "presets": _presets,
    "kernels": lambda: _first_lines(KERNELS),
    "adapters": lambda: _first_lines(ADAPTERS),
    "models": lambda: _MODELS,
    "tasks": _tasks,
}
