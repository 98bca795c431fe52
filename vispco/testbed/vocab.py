"""Words of the testbed: colours, shapes, places, and their token ids."""

from __future__ import annotations

import numpy as np

#: Cells a side of a board. One cell is one vision patch, and one visual token.
GRID = 8
CELLS = GRID * GRID
#: Colours and shapes of the generated scenes.
COLOURS = ("red", "green", "blue", "yellow", "black")
SHAPES = ("circle", "rectangle", "triangle", "cross")
#: North is up, west is left.
DIRECTIONS = ("north", "west")
NUMERALS = tuple(str(i) for i in range(10))
#: Names of the cells, row by row: "a1" is the upper left one.
PLACES = tuple(f"{column}{row}" for row in range(1, GRID + 1) for column in "abcdefgh")

PAD, EOS, UNK, IMAGE = "<pad>", "<eos>", "<unk>", "<image>"
_EASY = (
    "teal gray brown a color contain does image in is no not of present shape the there what yes"
)
_QUESTIONS = "at colour count digit every more object shares than that"
WORDS = (
    *(PAD, EOS, UNK, IMAGE, *COLOURS, *SHAPES, *DIRECTIONS, *NUMERALS),
    *(*_EASY.split(), *_QUESTIONS.split(), *PLACES),
)
ID = {word: index for index, word in enumerate(WORDS)}
VISION_START, IMAGE_PAD = "<|vision_start|>", "<|image_pad|>"
VISION_END, VIDEO_PAD = "<|vision_end|>", "<|video_pad|>"
#: Qwen's own tokens come after the words, so that a word has the same id in both models.
QWEN_WORDS = (*WORDS, VISION_START, IMAGE_PAD, VISION_END, VIDEO_PAD)
QWEN_ID = {word: index for index, word in enumerate(QWEN_WORDS)}

_VIDEO = "south east came first last where goes has"
#: Words of questions about clips, which testbed-qwen-video alone has.
VIDEO_WORDS = (*QWEN_WORDS, *_VIDEO.split())
VIDEO_ID = {word: index for index, word in enumerate(VIDEO_WORDS)}


def ids(words: tuple[str, ...]) -> np.ndarray:
    """Token ids of `words`, as an array that other arrays can index: `ids(COLOURS)[colour]`."""
    return np.array([ID[word] for word in words])


def encode(question: str) -> list[int]:
    """Token ids of a question, the same as the tokenizer's (a test compares the two)."""
    return [ID.get(word, ID[UNK]) for word in question.lower().replace("?", " ").split()]
