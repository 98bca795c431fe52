"""Generated scenes: an 8x8 board of coloured shapes and handwritten digits, sampled and drawn in bulk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .vocab import CELLS, COLOURS, GRID, SHAPES

EMPTY = -1
DIGIT = len(SHAPES)  # the value of `shape` in a cell that holds a digit
SPLITS = ("train", "calibration", "test")
CELL = 8  # pixels a side
_RGB = np.array([[220, 40, 40], [40, 170, 60], [50, 70, 220], [235, 205, 40], [25, 25, 25]], dtype=np.float32)


@dataclass(frozen=True)
class Scenes:
    """N boards in raster order. A cell is empty (colour -1), a shape, or a digit (shape == DIGIT)."""

    colour: np.ndarray  # (N, 64) int, -1 or index into COLOURS
    shape: np.ndarray  # (N, 64) int, -1, index into SHAPES, or DIGIT
    digit: np.ndarray  # (N, 64) int, -1 or 0..9
    writing: np.ndarray  # (N, 64) int, which handwritten image, -1 where there is none

    def __len__(self) -> int:
        return len(self.colour)

    def take(self, index: np.ndarray) -> Scenes:
        """The boards at `index`."""
        return Scenes(self.colour[index], self.shape[index], self.digit[index], self.writing[index])


@lru_cache(maxsize=1)
def handwriting() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's bundled digits: ink (1797, 8, 8) float32 in [0, 1] and labels (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the testbed needs scikit-learn: pip install "vispco[testbed]"') from error
    data = load_digits()
    return (data.images / 16.0).astype(np.float32), data.target.astype(np.int64)


@lru_cache(maxsize=3)
def digit_pool(split: str) -> np.ndarray:
    """Indices of the handwritten images that `split` may use; the three pools are disjoint."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}; pass one of those names")
    order = np.random.default_rng(1797).permutation(len(handwriting()[1]))
    train, calibration, test = np.split(order, [1200, 1450])
    return {"train": train, "calibration": calibration, "test": test}[split]


def _categorical(rng: np.random.Generator, weights: np.ndarray) -> np.ndarray:
    """Draw one class for each of the 64 cells of each board; weights (N, K) sum to one -> (N, 64)."""
    draw = rng.random((len(weights), CELLS, 1))
    return (draw > np.cumsum(weights, axis=1)[:, None, :-1]).sum(-1)


def sample(rng: np.random.Generator, n: int, split: str) -> Scenes:
    """Draw `n` boards. Colour and shape weights vary from board to board so that counts vary too."""
    filled = rng.random((n, CELLS)).argsort(1).argsort(1) < rng.integers(13, 25, size=(n, 1))
    colour = _categorical(rng, rng.dirichlet(np.full(len(COLOURS), 2.0), size=n))
    shape = _categorical(rng, rng.dirichlet(np.full(len(SHAPES), 2.0), size=n))
    is_digit = rng.random((n, CELLS)) < 0.25
    shape = np.where(is_digit, DIGIT, shape)
    pool = digit_pool(split)
    writing = pool[rng.integers(0, len(pool), size=(n, CELLS))]
    holds = filled & is_digit
    return Scenes(
        colour=np.where(filled, colour, EMPTY),
        shape=np.where(filled, shape, EMPTY),
        digit=np.where(holds, handwriting()[1][writing], EMPTY),
        writing=np.where(holds, writing, EMPTY),
    )


@lru_cache(maxsize=1)
def _stencils() -> np.ndarray:
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


def render(rng: np.random.Generator, scenes: Scenes) -> np.ndarray:
    """Draw the boards: (N, 64, 64, 3) uint8, with jittered colours, two sizes, and pixel noise."""
    n = len(scenes)
    size = rng.integers(0, 2, size=(n, CELLS))
    mask = _stencils()[np.clip(scenes.shape, 0, DIGIT - 1), size]  # (N, 64, 8, 8)
    mask = np.where((scenes.shape == DIGIT)[..., None, None], handwriting()[0][scenes.writing], mask)
    mask = mask * (scenes.colour >= 0)[..., None, None]
    ink = _RGB[scenes.colour] + rng.normal(0, 12, size=(n, CELLS, 3)).astype(np.float32)
    paper = rng.uniform(225, 250, size=(n, 1, 1, 1, 3)).astype(np.float32)
    cells = paper + mask[..., None] * (ink[:, :, None, None, :] - paper)
    image = cells.reshape(n, GRID, GRID, CELL, CELL, 3).swapaxes(2, 3).reshape(n, GRID * CELL, GRID * CELL, 3)
    image += rng.standard_normal(image.shape, dtype=np.float32) * 4
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def extend(rng: np.random.Generator, images: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pictures (N, h, w, 3) in the upper left of larger ones of plain, noisy paper: (N, height, width, 3)."""
    n, top, left, _ = images.shape
    if (height, width) == (top, left):
        return images
    paper = rng.uniform(200, 255, size=(n, 1, 1, 3)) + rng.normal(0, 4, size=(n, height, width, 3))
    out = np.clip(np.rint(paper), 0, 255).astype(np.uint8)
    out[:, :top, :left] = images
    return out
