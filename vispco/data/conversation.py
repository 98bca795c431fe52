"""One conversation about pictures or a video: what a line of a data set must say, and what it means."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..utils.files import brief

#: How a question says where a picture or a video stands.
MARKERS = {"image": "<image>", "video": "<video>"}
#: What a row is asked for.
KEYS = ("image", "images", "video", "question", "answer", "conversations", "system", "task")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Conversation:
    """Questions and answers, in turns, about some pictures or a video.

    turns: (question, answer) each. Questions hold `<image>` or `<video>` once for every one of `media`, in order.
    media: of each picture the path or the encoded bytes; of each video the path, or its frames as a tuple of those.
    kind: "image" or "video". folder: that all paths must lie in. source: `file:line`, for messages.
    system: a system prompt. task: a name to report accuracy by.
    """

    turns: tuple[tuple[str, str], ...]
    media: tuple[Any, ...]
    kind: str
    folder: str
    source: str
    system: str | None = None
    task: str | None = None


def parse(row: Any, source: str, folder: str | os.PathLike = ".",
          columns: Mapping[str, str] | None = None) -> Conversation | None:
    """The conversation that a row of a data set holds; None if it has no picture and no video, so nothing to prune.

    row: `{"image": path, "question": text, "answer": text}`, with `images` (a list) or `video` (a path, or a list of
    frames) in place of `image`; or LLaVA-Instruct's `{"image": path, "conversations": [{"from": "human", "value":
    text}, {"from": "gpt", "value": text}, ...]}`. Also `system` and `task`; other keys are ignored. Of a list of
    answers the most frequent counts. Media without a marker stand before the first question.
    columns: {key as above: the row's own name for it}.
    Raises ValueError that names `source`, what was expected, and what came.

    >>> parse({"image": "a.png", "question": "What is it?", "answer": "a cat"}, "q.jsonl:1").turns
    (('<image>What is it?', 'a cat'),)
    """
    try:
        return _parse(row, source, os.path.abspath(folder), dict(columns or {}))
    except ValueError as error:
        raise ValueError(f"{source}: {brief(error)}") from None


def _parse(row: Any, source: str, folder: str, columns: dict[str, str]) -> Conversation | None:
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with image, question and answer, got {_short(row)}")
    own = {key: row.get(columns.get(key, key)) for key in KEYS}
    given = [key for key in ("image", "images", "video") if own[key] not in (None, "", [])]
    if len(given) > 1:
        raise ValueError(f"expected one of image, images and video, got {' and '.join(given)}")
    system, task = (None if own[key] is None else _text(own[key], columns.get(key, key)) for key in ("system", "task"))
    if own["conversations"] is not None:
        turns, opening = _turns(own["conversations"])
        system = opening or system
        if not given:
            return None
    else:
        if not given:
            raise ValueError(f"expected a picture under {columns.get('image', 'image')!r} (or several under 'images', or a "
                             f"'video'), got the keys {', '.join(map(repr, row)) or 'of an empty object'}")
        question, answer = (_text(_most_frequent(own[key]) if key == "answer" else own[key], columns.get(key, key), row)
                            for key in ("question", "answer"))
        turns = [(question, answer)]
    kind = "video" if given == ["video"] else "image"
    media = _media(own[given[0]], kind, folder)
    return Conversation(_placed(turns, kind, len(media)), media, kind, folder, source, system, task)


def _text(value: Any, key: str, row: Mapping | None = None) -> str:
    """Stripped text; numbers become text."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if value is None and row is not None:
        raise ValueError(f"expected a text under {key!r}, got the keys {', '.join(map(repr, row))}; is it there by another "
                         "name?")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected a text that is not empty under {key!r}, got {_short(value)}")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"expected a text under {key!r}, got one with half of a character (a lone surrogate): {_short(value)}")
    return value.strip()


def _most_frequent(answers: Any) -> Any:
    """Of a list of annotators' answers the one given most often, of ties the first."""
    if isinstance(answers, list) and answers and all(isinstance(a, str) for a in answers):
        return Counter(answers).most_common(1)[0][0]
    return answers


def _turns(said: Any) -> tuple[list[tuple[str, str]], str | None]:
    """LLaVA-Instruct's list as (question, answer) pairs, and the system prompt if it opens with one."""
    if not isinstance(said, list) or not said:
        raise ValueError(f"expected a list of turns under 'conversations', got {_short(said)}")
    spoken = []
    for i, turn in enumerate(said):
        role = _ROLES.get(str(turn.get("from", turn.get("role")))) if isinstance(turn, Mapping) else None
        if role is None:
            raise ValueError(f"conversations[{i}]: expected {{'from': 'human' or 'gpt', 'value': text}}, got {_short(turn)}")
        spoken.append((role, _text(turn.get("value", turn.get("content")), f"conversations[{i}].value")))
    system = spoken.pop(0)[1] if spoken[0][0] == "system" else None
    roles = [role for role, _ in spoken]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError("expected turns of human and gpt in alternation, the last one gpt's, got "
                         f"{', '.join(roles) or 'none'}")
    return [(q[1], a[1]) for q, a in zip(spoken[::2], spoken[1::2])], system


def _media(value: Any, kind: str, folder: str) -> tuple[Any, ...]:
    """Each picture (or the one video) as a path below `folder`, or bytes, or frames of those."""
    if kind == "video":
        if isinstance(value, list):
            return (tuple(_file(v, "video", folder) for v in value),)
        return (_file(value, "video", folder),)
    return tuple(_file(v, "image", folder) for v in (value if isinstance(value, list) else [value]))


def _file(value: Any, key: str, folder: str) -> str | bytes:
    if isinstance(value, Mapping):  # as the datasets library stores pictures
        if isinstance(value.get("bytes"), bytes):
            return value["bytes"]
        value = value.get("path")
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"expected a path under {key!r}, got {_short(value)}")
    if "://" in value or value.startswith(("data:", "file:")):
        raise ValueError(f"expected a path under {key!r}, got the address {_short(value)}: nothing is downloaded")
    path = os.path.normpath(os.path.join(folder, value))
    if os.path.commonpath([path, folder]) != folder:
        raise ValueError(f"{_short(value)} lies outside of {folder}: give a folder that holds all pictures as --images")
    return path


def _placed(turns: list[tuple[str, str]], kind: str, count: int) -> tuple[tuple[str, str], ...]:
    """The turns with a marker for each of the media."""
    marker, other = MARKERS[kind], MARKERS["video" if kind == "image" else "image"]
    marks = sum(question.count(marker) for question, _ in turns)
    if any(m in answer for _, answer in turns for m in MARKERS.values()) or any(other in q for q, _ in turns):
        raise ValueError(f"expected {marker} in questions only, got {other} or a marker in an answer")
    if not marks:
        return ((marker * count + turns[0][0], turns[0][1]), *turns[1:])
    if marks != count:
        raise ValueError(f"expected {marker} once for each of {count}, got it {marks} times in the questions")
    return tuple(turns)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
