"""The testbed's words in the language model's tokens, and what visual tokens should say in them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from vispco.testbed import scenes, smollm
from vispco.testbed.vocab import COLOURS, PLACES, SHAPES

#: Colours of boards, then those that only easy-VQA has.
ALL_COLOURS = (*COLOURS, "teal", "gray", "brown")
#: A cell's digit is said as a word: as a numeral it would look like the row that the cell is in.
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
EMPTY = "empty"


#: Tokens of a question, which comes right after the picture, and of an answer. They are kept,
#: because the same texts come again and again.
question = lru_cache(maxsize=100_000)(smollm.question)
answer = lru_cache(maxsize=1000)(smollm.answer)


class Meanings:
    """What visual tokens should be: the sum of the embeddings of what their cell holds, and where.

    colours: (9, width), the last one of an empty cell. kinds: (15, width), shapes, digits, an empty
    cell. places: (64, width).
    """

    def __init__(self, embedding: Tensor) -> None:
        def tokens(text: str) -> Tensor:
            return embedding[question(f" {text}")].float()

        self.colours = torch.stack([tokens(word).mean(0) for word in (*ALL_COLOURS, EMPTY)])
        self.kinds = torch.stack([tokens(word).mean(0) for word in (*SHAPES, *DIGITS, EMPTY)])
        self.places = torch.stack([tokens(place).sum(0) for place in PLACES])

    def of(self, colour: Tensor, kind: Tensor) -> Tensor:
        """Targets (B, 64, width) of cells with these colours and kinds (B, 64)."""
        return self.colours[colour] + self.kinds[kind] + self.places

    def distances(self, visual: Tensor) -> list[Tensor]:
        """How far visual tokens (B, 64, width) are from each colour, kind and place, squared.

        Of what is not asked for, they are compared with the mean.
        """
        tables = [self.colours, self.kinds, self.places]
        means = [table.mean(0) for table in tables]
        rest = torch.stack(means).sum(0)
        return [
            torch.cdist(visual, table + rest - mean) ** 2
            for table, mean in zip(tables, means, strict=True)
        ]


def contents(boards: scenes.Scenes) -> tuple[np.ndarray, np.ndarray]:
    """Which colour and which kind each cell has: two arrays (B, 64) of indices."""
    empty = len(SHAPES) + len(DIGITS)
    kind = np.where(boards.shape == scenes.DIGIT, len(SHAPES) + boards.digit, boards.shape)
    return (
        np.where(boards.colour < 0, len(ALL_COLOURS), boards.colour),
        np.where(boards.shape < 0, empty, kind),
    )
