"""`start="before_llm"`: one drop before the language model, by the best of several methods.

    n       = the most visual tokens that may enter every layer within the budget
    method  = the one of least loss with n tokens kept before layer 0, each measured once

That is all that most serving engines can do: they prune once, by one number (`vispco convert`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..budget import Budget
from ..registry import METHODS, build_method
from ..utils.journal import Journal
from .evaluator import Evaluator
from .problem import Problem, Start


def before_llm() -> list[str]:
    """Names of the registered methods that rank before the language model runs.

    Not `vtw`, which keeps the first tokens, whatever they are.
    """
    names = [name for name in METHODS.names() if name != "vtw"]
    return [name for name in names if _reads_nothing_later(build_method(name))]


def _reads_nothing_later(method: Any) -> bool:
    return not (method.first_layer or method.reads_next or method.parts)


@dataclass(frozen=True)
class BeforeLLM(Start):
    """`start="before_llm"`: plans drop once, before layer 0; of several methods, the best one."""

    name: ClassVar[str] = "before_llm"
    #: There is one such schedule for each budget, so nothing to refine.
    refinement: ClassVar[int] = 0

    def solver(self, problem: Problem, limits: Sequence[Budget], seed: int) -> OneDrop:
        """What measures the methods. Raises ValueError for one that reads the language model, or a
        kernel that forms no single drop."""
        if not (problem.kernel.free or problem.kernel.stairs):
            raise ValueError(
                "start='before_llm' drops once, before layer 0: leave the kernel out, got "
                f"{problem.kernel_name!r}"
            )
        for name, options in problem.methods.items():
            if not _reads_nothing_later(build_method(name, options)):
                known = ", ".join(before_llm())
                raise ValueError(
                    f"start='before_llm' drops before the language model runs, and {name!r} ranks "
                    f"by what happens in it: choose from {known}"
                )
        return OneDrop(problem, limits)


class OneDrop:
    """Measures every method at every limit, and leaves each evaluator with the best one."""

    def __init__(self, problem: Problem, limits: Sequence[Budget]):
        self.problem = problem
        self.schedules = [(most(limit) / limit.tokens,) * limit.layers for limit in limits]
        self.guidance = {"propose": self.propose}

    def arguments(self) -> dict[str, Any]:
        """What decides the result, for journal and frontier."""
        return {}

    def propose(self, i: int, generator: torch.Generator) -> torch.Tensor:
        """The one schedule (1, L) of budget i."""
        return torch.tensor([self.schedules[i]], dtype=torch.float64)

    def run(
        self, evaluators: Sequence[Evaluator], limits: Sequence[Budget], journal: Journal
    ) -> int:
        """Measure; returns the forward passes of the methods that were not the best."""
        spent = 0
        for evaluator, limit, schedule in zip(evaluators, limits, self.schedules, strict=True):
            tried: list[Evaluator] = []
            for name, options in self.problem.methods.items():
                one = self.problem.evaluator(limit, journal)
                ranked = {"method": name, "method_options": dict(options)}
                one.ranked_by = _always(ranked)
                (loss,) = one.losses([schedule])
                if self.problem.callback:
                    found = {"layer": 0, "tokens": round(schedule[0] * limit.tokens)}
                    found |= {"budget": limit.value, "method": name, "loss": loss}
                    self.problem.callback(found)
                spent += one.passes
                tried.append(one)
            best = min(tried, key=lambda one: one.best_loss)
            evaluator.records, evaluator.ranked_by = best.records, best.ranked_by
        return spent


def _always(ranked: Mapping[str, Any]) -> Any:
    return lambda schedule: dict(ranked)


def most(limit: Budget) -> int:
    """The most tokens that may enter every layer within a limit; 0 always fits.

    >>> from vispco.flops import CostModel, Dimensions
    >>> cost = CostModel(Dimensions(3, 8, 2, 2, 4, 16, 10))
    >>> most(Budget(0.5, cost, torch.tensor([16]), torch.tensor([4]), first_layer=0))
    8
    """
    low, high = 0, limit.tokens
    while low < high:
        middle = (low + high + 1) // 2
        if limit.holds([middle] * limit.layers):
            low = middle
        else:
            high = middle - 1
    return low
