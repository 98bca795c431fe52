"""Conversations to model inputs, by the model's own processor, with labels on the answers alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch

from ..utils.distributed import share
from ..utils.files import brief
from ..utils.lazy import Lazy, Room
from .conversation import Conversation
from .labels import answer_tokens, check_words
from .marks import listening, marked
from .pictures import MAX_PIXELS, open_picture, open_video
from .process import Rendered, check_rates, process, warn_of_many
from .template import render, render_prompt

#: Bytes of large tensors (pixel values) that the batches of one call hold at a time.
MEMORY = 2 << 30


class Batches(Sequence):
    """Batches that are made when they are looked at. See `batches`."""

    def __init__(self, makes: Sequence[Callable[[], dict]], memory: int):
        room = Room(memory)
        self._batches = [Lazy(make, room) for make in makes]

    def __getitem__(self, i: Any) -> Any:
        return self._batches[i]

    def __len__(self) -> int:
        return len(self._batches)


def batches(
    processor: Any,
    conversations: Sequence[Conversation],
    batch_size: int = 8,
    memory: int = MEMORY,
    **options,
) -> Batches:
    """`collate` over conversations in order, `batch_size` at a time, each made when it is needed.

    Pictures and videos never share a batch. If several processes search together
    (`vispco.utils.distributed`), each gets its own share of every batch.

    memory: bytes of pixel values that are held at a time; those of further batches are made again
        from the files at each use. A search lets them all go once the vision tower has run, and
        holds what it made: visual tokens x width numbers.
    options: of `collate`.
    Raises ValueError if batch_size is below 1. Looking at a batch raises what `collate` raises.
    """
    parts = [share(group) for group in split(conversations, batch_size)]
    return Batches([partial(collate, processor, part, **options) for part in parts], memory)


def split(conversations: Sequence[Conversation], batch_size: int) -> list[list[Conversation]]:
    """The conversations of each batch that `batches` makes, before processes share them.

    Raises ValueError if batch_size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(conversations, str | os.PathLike):
        path = str(conversations)
        raise ValueError(f"expected conversations, got {path!r}: draw({path!r}, 256).conversations")
    if not hasattr(conversations, "__iter__"):
        kind = type(conversations).__name__
        raise ValueError(f"expected a list of conversations, as of draw(...), got {kind}")
    groups = [list(group) for _, group in groupby(conversations, key=lambda c: c.kind)]
    return [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]


def collate(
    processor: Any,
    conversations: Sequence[Conversation],
    *,
    padding_side: str = "left",
    chat_template: str | None = None,
    max_pixels: int = MAX_PIXELS,
    frames: int = 8,
    fps: float | None = None,
) -> dict[str, Any]:
    """Model inputs of some conversations, with `labels` (B, S).

    Labelled is every token that holds a character of an answer, and the special token that ends
    the answer's turn, if the template writes one right after it. All other labels are -100.

    processor: of any image-text-to-text model.
    conversations: all about pictures, or all about videos.
    chat_template: Jinja, in place of the processor's own. If there is none at all, it is
        `vispco.data.template.PLAIN`.
    max_pixels, frames: see `vispco.data.pictures`. Pictures are opened here, and closed again.
    fps: frames per second of videos that come as frames, unless the row says it.
    Raises ValueError that names the conversation: see `render`, `open_picture` and `check_rates`;
    if its words hold a token that controls the template; and what the processor says.

    No template needs to mark its answers. Each picture is processed once.
    """
    check_kind(processor, conversations[0].kind)
    rendered = []
    for conversation in conversations:
        text, answers = render(processor, conversation, chat_template)
        check_words(processor, conversation, text)
        media = _open(conversation, max_pixels, frames, fps)
        rendered.append(Rendered(conversation, marked(text, answers), media))
    check_rates(processor, rendered)
    twin, heard = listening(processor)
    inputs = process(twin, rendered, padding=True, padding_side=padding_side)
    warn_of_many(processor, inputs, rendered)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    labels = torch.full_like(ids, -100)
    for row, one in enumerate(rendered):
        columns = real[row].nonzero()[:, 0]
        spelled = heard[row] if len(heard) == len(rendered) else None
        tokens = ids[row, columns].tolist()
        places = columns[answer_tokens(processor, one.conversation, spelled, tokens)]
        labels[row, places] = ids[row, places]
    return {**inputs, "labels": labels}


def prompt(
    processor: Any,
    conversation: Conversation,
    *,
    chat_template: str | None = None,
    max_pixels: int = MAX_PIXELS,
    frames: int = 8,
    fps: float | None = None,
) -> dict[str, Any]:
    """Model inputs of one conversation up to its last answer, for `model.generate(**inputs)`.

    Arguments and errors are those of `collate`.
    """
    check_kind(processor, conversation.kind)
    text = render_prompt(processor, conversation, chat_template)
    check_words(processor, conversation, text)
    media = _open(conversation, max_pixels, frames, fps)
    rendered = Rendered(conversation, text, media)
    check_rates(processor, [rendered])
    inputs = process(processor, [rendered])
    warn_of_many(processor, inputs, [rendered])
    return inputs


def check_kind(processor: Any, kind: str) -> None:
    """Raise ValueError unless the processor takes media of this kind ("image" or "video")."""
    name = type(processor).__name__
    if getattr(processor, "tokenizer", None) is None:
        raise ValueError(
            f"expected the processor of a vision-language model, got a {name} without tokenizer"
        )
    if kind == "video" and getattr(processor, "video_processor", None) is None:
        raise ValueError(
            f'{name} takes no video (most need torchvision for it: pip install "vispco[qwen]"); '
            "give the frames as images"
        )


def _open(conversation: Conversation, max_pixels: int, frames: int, fps: float | None) -> list[Any]:
    folder, fps = conversation.folder, conversation.fps or fps
    try:
        if conversation.kind == "image":
            return [open_picture(picture, folder, max_pixels) for picture in conversation.media]
        return [open_video(video, folder, frames, max_pixels, fps) for video in conversation.media]
    except (ValueError, OSError) as error:
        raise ValueError(f"{conversation.source}: {brief(error, 600)}") from error
