"""How many forward passes and gradient steps a search takes, at most, with its defaults."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from math import ceil

import vispco
from vispco.kernels import Monotone

#: The budgets of a default search.
BUDGETS: tuple[float, ...] = inspect.signature(vispco.search).parameters["budgets"].default
#: Calibration questions, and questions in a batch, of the command `vispco search`.
QUESTIONS, BATCH = 256, 4


@dataclass(frozen=True)
class Passes:
    """Of one search: questions that the full model sees, gradient steps of one batch each, and
    questions that the pruned model sees for each budget (without a gradient)."""

    teacher: int
    steps: int
    measured: int

    def total(self, batch: int = BATCH, budgets: int = len(BUDGETS)) -> int:
        """As `frontier.meta["forward_passes"]` counts: a step is three passes of its batch."""
        return self.teacher + 3 * batch * self.steps + budgets * self.measured


def default_search(layers: int, questions: int = QUESTIONS, batch: int = BATCH) -> Passes:
    """The most that `vispco.search(model, batches)` does: start="gradient", monotone, FastV.

    Each budget: the starts race on an eighth of the data; the first one and the two best are
    measured; two schedules after each update of the multipliers; the refinement. Those that were
    measured before are not measured again, so a search does less.

    >>> default_search(layers=32)
    Passes(teacher=256, steps=100, measured=5408)
    """
    start = vispco.Gradient()
    batches = ceil(questions / batch)
    starts = 1 + len(Monotone(layers, first_layer=1).starts())
    race = starts * batch * max(1, round(batches / 8))
    whole = 3 + 2 * ceil(start.steps / start.inner) + start.refinement
    return Passes(questions, start.steps * len(BUDGETS), race + whole * questions)
