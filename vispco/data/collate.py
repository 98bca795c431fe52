"""Conversations to model inputs, by the model's own processor, with labels on the answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from ..utils.distributed import share
from ..utils.files import brief
from .conversation import MARKERS, Conversation
from .pictures import MAX_PIXELS, open_picture, open_video
from .template import render, render_prompt, tokens


def batches(processor: Any, conversations: Sequence[Conversation], batch_size: int = 8, **options) -> list[dict]:
    """`collate` over conversations in order, `batch_size` at a time; pictures and videos never share a batch.

    Of several processes that search together (`vispco.utils.distributed`), each gets its own share of every batch."""
    return [collate(processor, share(batch), **options) for batch in split(conversations, batch_size)]


def split(conversations: Sequence[Conversation], batch_size: int) -> list[list[Conversation]]:
    """What `batches` makes its batches of, before they are shared."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    groups = [list(group) for _, group in groupby(conversations, key=lambda c: c.kind)]
    return [group[i:i + batch_size] for group in groups for i in range(0, len(group), batch_size)]


def collate(processor: Any, conversations: Sequence[Conversation], *, padding_side: str = "left",
            chat_template: str | None = None, max_pixels: int = MAX_PIXELS, frames: int = 8) -> dict[str, Any]:
    """Model inputs of some conversations, with `labels` (B, S): every token that holds a character of an answer, and
    the special token that ends the answer's turn, if the template writes one right after it; -100 elsewhere.

    processor: of any image-text-to-text model. All conversations are about pictures, or all about videos.
    chat_template: Jinja, in place of the processor's own (and of `vispco.data.template.PLAIN` if it has none).
    max_pixels, frames: see `vispco.data.pictures`. Pictures are opened here, and closed again.
    Raises ValueError that names the conversation: see `render` and `open_picture`, and what the processor says.

    An answer starts where the tokens of the text before it and of the whole text part. So no template needs to
    mark its answers, and no tokenizer needs to know its offsets.
    """
    kind = conversations[0].kind
    check_kind(processor, kind)
    written = [render(processor, c, chat_template) for c in conversations]
    media = [_open(c, max_pixels, frames) for c in conversations]
    texts = [_begun(processor, text) for text, _ in written]
    inputs = _process(processor, texts, media, kind, conversations, padding_side)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    labels, endings = torch.full_like(ids, -100), _endings(processor)
    for row, (conversation, (text, spans)) in enumerate(zip(conversations, written)):
        columns = real[row].nonzero()[:, 0]
        whole = ids[row, columns].tolist()
        added = len(texts[row]) - len(text)
        for turn, span in enumerate(spans):
            seen = sum(question.count(MARKERS[kind]) for question, _ in conversation.turns[:turn + 1])
            (start, _), (stop, shared) = (_matching(processor, texts[row][:added + end], media[row][:seen],
                                                    kind, conversation, whole) for end in span)
            stop += shared or stop < len(whole) and whole[stop] in endings
            labels[row, columns[start:stop]] = ids[row, columns[start:stop]]
    return {**inputs, "labels": labels}


def prompt(processor: Any, conversation: Conversation, *, chat_template: str | None = None,
           max_pixels: int = MAX_PIXELS, frames: int = 8) -> dict[str, Any]:
    """Model inputs of one conversation up to its last answer, for `model.generate(**inputs)`."""
    check_kind(processor, conversation.kind)
    text = _begun(processor, render_prompt(processor, conversation, chat_template))
    return _process(processor, [text], [_open(conversation, max_pixels, frames)], conversation.kind, [conversation])


def check_kind(processor: Any, kind: str) -> None:
    """Raise ValueError unless the processor takes pictures, or videos."""
    if getattr(processor, "tokenizer", None) is None:
        raise ValueError(f"expected the processor of a vision-language model, got a {type(processor).__name__} without "
                         "tokenizer")
    if kind == "video" and getattr(processor, "video_processor", None) is None:
        raise ValueError(f"{type(processor).__name__} takes no video (some need torchvision for it: pip install torchvision); "
                         "give the frames as images")


def _open(conversation: Conversation, max_pixels: int, frames: int) -> list:
    try:
        if conversation.kind == "video":
            return [open_video(m, conversation.folder, frames, max_pixels) for m in conversation.media]
        return [open_picture(m, conversation.folder, max_pixels) for m in conversation.media]
    except (ValueError, OSError) as error:
        raise ValueError(f"{conversation.source}: {brief(error, 600)}") from error


def _begun(processor: Any, text: str) -> str:
    """The text with the beginning-of-sequence token that the tokenizer would add, unless the template wrote it.

    Special tokens are then never added, so the tokens of a text's beginning are the beginning of its tokens.
    """
    begin, tokenizer = processor.tokenizer.bos_token, processor.tokenizer
    if begin and not text.startswith(begin) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return begin + text
    return text


def _process(processor: Any, texts: list[str], media: list[list], kind: str, conversations: Sequence[Conversation],
             padding_side: str | None = None) -> dict[str, Any]:
    options: dict[str, Any] = {"return_tensors": "pt", "add_special_tokens": False}
    if padding_side:
        options |= {"padding": True, "padding_side": padding_side}
    if any(media):
        options[f"{kind}s"] = media
    if kind == "video":
        options["do_sample_frames"] = False  # they are sampled
    try:
        return dict(processor(text=texts, **options))
    except Exception as error:  # of pictures too small, of special tokens in questions: anything
        for alone in zip(texts, media, conversations) if len(texts) > 1 else ():  # whose fault is it?
            _process(processor, [alone[0]], [alone[1]], kind, [alone[2]])
        where = conversations[0].source + (f" to {conversations[-1].source}" if len(conversations) > 1 else "")
        raise ValueError(f"{where}: {type(processor).__name__} cannot process it: {brief(error)}") from error


def _matching(processor: Any, text: str, media: list, kind: str, conversation: Conversation,
              whole: list[int]) -> tuple[int, bool]:
    """How many of the tokens `whole` lie within its beginning `text`, and whether the next one lies across its end."""
    part = _process(processor, [text], [media], kind, [conversation])["input_ids"][0].tolist()
    same = next((i for i, (a, b) in enumerate(zip(part, whole)) if a != b), min(len(part), len(whole)))
    if len(part) - same > 8:  # words may be cut differently at the end of a text, but not long before
        raise ValueError(f"{conversation.source}: {type(processor).__name__} does not read this conversation from front to back "
                         "(some put all pictures first), so its answers cannot be found; ask about all pictures in one turn")
    return same, same < len(part)


def _endings(processor: Any) -> set[int]:
    """Special tokens that may end a turn: all but those of pictures and videos."""
    tokenizer = processor.tokenizer
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
    return special - set(tokenizer.convert_tokens_to_ids(list(tokens(processor).values())))
