"""The turns of a conversation, in the shapes in which data sets have them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .media import HOLDERS
from .words import DECODER, is_missing, short, text

#: How a question says where a picture or a video stands.
MARKERS = {"image": "<image>", "video": "<video>"}
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}


def decoded(said: Any) -> Any:
    """Turns as they are, or from the JSON that tables have in their place. Nothing is checked."""
    if not isinstance(said, str):
        return said
    try:
        return DECODER.decode(said)
    except (json.JSONDecodeError, RecursionError):
        return said


def listed(said: Any, key: str) -> list:
    """The list of turns under `key`. Raises ValueError if it is none."""
    if not isinstance(said, list) or not said:
        raise ValueError(f"expected a list of turns under {key!r}, got {short(said)}")
    return said


def seen_in(said: Any) -> list[tuple[str, Any]]:
    """("image" or "video", file) of each part of the turns that holds one. Nothing is checked."""
    found = []
    for part in _parts(said):
        kind = _kind(part)
        if kind and not is_missing(held := _held(part, kind)):
            found.append((kind, held))
    return found


def rate_in(said: Any) -> Any:
    """Frames per second, as a part says it of its video; None: none does. Nothing is checked."""
    films = [part for part in _parts(said) if _kind(part) == "video"]
    rates = [film.get(name) for film in films for name in ("sample_fps", "fps")]
    return next((rate for rate in rates if not is_missing(rate)), None)


def turns(said: list, key: str) -> tuple[list[tuple[str, str]], str | None]:
    """(question, answer) of each turn, and the system prompt if it opens the conversation.

    said: `{"from": "human" or "gpt", "value": text}` (LLaVA-Instruct), or `{"role": "user" or
        "assistant", "content": text or parts}` (Hugging Face) each; or both in one, `{"user": text,
        "assistant": text}` (The Cauldron). What the model says before the first question is left
        out, as LLaVA does.
    Raises ValueError that names the turn.
    """
    roles, texts = [], []
    for i, turn in _one_by_one(said):
        name = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
        role = _ROLES.get(str(name).lower())
        if role is None:
            raise ValueError(
                f"{key}[{i}]: expected {{'from': 'human' or 'gpt', 'value': text}} or "
                f"{{'role': 'user' or 'assistant', 'content': text}}, got {short(turn)}"
            )
        roles.append(role)
        name = "value" if "value" in turn else "content"
        texts.append(text(_joined(turn, f"{key}[{i}]"), f"{key}[{i}].{name}"))
    system = None
    if roles[0] == "system":
        system = texts.pop(0)
        roles.pop(0)
    if roles[:1] == ["assistant"]:
        roles, texts = roles[1:], texts[1:]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(
            "expected turns of human and gpt in alternation, the last one gpt's, got "
            f"{', '.join(roles) or 'none'}"
        )
    return list(zip(texts[::2], texts[1::2], strict=True)), system


def _one_by_one(said: list) -> Iterator[tuple[int, Any]]:
    """Each turn, with its place in the list; what holds two turns is parted."""
    for i, turn in enumerate(said):
        if isinstance(turn, Mapping) and turn.keys() >= {"user", "assistant"}:
            yield from (
                (i, {"role": role, "content": turn[role]}) for role in ("user", "assistant")
            )
        else:
            yield i, turn


def _parts(said: Any) -> list[Mapping]:
    turns = [turn for turn in said if isinstance(turn, Mapping)] if isinstance(said, list) else []
    contents = [turn.get("content", turn.get("value")) for turn in turns]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if isinstance(part, Mapping)]


def _kind(part: Mapping) -> str | None:
    """Of what kind a part is: image, video, or None for a text."""
    name = part.get("type")
    if is_missing(name):
        return next((kind for kind in MARKERS if not is_missing(_held(part, kind, ()))), None)
    name = str(name).removeprefix("input_").removesuffix("_url")
    return name if name in MARKERS else None


def _held(part: Mapping, kind: str, others: Sequence[str] = ("source", *HOLDERS)) -> Any:
    """The file of a part, as it stands there; None: it is somewhere else."""
    names = (kind, f"{kind}_url", *others)
    return next((part[name] for name in names if not is_missing(part.get(name))), None)


def _joined(turn: Mapping, where: str) -> Any:
    """The text of a turn; a marker stands for each part that is a picture or a video."""
    content = turn.get("content") if "content" in turn else turn.get("value")
    if not isinstance(content, list):
        return content
    pieces = []
    for i, part in enumerate(content):
        if isinstance(part, str):
            pieces.append(part)
        elif isinstance(part, Mapping) and _kind(part):
            pieces.append(MARKERS[str(_kind(part))])
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        else:
            raise ValueError(
                f"{where}.content[{i}]: expected a text, an image or a video, got {short(part)}"
            )
    return "".join(pieces)
