"""A progress bar for searches and for anything that goes item by item."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ..utils.console import budget_text

#: What a step of a search tells of its state, and how it is shown.
_STATE = {"loss": ".4f", "best": ".4f", "violation": ".4f", "multiplier": ".3g", "penalty": ".3g"}


class Progress:
    """A progress bar on stderr, only on a terminal, and nothing at all when `quiet`.

    An instance is a callback for `vispco.search`. It shows the time left, the budget and the loss;
    of the gradient also violation, multiplier and penalty; of the refinement the best loss so far.
    """

    def __init__(self, total: int, label: str, quiet: bool = False):
        from tqdm.auto import tqdm

        look: dict[str, Any] = {"leave": False, "dynamic_ncols": True}
        off = True if quiet else None
        self._bar = tqdm(total=total, desc=label, file=sys.stderr, disable=off, **look)

    def __call__(self, record: dict) -> None:
        state = [f"{name} {record[name]:{form}}" for name, form in _STATE.items() if name in record]
        if "budget" in record:
            state.insert(0, f"budget {budget_text(record['budget'])}")
        self._bar.set_postfix_str(", ".join(state), refresh=False)
        self.update()

    def update(self) -> None:
        """One more is done."""
        self._bar.update()

    def reach(self, done: int, state: str) -> None:
        """So many are done. state: what is being done."""
        self._bar.set_postfix_str(state, refresh=False)
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()


def track(items: Sequence, label: str, quiet: bool = False) -> Iterator[Any]:
    """The items one by one, beside a progress bar."""
    with Progress(len(items), label, quiet) as bar:
        for item in items:
            yield item
            bar.update()
