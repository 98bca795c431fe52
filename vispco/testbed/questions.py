"""The seven generated tasks. Every function asks one question about each of N boards at once.

A question ends with one token, a place ("c5") or a colour ("red"), and the answer is predicted
right there. A colour comes by name ("in red") or by a place ("in the colour at c5"). The latter
takes a hop more: the model reads the colour first, then searches for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from .scenes import DIGIT, Scenes
from .vocab import CELLS, COLOURS, DIRECTIONS, GRID, ID, NUMERALS, PLACES, SHAPES, ids

#: Larger counts are never asked for.
MAX_COUNT = 6
_COLOUR_ID, _SHAPE_ID, _PLACE_ID = ids(COLOURS), ids(SHAPES), ids(PLACES)
_DIRECTION_ID, _NUMERAL_ID = ids(DIRECTIONS), ids(NUMERALS)
_NO_YES = ids(("no", "yes"))


def _beside(down: int, right: int) -> np.ndarray:
    """The cell (64,) so many rows down and columns right of each cell, -1 outside the board."""
    row, column = np.divmod(np.arange(CELLS), GRID)
    row, column = row + down, column + right
    inside = (row >= 0) & (row < GRID) & (column >= 0) & (column < GRID)
    return np.where(inside, row * GRID + column, -1)


#: (2, 64): the cells north and west of each cell. Their visual tokens come before it: it can look
#: back at them.
NEIGHBOUR = np.stack([_beside(-1, 0), _beside(0, -1)])


@dataclass(frozen=True)
class Questions:
    """One question about each of N boards, all of the same length.

    tokens: (N, L) token ids. answer: (N,) token id. valid: (N,) bool; the other rows must not be
    used. hint: (N,) token id of what is to be read first, the colour in question or the answer (for
    training).
    """

    tokens: np.ndarray
    answer: np.ndarray
    valid: np.ndarray
    hint: np.ndarray


def _tokens(parts: list) -> np.ndarray:
    """Join texts and token ids of each board (N,) to questions (N, L)."""
    n = max(len(part) for part in parts if not isinstance(part, str))
    columns: list[np.ndarray] = []
    for part in parts:
        words = [np.full(n, ID[w]) for w in part.split()] if isinstance(part, str) else [part]
        columns += words
    return np.stack(columns, axis=1)


def _pick(
    rng: np.random.Generator, answers: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose one of K candidates a board: first a possible answer, evenly, then a candidate.

    answers: (N, K) int, -1 where a candidate cannot be asked for.
    Returns the candidate, its answer, and whether there was any, each (N,).
    """
    values = range(max(int(answers.max()) + 1, 1))
    possible = np.stack([(answers == value).any(1) for value in values], axis=1)
    value = _any_true(rng, possible)
    chosen = _any_true(rng, answers == value[:, None])
    return chosen, value, answers[np.arange(len(answers)), chosen] >= 0


def _any_true(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """The index of one true entry of each row (N, K), drawn evenly; 0 where there is none."""
    return np.where(mask, rng.random(mask.shape), -1).argmax(1)


def _ending(
    scenes: Scenes, rng: np.random.Generator, colour: np.ndarray, refers: np.ndarray, mode: str
) -> tuple[list, np.ndarray]:
    """The end of a question, a colour (N,): its parts, and whether it can be said in that way (N,).

    mode: "name" says "red"; "at" says "the colour at c5", one of the cells `refers` (N, 64) of that
    colour.
    """
    if mode == "name":
        return [_COLOUR_ID[colour]], np.ones(len(colour), dtype=bool)
    refers = refers & (scenes.colour == colour[:, None])
    return ["the colour at", _PLACE_ID[_any_true(rng, refers)]], refers.max(axis=1)


def _counts(scenes: Scenes) -> tuple[np.ndarray, np.ndarray]:
    """Objects of each colour (N, 5), and of each colour and shape, digits aside (N, 5, 4)."""
    colour = scenes.colour[..., None] == np.arange(len(COLOURS))
    shape = scenes.shape[..., None] == np.arange(DIGIT)
    both = np.einsum("nkc,nks->ncs", colour.astype(np.int64), shape.astype(np.int64))
    return colour.sum(1), both


def _attribute(scenes: Scenes, attribute: str) -> tuple[np.ndarray, np.ndarray]:
    """Each cell's answer (N, 64), -1 where it has none, and the token ids of the answers."""
    if attribute == "digit":
        return scenes.digit, _NUMERAL_ID
    if attribute == "colour":
        return scenes.colour, _COLOUR_ID
    return np.where(scenes.shape == DIGIT, -1, scenes.shape), _SHAPE_ID


def place(scenes: Scenes, rng: np.random.Generator, attribute: str) -> Questions:
    """What is at a place: "what colour is at c5"."""
    values, words = _attribute(scenes, attribute)
    cell, value, valid = _pick(rng, values)
    tokens = _tokens([f"what {attribute} is at", _PLACE_ID[cell]])
    return Questions(tokens, words[value], valid, words[value])


def only(scenes: Scenes, rng: np.random.Generator, attribute: str, mode: str) -> Questions:
    """The only one of a colour: "what digit is in red".

    A place that says the colour holds the other sort: a digit if a shape is asked for.
    """
    values, words = _attribute(scenes, attribute)
    colours = np.arange(len(COLOURS))[:, None]
    refers = (scenes.colour >= 0) & (values < 0)
    mine = (scenes.colour[:, None] == colours) & (values >= 0)[:, None]  # (N, 5, 64)
    others = (scenes.colour[:, None] == colours) & refers[:, None]
    ok = (mine.sum(2) == 1) & (others.any(2) | (mode == "name"))
    answers = np.where(ok, np.take_along_axis(values, mine.argmax(2), axis=1), -1)
    colour, value, valid = _pick(rng, answers)
    ending, said = _ending(scenes, rng, colour, refers, mode)
    tokens = _tokens([f"what {attribute} is in", *ending])
    return Questions(tokens, words[value], valid & said, _COLOUR_ID[colour])


def count(scenes: Scenes, rng: np.random.Generator, mode: str) -> Questions:
    """How many there are: "count every object in red"."""
    n, _ = _counts(scenes)
    ok = (n <= MAX_COUNT) & ((n > 0) | (mode == "name"))
    colour, value, valid = _pick(rng, np.where(ok, n, -1))
    ending, said = _ending(scenes, rng, colour, scenes.colour >= 0, mode)
    tokens = _tokens(["count every object in", *ending])
    return Questions(tokens, _NUMERAL_ID[value], valid & said, _COLOUR_ID[colour])


def _by_kind(scenes: Scenes, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Objects of each colour and shape (N, 5, 4), and which of these can be asked for.

    To say a colour by a place, there must be another object of that colour.
    """
    by_colour, both = _counts(scenes)
    return both, (by_colour[:, :, None] > both) | (mode == "name")


def exist(scenes: Scenes, rng: np.random.Generator, mode: str) -> Questions:
    """Whether there is one: "is there a circle in red"."""
    n, ok = _by_kind(scenes, mode)
    kind, value, valid = _pick(rng, np.where(ok, n > 0, -1).reshape(len(scenes), -1))
    colour, shape = np.divmod(kind, DIGIT)
    ending, said = _ending(scenes, rng, colour, scenes.shape != shape[:, None], mode)
    tokens = _tokens(["is there a", _SHAPE_ID[shape], "in", *ending])
    return Questions(tokens, _NO_YES[value], valid & said, _COLOUR_ID[colour])


def relation(scenes: Scenes, rng: np.random.Generator, attribute: str, mode: str) -> Questions:
    """Beside the only one of its kind: "what shape is west of the circle in red"."""
    n, ok = _by_kind(scenes, mode)
    unique = (ok & (n == 1)).reshape(len(scenes), -1, 1)
    is_shape = (scenes.colour >= 0) & (scenes.shape != DIGIT)
    kinds = np.where(is_shape, scenes.colour * DIGIT + scenes.shape, -1)
    where = [(kinds == kind).argmax(1) for kind in range(len(COLOURS) * DIGIT)]
    values, words = _attribute(scenes, attribute)
    beside = [np.where(cells >= 0, values[:, cells], -1) for cells in NEIGHBOUR]
    rows = np.arange(len(scenes))[:, None]
    found = np.stack(beside, axis=-1)[rows, np.stack(where, axis=1)]  # (N, 20, 2)
    chosen, value, valid = _pick(rng, np.where(unique, found, -1).reshape(len(scenes), -1))
    kind, direction = np.divmod(chosen, len(DIRECTIONS))
    colour, shape = np.divmod(kind, DIGIT)
    ending, said = _ending(scenes, rng, colour, scenes.shape != shape[:, None], mode)
    opening = [f"what {attribute} is", _DIRECTION_ID[direction], "of the", _SHAPE_ID[shape], "in"]
    return Questions(_tokens([*opening, *ending]), words[value], valid & said, _COLOUR_ID[colour])


def compare(scenes: Scenes, rng: np.random.Generator, mode: str) -> Questions:
    """Which colour has more, by two at least: "is there more blue than red"."""
    n, _ = _counts(scenes)
    gap = n[:, :, None] - n[:, None, :]
    ok = (abs(gap) >= 2) & ((n > 0) | (mode == "name"))[:, None, :]
    pair, value, valid = _pick(rng, np.where(ok, gap > 0, -1).reshape(len(scenes), -1))
    first, second = np.divmod(pair, len(COLOURS))
    ending, said = _ending(scenes, rng, second, scenes.colour >= 0, mode)
    tokens = _tokens(["is there more", _COLOUR_ID[first], "than", *ending])
    return Questions(tokens, _NO_YES[value], valid & said, _COLOUR_ID[second])


@dataclass(frozen=True)
class Family:
    """One form of a task.

    share: of the task's examples. after: names of the forms that must be learned before it.
    """

    task: str
    share: float
    ask: Callable[[Scenes, np.random.Generator], Questions]
    after: tuple[str, ...] = ()


_READ = ("place_colour",)
#: Every family, in the order in which training takes them up.
FAMILIES: dict[str, Family] = {
    "place_colour": Family("place", 0.5, partial(place, attribute="colour")),
    "place_shape": Family("place", 0.5, partial(place, attribute="shape")),
    "digit": Family("digit", 1.0, partial(place, attribute="digit")),
    "count": Family("count", 0.5, partial(count, mode="name"), _READ),
    "find_digit": Family("find", 0.5, partial(only, attribute="digit", mode="name"), _READ),
    "find_shape": Family("find", 0.5, partial(only, attribute="shape", mode="name"), _READ),
    "exist": Family("exist", 0.5, partial(exist, mode="name"), _READ),
    "compare": Family("compare", 1.0, partial(compare, mode="name"), _READ),
    "relation_colour": Family(
        "relation", 0.5, partial(relation, attribute="colour", mode="name"), _READ
    ),
    "relation_shape": Family(
        "relation", 0.5, partial(relation, attribute="shape", mode="name"), _READ
    ),
    "count_at": Family("count", 0.5, partial(count, mode="at"), ("count",)),
    "exist_at": Family("exist", 0.5, partial(exist, mode="at"), ("exist",)),
}
