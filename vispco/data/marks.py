"""Where answers are in the text that a processor makes of a conversation and its pictures.

A processor puts many tokens in the place of a picture, then has the whole text cut into tokens. How
many depends on the pictures, so only the processor knows where an answer is afterwards. Marks
around each answer go with the text through the processor; its tokenizer, which is the last to get
the text, takes them out again. So no picture is processed twice, and the tokens are the same as
without marks.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: Unicode keeps these for a program's own use: no text that is exchanged holds them.
BEGIN, END = "\ufdd0", "\ufdd1"
_MARK = re.compile(f"[{BEGIN}{END}]")


@dataclass(frozen=True)
class Spelled:
    """A text as a tokenizer got it, without marks. answers: (start, end) of each in it."""

    text: str
    answers: tuple[tuple[int, int], ...]


def marked(text: str, answers: Sequence[tuple[int, int]]) -> str:
    """A text with marks around its answers.

    >>> unmarked(marked("Q: why? A: so.", [(11, 13)])).answers
    ((11, 13),)
    """
    pieces, before = [], 0
    for start, end in answers:
        pieces += [text[before:start], BEGIN, text[start:end], END]
        before = end
    return "".join([*pieces, text[before:]])


def unmarked(text: str) -> Spelled:
    """The text without its marks, and where they were."""
    places = [mark.start() - i for i, mark in enumerate(_MARK.finditer(text))]
    return Spelled(_MARK.sub("", text), tuple(zip(places[::2], places[1::2], strict=False)))


def listening(processor: Any) -> tuple[Any, list[Spelled]]:
    """A twin of a processor that takes marked texts; and a list of what its tokenizer got.

    The processor stays as it is. Texts without marks are not put into the list.
    """
    tokenizer = processor.tokenizer
    heard: list[Spelled] = []

    class Listening(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text=None, *others, **options):
            several = isinstance(text, (list, tuple))
            spelled = [unmarked(one) for one in (text if several else [text])]
            heard.extend(one for one in spelled if one.answers)
            clean = [one.text for one in spelled]
            return tokenizer(clean if several else clean[0], *others, **options)

    # Processors look at the class of their parts, and at its name.
    Listening.__name__ = type(tokenizer).__name__
    twin, ears = copy.copy(processor), copy.copy(tokenizer)
    ears.__class__ = Listening
    twin.tokenizer = ears
    return twin, heard
