"""A progress bar on a terminal or in a notebook, for searches and all that goes step by step."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from .console import budget_text

#: What fits into 80 columns: what is done, how much is left, and the state of it.
_FORMAT = "{desc} {percentage:3.0f}% |{bar}| {remaining} left{postfix}"


def visible() -> bool:
    """Whether somebody is looking: at a terminal, or at a notebook."""
    return sys.stderr.isatty() or in_notebook()


def in_notebook() -> bool:
    """Whether this runs in the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def say(text: str, quiet: bool = False) -> None:
    """One line about what happens now, if somebody is looking and not `quiet`."""
    if visible() and not quiet:
        print(text, file=sys.stderr, flush=True)


def _known(columns: int | None, rows: int | None) -> tuple[int, int]:
    """The size of a terminal. One that does not know its own says 0, or less, and gets no bar."""
    return columns if columns and columns > 0 else 79, rows if rows and rows > 0 else 24


class Progress:
    """A progress bar on stderr, if somebody is looking, and nothing at all when `quiet`.

    always: show it even where nobody seems to look. An instance is a callback for `vispco.search`.
    It shows the time left, the budget, and the best loss, or the last where no best is known yet.
    layers: of the model, so that a profile says how far it is.
    """

    layers = 0

    def __init__(self, total: int, label: str, quiet: bool = False, always: bool = False):
        from tqdm.auto import tqdm

        look: dict[str, Any] = {"leave": False, "dynamic_ncols": True, "bar_format": _FORMAT}
        off = quiet or not (always or visible())
        self._bar: Any = tqdm(total=total, desc=label, file=sys.stderr, disable=off, **look)
        if shape := getattr(self._bar, "dynamic_ncols", None):
            self._bar.dynamic_ncols = lambda file: _known(*shape(file))
            self._bar.ncols, self._bar.nrows = self._bar.dynamic_ncols(sys.stderr)
            self._bar.refresh()

    def __call__(self, record: Mapping) -> None:
        if "layer" in record:
            # Of a profile, which comes first.
            of = f" of {self.layers - 1}" if self.layers else ""
            self.say(f"profile, layer {record['layer']}{of}")
            return
        state = [f"budget {budget_text(record['budget'])}"] if "budget" in record else []
        known = next((name for name in ("best", "loss") if name in record), None)
        if known:
            state.append(f"{known} {record[known]:.4f}")
        self._bar.set_postfix_str(", ".join(state), refresh=False)
        self.update()

    def update(self) -> None:
        """One more is done."""
        self._bar.update()

    def say(self, state: str) -> None:
        """What is being done, before the first step or between two."""
        self._bar.set_postfix_str(state)

    def reach(self, done: int, state: str) -> None:
        """So many are done. state: what is being done."""
        self._bar.set_postfix_str(state, refresh=False)
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
