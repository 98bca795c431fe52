"""One question about a picture, given on the command line or of the testbed, as a conversation."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

from .. import data, testbed
from ..data.draw import check_files
from ..data.pictures import require_pillow
from .model import is_testbed


def about(media: Sequence[str], kind: str, question: str, max_pixels: int) -> data.Conversation:
    """media: paths of pictures, or of one video; kind: "image" or "video". Raises ValueError or OSError that names the path."""
    media = tuple(map(os.path.abspath, media))
    for path in media:
        os.stat(path)
    own = {"images": [*media]} if kind == "image" else {"video": media[0]}
    asked: Any = data.parse({**own, "question": question, "answer": "?"}, f"--{kind}", os.path.abspath(os.sep))
    if kind == "image":
        check_files(asked, max_pixels)
    return asked


def of_testbed(example: testbed.Example, source: str) -> data.Conversation:
    """A question of the testbed."""
    image, _ = require_pillow()
    file = io.BytesIO()
    image.fromarray(example.image).save(file, "png")
    row = {"image": {"bytes": file.getvalue()}, "question": example.question + "?", "answer": example.answer}
    found: Any = data.parse(row, source)
    return found


def words(asked: data.Conversation) -> str:
    """The first question without the marks of its pictures."""
    return asked.turns[0][0].replace("<image>", "").replace("<video>", "")


def check_words(name: str, processor, inputs: dict, question: str) -> None:
    """Raise ValueError if the model `name` is the testbed's and does not know every word."""
    if is_testbed(name) and bool((inputs["input_ids"] == processor.tokenizer.unk_token_id).any()):
        raise ValueError(f"the testbed does not know every word of {question!r}: see `vispco list tasks` for what it is asked")
