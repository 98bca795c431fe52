"""Conversations as text, by the model's own chat template, and where the answers stand in it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..utils.files import brief
from .conversation import MARKERS, Conversation

#: For processors without a chat template. Each question and each answer has lines of its own; the
#: end-of-sequence token ends an answer.
PLAIN = """\
{%- for message in messages %}
{%- for part in message.content %}
{%- if part.type == 'text' %}{{ part.text }}
{%- elif part.type == 'image' %}IMAGE{% else %}VIDEO{% endif %}
{%- endfor %}
{%- if message.role == 'assistant' %}{{ eos_token }}
{%- elif not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}
{%- endfor %}"""

#: What stands for the i-th answer until the places of the answers are known. These characters are
#: for private use, so no text has them.
PLACEHOLDER = "\ue000{}\ue001"
_PLACEHOLDERS = re.compile("\ue000[0-9]+\ue001")


def read_template(path: str | os.PathLike) -> str:
    """The chat template of a Jinja file.

    Raises ValueError that names the file if it is not UTF-8; OSError if it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        name = os.fspath(path)
        raise ValueError(f"{name}: expected a Jinja template in UTF-8, but {error}") from None


def render(
    processor: Any, conversation: Conversation, chat_template: str | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as the model is to read it, and (start, end) of each answer in that text.

    The template writes the conversation twice: with its answers, and with placeholders for them.
    So the places are known, whatever the template puts around the answers. Raises ValueError that
    names the conversation if the template refuses it, or if it alters or leaves out an answer:
    then there is nothing to label.
    """
    answers = [answer for _, answer in conversation.turns]
    placeholders = [PLACEHOLDER.format(i) for i in range(len(answers))]
    marked, text = _written(processor, conversation, chat_template, [placeholders, answers])
    *pieces, rest = _PLACEHOLDERS.split(marked)
    spans, expected = [], ""
    for piece, answer in zip(pieces, answers, strict=True):
        start = len(expected) + len(piece)
        expected += piece + answer
        spans.append((start, len(expected)))
    if text != expected + rest:
        raise ValueError(
            f"{conversation.source}: the model's chat template alters the answers, so they cannot "
            "be labelled"
        )
    return text, spans


def render_prompt(
    processor: Any, conversation: Conversation, chat_template: str | None = None
) -> str:
    """The conversation up to where its last answer would start, for generation.

    Raises ValueError that names the conversation if the template refuses it.
    """
    answers = [answer for _, answer in conversation.turns]
    (text,) = _written(processor, conversation, chat_template, [answers], prompt=True)
    return text


def messages(
    processor: Any, conversation: Conversation, answers: list[str], as_strings: bool = False
) -> list[dict]:
    """Hugging Face's form of a conversation, with `answers` in place of its own.

    as_strings: contents are strings that hold the model's image token, not lists of parts.
    """
    kind = conversation.kind
    marker, token = MARKERS[kind], media_tokens(processor)[kind]
    turns = [("system", conversation.system)] if conversation.system else []
    for (question, _), answer in zip(conversation.turns, answers, strict=True):
        turns += [("user", question), ("assistant", answer)]
    found = []
    for role, text in turns:
        pieces = re.split(f"({marker})", text) if role == "user" else [text]
        parts = [
            {"type": kind} if piece == marker else {"type": "text", "text": piece.strip()}
            for piece in pieces
            if piece.strip()
        ]
        as_string = "\n".join(part.get("text", token) for part in parts)
        found.append({"role": role, "content": as_string if as_strings else parts})
    return found


def media_tokens(processor: Any) -> dict[str, str]:
    """The words that stand for a picture and for a video in a model's text, by kind."""
    return {kind: getattr(processor, f"{kind}_token", None) or MARKERS[kind] for kind in MARKERS}


def _written(processor, conversation, chat_template, versions, prompt=False) -> list[str]:
    """What the template writes with each of the `versions` of the answers.

    Most templates take lists of parts; strings are tried after them. prompt: leave the last answer
    out. Raises ValueError that names the conversation if the template takes neither.
    """
    if chat_template is None and not getattr(processor, "chat_template", None):
        words = media_tokens(processor)
        plain = PLAIN.replace("IMAGE", words["image"]).replace("VIDEO", words["video"])
        chat_template = getattr(processor.tokenizer, "chat_template", None) or plain

    def write(answers: list[str], as_strings: bool) -> str:
        said = messages(processor, conversation, answers, as_strings)[: -1 if prompt else None]
        text = processor.apply_chat_template(
            said, chat_template=chat_template, tokenize=False, add_generation_prompt=prompt
        )
        # A template that takes strings writes a list of parts out as Python shows it.
        if not as_strings and any(str(turn["content"]) in text for turn in said):
            raise ValueError("it takes strings, not lists of parts")
        if _PLACEHOLDERS.findall(text) != _PLACEHOLDERS.findall("".join(answers)):
            raise ValueError("it leaves answers out, repeats or reorders them")
        return text

    for as_strings in (False, True):
        try:
            return [write(answers, as_strings) for answers in versions]
        except Exception as error:
            # A template may raise anything.
            reason = brief(f"{type(error).__name__}: {error}")
    what = "question" if prompt else "conversation"
    raise ValueError(
        f"{conversation.source}: the model's chat template cannot write this {what}: {reason}"
    )
