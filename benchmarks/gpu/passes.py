"""How many forward passes a search takes, at most, with its defaults."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from math import ceil

import vispco
from vispco.solvers.profiled import Profiled

#: The budgets of a default search.
BUDGETS: tuple[float, ...] = inspect.signature(vispco.search).parameters["budgets"].default
#: Calibration questions, and questions in a batch, of the command `vispco search`.
QUESTIONS, BATCH = 256, 4


@dataclass(frozen=True)
class Passes:
    """Of one search: questions that the full model sees, passes of one question of the profile, and
    questions that the pruned model sees for each budget."""

    teacher: int
    profile: int
    measured: int

    def total(self, budgets: int = len(BUDGETS)) -> int:
        """As `frontier.meta["forward_passes"]` counts."""
        return self.teacher + self.profile + budgets * self.measured


def default_search(layers: int, questions: int = QUESTIONS, batch: int = BATCH) -> Passes:
    """The most that `vispco.search(model, batches)` does: start="profile", FastV.

    The profile takes at most 3 L + 6 passes of each of its questions. For each budget a plan, the
    ramp, and what the refinement tries are measured on all questions.

    >>> default_search(layers=32)
    Passes(teacher=256, profile=3264, measured=2048)
    """
    start = Profiled()
    profiled = min(questions, batch * ceil(start.questions / batch))
    return Passes(questions, profiled * (3 * layers + 6), (2 + start.refinement) * questions)
