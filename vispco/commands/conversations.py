"""One question about a picture, of the command line or the testbed, as a conversation."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

from .. import data, testbed
from ..data.draw import check_files
from ..data.pictures import require_pillow
from .model import is_testbed

_A = {"image": "a picture", "video": "a video"}


def conversation_about(
    media: Sequence[str], kind: str, question: str, max_pixels: int
) -> data.Conversation:
    """A question about pictures, or about one video.

    media: paths of the pictures, or of the video. kind: "image" or "video".
    Raises ValueError or OSError that names the path.
    """
    paths = [os.path.abspath(path) for path in media]
    for name, path in zip(media, paths, strict=True):
        if "://" in name:
            raise ValueError(f"{name} is an address: download it, and give the file as --{kind}")
        if not os.path.exists(path):
            raise ValueError(f"{name}: there is no such file; --{kind} needs the path of one")
        if os.path.isfile(path) and not os.path.getsize(path):
            raise ValueError(f"{name}: expected {_A[kind]}, but the file is empty")
    seen = {"images": paths} if kind == "image" else {"video": paths[0]}
    row = {**seen, "question": question, "answer": "?"}
    conversation: Any = data.parse(row, f"--{kind}", os.path.abspath(os.sep))
    if kind == "image":
        check_files(conversation, max_pixels)
    return conversation


def from_testbed(example: testbed.Example, source: str) -> data.Conversation:
    """A question of the testbed. source: names it in error messages."""
    image = require_pillow()
    file = io.BytesIO()
    image.fromarray(example.image).save(file, "png")
    row = {"image": {"bytes": file.getvalue()}, "question": f"{example.question}?"}
    conversation: Any = data.parse({**row, "answer": example.answer}, source)
    return conversation


def first_question(conversation: data.Conversation) -> str:
    """The first question without the marks of its pictures."""
    return conversation.turns[0][0].replace("<image>", "").replace("<video>", "")


def check_vocabulary(name: str, processor, inputs: dict, question: str) -> None:
    """Raise ValueError if the model `name` is the testbed's and does not know every word."""
    unknown = inputs["input_ids"] == processor.tokenizer.unk_token_id
    if is_testbed(name) and bool(unknown.any()):
        hint = "see `vispco list tasks` for what it is asked"
        raise ValueError(f"the testbed does not know every word of {question!r}: {hint}")
