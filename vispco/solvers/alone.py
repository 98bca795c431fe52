"""Several methods: the one that ranks best alone is searched alone, too.

A composite has the best method for each drop. But two methods that disagree lose what either of
them loses, so one method for all drops may be better. Which one: the ramp of every budget is
measured with each method that has won a layer, on the questions of the profile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..budget import Budget
from ..schedule import ramp
from ..utils.journal import Journal
from .problem import Problem
from .surrogate import log_loss


def best_alone(
    problem: Problem,
    names: Iterable[str],
    budgets: Sequence,
    part: Sequence[int],
    journal: Journal,
) -> tuple[Problem, list[Budget], int]:
    """The problem with the best one of the methods, its limits, and the passes that it took.

    part: numbers of the batches that are measured. Best is the least mean of log(loss + 0.01) over
    the budgets, among the methods that reach most of them. Without limits if none reaches any.
    """
    found: list[tuple] = []
    spent = 0
    for name in names:
        one, losses = problem.only(name), []
        limits = reachable(one, budgets)
        for limit in limits:
            evaluator = one.evaluator(limit, journal)
            losses += evaluator.losses([tuple(limit.harden(ramp(limit)))], part)
            spent += evaluator.passes
        mean = float(log_loss(torch.tensor(losses, dtype=torch.float64)).mean())
        found.append((-len(limits), mean, len(found), one, limits))
    *_, best, limits = min(found)
    return best, limits, spent


def reachable(problem: Problem, budgets: Sequence) -> list[Budget]:
    """The limits of those budgets that the problem's method can hold."""
    found = []
    for budget in budgets:
        try:
            found.append(problem.limit(budget))
        except ValueError:
            # A method that begins at a later layer reaches less.
            continue
    return found
