"""One conversation about pictures or a video: what a row must say, and what it means."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..utils.files import brief
from .columns import KEYS as KEYS, suggestion
from .media import media
from .turns import MARKERS as MARKERS, decoded, listed, rate_in, seen_in, turns
from .words import is_missing, most_frequent, short, text

_MEDIA = ("image", "images", "video")
#: What a message may say of a row.
_LONGEST_MESSAGE = 400


class NoPicture(ValueError):
    """A row that has no key of a picture, nor one that may stand for it."""


@dataclass(frozen=True)
class Conversation:
    """Questions and answers, in turns, about some pictures or a video.

    turns: (question, answer) each. Questions hold `<image>` or `<video>` once for each of `media`,
        in the same order.
    media: of a picture its path or its encoded bytes; of a video the same, or a tuple of frames,
        each given as a picture is.
    kind: "image" or "video".
    folder: the folder that all paths must lie in.
    source: `file:line`, for messages.
    system: a system prompt.
    task: a name to report accuracy by.
    fps: how many frames are a second, of videos that do not say it themselves.
    """

    turns: tuple[tuple[str, str], ...]
    media: tuple[Any, ...]
    kind: str
    folder: str
    source: str
    system: str | None = None
    task: str | None = None
    fps: float | None = None


def parse(
    row: Any, source: str, folder: str | os.PathLike = ".", columns: Mapping[str, str] | None = None
) -> Conversation | None:
    """The conversation that a row of a data set holds.

    None if it holds no picture and no video: then there is nothing to prune, and nothing else in
    the row is looked at.

    row: one of
        - `{"image": path, "question": text, "answer": text}`, with `images` (a list) or `video` (a
          path, or a list of frames) in place of `image`;
        - LLaVA-Instruct's `{"image": path, "conversations": [{"from": "human", "value": text},
          {"from": "gpt", "value": text}, ...]}`;
        - Hugging Face's `{"messages": [{"role": "user", "content": [{"type": "image"}, {"type":
          "text", "text": text}]}, {"role": "assistant", "content": text}, ...], "images": [path]}`,
          where the parts may also hold the pictures themselves.
        A picture may also be bytes, `{"bytes": ...}`, a data URL or base64. Also `system`, `task`,
        and `fps` (of a video given as frames, how many are a second; a part that holds the frames
        may say `sample_fps`). Other keys are ignored. Of a
        list of answers the most frequent one counts. Media without a marker stand before the first
        question.
    columns: {key as above: the row's own name for it}.
    Raises ValueError that names `source`, what was expected, and what came.

    >>> parse({"image": "a.png", "question": "What is it?", "answer": "a cat"}, "q.jsonl:1").turns
    (('<image>What is it?', 'a cat'),)
    """
    try:
        return _parse(row, source, os.path.abspath(folder), columns or {})
    except ValueError as error:
        kind = NoPicture if isinstance(error, NoPicture) else ValueError
        raise kind(f"{source}: {brief(error, _LONGEST_MESSAGE)}") from None


def _parse(row: Any, source: str, folder: str, columns: Mapping[str, str]) -> Conversation | None:
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with image, question and answer, got {short(row)}")
    names = {key: columns.get(key, key) for key in KEYS}
    own = {key: row.get(names[key]) for key in KEYS}
    for key in _MEDIA:
        # A column that the user has named as another key is not read twice.
        if key not in columns and key in columns.values():
            own[key] = None
    said = next((key for key in ("conversations", "messages") if own[key] is not None), None)
    if said:
        own[said] = decoded(own[said])
        own["fps"] = rate_in(own[said]) if is_missing(own["fps"]) else own["fps"]
    seen = _seen(own, said)
    if seen is None:
        _check_absent(row, names, columns, said)
        return None
    kind, files = seen
    system, task = (
        None if is_missing(own[key]) else text(own[key], names[key]) for key in ("system", "task")
    )
    if said:
        dialogue, opening = turns(listed(own[said], names[said]), names[said])
        system = opening or system
    else:
        _check_present(row, names, columns)
        question = text(own["question"], names["question"])
        answer = text(most_frequent(own["answer"], names["answer"]), names["answer"])
        dialogue = [(question, answer)]
    found = media(files, kind, folder)
    dialogue = _with_markers(dialogue, kind, len(found))
    fps = _rate(own["fps"], names["fps"])
    return Conversation(tuple(dialogue), found, kind, folder, source, system, task, fps)


def _seen(own: Mapping[str, Any], said: str | None) -> tuple[str, Any] | None:
    """("image" or "video", the files) of a row; None if it has neither."""
    given = [key for key in _MEDIA if not is_missing(own[key])]
    if len(given) > 1:
        raise ValueError(f"expected one of image, images and video, got {' and '.join(given)}")
    parts = seen_in(own[said]) if said else []
    if given and parts:
        raise ValueError(f"expected the pictures under {given[0]} or in the turns, got both")
    if given:
        return "video" if given == ["video"] else "image", own[given[0]]
    if not parts:
        return None
    kinds = {kind for kind, _ in parts}
    files = [file for _, file in parts]
    if len(kinds) > 1 or kinds == {"video"} and len(files) > 1:
        raise ValueError("expected pictures or one video in a conversation, got several kinds")
    return (kinds.pop(), files) if "image" in kinds else ("video", files[0])


def _check_absent(row: Mapping, names: Mapping, columns: Mapping, said: str | None) -> None:
    """Raise ValueError unless the row is without a picture, not only without one by these names."""
    if any(names[key] in row for key in _MEDIA):
        return
    hint = suggestion(row, [*_MEDIA, *_wanted(row, names)], columns)
    if said and "--columns" not in hint:
        return
    keys = ", ".join(map(repr, row)) or "of an empty object"
    meant = any(f"{key}=" in hint for key in (*_MEDIA, "conversations"))
    raise (ValueError if meant else NoPicture)(
        f"expected a picture under {names['image']!r} (or several under 'images', or a 'video'), "
        f"got the keys {keys}; {hint}"
    )


def _wanted(row: Mapping, names: Mapping) -> list[str]:
    """Which keys of a question and its answer a row lacks by these names."""
    if names["conversations"] in row or names["messages"] in row:
        return []
    lacking = [key for key in ("question", "answer") if names[key] not in row]
    return [*lacking, "conversations"] if len(lacking) == 2 else lacking


def _check_present(row: Mapping, names: Mapping, columns: Mapping) -> None:
    for key in ("question", "answer"):
        if names[key] not in row:
            keys = ", ".join(map(repr, row))
            hint = suggestion(row, _wanted(row, names), columns)
            raise ValueError(f"expected a text under {names[key]!r}, got the keys {keys}; {hint}")


def _rate(value: Any, key: str) -> float | None:
    """Frames per second. Raises ValueError unless it is a positive number."""
    if is_missing(value):
        return None
    try:
        rate = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ValueError(f"expected a positive number under {key!r}, got {short(value)}")
    return rate


def _with_markers(dialogue: list[tuple[str, str]], kind: str, count: int) -> list[tuple[str, str]]:
    """The turns with a marker for each of `count` media: their own, or all in front."""
    marker = MARKERS[kind]
    other = MARKERS["video" if kind == "image" else "image"]
    questions = "\n".join(question for question, _ in dialogue)
    answers = "\n".join(answer for _, answer in dialogue)
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
        question, answer = dialogue[0]
        dialogue = [(marker * count + question, answer), *dialogue[1:]]
    return dialogue
