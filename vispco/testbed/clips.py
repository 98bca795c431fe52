"""Generated clips: coloured shapes come, move, change colour and leave, between standing digits."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from .scenes import CELL, EMPTY, digit_pool, handwriting, ink_of, stencils
from .vocab import COLOURS, SHAPES

#: Cells a side of a board, and moments in a clip. A moment is FRAMES frames without motion.
SIDE, MOMENTS, FRAMES = 5, 8, 2
#: Frames a second: a moment is half a second.
RATE = 4.0
#: Rows down and columns right of a step north, south, west and east.
STEPS = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]])
#: Standing digits a board, at most; at least two.
SCENERY = 4
#: Moments that a shape stays: from the first to the second.
STAY = (3, 5)


@dataclass(frozen=True)
class Clips:
    """N clips. A clip shows every shape once at most: a shape is named by its index into SHAPES.

    cell: (N, 8, 4) int, where each shape is at each moment, row by row; -1 when it is away.
    colour: (N, 8, 4) int, index into COLOURS; -1 when it is away.
    way: (N, 4) int, index into STEPS of the one direction in which it moves; -1 if it never comes.
    place, writing, tint: (N, 4) int, the digits' cells, handwritten images and colours, or -1.
    """

    cell: np.ndarray
    colour: np.ndarray
    way: np.ndarray
    place: np.ndarray
    writing: np.ndarray
    tint: np.ndarray

    def __len__(self) -> int:
        return len(self.cell)

    def take(self, index: np.ndarray) -> Clips:
        """The clips at `index`."""
        return Clips(*(getattr(self, field.name)[index] for field in fields(self)))

    @property
    def enters(self) -> np.ndarray:
        """(N, 4) the moment at which each shape comes; MOMENTS if it never does."""
        there = self.cell >= 0
        return np.where(there.any(1), there.argmax(1), MOMENTS)


def sample(rng: np.random.Generator, n: int, split: str) -> Clips:
    """Draw `n` clips of one to four shapes, evenly. No two things are ever in one cell."""
    number = rng.integers(1, len(SHAPES) + 1, size=n)
    out = _draw(rng, number, split)
    while len(bad := np.flatnonzero(_crowded(out))):
        again = _draw(rng, number[bad], split)
        for field in fields(Clips):
            getattr(out, field.name)[bad] = getattr(again, field.name)
    return out


def _draw(rng: np.random.Generator, number: np.ndarray, split: str) -> Clips:
    """Clips of so many shapes (N,), some of which may meet in a cell."""
    n, shapes = len(number), len(SHAPES)
    rank = rng.random((n, shapes)).argsort(1).argsort(1)
    comes = rank < number[:, None]
    # Distinct moments, the earliest for the shape of rank 0.
    chosen = rng.random((n, MOMENTS - STAY[0] + 1)).argsort(1)
    chosen = np.where(np.arange(chosen.shape[1]) < number[:, None], chosen, MOMENTS)
    enters = np.take_along_axis(np.sort(chosen, axis=1), rank, axis=1)
    leaves = np.minimum(enters + rng.integers(STAY[0], STAY[1] + 1, size=(n, shapes)), MOMENTS)
    moment = np.arange(MOMENTS)[:, None]
    there = (moment >= enters[:, None]) & (moment < leaves[:, None]) & comes[:, None]  # (N, 8, 4)
    later = there & (moment > enters[:, None])
    moves = later & ((rng.random(there.shape) < 0.5) | _one(rng, later))
    gone = moves.cumsum(1)
    way = rng.integers(0, len(STEPS), size=(n, shapes))
    step = STEPS[way]  # (N, 4, 2)
    longest = gone[:, -1]
    first = np.floor(rng.random((n, shapes)) * (SIDE - longest)).astype(int)
    first = np.where(step.sum(-1) > 0, first, SIDE - 1 - first)
    lane = rng.integers(0, SIDE, size=(n, shapes))
    begin = np.where(step == 0, lane[..., None], first[..., None])
    row, column = np.moveaxis(begin[:, None] + gone[..., None] * step[:, None], -1, 0)
    before = rng.integers(0, len(COLOURS), size=(n, shapes))
    after = (before + rng.integers(1, len(COLOURS), size=(n, shapes))) % len(COLOURS)
    changes = _one(rng, later).cumsum(1) * (rng.random((n, 1, shapes)) < 0.5)
    digits = np.arange(SCENERY) < rng.integers(2, SCENERY + 1, size=(n, 1))
    pool = digit_pool(split)
    return Clips(
        cell=np.where(there, row * SIDE + column, EMPTY),
        colour=np.where(there, np.where(changes > 0, after[:, None], before[:, None]), EMPTY),
        way=np.where(comes, way, EMPTY),
        place=np.where(digits, rng.random((n, SIDE * SIDE)).argsort(1)[:, :SCENERY], EMPTY),
        writing=np.where(digits, pool[rng.integers(0, len(pool), size=digits.shape)], EMPTY),
        tint=np.where(digits, rng.integers(0, len(COLOURS), size=digits.shape), EMPTY),
    )


def _one(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """One true moment of each shape of `mask` (N, 8, 4), drawn evenly; none where there is none."""
    draw = np.where(mask, rng.random(mask.shape), -1)
    return mask & (draw == draw.max(1, keepdims=True))


def _crowded(clips: Clips) -> np.ndarray:
    """Whether two things are in one cell at any moment (N,)."""
    standing = np.broadcast_to(clips.place[:, None], (len(clips), MOMENTS, SCENERY))
    cells = np.sort(np.concatenate([clips.cell, standing], axis=2), axis=2)
    return ((cells[..., 1:] == cells[..., :-1]) & (cells[..., 1:] >= 0)).any((1, 2))


def render(rng: np.random.Generator, clips: Clips) -> np.ndarray:
    """Draw the clips: (N, 16, 40, 40, 3) uint8, two frames a moment.

    Sizes and shades are a clip's own and do not change; pixel noise is a frame's own.
    """
    n = len(clips)
    paper = rng.uniform(225, 250, size=(n, 1, 1, 1, 1, 1, 1)).astype(np.float32)
    board = np.broadcast_to(paper, (n, MOMENTS, SIDE, SIDE, CELL, CELL, 3)).copy()
    standing = np.broadcast_to(clips.place[:, None], (n, MOMENTS, SCENERY))
    tints = np.broadcast_to(clips.tint[:, None], standing.shape)
    size = rng.integers(0, 2, size=(n, len(SHAPES)))
    masks = [*np.moveaxis(stencils()[np.arange(len(SHAPES)), size], 1, 0)]
    masks += [*np.moveaxis(handwriting()[0][clips.writing], 1, 0)]  # each (N, 8, 8)
    cells = np.concatenate([clips.cell, standing], axis=2)
    colours = np.concatenate([clips.colour, tints], axis=2)
    shade = rng.normal(0, 12, size=(n, len(masks), 3)).astype(np.float32)
    for thing, mask in enumerate(masks):
        clip, moment = np.nonzero(cells[..., thing] >= 0)
        row, column = np.divmod(cells[clip, moment, thing], SIDE)
        ink = ink_of(colours[clip, moment, thing]) + shade[clip, thing]
        ground = paper[clip].reshape(-1, 1, 1, 1)
        drawn = ground + mask[clip][..., None] * (ink[:, None, None] - ground)
        board[clip, moment, row, column] = drawn
    frames = board.swapaxes(3, 4).reshape(n, MOMENTS, SIDE * CELL, SIDE * CELL, 3)
    frames = frames.repeat(FRAMES, axis=1)
    frames += rng.standard_normal(frames.shape, dtype=np.float32) * 4
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)
