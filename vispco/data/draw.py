"""A sample of a data set: read once, row by row. The same seed draws the same questions."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeVar

from ..utils.files import brief
from .conversation import Conversation, NoPicture, parse
from .guards import check_inside
from .library import load, of_metadata, row, text_files
from .lines import rows
from .opening import ENDINGS
from .pictures import MAX_PIXELS, open_picture

Item = TypeVar("Item")
#: From a row and its source to a conversation, or to None if it has no picture.
Reader = Callable[[Any, str], Conversation | None]


@dataclass(frozen=True)
class Sample:
    """What was drawn from a data set.

    conversations: those drawn, pictures before videos. total: questions in the data set, less
        those that were left out.
    skipped: conversations without a picture among those that were read. They are left out.
    """

    conversations: list[Conversation]
    total: int
    skipped: int


def draw(
    data: str | os.PathLike,
    limit: int,
    seed: int = 0,
    *,
    images: str | os.PathLike | None = None,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Sample:
    """`limit` conversations (all, if there are fewer), each with the same chance, shuffled.

    data: a file of JSON lines, a JSON list, CSV, TSV or parquet (`vispco.data.rows`); a folder of
        such files; or a folder or a name for the `datasets` library. Of a folder or a name, `split`
        (default "train") is taken.
    images: the folder that relative paths start from and that all pictures must lie in; default:
        the data's own.
    columns: see `vispco.data.parse`.
    Every row of a file is checked, and the pictures of those drawn must be there. Raises ValueError
    that names the row.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1 question, got {limit}")
    name = os.fspath(data)
    if images is not None and not os.path.isdir(images):
        raise ValueError(
            f"{os.fspath(images)} is no folder: --images needs the one that holds the pictures"
        )
    is_file = os.path.isfile(name) or name.lower().endswith(ENDINGS)
    if is_file and split is not None:
        raise ValueError(f"{name} is a file, which has no splits, got split {split!r}")
    parent = os.path.dirname(os.path.abspath(name))
    folder = images or (parent if is_file else name if os.path.isdir(name) else ".")
    read = partial(parse, folder=folder, columns=columns)
    part = split or "train"
    files = [name] if is_file else text_files(name, part) if os.path.isdir(name) else None
    if files:
        sample = _from_files(files, name, limit, seed, read)
    else:
        sample = _from_library(name, part, limit, seed, read)
    if not sample.conversations:
        without = f", but {sample.skipped} conversations without" if sample.skipped else ""
        raise ValueError(
            f"{name} holds no question about a picture{without}: expected rows with image, "
            "question and answer"
        )
    for conversation in sample.conversations:
        check_files(conversation, max_pixels)
    sample.conversations.sort(key=lambda c: c.kind)
    return sample


def _from_files(files: list[str], folder: str, limit: int, seed: int, read: Reader) -> Sample:
    total = skipped = 0
    first: NoPicture | None = None

    def parsed() -> Iterator[Conversation]:
        nonlocal total, skipped, first
        for file in files:
            for source, content in rows(file):
                try:
                    conversation = read(of_metadata(file, folder, content), source)
                except NoPicture as error:
                    conversation, first = None, first or error
                if conversation is None:
                    skipped += 1
                else:
                    total += 1
                    yield conversation

    found = reservoir(parsed(), limit, seed)
    # Rows without a picture are left out, unless there is no other.
    if first and not found:
        raise first
    return Sample(found, total, skipped)


def _from_library(name: str, split: str, limit: int, seed: int, read: Reader) -> Sample:
    table, rng = load(name, split), random.Random(seed)
    count = len(table)
    chosen = rng.sample(range(count), min(limit, count))
    found: list[Conversation] = []
    looked_at = 0
    for i in chain(chosen, _others(chosen, count, rng)):
        if len(found) == limit:
            break
        source = f"{name}[{i}]"
        conversation = read(row(table, i, source), source)
        found += [conversation] if conversation else []
        looked_at += 1
    skipped = looked_at - len(found)
    return Sample(found, count - skipped, skipped)


def _others(chosen: list[int], count: int, rng: random.Random) -> Iterator[int]:
    """The rows that were not chosen, shuffled: for those without a picture. Made when needed."""
    taken = set(chosen)
    rest = [i for i in range(count) if i not in taken]
    rng.shuffle(rest)
    yield from rest


def reservoir(items: Iterable[Item], n: int, seed: int = 0) -> list[Item]:
    """`n` of the items (all, if there are fewer), shuffled; holds n at a time.

    Every set of n is equally likely. Algorithm R: the i-th item takes the place of a random one
    with probability n / i (Vitter, ACM TOMS 1985).

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
    """Raise ValueError that names the row, unless all its pictures are there, readable and small.

    max_pixels: the most pixels of a picture.
    """
    source, folder = conversation.source, conversation.folder
    media = chain.from_iterable(m if isinstance(m, tuple) else (m,) for m in conversation.media)
    for medium in media:
        try:
            frame = isinstance(conversation.media[0], tuple)
            if conversation.kind == "image" or frame:
                open_picture(medium, folder, max_pixels, decode=False)
            elif isinstance(medium, str):
                check_inside(medium, folder)
                os.stat(medium)
        except FileNotFoundError:
            raise ValueError(
                f"{source}: expected the file {brief(medium, 200)}, which is not there; "
                f"relative paths start from {folder}, or from --images FOLDER"
            ) from None
        except (ValueError, OSError) as error:
            raise ValueError(f"{source}: {brief(error, 600)}") from error
