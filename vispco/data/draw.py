"""A sample of a data set: read once, row by row, and kept in a reservoir; the same seed draws the same questions."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ..utils.files import brief
from .conversation import Conversation, parse
from .library import load, row
from .lines import rows
from .pictures import MAX_PIXELS, check_inside, open_picture

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sample:
    """conversations: those drawn, pictures before videos. total: questions in the data set. skipped: conversations
    without a picture, of those read."""

    conversations: list[Conversation]
    total: int
    skipped: int


def draw(data: str | os.PathLike, limit: int, seed: int = 0, *, images: str | os.PathLike | None = None,
         columns: Mapping[str, str] | None = None, split: str | None = None, max_pixels: int = MAX_PIXELS) -> Sample:
    """`limit` conversations (all, if there are fewer), each with the same chance, shuffled.

    data: a file of JSON lines or a JSON list (`vispco.data.rows`); or a folder or name for the `datasets` library, of
    which `split` (default "train") is taken. images: the folder that relative paths start from and that all
    pictures must lie in; default: the data's own. columns: see `vispco.data.parse`.
    Every row of a file is checked, and the pictures of those drawn must be there. Raises ValueError that names
    the row.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1 question, got {limit}")
    name = os.fspath(data)
    if images is not None and not os.path.isdir(images):
        raise ValueError(f"{os.fspath(images)} is no folder: --images needs the one that holds the pictures")
    if os.path.isfile(name) or name.endswith((".json", ".jsonl")):
        if split is not None:
            raise ValueError(f"{name} is a file, which has no splits, got split {split!r}")
        folder = images or os.path.dirname(os.path.abspath(name))
        read = (parse(row, source, folder, columns) for source, row in rows(name))
        found, total, skipped = _count(read, limit, seed)
    else:
        table = load(name, split or "train")
        folder = images or (name if os.path.isdir(name) else ".")
        chosen = random.Random(seed).sample(range(len(table)), min(limit, len(table)))
        drawn = [parse(row(table, i, f"{name}[{i}]"), f"{name}[{i}]", folder, columns) for i in chosen]
        found, total = [c for c in drawn if c], len(table)
        skipped = len(drawn) - len(found)
    if not found:
        without = f", but {skipped} conversations without" if skipped else ""
        raise ValueError(f"{name} holds no question about a picture{without}: expected rows with image, question "
                         "and answer")
    for conversation in found:
        check_files(conversation, max_pixels)
    return Sample(sorted(found, key=lambda c: c.kind), total, skipped)


def _count(read: Iterable[Conversation | None], limit: int, seed: int) -> tuple[list[Conversation], int, int]:
    counts = {True: 0, False: 0}

    def pictured():
        for conversation in read:
            counts[conversation is not None] += 1
            if conversation is not None:
                yield conversation

    found = reservoir(pictured(), limit, seed)
    return found, counts[True], counts[False]


def reservoir(items: Iterable[Item], n: int, seed: int = 0) -> list[Item]:
    """`n` of the items (all, if there are fewer), every set of n equally likely, shuffled; holds n at a time.

    Algorithm R: the i-th item takes the place of a random one with probability n / i (Vitter, ACM TOMS 1985).

    >>> sorted(reservoir(range(3), 5)), len(reservoir(iter(range(1000)), 5))
    ([0, 1, 2], 5)
    """
    rng, kept = random.Random(seed), []
    for i, item in enumerate(items):
        if i < n:
            kept.append(item)
        elif (place := rng.randrange(i + 1)) < n:
            kept[place] = item
    rng.shuffle(kept)
    return kept


def check_files(conversation: Conversation, max_pixels: int = MAX_PIXELS) -> None:
    """Raise ValueError, naming the row, unless all its pictures are there, readable and small enough."""
    for medium in _flat(conversation.media):
        try:
            if conversation.kind == "image" or isinstance(medium, bytes):
                open_picture(medium, conversation.folder, max_pixels, decode=False)
            else:
                check_inside(medium, conversation.folder)
                os.stat(medium)
        except FileNotFoundError:
            raise ValueError(f"{conversation.source}: expected the file {brief(medium, 200)}, which is not there; relative paths start "
                             f"from {conversation.folder}, or from --images FOLDER") from None
        except (ValueError, OSError) as error:
            raise ValueError(f"{conversation.source}: {brief(error, 600)}") from error


def _flat(media: Iterable[Any]) -> Iterable[Any]:
    for medium in media:
        yield from medium if isinstance(medium, tuple) else [medium]
