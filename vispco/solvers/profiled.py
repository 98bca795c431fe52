"""`start="profile"`: profile the model once, plan every budget from it, measure the best plans.

    profile    g_k(n), the loss of n tokens from layer k on          (`vispco.profile`)
    plan       staircases of least predicted loss on each budget     (`vispco.solvers.plan`)
    screen     the most promising ones on a part of the data, the profile being the prior of the
               surrogate (`vispco.solvers.refine`)
    measure    the best of these on all of the data

Each stage tells the next one what to expect: what the surrogate has learned of a part of the data
is its prior for all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..budget import Budget
from ..profiling import Profile, measured, predicted
from ..utils.digest import key
from ..utils.distributed import total
from ..utils.journal import Journal
from .evaluator import Evaluator
from .plan import DROPS, fill, offspring, plans
from .problem import Problem
from .refine import fitted, moves, refine
from .surrogate import log_loss


@dataclass(frozen=True)
class Profiled:
    """Options of `start="profile"`: one profile answers all budgets.

    questions: calibration questions of the profile, in whole batches, and of the screening, which
        has others if there are so many.
    measurements: most measurements of the profile at one layer, see `vispco.profile`.
    screens: schedules per budget that are measured on a part of the data. finals: of these, how
        many are measured on all.
    profile: one that was measured before, of the same model, method and objective; None: measured.
    Raises ValueError for bad values.
    """

    name: ClassVar[str] = "profile"
    refinement: ClassVar[int] = 1
    any_budget: ClassVar[bool] = False
    largest_first: ClassVar[bool] = False
    checkpoint: ClassVar[bool] = False

    questions: int = 32
    measurements: int = 6
    screens: int = 12
    finals: int = 2
    profile: Profile | None = None

    def __post_init__(self):
        least = {"questions": 1, "measurements": 1, "screens": 1, "finals": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name} must be a whole number from {lowest} on, got {value!r}")

    def solver(self, problem: Problem, limits: Sequence[Budget], seed: int) -> Planned:
        """A planner for the problem. Raises ValueError for a kernel that forms no staircases, or a
        profile of something else."""
        return Planned(self, problem, limits, seed)


class Planned:
    """Plans and screens schedules for every limit."""

    def __init__(self, options: Profiled, problem: Problem, limits: Sequence[Budget], seed: int):
        kernel = problem.kernel
        if not (kernel.free or kernel.stairs):
            raise ValueError(
                "start='profile' plans drops at single layers: use a kernel that forms these "
                f"(monotone, single_layer, multi_step), got {problem.kernel_name!r}"
            )
        self.options, self.problem, self.limits, self.seed = options, problem, limits, seed
        self.drops = DROPS if kernel.free else getattr(kernel, "steps", 1)
        self.profile = options.profile
        if self.profile is not None:
            self._check(self.profile)
        # The profile's losses (L, tokens + 1, A), and the plans (C, L) of every limit.
        self.table = torch.empty(0)
        self.plans: list[Tensor] = []
        # The batches of the screening.
        self.part: list[int] = []
        self.evaluators: Sequence[Evaluator] = ()
        self.guidance: dict[str, Any] = {"propose": self.propose, "whole": True}

    def again(self) -> Profiled:
        """The start for further budgets: the profile is known, the best plan is measured once."""
        return replace(self.options, profile=self.profile, screens=1, finals=1)

    def arguments(self) -> dict[str, Any]:
        """What decides the result, for journal and frontier."""
        own = {name: getattr(self.options, name) for name in ("questions", "measurements")}
        own |= {"screens": self.options.screens, "finals": self.options.finals}
        given = self.options.profile
        return own if given is None else {**own, "profile": key(profile=given.to_dict())[:16]}

    def _check(self, profile: Profile) -> None:
        problem, objective = self.problem, self.problem.options.objective
        layers = range(problem.first_layer, problem.layers)
        mine = f"{problem.model_type}, {problem.methods}, {objective}, layers {[*layers]}"
        other = f"{profile.model_type}, {dict(profile.methods)}, {profile.objective}"
        other += f", layers {list(profile.rows)}"
        if other != mine:
            raise ValueError(
                f"the profile is of {other}; this search is of {mine}: measure another"
            )

    def run(
        self, evaluators: Sequence[Evaluator], limits: Sequence[Budget], journal: Journal
    ) -> float:
        """Profile, plan, screen, and measure the best; returns the passes of the profile."""
        (first, part), problem = self._parts(), self.problem
        self.part, self.evaluators = part, evaluators
        spent = 0.0
        profile = self.profile
        if profile is None:
            batches = [problem.prepared[i] for i in first]
            given = problem.methods, problem.options.objective, self.options.measurements
            profile = measured(problem.model, batches, *given, journal, problem.callback)
            # The full model's answers are known already.
            spent = profile.forward_passes - self._size(first)
        self.profile, self.table = profile, profile.table(problem.tokens)
        for limit, evaluator in zip(limits, evaluators, strict=True):
            evaluator.ranked_by = profile.ranked_by
            if limit.holds(limit.everything):
                self.plans.append(torch.tensor([limit.everything]))
                evaluator.losses([(1.0,) * limit.layers])
                continue
            found = plans(self.table, limit, self.seed, drops=self.drops)
            self.plans.append(found)
            evaluator.losses([tuple((found[0] / limit.tokens).tolist())], part)
        how: dict[str, Any] = {**self.guidance, "prior": self._prior, "part": part}
        how["callback"] = problem.callback
        refine(evaluators, limits, self.options.screens - 1, self.seed, **how)
        screened = fitted(evaluators, self._prior, part)
        self.guidance["prior"] = lambda ratios: screened(ratios)[0]
        for evaluator in evaluators:
            evaluator.losses(evaluator.ranked(part)[: self.options.finals])
        return spent

    def _parts(self) -> list[list[int]]:
        """Numbers of the batches that the profile uses, and of those that the screening uses.

        They are others, if half as many questions are left: what the profile has not seen tells
        more of a plan.
        """
        prepared, seed = self.problem.prepared, torch.Generator().manual_seed(self.seed)
        parts: list[list[int]] = [[], []]
        for i in torch.randperm(len(prepared), generator=seed).tolist():
            few = [part for part in parts if self._size(part) < self.options.questions]
            if few:
                few[0].append(i)
        first, second = map(sorted, parts)
        return [first, second if 2 * self._size(second) >= self.options.questions else first]

    def _size(self, part: Sequence[int]) -> int:
        return total(sum(len(self.problem.prepared[i]) for i in part))

    def _predict(self, counts: Tensor) -> Tensor:
        return predicted(self.table, counts)

    def _prior(self, ratios: Tensor) -> Tensor:
        counts = (ratios.double() * self.problem.tokens).round().long()
        return log_loss(self._predict(counts))

    def propose(self, i: int, generator: torch.Generator) -> Tensor:
        """Candidates (C, L) on budget i, steps as steps: plans, and what is near the best ones."""
        limit, near = self.limits[i], (i, i - 1, i + 1)
        found = []
        for evaluator in (self.evaluators[j] for j in near if 0 <= j < len(self.evaluators)):
            found += evaluator.ranked()[:4] + evaluator.ranked(self.part)[:6]
        best = torch.tensor(list(dict.fromkeys(found)), dtype=torch.float64)
        counts = (best * limit.tokens).round().long()
        few = offspring(counts, limit, 128, self.drops, generator)
        made = [counts, few, self.plans[i]]
        if self.drops == DROPS:
            # A part of a drop goes elsewhere: where layers are few, many small drops may be best.
            parents = best[torch.randint(len(best), (64,), generator=generator)]
            apart = moves(parents, limit.first_layer, generator)
            made.append((apart * limit.tokens).round().long())
        return fill(torch.cat(made), limit, generator) / limit.tokens
