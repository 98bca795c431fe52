"""Pictures as parts of a page."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

from .figure import clean

_SVG = "http://www.w3.org/2000/svg"
_DROPPED = {f"{{{_SVG}}}metadata"}


def drawn(draw: Callable[[Path], None], prefix: str, description: str) -> str:
    """The SVG that `draw(path)` writes, to stand inside of HTML.

    prefix: of its ids, so that several pictures do not share them. description: what a screen reader says.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.svg"
        draw(path)
        root = ElementTree.parse(path).getroot()
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag in _DROPPED]:
            parent.remove(child)
        for name, value in parent.attrib.items():
            if name == "id":
                parent.set(name, f"{prefix}-{value}")
            elif name.endswith("href") and value.startswith("#"):
                parent.set(name, f"#{prefix}-{value[1:]}")
            elif "url(#" in value:
                parent.set(name, re.sub(r"url\(#", f"url(#{prefix}-", value))
    for name in ("width", "height"):  # the page decides; viewBox keeps the proportions
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", clean(description, 200))
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return ElementTree.tostring(root, encoding="unicode")
