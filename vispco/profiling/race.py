"""Several methods: a race at each layer, on the first batch, says which are worth measuring."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from .drops import Drops
from .record import FREE

#: Shares of the tokens that a row of the profile may measure.
SHARES = (0, 1 / 64, 1 / 16, 1 / 8, 7 / 32, 3 / 8, 9 / 16, 3 / 4, 7 / 8, 15 / 16)
#: Of these: where the methods race, few kept and many.
PROBES = 1 / 8, 3 / 4


class Race:
    """Which of several methods rank best at a layer, on the first batch.

    At the first layers all of them run. Later the best four so far do, and the others in turn.
    """

    def __init__(self, runs: Drops):
        self.runs = runs
        # The methods that have run, best first.
        self.standing: list[str] = []

    @property
    def levels(self) -> list[int]:
        """The two numbers of tokens kept at which the methods race."""
        most = self.runs.tokens - 1
        return [max(min(1, most), math.floor(share * (most + 1))) for share in PROBES]

    def able(self, layer: int) -> list[str]:
        """The methods that can rank what enters a layer, the best so far first."""
        names = [name for name, first in self.runs.first_layers.items() if first <= layer]
        return sorted(names, key=lambda name: [*self.standing, *names].index(name))

    def nothing(self, layer: int) -> tuple[str, list[float]] | None:
        """A method, and the losses without any token from a layer on: all methods have the same.

        None if no method can rank there.
        """
        found = ((name, self._losses(layer, 0, name)) for name in self.able(layer))
        return next(((name, losses) for name, losses in found if losses is not None), None)

    def best(self, layer: int) -> list[str]:
        """The best method where few tokens are kept, and the best where many are."""
        names, known = self.able(layer), len(self.standing)
        in_turn = names[4:known][layer % max(1, known - 4) :][:1]
        found = {}
        for name in names[:4] + in_turn + names[max(4, known) :]:
            losses = [self._losses(layer, tokens, name, part=1) for tokens in self.levels]
            if None not in losses:
                found[name] = [mean(each) for each in losses if each is not None]
        ranked = sorted(found, key=lambda name: sum(math.log(x + FREE) for x in found[name]))
        later = [name for name in self.standing if name in self.able(layer) and name not in found]
        self.standing = ranked + later
        return [min(found, key=lambda name: found[name][i]) for i in range(len(self.levels))]

    def _losses(
        self, layer: int, tokens: int, name: str, part: int | None = None
    ) -> list[float] | None:
        """The losses of a drop; None of a method that this model does not serve, said aloud.

        Some read a tower, or places, that the model does not tell. Raises ValueError for the last
        method.
        """
        known = self.runs.first_layers
        try:
            return self.runs.losses(layer, tokens, name, part) if name in known else None
        except ValueError as error:
            if len(known) == 1:
                raise
            warnings.warn(f"{name} is left out: {error}", stacklevel=2)
            del known[name]
            return None


def levels_of(tokens: int) -> list[int]:
    """The numbers of tokens that a row may measure, and all of them, rising."""
    return sorted({math.floor(share * tokens) for share in SHARES} | {tokens})


def mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)
