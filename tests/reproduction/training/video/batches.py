"""One batch of clips with many questions each, and what every visual token should know."""

from __future__ import annotations

import numpy as np

from vispco.testbed import clips
from vispco.testbed.clip_questions import FAMILIES
from vispco.testbed.vocab import COLOURS, SHAPES

from ..pack import Packed, pack

NAMES = tuple(FAMILIES)


def clip_batch(rng: np.random.Generator, families: list[str], n: int) -> tuple[clips.Clips, Packed]:
    """`n` clips with a question of each of `families`."""
    drawn = clips.sample(rng, n, "train")
    slots, nothing = [], np.full(n, -100)
    for name in families:
        asked = FAMILIES[name].ask(drawn, rng)
        length = np.full(n, asked.tokens.shape[1])
        slots.append((asked.tokens, length, asked.answer, asked.valid, nothing))
    return drawn, pack(clips.render(rng, drawn), slots, eos_slots=2)


#: How many values each of `truths` has: 0 is "no shape here", or an empty cell.
SIZES = (len(SHAPES) + 2, len(COLOURS) + 1, len(SHAPES) + 1, 6, 6, len(COLOURS) + 1)


def truths(drawn: clips.Clips) -> list[np.ndarray]:
    """What each visual token could know of its cell and of what came before (N, 8 * 25), int.

    Which thing is there (a digit is number 5); its colour. Of a shape: as which one it came; which
    way it went a moment ago, and so far (1: it has not moved); the colour that it came with.
    """
    n, cells = len(drawn), clips.SIDE**2
    out = [np.zeros((n, clips.MOMENTS, cells), dtype=np.int64) for _ in SIZES]
    thing, colour, rank, now, way, first = out
    rows, digit = np.nonzero(drawn.place >= 0)
    where = drawn.place[rows, digit]
    thing[rows, :, where] = len(SHAPES) + 1
    colour[rows, :, where] = drawn.tint[rows, digit][:, None] + 1
    order = drawn.enters.argsort(1).argsort(1)
    row, moment, shape = np.nonzero(drawn.cell >= 0)
    cell = drawn.cell[row, moment, shape]
    begin = drawn.enters[row, shape]
    thing[row, moment, cell] = shape + 1
    colour[row, moment, cell] = drawn.colour[row, moment, shape] + 1
    rank[row, moment, cell] = order[row, shape] + 1
    moved = drawn.cell[row, begin, shape] != cell
    way[row, moment, cell] = np.where(moved, drawn.way[row, shape] + 2, 1)
    before = drawn.cell[row, np.maximum(moment - 1, begin), shape]
    now[row, moment, cell] = np.where(before != cell, drawn.way[row, shape] + 2, 1)
    first[row, moment, cell] = drawn.colour[row, begin, shape] + 1
    return [truth.reshape(n, -1) for truth in out]
