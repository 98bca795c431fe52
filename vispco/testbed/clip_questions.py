"""Questions about generated clips: what came first or last, how many, which way, what colour.

Every function asks one question about each of N clips at once. A question ends with one token, and
the answer is predicted right there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from .clips import MOMENTS, Clips
from .vocab import COLOURS, NUMERALS, SHAPES, VIDEO_ID

#: In the order of `clips.STEPS`.
WAYS = ("north", "south", "west", "east")


def ids(words: tuple[str, ...]) -> np.ndarray:
    """Token ids of `words` in testbed-qwen-video, as an array that other arrays can index."""
    return np.array([VIDEO_ID[word] for word in words])


@dataclass(frozen=True)
class Asked:
    """One question about each of N clips, all of the same length.

    tokens: (N, L) token ids. answer: (N,) token id. valid: (N,) bool; the other rows must not be
    used.
    """

    tokens: np.ndarray
    answer: np.ndarray
    valid: np.ndarray


def _tokens(n: int, text: str, last: np.ndarray | None = None) -> np.ndarray:
    """(N, L) ids of `text`, the same for all, and then of one word for each clip (N,)."""
    same = np.tile(ids(tuple(text.split())), (n, 1))
    return same if last is None else np.concatenate([same, last[:, None]], axis=1)


def order(clips: Clips, rng: np.random.Generator, end: str) -> Asked:
    """Which of two shapes or more came first or last: "what shape came first"."""
    enters = clips.enters
    came = enters < MOMENTS
    found = enters.argmin(1) if end == "first" else np.where(came, enters, -1).argmax(1)
    return Asked(_tokens(len(clips), f"what shape came {end}"), ids(SHAPES)[found], came.sum(1) > 1)


def number(clips: Clips, rng: np.random.Generator) -> Asked:
    """How many shapes appear in all, digits aside: "count every shape"."""
    count = (clips.enters < MOMENTS).sum(1)
    valid = np.ones(len(clips), dtype=bool)
    return Asked(_tokens(len(clips), "count every shape"), ids(NUMERALS)[count], valid)


def motion(clips: Clips, rng: np.random.Generator) -> Asked:
    """Which way a shape moves: "where goes the circle"."""
    shape = _any_true(rng, clips.way >= 0)
    way = clips.way[np.arange(len(clips)), shape]
    tokens = _tokens(len(clips), "where goes the", ids(SHAPES)[shape])
    return Asked(tokens, ids(WAYS)[way], way >= 0)


def change(clips: Clips, rng: np.random.Generator, end: str) -> Asked:
    """The first or last colour of a shape that changes it: "what first colour has the circle"."""
    there = clips.cell >= 0
    first = np.take_along_axis(clips.colour, there.argmax(1)[:, None], axis=1)[:, 0]
    late = MOMENTS - 1 - there[:, ::-1].argmax(1)
    last = np.take_along_axis(clips.colour, late[:, None], axis=1)[:, 0]
    changes = there.any(1) & (first != last)
    shape = _any_true(rng, changes)
    rows = np.arange(len(clips))
    colour = (first if end == "first" else last)[rows, shape]
    tokens = _tokens(len(clips), f"what {end} colour has the", ids(SHAPES)[shape])
    return Asked(tokens, ids(COLOURS)[colour], changes[rows, shape])


def _any_true(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """The index of one true entry of each row (N, K), drawn evenly; 0 where there is none."""
    return np.where(mask, rng.random(mask.shape), -1).argmax(1)


@dataclass(frozen=True)
class Family:
    """One form of a task."""

    task: str
    ask: Callable[[Clips, np.random.Generator], Asked]


FAMILIES: dict[str, Family] = {
    "first": Family("order", partial(order, end="first")),
    "last": Family("order", partial(order, end="last")),
    "number": Family("number", number),
    "motion": Family("motion", motion),
    "first_colour": Family("change", partial(change, end="first")),
    "last_colour": Family("change", partial(change, end="last")),
}
TASKS = ("order", "number", "motion", "change")
