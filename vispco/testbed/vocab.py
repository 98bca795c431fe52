"""Words of the testbed: colours, shapes, places, and the word-level tokenizers built from them."""

from __future__ import annotations

import numpy as np

GRID = 8  # cells a side; one cell is one vision patch is one visual token
CELLS = GRID * GRID
COLOURS = ("red", "green", "blue", "yellow", "black")  # colours of the generated scenes
SHAPES = ("circle", "rectangle", "triangle", "cross")  # shapes of the generated scenes
DIRECTIONS = ("north", "west")  # up, left
NUMERALS = tuple(str(i) for i in range(10))
PLACES = tuple(f"{column}{row}" for row in range(1, GRID + 1) for column in "abcdefgh")  # raster order

PAD, EOS, UNK, IMAGE = "<pad>", "<eos>", "<unk>", "<image>"
_EASY = "teal gray brown a color contain does image in is no not of present shape the there what yes".split()
_QUESTIONS = "at colour count digit every more object shares than that".split()
WORDS = (PAD, EOS, UNK, IMAGE, *COLOURS, *SHAPES, *DIRECTIONS, *NUMERALS, *_EASY, *_QUESTIONS, *PLACES)
ID = {word: index for index, word in enumerate(WORDS)}
#: Qwen's own tokens come after the words, so that a word has the same id in both models.
VISION_START, IMAGE_PAD, VISION_END, VIDEO_PAD = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"
QWEN_ID = {word: index for index, word in enumerate((*WORDS, VISION_START, IMAGE_PAD, VISION_END, VIDEO_PAD))}


def ids(words: tuple[str, ...]) -> np.ndarray:
    """Vocabulary ids of `words`, as an array that other arrays can index: ids(COLOURS)[colour]."""
    return np.array([ID[word] for word in words])


def encode(question: str) -> list[int]:
    """Token ids of a question, exactly as the tokenizer gives them (a test holds the two together)."""
    return [ID.get(word, ID[UNK]) for word in question.lower().replace("?", " ").split()]


def build_tokenizer(vocabulary: dict[str, int] = ID, special: tuple[str, ...] | dict[str, str] = (IMAGE,)):
    """The same rule as `encode`, as a `PreTrainedTokenizerFast` that saves to JSON."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNK))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("?", " ")])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, unk_token=UNK, padding_side="left",
        extra_special_tokens=special if isinstance(special, dict) else list(special),
        model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    return tokenizer
