"""The seven generated families: every function asks one question of each of N boards at once.

A question ends with one token that names a place ("c5") or an object ("red circle"), so the answer can be
predicted right there. References come direct ("of c5") or by a step ("east of c5"); families differ in how many
hops they need: read a cell, find a cell with what was read, look beside it, count, compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from .scenes import DIGIT, Scenes
from .vocab import CELLS, COLOURS, DIRECTIONS, GRID, ID, NUMERALS, PLACES, SHAPES, ids

MAX_COUNT = 6  # larger counts are never asked
_COLOUR_ID, _SHAPE_ID, _PLACE_ID = ids(COLOURS), ids(SHAPES), ids(PLACES)
_DIRECTION_ID, _NUMERAL_ID = ids(DIRECTIONS), ids(NUMERALS)
_NO_YES = np.array([ID["no"], ID["yes"]])


def _neighbours() -> np.ndarray:
    """(4, 64): the cell north, east, south, west of each cell, -1 outside the board."""
    row, column = np.divmod(np.arange(CELLS), GRID)
    table = []
    for down, right in ((-1, 0), (0, 1), (1, 0), (0, -1)):
        inside = (0 <= row + down) & (row + down < GRID) & (0 <= column + right) & (column + right < GRID)
        table.append(np.where(inside, (row + down) * GRID + column + right, -1))
    return np.array(table)


NEIGHBOUR = _neighbours()


@dataclass(frozen=True)
class Questions:
    """One question per board, all of the same length. Rows where `valid` is False must not be used."""

    tokens: np.ndarray  # (N, L) vocabulary ids
    answer: np.ndarray  # (N,) vocabulary id
    valid: np.ndarray  # (N,) bool


def _ask(parts: list, answer: np.ndarray, valid: np.ndarray) -> Questions:
    """Join words and per-board ids to a question; a part may hold several words."""
    columns = []
    for part in parts:
        columns += [np.full(len(answer), ID[word]) for word in part.split()] if isinstance(part, str) else [part]
    return Questions(np.stack(columns, axis=1), answer, valid)


def _pick(rng: np.random.Generator, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose one candidate a board: first an answer, evenly among those possible, then a candidate.

    answers: (N, K) int >= 0, or -1 where the candidate cannot be asked -> index, answer, valid, each (N,).
    """
    n = len(answers)
    possible = np.stack([(answers == value).any(1) for value in range(max(int(answers.max()) + 1, 1))], axis=1)
    value = np.where(possible, rng.random(possible.shape), -1).argmax(1)
    chosen = np.where(answers == value[:, None], rng.random(answers.shape), -1).argmax(1)
    return chosen, value, answers[np.arange(n), chosen] >= 0


def _refer(rng: np.random.Generator, cell: np.ndarray, step: bool, opening: str = "") -> list:
    """Name a cell (N,): "<opening> of c5", or one step away, "<opening> east of b5"."""
    if not step:
        return [f"{opening} of", _PLACE_ID[cell]]
    back = NEIGHBOUR[[2, 3, 0, 1]][:, cell].T  # (N, 4): where one has to stand to see `cell` in that direction
    direction = np.where(back >= 0, rng.random(back.shape), -1).argmax(1)
    return [opening, _DIRECTION_ID[direction], "of", _PLACE_ID[back[np.arange(len(cell)), direction]]]


def _counts(scenes: Scenes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Objects by colour (N, 5), by shape or digit (N, 5), and by both (N, 5, 5)."""
    colour = scenes.colour[..., None] == np.arange(len(COLOURS))
    shape = scenes.shape[..., None] == np.arange(DIGIT + 1)
    both = np.einsum("nkc,nks->ncs", colour.astype(np.int64), shape.astype(np.int64))
    return both.sum(2), both.sum(1), both


def _attribute(scenes: Scenes, attribute: str) -> tuple[np.ndarray, np.ndarray]:
    """What a question can ask of every cell (N, 64), -1 where it cannot, and the answers' vocabulary ids."""
    if attribute == "digit":
        return scenes.digit, _NUMERAL_ID
    if attribute == "colour":
        return scenes.colour, _COLOUR_ID
    return np.where(scenes.shape == DIGIT, -1, scenes.shape), _SHAPE_ID


def place(scenes: Scenes, rng: np.random.Generator, attribute: str, step: bool = False) -> Questions:
    """What is at a place: "what colour is at c5", "what digit is east of c5"."""
    values, words = _attribute(scenes, attribute)
    cell, value, valid = _pick(rng, values)
    end = _refer(rng, cell, True) if step else ["at", _PLACE_ID[cell]]
    return _ask([f"what {attribute} is", *end], words[value], valid)


def twin(scenes: Scenes, rng: np.random.Generator, attribute: str, step: bool = False) -> Questions:
    """The other one of exactly two: "what shape shares the colour of c5", "what digit shares the colour ..."."""
    key = "shape" if attribute == "colour" else "colour"
    keys = _attribute(scenes, key)[0]
    values, words = _attribute(scenes, attribute)
    same = (keys[:, :, None] == keys[:, None, :]) & (keys >= 0)[:, :, None] & ~np.eye(CELLS, dtype=bool)
    if attribute == "digit":  # a unique digit among any number of objects of that colour, asked from a shape
        same &= (scenes.shape != DIGIT)[:, :, None] & (scenes.shape == DIGIT)[:, None, :]
    other = values[np.arange(len(scenes))[:, None], same.argmax(2)]
    cell, value, valid = _pick(rng, np.where(same.sum(2) == 1, other, -1))
    return _ask([f"what {attribute} shares the {key}", *_refer(rng, cell, step)], words[value], valid)


def count_kind(scenes: Scenes, rng: np.random.Generator, joint: bool) -> Questions:
    """"count every red circle" or "count every red object"."""
    by_colour, _, both = _counts(scenes)
    n = both[:, :, :DIGIT].reshape(len(scenes), -1) if joint else by_colour
    chosen, value, valid = _pick(rng, np.where(n <= MAX_COUNT, n, -1))
    colour, shape = np.divmod(chosen, DIGIT) if joint else (chosen, None)
    end = _SHAPE_ID[shape] if joint else "object"
    return _ask(["count every", _COLOUR_ID[colour], end], _NUMERAL_ID[value], valid)


def count_shared(scenes: Scenes, rng: np.random.Generator, key: str, step: bool = False) -> Questions:
    """How many objects, itself included: "count what shares the colour of c5"."""
    keys = _attribute(scenes, key)[0]
    n = ((keys[:, :, None] == keys[:, None, :]) & (keys >= 0)[:, None, :]).sum(2)
    cell, value, valid = _pick(rng, np.where((keys >= 0) & (n <= MAX_COUNT), n, -1))
    return _ask([f"count what shares the {key}", *_refer(rng, cell, step)], _NUMERAL_ID[value], valid)


def exist_kind(scenes: Scenes, rng: np.random.Generator) -> Questions:
    """"is there a red circle"."""
    both = _counts(scenes)[2][:, :, :DIGIT].reshape(len(scenes), -1)
    chosen, value, valid = _pick(rng, (both > 0).astype(np.int64))
    colour, shape = np.divmod(chosen, DIGIT)
    return _ask(["is there a", _COLOUR_ID[colour], _SHAPE_ID[shape]], _NO_YES[value], valid)


def exist_shared(scenes: Scenes, rng: np.random.Generator, step: bool = False) -> Questions:
    """"is there a circle that shares the colour of c5", asked of a cell that is no circle itself."""
    both = _counts(scenes)[2][:, :, :DIGIT]
    there = both[np.arange(len(scenes))[:, None], scenes.colour] > 0  # (N, 64, 4); empty cells are masked below
    ok = (scenes.colour >= 0)[..., None] & (scenes.shape[..., None] != np.arange(DIGIT))
    chosen, value, valid = _pick(rng, np.where(ok, there, -1).reshape(len(scenes), -1))
    cell, shape = np.divmod(chosen, DIGIT)
    return _ask(["is there a", _SHAPE_ID[shape], *_refer(rng, cell, step, "that shares the colour")],
                _NO_YES[value], valid)  # fmt: skip


def _beside(values: np.ndarray, anchor_ok: np.ndarray) -> np.ndarray:
    """The value beside each cell in each direction (N, 64, 4), -1 off the board or where not `anchor_ok`."""
    beside = np.stack([np.where(NEIGHBOUR[d] >= 0, values[:, NEIGHBOUR[d]], -1) for d in range(4)], axis=-1)
    return np.where(anchor_ok[..., None], beside, -1)


def relation(scenes: Scenes, rng: np.random.Generator, attribute: str) -> Questions:
    """Beside the only one of its kind: "what shape is east of the red circle"."""
    rows = np.arange(len(scenes))
    both = _counts(scenes)[2]
    only = (both[rows[:, None], scenes.colour, scenes.shape] == 1) & (scenes.colour >= 0) & (scenes.shape != DIGIT)
    values, words = _attribute(scenes, attribute)
    chosen, value, valid = _pick(rng, _beside(values, only).reshape(len(scenes), -1))
    cell, direction = np.divmod(chosen, 4)
    colour, shape = scenes.colour[rows, cell], np.clip(scenes.shape[rows, cell], 0, DIGIT - 1)
    return _ask([f"what {attribute} is", _DIRECTION_ID[direction], "of the", _COLOUR_ID[colour], _SHAPE_ID[shape]],
                words[value], valid)  # fmt: skip


def relation_shared(scenes: Scenes, rng: np.random.Generator, attribute: str) -> Questions:
    """Three hops: "what shape is east of the circle that shares the colour of c5" (asked of no circle)."""
    rows = np.arange(len(scenes))[:, None]
    both = _counts(scenes)[2]
    kind = scenes.colour * DIGIT + scenes.shape  # unique code of (colour, shape) for cells that hold a shape
    kind = np.where((scenes.colour >= 0) & (scenes.shape != DIGIT), kind, -1)
    where = np.stack([(kind == code).argmax(1) for code in range(len(COLOURS) * DIGIT)], axis=1)  # (N, 20)
    single = both[:, :, :DIGIT].reshape(len(scenes), -1) == 1
    values, words = _attribute(scenes, attribute)
    beside = _beside(values, np.ones_like(values, dtype=bool))[rows, where]  # (N, 20, 4)
    beside = np.where(single[..., None], beside, -1).reshape(len(scenes), len(COLOURS), DIGIT, 4)
    table = beside[rows, scenes.colour]  # (N, 64, 4 shapes, 4 directions)
    ok = (scenes.colour >= 0)[..., None] & (scenes.shape[..., None] != np.arange(DIGIT))
    chosen, value, valid = _pick(rng, np.where(ok[..., None], table, -1).reshape(len(scenes), -1))
    cell, rest = np.divmod(chosen, DIGIT * 4)
    shape, direction = np.divmod(rest, 4)
    return _ask([f"what {attribute} is", _DIRECTION_ID[direction], "of the", _SHAPE_ID[shape],
                 *_refer(rng, cell, False, "that shares the colour")], words[value], valid)  # fmt: skip


def compare_more(scenes: Scenes, rng: np.random.Generator) -> Questions:
    """"is there more red than blue"; the two counts differ by two at least."""
    n = _counts(scenes)[0]
    gap = n[:, :, None] - n[:, None, :]
    chosen, value, valid = _pick(rng, np.where(abs(gap) >= 2, gap > 0, -1).reshape(len(scenes), -1))
    first, second = np.divmod(chosen, len(COLOURS))
    return _ask(["is there more", _COLOUR_ID[first], "than", _COLOUR_ID[second]], _NO_YES[value], valid)


def compare_more_shared(scenes: Scenes, rng: np.random.Generator, step: bool = False) -> Questions:
    """"is there more red than the colour of c5"; the two counts differ by two at least."""
    n = _counts(scenes)[0]
    gap = n[:, None, :] - n[np.arange(len(scenes))[:, None], scenes.colour][..., None]  # (N, 64, 5)
    ok = (scenes.colour >= 0)[..., None] & (abs(gap) >= 2)
    chosen, value, valid = _pick(rng, np.where(ok, gap > 0, -1).reshape(len(scenes), -1))
    cell, colour = np.divmod(chosen, len(COLOURS))
    return _ask(["is there more", _COLOUR_ID[colour], *_refer(rng, cell, step, "than the colour")],
                _NO_YES[value], valid)  # fmt: skip


def compare_same(scenes: Scenes, rng: np.random.Generator, key: str, step: bool = False) -> Questions:
    """"is the colour of a1 that of c5"."""
    keys = _attribute(scenes, key)[0]
    same = keys[:, :, None] == keys[:, None, :]
    ok = (keys >= 0)[:, :, None] & (keys >= 0)[:, None, :] & ~np.eye(CELLS, dtype=bool)
    chosen, value, valid = _pick(rng, np.where(ok, same, -1).reshape(len(scenes), -1))
    first, second = np.divmod(chosen, CELLS)
    return _ask([f"is the {key} of", _PLACE_ID[first], *_refer(rng, second, step, "that")], _NO_YES[value], valid)


@dataclass(frozen=True)
class Family:
    """One form of a task: its share of the task's examples and the forms that must be learned before it."""

    task: str
    share: float
    ask: Callable[[Scenes, np.random.Generator], Questions]
    after: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {}
for _a in ("colour", "shape"):
    _k = "shape" if _a == "colour" else "colour"
    FAMILIES[f"place_{_a}"] = Family("place", 0.1, partial(place, attribute=_a))
    FAMILIES[f"place_{_a}_step"] = Family("place", 0.4, partial(place, attribute=_a, step=True), ("place_colour",))
    FAMILIES[f"twin_{_a}"] = Family("twin", 0.25, partial(twin, attribute=_a), (f"place_{_k}",))
    FAMILIES[f"twin_{_a}_step"] = Family("twin", 0.25, partial(twin, attribute=_a, step=True),
                                         (f"twin_{_a}", f"place_{_k}_step"))  # fmt: skip
    FAMILIES[f"relation_{_a}"] = Family("relation", 0.25, partial(relation, attribute=_a), ("place_colour_step",))
    FAMILIES[f"relation_{_a}_shared"] = Family("relation", 0.25, partial(relation_shared, attribute=_a),
                                               (f"relation_{_a}", "exist_shared"))  # fmt: skip
    FAMILIES[f"count_{_a}"] = Family("count", 0.2, partial(count_shared, key=_a), (f"place_{_a}", "count_one"))
    FAMILIES[f"count_{_a}_step"] = Family("count", 0.2, partial(count_shared, key=_a, step=True),
                                          (f"count_{_a}", f"place_{_a}_step"))  # fmt: skip
    FAMILIES[f"same_{_a}"] = Family("compare", 0.1, partial(compare_same, key=_a), (f"place_{_a}",))
    FAMILIES[f"same_{_a}_step"] = Family("compare", 0.1, partial(compare_same, key=_a, step=True),
                                         (f"same_{_a}", f"place_{_a}_step"))  # fmt: skip
FAMILIES |= {
    "count_one": Family("count", 0.1, partial(count_kind, joint=False), ("place_colour",)),
    "count_both": Family("count", 0.1, partial(count_kind, joint=True), ("count_one",)),
    "exist": Family("exist", 0.2, exist_kind, ("place_colour",)),
    "exist_shared": Family("exist", 0.4, exist_shared, ("exist",)),
    "exist_shared_step": Family("exist", 0.4, partial(exist_shared, step=True),
                                ("exist_shared", "place_colour_step")),
    "more": Family("compare", 0.1, compare_more, ("count_one",)),
    "more_shared": Family("compare", 0.25, compare_more_shared, ("more",)),
    "more_shared_step": Family("compare", 0.25, partial(compare_more_shared, step=True),
                               ("more_shared", "place_colour_step")),
    "digit": Family("digit", 0.1, partial(place, attribute="digit")),
    "digit_step": Family("digit", 0.2, partial(place, attribute="digit", step=True), ("place_colour_step",)),
    "digit_relation": Family("digit", 0.2, partial(relation, attribute="digit"), ("relation_colour",)),
    "digit_shared": Family("digit", 0.25, partial(twin, attribute="digit"), ("place_colour", "digit")),
    "digit_shared_step": Family("digit", 0.25, partial(twin, attribute="digit", step=True),
                                ("digit_shared", "place_colour_step")),
}  # fmt: skip
