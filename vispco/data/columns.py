"""The columns of a row: which are read, and which the user may have meant."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .words import is_missing

#: The keys of a row that are read.
KEYS = (
    *("image", "images", "video", "fps"),
    *("question", "answer", "conversations", "messages"),
    *("system", "task"),
)
#: Other names that data sets have for them, in small letters, with neither `_` nor `-`.
_NAMES = {
    "image": (
        "img pic picture photo imagepath imgpath imagefile imagename imageurl filename filepath "
        "imagebytes imagebase64 base64 jpg png decodedimage file path"
    ),
    "images": "imgs pics pictures photos imagepaths imagefiles imagelist",
    "video": "clip film movie videopath videofile videoname videos videourl mp4",
    "question": "query prompt instruction problem input user questions text q",
    "answer": (
        "label response output target solution groundtruth gt answers completion assistant labels "
        "a gold multiplechoiceanswer directanswers"
    ),
    "conversations": "conversation dialog dialogue dialogs turns chat chats message texts",
}
OTHER_NAMES = {key: names.split() for key, names in _NAMES.items()}


def suggestion(row: Mapping, wanted: Collection[str], columns: Mapping[str, str]) -> str:
    """What to say of the `wanted` keys, which a row does not have by these names.

    columns: {key: the row's name}, as the user gave it.

    >>> suggestion({"img": 1, "Query": 2, "x": 3}, ["question", "answer"], {"image": "img"})
    'is it there by another name? --columns image=img,question=Query'
    """
    found = dict(columns)
    for key in wanted:
        names = {str(name).lower().replace("_", "").replace("-", ""): name for name in row}
        like = [names[other] for other in (key, *OTHER_NAMES.get(key, ())) if other in names]
        like = [x for x in like if x not in found.values() and _fits(row[x], key)]
        if like:
            found[key] = like[0]
    pairs = ",".join(f"{key}={name}" for key, name in found.items())
    more = f" --columns {pairs}" if len(found) > len(columns) else ""
    return f"is it there by another name?{more}"


def _fits(value: Any, key: str) -> bool:
    """Whether a value could be what `key` holds."""
    first = value[0] if isinstance(value, list) and value else value
    if key == "conversations":
        return isinstance(first, Mapping) or isinstance(value, str) and value.startswith("[")
    turns = isinstance(first, Mapping) and bool({"role", "from"} & first.keys())
    return not (is_missing(value) or turns or key == "question" and isinstance(value, list))
