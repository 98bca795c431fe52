"""The notations of FastV, PyramidDrop and SparseVLM for one and the same thing: a schedule of keep ratios."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..config import PruningConfig


@dataclass(frozen=True)
class Notation:
    """example: how it is written, `KEY=NUMBERS KEY=NUMBERS`. meaning: in words. build(values, num_layers, n_visual): the
    configuration. values(steps, n_visual): the inverse, of `PruningConfig.steps`."""

    example: str
    meaning: str
    build: Callable[[dict, int, int], PruningConfig]
    values: Callable[[dict[int, float], int], dict]

    @property
    def keys(self) -> list[str]:
        """In the order in which they are written."""
        return re.findall(r"(\w+)=", self.example)


def parse_notation(name: str, text: str, num_layers: int, n_visual: int = 576) -> PruningConfig:
    """The configuration that `text` means in a notation of NOTATIONS, for a model of `num_layers` decoder layers.

    n_visual: visual tokens of a prompt, for notations that count them. Raises ValueError that shows the notation.

    >>> parse_notation("fastv", "K=2 R=0.75", num_layers=4).keep_ratios
    (1.0, 1.0, 0.25, 0.25)
    >>> parse_notation("sparsevlm", "layers=1,2 tokens=288,144", num_layers=4).keep_ratios
    (1.0, 1.0, 0.5, 0.25)
    """
    notation, why = _notation(name), ""
    try:
        pairs = [part.partition("=") for part in text.split()]
        values = {key: [float(v) for v in numbers.split(",")] for key, _, numbers in pairs}
    except ValueError:
        values = {}
    if set(values) == set(notation.keys) and len(text.split()) == len(values):
        try:
            return notation.build(values, num_layers, n_visual)
        except ValueError as error:
            why = f": {error}"
    raise ValueError(f"{text!r} is not in the notation of {name}{why}; expected such as {notation.example!r}: "
                     f"{notation.meaning}")


def write_notation(name: str, config: PruningConfig, n_visual: int | None = None) -> str:
    """A configuration in a notation. n_visual: default, the configuration's own, else 576.

    Raises ValueError if the notation has no words for it, such as FastV's for two steps.

    >>> write_notation("fastv", PruningConfig("random", [1, 1, 0.25, 0.25]))
    'K=2 R=0.75'
    """
    notation, n_visual = _notation(name), n_visual or config.n_visual or 576
    try:
        values = notation.values(config.steps, n_visual)
        text = " ".join(f"{key}={','.join(format(v, '.10g') for v in values[key])}" for key in notation.keys)
        back = parse_notation(name, text, config.num_layers, n_visual)
    except ValueError as error:
        raise ValueError(f"the notation of {name} cannot say {config.describe()!r}: {error}") from None
    if back.tokens(n_visual) != config.tokens(n_visual):
        raise ValueError(f"the notation of {name} cannot say {config.describe()!r} for {n_visual} visual tokens")
    return text


def _notation(name: str) -> Notation:
    if name not in NOTATIONS:
        raise ValueError(f"unknown notation {name!r}: expected one of {', '.join(NOTATIONS)}")
    return NOTATIONS[name]


def _integers(values: list[float]) -> list[int]:
    for value in values:
        if not value.is_integer() or value < 0:
            raise ValueError(f"expected a whole number from 0, got {value:g}")
    return [int(value) for value in values]


def _single(values: list[float], key: str) -> float:
    if len(values) != 1:
        raise ValueError(f"expected one number for {key}, got {len(values)}")
    return values[0]


def _one_step(steps: dict[int, float], n_visual: int) -> dict:
    if len(steps) > 1:
        raise ValueError(f"it drops tokens once, not before {len(steps)} layers")
    (layer, ratio), = steps.items() or [(0, 1.0)]
    return {"K": [layer], "R": [1 - ratio]}


def _after(steps: dict[int, float], n_visual: int) -> dict:
    if not steps or 0 in steps:
        raise ValueError("it drops tokens after a layer, so at least once, and never before layer 0")
    return {"layers": [i - 1 for i in steps], "tokens": [round(r * n_visual) for r in steps.values()]}


def _listed(steps: dict[int, float], n_visual: int) -> dict:
    if not steps:
        raise ValueError("it lists at least one layer")
    return {"layers": [*steps], "ratios": [*steps.values()]}


def _fastv(values: dict, num_layers: int, n_visual: int) -> PruningConfig:
    layer = _integers([_single(values["K"], "K")])[0]
    return PruningConfig.from_fastv(layer, _single(values["R"], "R"), num_layers=num_layers)


def _pdrop(values: dict, num_layers: int, n_visual: int) -> PruningConfig:
    return PruningConfig.from_pdrop(_integers(values["layers"]), values["ratios"], num_layers=num_layers)


def _sparsevlm(values: dict, num_layers: int, n_visual: int) -> PruningConfig:
    tokens, layers = _integers(values["tokens"]), _integers(values["layers"])
    config = PruningConfig.from_sparsevlm(tokens, layers, num_layers=num_layers, n_visual=n_visual)
    return replace(config, n_visual=n_visual)


NOTATIONS = {
    "fastv": Notation("K=2 R=0.5", "before layer K, drop the fraction R of the visual tokens", _fastv, _one_step),
    "pdrop": Notation("layers=8,16,24 ratios=0.5,0.25,0.125", "from each layer on, that fraction of the original tokens",
                      _pdrop, _listed),
    "sparsevlm": Notation("layers=2,6,15 tokens=300,200,110", "after each layer, so many visual tokens remain",
                          _sparsevlm, _after)}
