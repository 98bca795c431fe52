"""The notations of FastV, PyramidDrop and SparseVLM for a schedule of keep ratios."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..config import PruningConfig
from ..registry import did_you_mean


@dataclass(frozen=True)
class Notation:
    """A way to write a schedule, as `KEY=NUMBERS KEY=NUMBERS`.

    example: one schedule. meaning: in words. build(values, num_layers, n_visual): the
    configuration. values(steps, n_visual): the inverse; steps: as of `PruningConfig.steps`.
    """

    example: str
    meaning: str
    build: Callable[[dict, int, int], PruningConfig]
    values: Callable[[dict[int, float], int], dict[str, list]]

    @property
    def keys(self) -> list[str]:
        """The keys in the order in which they are written."""
        return re.findall(r"(\w+)=", self.example)


def parse_notation(name: str, text: str, num_layers: int, n_visual: int = 576) -> PruningConfig:
    """The configuration that `text` means in a notation of NOTATIONS.

    num_layers: decoder layers of the model. n_visual: visual tokens of a prompt, for notations that
    count them. Raises ValueError that shows the notation.

    >>> parse_notation("fastv", "K=2 R=0.75", num_layers=4).keep_ratios
    (1.0, 1.0, 0.25, 0.25)
    >>> parse_notation("sparsevlm", "layers=1,2 tokens=288,144", num_layers=4).keep_ratios
    (1.0, 1.0, 0.5, 0.25)
    """
    notation, why = _notation(name), ""
    values: dict[str, list[float]] = {}
    parts = text.split()
    try:
        for key, _, numbers in (part.partition("=") for part in parts):
            values[key] = [float(number) for number in numbers.split(",")]
    except ValueError:
        values = {}
    if set(values) == set(notation.keys) and len(parts) == len(values):
        try:
            return notation.build(values, num_layers, n_visual)
        except ValueError as error:
            fault = str(error).partition(": did you mean")[0]
            why = f": {fault}{_as_fractions(notation, values)}"
    elif meant := _as_written(notation, text):
        why = f"; did you mean {meant!r}?"
    expected = f"expected such as {notation.example!r}: {notation.meaning}"
    raise ValueError(f"{text!r} is not in the notation of {name}{why}; {expected}")


def write_notation(name: str, config: PruningConfig, n_visual: int | None = None) -> str:
    """A configuration in a notation of NOTATIONS.

    n_visual: default, the configuration's own, else 576.
    Raises ValueError if the notation has no words for it, such as FastV's for two steps.

    >>> write_notation("fastv", PruningConfig("random", [1, 1, 0.25, 0.25]))
    'K=2 R=0.75'
    """
    notation, n_visual = _notation(name), n_visual or config.n_visual or 576
    refusal = f"the notation of {name} cannot say {config.describe()!r}"
    parts = []
    try:
        values = notation.values(config.steps, n_visual)
        for key in notation.keys:
            parts.append(f"{key}={','.join(format(value, '.10g') for value in values[key])}")
        back = parse_notation(name, " ".join(parts), config.num_layers, n_visual)
    except ValueError as error:
        raise ValueError(f"{refusal}: {error}") from None
    if back.tokens(n_visual) != config.tokens(n_visual):
        raise ValueError(f"{refusal} for {n_visual} visual tokens")
    return " ".join(parts)


def _as_fractions(notation: Notation, values: dict[str, list[float]]) -> str:
    """What was probably meant where fractions were given in percent."""
    shares = [key for key in ("R", "ratios") if any(1 < x <= 100 for x in values.get(key, ()))]
    if not shares:
        return ""
    right = values | {key: [x / 100 for x in values[key]] for key in shares}
    meant = [f"{key}={','.join(format(x, 'g') for x in right[key])}" for key in notation.keys]
    return f"; did you mean {' '.join(meant)!r}?"


def _as_written(notation: Notation, text: str) -> str:
    """What was probably meant: the keys in other letters, other separators, numbers in percent."""
    found = []
    for key in notation.keys:
        match = re.search(rf"\b{key}\s*[=:]?\s*([\d.,%\s]*\d%?)", text, re.IGNORECASE)
        if match is None:
            return ""
        numbers = re.split(r"[\s,]+", match[1].strip())
        shares = [format(float(x[:-1]) / 100, "g") if x.endswith("%") else x for x in numbers]
        found.append(f"{key}={','.join(shares)}")
    return " ".join(found)


def _notation(name: str) -> Notation:
    if name not in NOTATIONS:
        hint = did_you_mean(name, NOTATIONS)
        known = ", ".join(NOTATIONS)
        raise ValueError(f"unknown notation {name!r}: {hint}expected one of {known}")
    return NOTATIONS[name]


def _integers(values: list[float]) -> list[int]:
    for value in values:
        if not value.is_integer() or value < 0:
            raise ValueError(f"expected a whole number from 0, got {value:g}")
    return [int(value) for value in values]


def _single(values: dict[str, list[float]], key: str) -> float:
    if len(values[key]) != 1:
        raise ValueError(f"expected one number for {key}, got {len(values[key])}")
    return values[key][0]


def _build_fastv(values: dict, num_layers: int, n_visual: int) -> PruningConfig:
    layer = _integers([_single(values, "K")])[0]
    return PruningConfig.from_fastv(layer, _single(values, "R"), num_layers=num_layers)


def _fastv_values(steps: dict[int, float], n_visual: int) -> dict[str, list]:
    if len(steps) > 1:
        raise ValueError(f"it drops tokens once, not before {len(steps)} layers")
    layer, ratio = next(iter(steps.items()), (0, 1.0))
    return {"K": [layer], "R": [1 - ratio]}


def _build_pdrop(values: dict, num_layers: int, n_visual: int) -> PruningConfig:
    layers = _integers(values["layers"])
    return PruningConfig.from_pdrop(layers, values["ratios"], num_layers=num_layers)


def _pdrop_values(steps: dict[int, float], n_visual: int) -> dict[str, list]:
    if not steps:
        raise ValueError("it lists at least one layer")
    return {"layers": [*steps], "ratios": [*steps.values()]}


def _build_sparsevlm(values: dict, num_layers: int, n_visual: int) -> PruningConfig:
    tokens, layers = _integers(values["tokens"]), _integers(values["layers"])
    size: dict[str, Any] = {"num_layers": num_layers, "n_visual": n_visual}
    return replace(PruningConfig.from_sparsevlm(tokens, layers, **size), n_visual=n_visual)


def _sparsevlm_values(steps: dict[int, float], n_visual: int) -> dict[str, list]:
    if not steps or 0 in steps:
        when = "after a layer, so at least once, and never before layer 0"
        raise ValueError(f"it drops tokens {when}")
    counts = [round(ratio * n_visual) for ratio in steps.values()]
    return {"layers": [layer - 1 for layer in steps], "tokens": counts}


NOTATIONS = {
    "fastv": Notation(
        "K=2 R=0.5",
        "before layer K, drop the fraction R of the visual tokens",
        _build_fastv,
        _fastv_values,
    ),
    "pdrop": Notation(
        "layers=8,16,24 ratios=0.5,0.25,0.125",
        "from each layer on, that fraction of the original tokens",
        _build_pdrop,
        _pdrop_values,
    ),
    "sparsevlm": Notation(
        "layers=2,6,15 tokens=300,200,110",
        "after each layer, so many visual tokens remain",
        _build_sparsevlm,
        _sparsevlm_values,
    ),
}
