"""Conversations as text, by the model's own chat template, and where in the text the answers stand."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..utils.files import brief
from .conversation import MARKERS, Conversation

#: For processors without a chat template: each turn's question and answer on lines of their own, answers ended.
PLAIN = """\
{%- for message in messages %}
{%- for part in message.content %}
{%- if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}IMAGE{% else %}VIDEO{% endif %}
{%- endfor %}
{%- if message.role == 'assistant' %}{{ eos_token }}{% elif not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}
{%- endfor %}"""


def read_template(path: str | os.PathLike) -> str:
    """The chat template of a Jinja file. Raises ValueError, naming it, unless it is UTF-8; OSError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)}: expected a Jinja template in UTF-8, but {error}") from None


def render(processor: Any, conversation: Conversation,
           chat_template: str | None = None) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as the model is to read it, and (start, end) of each answer in that text.

    The template writes the conversation once with its answers and once with marks in their place, so the places are
    known whatever the template puts around them. Raises ValueError that names the conversation if the template
    refuses it, or alters or leaves out an answer, so that there is nothing to label.
    """
    answers = [answer for _, answer in conversation.turns]
    marks = [f"\ue000{i}\ue001" for i in range(len(answers))]  # private use: nobody's words
    for inline in (False, True):  # most templates want lists of parts, older ones want strings
        try:
            marked, text = (_write(processor, messages(processor, conversation, said, inline), chat_template)
                            for said in (marks, answers))
        except Exception as error:  # whatever a template may raise
            reason = f"{type(error).__name__}: {error}"
            continue
        pieces = re.split("\ue000[0-9]+\ue001", marked)
        if re.findall("\ue000[0-9]+\ue001", marked) == marks:
            break
        reason = "it leaves answers out, repeats or reorders them"
    else:
        raise ValueError(f"{conversation.source}: the model's chat template cannot write this conversation: {brief(reason)}")
    spans, at = [], 0
    for piece, answer in zip(pieces, answers):
        spans.append((at + len(piece), at := at + len(piece) + len(answer)))
    if text != "".join(p + a for p, a in zip(pieces, [*answers, ""])):
        raise ValueError(f"{conversation.source}: the model's chat template alters the answers, so they cannot be labelled")
    return text, spans


def render_prompt(processor: Any, conversation: Conversation, chat_template: str | None = None) -> str:
    """The conversation up to where its last answer would start, for generation."""
    for inline in (False, True):
        asked = messages(processor, conversation, [a for _, a in conversation.turns], inline)[:-1]
        try:
            return _write(processor, asked, chat_template, add_generation_prompt=True)
        except Exception as error:
            reason = error
    raise ValueError(f"{conversation.source}: the model's chat template cannot write this question: {brief(reason)}")


def messages(processor: Any, conversation: Conversation, answers: list[str], inline: bool = False) -> list[dict]:
    """Hugging Face's form of a conversation, with `answers` in place of its own.

    inline: contents are strings that hold the model's image token, not lists of parts.
    """
    kind = conversation.kind
    turns = [("system", conversation.system)] if conversation.system else []
    for (question, _), answer in zip(conversation.turns, answers):
        turns += [("user", question), ("assistant", answer)]
    result = []
    for role, text in turns:
        cut = re.split(f"({re.escape(MARKERS[kind])})", text) if role == "user" else [text]
        parts = [{"type": kind} if piece == MARKERS[kind] else {"type": "text", "text": piece.strip()}
                 for piece in cut if piece.strip()]
        strings = [part.get("text") or tokens(processor)[kind] for part in parts]
        result.append({"role": role, "content": "\n".join(strings) if inline else parts})
    return result


def tokens(processor: Any) -> dict[str, str]:
    """The words that stand for a picture and a video in a model's text."""
    return {kind: getattr(processor, f"{kind}_token", None) or MARKERS[kind] for kind in MARKERS}


def _write(processor: Any, said: list[dict], chat_template: str | None, **options) -> str:
    if chat_template is None and not getattr(processor, "chat_template", None):
        words = tokens(processor)
        plain = PLAIN.replace("IMAGE", words["image"]).replace("VIDEO", words["video"])
        chat_template = getattr(processor.tokenizer, "chat_template", None) or plain
    text = processor.apply_chat_template(said, chat_template=chat_template, tokenize=False, **options)
    if any(isinstance(turn["content"], list) and str(turn["content"]) in text for turn in said):
        raise ValueError("it takes strings, not lists of parts")
    return text
