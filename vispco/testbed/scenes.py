"""Generated scenes: 8x8 boards of coloured shapes and handwritten digits, drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from .vocab import CELLS, COLOURS, GRID, SHAPES

#: The colour, shape, digit and writing of a cell that has none.
EMPTY = -1
#: The shape of a cell that holds a digit.
DIGIT = len(SHAPES)
SPLITS = ("train", "calibration", "test")
#: Pixels a side.
CELL = 8
_RGB = np.array(
    [[220, 40, 40], [40, 170, 60], [50, 70, 220], [235, 205, 40], [25, 25, 25]], dtype=np.float32
)


@dataclass(frozen=True)
class Scenes:
    """N boards; every field is (N, 64) int, row by row, and -1 where a cell has no such thing.

    colour: index into COLOURS. shape: index into SHAPES, or DIGIT. digit: 0 to 9. writing: which
    handwritten image.
    """

    colour: np.ndarray
    shape: np.ndarray
    digit: np.ndarray
    writing: np.ndarray

    def __len__(self) -> int:
        return len(self.colour)

    def take(self, index: np.ndarray) -> Scenes:
        """The boards at `index`."""
        return Scenes(*(getattr(self, field.name)[index] for field in fields(self)))


def join(parts: Sequence[Scenes]) -> Scenes:
    """All boards of `parts`, one after the other."""
    names = [field.name for field in fields(Scenes)]
    return Scenes(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@lru_cache(maxsize=1)
def handwriting() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: ink (1797, 8, 8) float32 in [0, 1], and labels (1797,).

    Raises ImportError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        message = 'the testbed needs scikit-learn: pip install "vispco[testbed]"'
        raise ImportError(message) from error
    data = load_digits()
    return (data.images / 16.0).astype(np.float32), data.target.astype(np.int64)


@lru_cache(maxsize=3)
def digit_pool(split: str) -> np.ndarray:
    """Which handwritten images `split` may use; the three pools are disjoint.

    Raises ValueError for a name that is no split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}; pass one of those names")
    order = np.random.default_rng(1797).permutation(len(handwriting()[1]))
    return np.split(order, [1200, 1450])[SPLITS.index(split)]


def sample(rng: np.random.Generator, n: int, split: str) -> Scenes:
    """Draw `n` boards of 13 to 24 objects.

    Every board has weights of colours and shapes of its own, so that counts vary.
    """
    filled = rng.random((n, CELLS)).argsort(1).argsort(1) < rng.integers(13, 25, size=(n, 1))
    colour = _categorical(rng, rng.dirichlet(np.full(len(COLOURS), 2.0), size=n))
    shape = _categorical(rng, rng.dirichlet(np.full(len(SHAPES), 2.0), size=n))
    is_digit = rng.random((n, CELLS)) < 0.25
    pool = digit_pool(split)
    writing = pool[rng.integers(0, len(pool), size=(n, CELLS))]
    return Scenes(
        colour=np.where(filled, colour, EMPTY),
        shape=np.where(filled, np.where(is_digit, DIGIT, shape), EMPTY),
        digit=np.where(filled & is_digit, handwriting()[1][writing], EMPTY),
        writing=np.where(filled & is_digit, writing, EMPTY),
    )


def _categorical(rng: np.random.Generator, weights: np.ndarray) -> np.ndarray:
    """Draw a class for each cell (N, 64) by the boards' weights (N, K), which sum to one."""
    draw = rng.random((len(weights), CELLS, 1))
    return (draw > np.cumsum(weights, axis=1)[:, None, :-1]).sum(-1)


def render(rng: np.random.Generator, scenes: Scenes) -> np.ndarray:
    """Draw the boards: (N, 64, 64, 3) uint8, with jittered colours, two sizes, and pixel noise."""
    n = len(scenes)
    size = rng.integers(0, 2, size=(n, CELLS))
    shapes = stencils()[np.clip(scenes.shape, 0, DIGIT - 1), size]
    is_digit = (scenes.shape == DIGIT)[..., None, None]
    mask = np.where(is_digit, handwriting()[0][scenes.writing], shapes)  # (N, 64, 8, 8)
    mask = mask * (scenes.colour >= 0)[..., None, None]
    ink = ink_of(scenes.colour) + rng.normal(0, 12, size=(n, CELLS, 3)).astype(np.float32)
    paper = rng.uniform(225, 250, size=(n, 1, 1, 1, 3)).astype(np.float32)
    cells = paper + mask[..., None] * (ink[:, :, None, None, :] - paper)
    rows = cells.reshape(n, GRID, GRID, CELL, CELL, 3).swapaxes(2, 3)
    image = rows.reshape(n, GRID * CELL, GRID * CELL, 3)
    image += rng.standard_normal(image.shape, dtype=np.float32) * 4
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def ink_of(colour: np.ndarray) -> np.ndarray:
    """Red, green and blue (..., 3) float32 of indices into COLOURS (...)."""
    return _RGB[colour]


@lru_cache(maxsize=1)
def stencils() -> np.ndarray:
    """Filled silhouettes (4 shapes, 2 sizes, 8, 8) float32, in the order of SHAPES."""
    y, x = np.mgrid[0:CELL, 0:CELL].astype(np.float32) - 3.5
    table = []
    for half in (2.7, 3.6):
        circle = x**2 + y**2 <= half**2
        rectangle = (abs(x) <= half) & (abs(y) <= half - 1)
        triangle = (abs(y) <= half) & (abs(x) <= (y + half) / 2 + 0.3)
        cross = ((abs(x) <= 1) | (abs(y) <= 1)) & (abs(x) <= half) & (abs(y) <= half)
        table.append([circle, rectangle, triangle, cross])
    return np.array(table, dtype=np.float32).swapaxes(0, 1)


def extend(rng: np.random.Generator, images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Put the pictures (N, h, w, 3) in the upper left of noisy paper: (N, height, width, 3)."""
    n, top, left, _ = images.shape
    if (height, width) == (top, left):
        return images
    paper = rng.uniform(200, 255, size=(n, 1, 1, 3)) + rng.normal(0, 4, size=(n, height, width, 3))
    out = np.clip(np.rint(paper), 0, 255).astype(np.uint8)
    out[:, :top, :left] = images
    return out
