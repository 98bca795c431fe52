"""The batches of one training step: boards with many questions each, and easy-VQA images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vispco.testbed import easyvqa, scenes
from vispco.testbed.model import PATCH
from vispco.testbed.questions import FAMILIES
from vispco.testbed.vocab import GRID, ID, encode

from .pack import Packed, pack
from .recipe import Recipe


class EasyArrays(NamedTuple):
    """A whole split of easy-VQA.

    images: (N, 64, 64, 3) uint8. rows: the question rows of every image. tokens: (Q, L) token ids,
    padded with 0 on the right. length: (Q,). answer: (Q,) token ids.
    """

    images: np.ndarray
    rows: list[np.ndarray]
    tokens: np.ndarray
    length: np.ndarray
    answer: np.ndarray


def easy_arrays(split: str) -> EasyArrays:
    """Read a whole split of easy-VQA into memory."""
    data = easyvqa.load(split)
    images = np.stack([easyvqa.read_image(path) for path in data.paths])
    rows = [np.flatnonzero(data.image == index) for index in range(len(images))]
    encoded = [encode(question) for question in data.question]
    length = np.array([len(tokens) for tokens in encoded])
    tokens = np.zeros((len(encoded), length.max()), dtype=np.int64)
    for index, row in enumerate(encoded):
        tokens[index, : len(row)] = row
    return EasyArrays(images, rows, tokens, length, np.array([ID[word] for word in data.answer]))


def picture_size(rng: np.random.Generator, recipe: Recipe) -> tuple[int, int]:
    """Rows and columns of visual tokens in a step's pictures: the board's, or up to two more."""
    if rng.random() >= recipe.margins:
        return GRID, GRID
    return GRID + int(rng.integers(3)), GRID + int(rng.integers(3))


def board_batch(
    rng: np.random.Generator, families: list[int], n: int, size: tuple[int, int]
) -> tuple[scenes.Scenes, Packed]:
    """`n` boards, on pictures of `size` visual tokens, with a question of each of `families`."""
    boards = scenes.sample(rng, n, "train")
    names, slots = list(FAMILIES), []
    for index in families:
        asked = FAMILIES[names[index]].ask(boards, rng)
        length = np.full(n, asked.tokens.shape[1])
        slots.append((asked.tokens, length, asked.answer, asked.valid, asked.hint))
    height, width = size[0] * PATCH, size[1] * PATCH
    images = scenes.extend(rng, scenes.render(rng, boards), height, width)
    return boards, pack(images, slots, eos_slots=2)


def easy_batch(rng: np.random.Generator, data: EasyArrays, n: int, slots: int) -> Packed:
    """`n` easy-VQA images, flipped and transposed at random, with `slots` questions each."""
    chosen = rng.integers(0, len(data.images), size=n)
    asked = [
        rng.choice(data.rows[i], size=slots, replace=len(data.rows[i]) < slots) for i in chosen
    ]
    images = data.images[chosen]
    if rng.random() < 0.5:
        images = images[:, ::-1]
    if rng.random() < 0.5:
        images = images[:, :, ::-1]
    if rng.random() < 0.5:
        images = images.swapaxes(1, 2)
    valid, no_hint = np.ones(n, dtype=bool), np.full(n, -100)
    parts = [
        (data.tokens[q], data.length[q], data.answer[q], valid, no_hint)
        for q in np.stack(asked, axis=1)
    ]
    return pack(np.ascontiguousarray(images), parts, eos_slots=2)
