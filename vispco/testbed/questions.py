"""The seven generated tasks: every function asks one question of each of N boards at once.

A question ends with one token, a place ("c5") or a colour ("red"), and the answer is predicted right there. A colour
comes by name ("in red") or by a place ("in the colour at c5"), which takes a hop more: read first, then search.
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


def _beside(down: int, right: int) -> np.ndarray:
    """(64,): the cell that lies so many rows down and columns right of each cell, -1 outside the board."""
    row, column = np.divmod(np.arange(CELLS), GRID)
    row, column = row + down, column + right
    inside = (0 <= row) & (row < GRID) & (0 <= column) & (column < GRID)
    return np.where(inside, row * GRID + column, -1)


# Only cells that come before a cell in raster order: its visual token can look back at them, not ahead.
NEIGHBOUR = np.stack([_beside(-1, 0), _beside(0, -1)])  # (2, 64): north, west


@dataclass(frozen=True)
class Questions:
    """One question per board, all of the same length. Rows where `valid` is False must not be used."""

    tokens: np.ndarray  # (N, L) vocabulary ids
    answer: np.ndarray  # (N,) vocabulary id
    valid: np.ndarray  # (N,) bool
    hint: np.ndarray  # (N,) vocabulary id of what is to be read first: the colour in question, or the answer


def _ask(parts: list, answer: np.ndarray, valid: np.ndarray, hint: np.ndarray | None = None) -> Questions:
    """Join words and per-board ids to a question; a part may hold several words."""
    columns = []
    for part in parts:
        columns += [np.full(len(answer), ID[word]) for word in part.split()] if isinstance(part, str) else [part]
    return Questions(np.stack(columns, axis=1), answer, valid, answer if hint is None else hint)


def _pick(rng: np.random.Generator, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose one candidate a board: first an answer, evenly among those possible, then a candidate.

    answers: (N, K) int >= 0, or -1 where the candidate cannot be asked -> index, answer, valid, each (N,).
    """
    n = len(answers)
    possible = np.stack([(answers == value).any(1) for value in range(max(int(answers.max()) + 1, 1))], axis=1)
    value = np.where(possible, rng.random(possible.shape), -1).argmax(1)
    chosen = np.where(answers == value[:, None], rng.random(answers.shape), -1).argmax(1)
    return chosen, value, answers[np.arange(n), chosen] >= 0


def _ask_colour(scenes: Scenes, rng: np.random.Generator, opening: list, colour: np.ndarray, refers: np.ndarray,
                mode: str, answer: np.ndarray, valid: np.ndarray) -> Questions:  # fmt: skip
    """End a question with a colour (N,): "red", or by one of the cells in `refers` (N, 64) that have it."""
    words = _COLOUR_ID[colour]
    if mode == "name":
        return _ask([*opening, words], answer, valid, words)
    refers = refers & (scenes.colour == colour[:, None])
    cell = np.where(refers, rng.random(refers.shape), -1).argmax(1)
    return _ask([*opening, "the colour at", _PLACE_ID[cell]], answer, valid & refers.any(1), words)


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


def place(scenes: Scenes, rng: np.random.Generator, attribute: str) -> Questions:
    """What is at a place: "what colour is at c5"."""
    values, words = _attribute(scenes, attribute)
    cell, value, valid = _pick(rng, values)
    return _ask([f"what {attribute} is at", _PLACE_ID[cell]], words[value], valid)


def only(scenes: Scenes, rng: np.random.Generator, attribute: str, mode: str) -> Questions:
    """The only one of a colour: "what digit is in red"; a place that names the colour holds the other sort."""
    values, words = _attribute(scenes, attribute)
    mine = (scenes.colour[:, None] == np.arange(len(COLOURS))[:, None]) & (values >= 0)[:, None]  # (N, 5, 64)
    refers = (scenes.colour >= 0) & (values < 0)
    there = (scenes.colour[:, None] == np.arange(len(COLOURS))[:, None]) & refers[:, None]
    ok = (mine.sum(2) == 1) & (there.any(2) | (mode == "name"))
    answers = np.where(ok, np.take_along_axis(values, mine.argmax(2), axis=1), -1)
    colour, value, valid = _pick(rng, answers)
    return _ask_colour(scenes, rng, [f"what {attribute} is in"], colour, refers, mode, words[value], valid)


def count(scenes: Scenes, rng: np.random.Generator, mode: str) -> Questions:
    """"count every object in red"."""
    n = _counts(scenes)[0]
    ok = (n <= MAX_COUNT) & ((n > 0) | (mode == "name"))
    colour, value, valid = _pick(rng, np.where(ok, n, -1))
    refers = scenes.colour >= 0
    return _ask_colour(scenes, rng, ["count every object in"], colour, refers, mode, _NUMERAL_ID[value], valid)


def _by_kind(scenes: Scenes, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """How many of every colour and shape (N, 5, 4), and which can be asked: with others of that colour to name it."""
    by_colour, _, both = _counts(scenes)
    both = both[:, :, :DIGIT]
    return both, (by_colour[:, :, None] > both) | (mode == "name")


def exist(scenes: Scenes, rng: np.random.Generator, mode: str) -> Questions:
    """"is there a circle in red"."""
    n, ok = _by_kind(scenes, mode)
    chosen, value, valid = _pick(rng, np.where(ok, n > 0, -1).reshape(len(scenes), -1))
    colour, shape = np.divmod(chosen, DIGIT)
    return _ask_colour(scenes, rng, ["is there a", _SHAPE_ID[shape], "in"], colour,
                       scenes.shape != shape[:, None], mode, _NO_YES[value], valid)  # fmt: skip


def relation(scenes: Scenes, rng: np.random.Generator, attribute: str, mode: str) -> Questions:
    """Beside the only one of its kind: "what shape is west of the circle in red"."""
    rows = np.arange(len(scenes))[:, None]
    n, ok = _by_kind(scenes, mode)
    kind = np.where((scenes.colour >= 0) & (scenes.shape != DIGIT), scenes.colour * DIGIT + scenes.shape, -1)
    where = np.stack([(kind == code).argmax(1) for code in range(len(COLOURS) * DIGIT)], axis=1)  # (N, 20)
    values, words = _attribute(scenes, attribute)
    beside = np.stack([np.where(NEIGHBOUR[d] >= 0, values[:, NEIGHBOUR[d]], -1) for d in range(len(DIRECTIONS))], axis=-1)
    answers = np.where((ok & (n == 1)).reshape(len(scenes), -1)[..., None], beside[rows, where], -1)
    chosen, value, valid = _pick(rng, answers.reshape(len(scenes), -1))
    code, direction = np.divmod(chosen, len(DIRECTIONS))
    colour, shape = np.divmod(code, DIGIT)
    opening = [f"what {attribute} is", _DIRECTION_ID[direction], "of the", _SHAPE_ID[shape], "in"]
    return _ask_colour(scenes, rng, opening, colour, scenes.shape != shape[:, None], mode, words[value], valid)


def compare(scenes: Scenes, rng: np.random.Generator, mode: str) -> Questions:
    """"is there more blue than red"; the two counts differ by two at least."""
    n = _counts(scenes)[0]
    gap = n[:, :, None] - n[:, None, :]
    ok = (abs(gap) >= 2) & ((n > 0) | (mode == "name"))[:, None, :]
    chosen, value, valid = _pick(rng, np.where(ok, gap > 0, -1).reshape(len(scenes), -1))
    first, second = np.divmod(chosen, len(COLOURS))
    opening = ["is there more", _COLOUR_ID[first], "than"]
    return _ask_colour(scenes, rng, opening, second, scenes.colour >= 0, mode, _NO_YES[value], valid)


@dataclass(frozen=True)
class Family:
    """One form of a task: its share of the task's examples and the forms that must be learned before it."""

    task: str
    share: float
    ask: Callable[[Scenes, np.random.Generator], Questions]
    after: tuple[str, ...] = ()


#: Every family, in the order in which training takes them up.
FAMILIES: dict[str, Family] = {
    "place_colour": Family("place", 0.5, partial(place, attribute="colour")),
    "place_shape": Family("place", 0.5, partial(place, attribute="shape")),
    "digit": Family("digit", 1.0, partial(place, attribute="digit")),
    "count": Family("count", 0.5, partial(count, mode="name"), ("place_colour",)),
    "find_digit": Family("find", 0.5, partial(only, attribute="digit", mode="name"), ("place_colour",)),
    "find_shape": Family("find", 0.5, partial(only, attribute="shape", mode="name"), ("place_colour",)),
    "exist": Family("exist", 0.5, partial(exist, mode="name"), ("place_colour",)),
    "compare": Family("compare", 1.0, partial(compare, mode="name"), ("place_colour",)),
    "relation_colour": Family("relation", 0.5, partial(relation, attribute="colour", mode="name"), ("place_colour",)),
    "relation_shape": Family("relation", 0.5, partial(relation, attribute="shape", mode="name"), ("place_colour",)),
    "count_at": Family("count", 0.5, partial(count, mode="at"), ("count",)),
    "exist_at": Family("exist", 0.5, partial(exist, mode="at"), ("exist",)),
}
