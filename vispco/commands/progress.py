"""The items one by one, beside a progress bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..utils.progress import Progress as Progress, say as say


def track(items: Sequence, label: str, quiet: bool = False) -> Iterator[Any]:
    """The items one by one, beside a progress bar."""
    with Progress(len(items), label, quiet) as bar:
        for item in items:
            yield item
            bar.update()
