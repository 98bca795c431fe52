"""Where the pictures and videos of a row are: below one folder, or in the row itself."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from .words import short

#: Where an object may hold a file.
HOLDERS = ("bytes", "path", "url", "base64", "data")
#: How base64 of PNG, JPEG, GIF, WebP, BMP, TIFF and MP4 begins.
_BASE64 = re.compile(r"iVBORw0KGgo|[/_]9j[/_]|R0lGOD|UklGR|Qk[0-3]|SUkqA|TU0AK|AAAA[A-Z]GZ0eX")
_URL_SAFE = str.maketrans("-_", "+/")
_BLANKS = re.compile(r"\s+")
#: The longest path, and the longest name in it, that file systems take.
_LONGEST, _LONGEST_NAME = 4096, 255


def media(value: Any, kind: str, folder: str) -> tuple[Any, ...]:
    """Each picture, or the one video, as a path below `folder`, as bytes, or as frames of those.

    Raises ValueError that says what was expected and what came.
    """
    if isinstance(value, str) and value.startswith("["):
        # A list in a cell of a table.
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    several = isinstance(value, list)
    files = tuple(medium(one, kind, folder) for one in (value if several else [value]))
    return (files,) if kind == "video" and several else files


def medium(value: Any, key: str, folder: str) -> str | bytes:
    """One file: a path below `folder`, or its bytes.

    value: a path; a `file:` address; bytes; `{"bytes": ..., "path": ...}`, as the datasets library
        stores a file, or with `url`, `base64` or `data` in it; a data URL; or base64.
    """
    if isinstance(value, Mapping):
        held = [value[name] for name in HOLDERS if value.get(name) is not None]
        value = held[0] if held else None
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"expected a path under {key!r}, got {short(value)}")
    if value[:5].lower() == "data:":
        head, _, body = value.partition(",")
        if not head.lower().endswith(";base64"):
            raise ValueError(
                f"expected base64 in the data URL under {key!r}, got one that begins {short(head)}"
            )
        return _decoded(body, key)
    value = value.removeprefix("file://")
    if "://" in value or value.startswith("file:"):
        raise ValueError(
            f"expected a path under {key!r}, got the address {short(value)}: nothing is downloaded"
        )
    if _BASE64.match(value) and not os.path.splitext(value)[1]:
        return _decoded(value, key)
    if len(value) > _LONGEST or max(map(len, value.split("/"))) > _LONGEST_NAME:
        raise ValueError(
            f"expected a path under {key!r} (or a picture in base64), got {len(value):,} "
            f"characters: {short(value)}"
        )
    path = os.path.normpath(os.path.join(folder, value))
    if os.path.commonpath([path, folder]) != folder:
        raise ValueError(
            f"{short(value)} lies outside of {folder}: give a folder that holds all pictures as "
            "--images"
        )
    return path


def _decoded(body: str, key: str) -> bytes:
    body = _BLANKS.sub("", body).rstrip("=")
    try:
        body = body.translate(_URL_SAFE)
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(
            f"expected a picture in base64 under {key!r}, but {error}: {short(body)}"
        ) from None
