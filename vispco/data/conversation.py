"""One conversation about pictures or a video: what a row must say, and what it means."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..utils.files import brief

#: How a question says where a picture or a video stands.
MARKERS = {"image": "<image>", "video": "<video>"}
#: The keys of a row that are read.
KEYS = ("image", "images", "video", "question", "answer", "conversations", "system", "task")
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class Conversation:
    """Questions and answers, in turns, about some pictures or a video.

    turns: (question, answer) each. Questions hold `<image>` or `<video>` once for each of `media`,
        in the same order.
    media: of a picture its path or its encoded bytes; of a video its path, or a tuple of frames,
        each given as a picture is.
    kind: "image" or "video".
    folder: the folder that all paths must lie in.
    source: `file:line`, for messages.
    system: a system prompt.
    task: a name to report accuracy by.
    """

    turns: tuple[tuple[str, str], ...]
    media: tuple[Any, ...]
    kind: str
    folder: str
    source: str
    system: str | None = None
    task: str | None = None


def parse(
    row: Any, source: str, folder: str | os.PathLike = ".", columns: Mapping[str, str] | None = None
) -> Conversation | None:
    """The conversation that a row of a data set holds.

    None if it has turns, but no picture and no video: then there is nothing to prune.

    row: `{"image": path, "question": text, "answer": text}`, with `images` (a list) or `video` (a
        path, or a list of frames) in place of `image`. Or LLaVA-Instruct's `{"image": path,
        "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}, ...]}`.
        Also `system` and `task`; other keys are ignored. Of a list of answers the most frequent
        one counts. Media without a marker stand before the first question.
    columns: {key as above: the row's own name for it}.
    Raises ValueError that names `source`, what was expected, and what came.

    >>> parse({"image": "a.png", "question": "What is it?", "answer": "a cat"}, "q.jsonl:1").turns
    (('<image>What is it?', 'a cat'),)
    """
    try:
        return _parse(row, source, os.path.abspath(folder), columns or {})
    except ValueError as error:
        raise ValueError(f"{source}: {brief(error)}") from None


def _parse(row: Any, source: str, folder: str, columns: Mapping[str, str]) -> Conversation | None:
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with image, question and answer, got {_short(row)}")
    names = {key: columns.get(key, key) for key in KEYS}
    own = {key: row.get(names[key]) for key in KEYS}
    given = [key for key in ("image", "images", "video") if own[key] not in (None, "", [])]
    if len(given) > 1:
        raise ValueError(f"expected one of image, images and video, got {' and '.join(given)}")
    system = None if own["system"] is None else _text(own["system"], names["system"])
    task = None if own["task"] is None else _text(own["task"], names["task"])
    keys = ", ".join(map(repr, row)) or "of an empty object"
    if own["conversations"] is not None:
        turns, opening = _turns(own["conversations"])
        system = opening or system
        if not given:
            return None
    elif not given:
        raise ValueError(
            f"expected a picture under {names['image']!r} (or several under 'images', or a "
            f"'video'), got the keys {keys}"
        )
    else:
        for key in ("question", "answer"):
            if own[key] is None:
                raise ValueError(
                    f"expected a text under {names[key]!r}, got the keys {keys}; is it there by "
                    "another name?"
                )
        question = _text(own["question"], names["question"])
        turns = [(question, _text(_most_frequent(own["answer"]), names["answer"]))]
    kind = "video" if given == ["video"] else "image"
    media = _media(own[given[0]], kind, folder)
    turns = _with_markers(turns, kind, len(media))
    return Conversation(tuple(turns), media, kind, folder, source, system, task)


def _text(value: Any, key: str) -> str:
    """Stripped text; numbers become text."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected a text that is not empty under {key!r}, got {_short(value)}")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(
            f"expected a text under {key!r}, got one with half of a character (a lone surrogate): "
            f"{_short(value)}"
        )
    return value.strip()


def _most_frequent(answers: Any) -> Any:
    """Of a list of annotators' answers the one given most often, of ties the first."""
    if isinstance(answers, list) and answers and all(isinstance(a, str) for a in answers):
        return Counter(answers).most_common(1)[0][0]
    return answers


def _turns(said: Any) -> tuple[list[tuple[str, str]], str | None]:
    """LLaVA-Instruct's list as (question, answer) pairs, and the system prompt if it opens it."""
    if not isinstance(said, list) or not said:
        raise ValueError(f"expected a list of turns under 'conversations', got {_short(said)}")
    roles, texts = [], []
    for i, turn in enumerate(said):
        name = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
        role = _ROLES.get(str(name), str(name))
        if role not in _ROLES.values():
            raise ValueError(
                f"conversations[{i}]: expected {{'from': 'human' or 'gpt', 'value': text}}, "
                f"got {_short(turn)}"
            )
        roles.append(role)
        texts.append(_text(turn.get("value", turn.get("content")), f"conversations[{i}].value"))
    system = None
    if roles[0] == "system":
        system = texts.pop(0)
        roles.pop(0)
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(
            "expected turns of human and gpt in alternation, the last one gpt's, got "
            f"{', '.join(roles) or 'none'}"
        )
    return list(zip(texts[::2], texts[1::2], strict=True)), system


def _media(value: Any, kind: str, folder: str) -> tuple[Any, ...]:
    """Each picture, or the one video, as a path below `folder`, as bytes, or as frames of those."""
    several = isinstance(value, list)
    files = tuple(_file(one, kind, folder) for one in (value if several else [value]))
    return (files,) if kind == "video" and several else files


def _file(value: Any, key: str, folder: str) -> str | bytes:
    # The datasets library stores a picture as {"bytes": ..., "path": ...}.
    if isinstance(value, Mapping):
        if isinstance(value.get("bytes"), bytes):
            return value["bytes"]
        value = value.get("path")
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"expected a path under {key!r}, got {_short(value)}")
    if "://" in value or value.startswith(("data:", "file:")):
        raise ValueError(
            f"expected a path under {key!r}, got the address {_short(value)}: nothing is downloaded"
        )
    path = os.path.normpath(os.path.join(folder, value))
    if os.path.commonpath([path, folder]) != folder:
        raise ValueError(
            f"{_short(value)} lies outside of {folder}: give a folder that holds all pictures as "
            "--images"
        )
    return path


def _with_markers(turns: list[tuple[str, str]], kind: str, count: int) -> list[tuple[str, str]]:
    """The turns with a marker for each of `count` media: their own, or all in front."""
    marker = MARKERS[kind]
    other = MARKERS["video" if kind == "image" else "image"]
    questions = "\n".join(question for question, _ in turns)
    answers = "\n".join(answer for _, answer in turns)
    if other in questions or any(m in answers for m in MARKERS.values()):
        raise ValueError(
            f"expected {marker} in questions only, got {other} or a marker in an answer"
        )
    marks = questions.count(marker)
    if marks not in (0, count):
        raise ValueError(
            f"expected {marker} once for each of {count}, got it {marks} times in the questions"
        )
    if marks == 0:
        question, answer = turns[0]
        turns = [(marker * count + question, answer), *turns[1:]]
    return turns


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
