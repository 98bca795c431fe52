"""The configurations that a user names: a file, the folder of a search, or a published one."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from ..baselines.presets import presets
from ..config import PruningConfig
from ..frontier import Frontier
from ..registry import METHODS, did_you_mean
from .output import slug

#: What stands before the name of a published configuration.
PRESET = "preset:"
#: What an option of these commands takes, for its help.
HELP = "a configuration file, or a published one such as preset:fastv/k2-r50"

#: The configuration for a model of so many decoder layers.
ForLayers = Callable[[int], PruningConfig]


def find_configs(text: str) -> dict[str, ForLayers]:
    """What `text` names: {name: configuration}; of a search's folder all that it found.

    Raises ValueError, or OSError that names the file, before any model is needed.

    >>> find_configs("preset:fastv/k2-r50")["preset:fastv/k2-r50"](28).describe()
    'fastv: layer 2 keeps 50.0 % (drops 50.0 %)'
    """
    if "," in text and not os.path.exists(text):
        names = " ".join(part.strip() for part in text.split(","))
        raise ValueError(f"{text}: several configurations have spaces between them: {names}")
    if text.startswith(PRESET):
        return {text: _preset(text)}
    if not os.path.exists(text):
        raise ValueError(f"{text}: there is no such file or folder; {_hint(text)}")
    paths = _of_folder(Path(text)) if Path(text).is_dir() else [text]
    loaded = {str(path): _load(str(path)) for path in paths}
    return {path: partial(always, config) for path, config in loaded.items()}


def always(config: PruningConfig, layers: int) -> PruningConfig:
    """`config`, whatever the model: with `partial`, a configuration that does not move."""
    return config


def find_config(text: str) -> ForLayers:
    """The one configuration that `text` names. Raises ValueError if a folder holds several."""
    found = find_configs(text)
    if len(found) > 1:
        best = _recommended(Path(text))
        hint = f"; the search recommends {best}" if best in found else ""
        names = ", ".join(found)
        raise ValueError(f"{text} holds several configurations: name one of {names}{hint}")
    return next(iter(found.values()))


def _recommended(folder: Path) -> str:
    """The file of the configuration that a search recommends, if there is one."""
    if not (folder / "frontier.json").is_file():
        return ""
    budget = Frontier.load(folder / "frontier.json").meta.get("recommended_budget")
    return "" if budget is None else str(folder / f"config-{slug(budget)}.json")


def frontier_path(text: str) -> str:
    """The file of a frontier: `text` itself, or frontier.json in the folder that it names.

    Raises ValueError for a folder without one.
    """
    folder = Path(text)
    if not folder.is_dir():
        return text
    if not (folder / "frontier.json").is_file():
        raise ValueError(
            f"{text}: there is no frontier.json in this folder; `vispco search` makes one"
        )
    return str(folder / "frontier.json")


def _hint(text: str) -> str:
    """What was probably meant by something that is not there."""
    _, _, name = text.rpartition(":")
    for method in METHODS.names():
        known = [f"{method}/{each}" for each in presets(method)]
        if known and (name == method or name.startswith(f"{method}/")):
            near = get_close_matches(name, known, n=1) or known
            return f"did you mean {PRESET}{near[0]}?"
    if "=" in text:
        return f"`vispco convert --from fastv {shlex.quote(text)}` reads a published notation"
    return (
        "expected a configuration file, the folder of a search, or a published configuration such "
        f"as {PRESET}fastv/k2-r50 (`vispco list presets`)"
    )


def _of_folder(folder: Path) -> list[Path]:
    """The configuration files of a search's folder: those of its frontier, where there is one."""
    found = sorted(folder.glob("*config-*.json"))
    if (folder / "frontier.json").is_file():
        # Others may be an earlier search's.
        points = Frontier.load(folder / "frontier.json").points
        own = {f"config-{slug(point.budget)}.json" for point in points}
        found = [path for path in found if path.name in own] or found
    if not found:
        raise ValueError(
            f"{folder}: there is no config-<budget>.json in this folder; `vispco search` makes them"
        )
    return found


def _load(path: str) -> PruningConfig:
    try:
        return PruningConfig.load(path)
    except ValueError as error:
        folder = Path(path).parent
        if "this is a frontier" not in str(error) or not [*folder.glob("*config-*.json")]:
            raise
        beside = _of_folder(folder)
        files = ", ".join(map(str, beside))
        raise ValueError(
            f"{path}: this is a frontier, which holds several configurations: take one of {files}"
        ) from None


def _preset(text: str) -> ForLayers:
    """A published configuration, `preset:METHOD/NAME`, moved to the depth of the model."""
    method, _, name = text.removeprefix(PRESET).partition("/")
    if not method:
        what = "give a method and the name of its configuration"
        raise ValueError(f"{text}: {what}, such as {PRESET}fastv/k2-r50; see `vispco list presets`")
    known = presets(method)
    if not known:
        raise ValueError(f"{text}: nothing was published for {method}; see `vispco list presets`")
    if name not in known:
        names = ", ".join(f"{PRESET}{method}/{each}" for each in known)
        raise ValueError(f"unknown {text!r}: {did_you_mean(name, known)}there are {names}")

    def build(layers: int) -> PruningConfig:
        found = presets(method, layers)
        # In a very shallow model several have one schedule.
        return next(preset.config for names, preset in found.items() if name in names.split(", "))

    return build


def moved(text: str, layers: int) -> str:
    """A line about a published configuration in a model of another depth, else nothing."""
    if not text.startswith(PRESET):
        return ""
    method, _, name = text.removeprefix(PRESET).partition("/")
    own = presets(method)[name].published.num_layers
    if layers == own:
        return ""
    config = find_config(text)(layers)
    return f"{text} was published for {own} layers; in these {layers}: {config.describe()}"
