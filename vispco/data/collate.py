"""Conversations to model inputs, by the model's own processor, with labels on the answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

from ..utils.distributed import share
from ..utils.files import brief
from .conversation import MARKERS, Conversation
from .pictures import MAX_PIXELS, open_picture, open_video
from .template import media_tokens, render, render_prompt

#: How many tokens at the end of a cut text may differ from those of the whole text.
TOKENS_AT_A_CUT = 8


def batches(
    processor: Any, conversations: Sequence[Conversation], batch_size: int = 8, **options
) -> list[dict]:
    """`collate` over conversations in order, `batch_size` at a time.

    Pictures and videos never share a batch. If several processes search together
    (`vispco.utils.distributed`), each gets its own share of every batch. options: of `collate`.
    Raises ValueError if batch_size is below 1, and whatever `collate` raises.
    """
    groups = split(conversations, batch_size)
    return [collate(processor, share(group), **options) for group in groups]


def split(conversations: Sequence[Conversation], batch_size: int) -> list[list[Conversation]]:
    """The conversations of each batch that `batches` makes, before processes share them.

    Raises ValueError if batch_size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
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
) -> dict[str, Any]:
    """Model inputs of some conversations, with `labels` (B, S).

    Labelled is every token that holds a character of an answer, and the special token that ends
    the answer's turn, if the template writes one right after it. All other labels are -100.

    processor: of any image-text-to-text model.
    conversations: all about pictures, or all about videos.
    chat_template: Jinja, in place of the processor's own. If there is none at all, it is
        `vispco.data.template.PLAIN`.
    max_pixels, frames: see `vispco.data.pictures`. Pictures are opened here, and closed again.
    Raises ValueError that names the conversation: see `render` and `open_picture`, and what the
    processor says.

    An answer starts at the first token in which the text before the answer and the whole text
    differ. So no template needs to mark its answers, and no tokenizer needs to know its offsets.
    """
    check_kind(processor, conversations[0].kind)
    rendered = []
    for conversation in conversations:
        text, answers = render(processor, conversation, chat_template)
        media = _open(conversation, max_pixels, frames)
        rendered.append(_Rendered(conversation, text, media, answers))
    inputs = _process(processor, rendered, padding=True, padding_side=padding_side)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    labels = torch.full_like(ids, -100)
    endings = _endings(processor)
    for row, whole in enumerate(rendered):
        columns = real[row].nonzero()[:, 0]
        tokens = ids[row, columns].tolist()
        for turn, (begin, end) in enumerate(whole.answers):
            start, _ = _common_tokens(processor, whole.cut(begin, turn), tokens)
            stop, across = _common_tokens(processor, whole.cut(end, turn), tokens)
            if across or (stop < len(tokens) and tokens[stop] in endings):
                stop += 1
            labels[row, columns[start:stop]] = ids[row, columns[start:stop]]
    return {**inputs, "labels": labels}


def prompt(
    processor: Any,
    conversation: Conversation,
    *,
    chat_template: str | None = None,
    max_pixels: int = MAX_PIXELS,
    frames: int = 8,
) -> dict[str, Any]:
    """Model inputs of one conversation up to its last answer, for `model.generate(**inputs)`.

    Arguments and errors are those of `collate`.
    """
    check_kind(processor, conversation.kind)
    text = render_prompt(processor, conversation, chat_template)
    media = _open(conversation, max_pixels, frames)
    return _process(processor, [_Rendered(conversation, text, media)])


def check_kind(processor: Any, kind: str) -> None:
    """Raise ValueError unless the processor takes media of this kind ("image" or "video")."""
    name = type(processor).__name__
    if getattr(processor, "tokenizer", None) is None:
        raise ValueError(
            f"expected the processor of a vision-language model, got a {name} without tokenizer"
        )
    if kind == "video" and getattr(processor, "video_processor", None) is None:
        raise ValueError(
            f"{name} takes no video (some need torchvision for it: pip install torchvision); "
            "give the frames as images"
        )


@dataclass(frozen=True)
class _Rendered:
    """What a processor gets of one conversation.

    media: opened pictures, or frames of videos. answers: (start, end) of each in the text.
    """

    conversation: Conversation
    text: str
    media: list
    answers: Sequence[tuple[int, int]] = ()

    def cut(self, end: int, turn: int) -> _Rendered:
        """The first `end` characters of the text, which lie in `turn`, and the media in them."""
        marker = MARKERS[self.conversation.kind]
        questions = [question for question, _ in self.conversation.turns[: turn + 1]]
        shown = "\n".join(questions).count(marker)
        return replace(self, text=self.text[:end], media=self.media[:shown])


def _open(conversation: Conversation, max_pixels: int, frames: int) -> list:
    folder = conversation.folder
    try:
        if conversation.kind == "video":
            return [open_video(video, folder, frames, max_pixels) for video in conversation.media]
        return [open_picture(picture, folder, max_pixels) for picture in conversation.media]
    except (ValueError, OSError) as error:
        raise ValueError(f"{conversation.source}: {brief(error, 600)}") from error


def _with_bos(processor: Any, text: str) -> str:
    """The text with the beginning-of-sequence token that the tokenizer would add.

    The template may have written it already. With it in the text, the tokenizer adds no special
    tokens, so the tokens of a text's beginning are the beginning of its tokens.
    """
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token
    if not bos or text.startswith(bos):
        return text
    adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return bos + text if adds_bos else text


def _process(processor: Any, rendered: Sequence[_Rendered], **padding) -> dict[str, Any]:
    """What the processor makes of these. Raises ValueError that names the conversation at fault."""
    kind = rendered[0].conversation.kind
    texts = [_with_bos(processor, one.text) for one in rendered]
    options: dict[str, Any] = {"return_tensors": "pt", "add_special_tokens": False, **padding}
    if any(one.media for one in rendered):
        options[f"{kind}s"] = [one.media for one in rendered]
    if kind == "video":
        # The frames were sampled when the video was opened.
        options["do_sample_frames"] = False
    try:
        return dict(processor(text=texts, **options))
    except Exception as error:
        # Pictures too small, special tokens in questions: a processor may raise anything.
        where = rendered[0].conversation.source
        if len(rendered) > 1:
            where += f" to {rendered[-1].conversation.source}"
            # Each conversation alone, to name the one at fault.
            for one in rendered:
                _process(processor, [one])
        name = type(processor).__name__
        raise ValueError(f"{where}: {name} cannot process it: {brief(error)}") from error


def _common_tokens(processor: Any, cut: _Rendered, tokens: list[int]) -> tuple[int, bool]:
    """How many of the `tokens` of a whole text lie within `cut`, a beginning of it.

    Second result: whether the next token lies across the end of `cut`.
    """
    own = _process(processor, [cut])["input_ids"][0].tolist()
    same = 0
    while same < min(len(own), len(tokens)) and own[same] == tokens[same]:
        same += 1
    # Words may be cut into other tokens at the end of a text, but not long before it.
    if len(own) - same > TOKENS_AT_A_CUT:
        raise ValueError(
            f"{cut.conversation.source}: {type(processor).__name__} does not read this "
            "conversation from front to back (some put all pictures first), so its answers "
            "cannot be found; ask about all pictures in one turn"
        )
    return same, same < len(own)


def _endings(processor: Any) -> set[int]:
    """Ids of the special tokens that may end a turn: all but those of pictures and videos."""
    tokenizer = processor.tokenizer
    added = tokenizer.added_tokens_decoder.items()
    special = {number for number, token in added if token.special} | {*tokenizer.all_special_ids}
    return special - {*tokenizer.convert_tokens_to_ids([*media_tokens(processor).values()])}
