"""`start="profile"`: profile the model once, plan every budget from it, measure the best plans.

    profile   g_k(n), the loss of n tokens from layer k on, on a part of the data (`vispco.profile`)
    plan      staircases of least predicted loss on each budget      (`vispco.solvers.plan`)
    exit      of the best plan, moved while a part of the data is answered better
              (`vispco.solvers.exits`)
    refine    what is measured of them corrects what is expected: the prediction is the prior of the
              surrogate (`vispco.solvers.refine`)

A profile of single drops does not know how drops interact. So two more schedules are measured
beside the best plan of each budget: the same with its exit moved, and the rule that costs nothing
(`vispco.schedule.ramp`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..budget import Budget
from ..calibration import PreparedBatch
from ..profiling import Profile, measured, predicted
from ..schedule import ramp
from ..utils.digest import key
from ..utils.distributed import total
from ..utils.journal import Journal
from .alone import best_alone, reachable
from .evaluator import Evaluator, Schedule
from .exits import walked
from .plan import DROPS, SCALE, fill, offspring, plans, steps
from .problem import Problem, Start
from .refine import nearby
from .several import Several
from .surrogate import log_loss

#: Numbers of tokens kept that are told apart in predictions, at most.
PARTS = 256


@dataclass(frozen=True)
class Profiled(Start):
    """Options of `start="profile"`: one profile answers all budgets.

    questions: calibration questions of the profile, in whole batches, drawn at random.
    measurements: most measurements of the profile at one layer, see `vispco.profile`.
    rule: whether the ramp of each budget, and its plan with other exits, are measured, too.
    profile: one that was measured before, of the same model, method and objective; None: measured.
    alone: of several methods, the profile of the one that is searched alone, too. None: it is
        chosen (`vispco.solvers.alone`) and measured, unless `rule` is False.
    Raises ValueError for bad values. A search raises it for a profile of something else, or if
    `alone` is of none of its methods or there is one only.
    """

    name: ClassVar[str] = "profile"

    questions: int = 32
    measurements: int = 6
    rule: bool = True
    profile: Profile | None = None
    alone: Profile | None = None

    def __post_init__(self):
        for name in ("questions", "measurements"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}")

    def solver(self, problem: Problem, limits: Sequence[Budget], seed: int) -> Planned:
        """A planner for the problem. Raises ValueError for a kernel that forms no staircases, or a
        profile of something else."""
        return Planned(self, problem, limits, seed)


class Planned:
    """Plans schedules for every limit."""

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
        # With several methods: the search with the best one alone.
        self.rival: Planned | None = None
        if self.profile is not None:
            self._check(self.profile, problem.methods)
        self._check_alone(options.alone)
        # The profile's losses (L, parts + 1, A), and the plans (C, L) of every limit.
        self.table = torch.empty(0)
        self.plans: list[Tensor] = []
        self.evaluators: Sequence[Evaluator] = ()
        self.guidance = {"propose": self.propose, "harden": self.harden, "prior": self._prior}

    def again(self) -> Profiled:
        """The start for further budgets: the profile is known, the best plan is measured once."""
        alone = self.rival.profile if self.rival else None
        return replace(self.options, profile=self.profile, alone=alone, rule=False)

    def arguments(self) -> dict[str, Any]:
        """What decides the result, for journal and frontier."""
        own = {name: getattr(self.options, name) for name in ("questions", "measurements", "rule")}
        for name in ("profile", "alone"):
            if given := getattr(self.options, name):
                own[name] = key(profile=given.to_dict())[:16]
        return own

    def _check(self, profile: Profile, methods: dict[str, dict]) -> None:
        problem, objective = self.problem, self.problem.options.objective
        mine = f"{problem.model_type}, {problem.layers} layers, {methods}, {objective}"
        other = f"{profile.model_type}, {profile.layers} layers, {dict(profile.methods)}"
        other += f", {profile.objective}"
        if other != mine:
            raise ValueError(
                f"the profile is of {other}; this search is of {mine}: measure another"
            )

    def _check_alone(self, alone: Profile | None) -> None:
        """Raise ValueError unless `alone` is of one of the several methods that are searched."""
        if alone is None:
            return
        known = {name: {name: options} for name, options in self.problem.methods.items()}
        mine = ", ".join(known)
        if len(known) == 1:
            raise ValueError(
                f"alone is for a search over several methods, and this one is of {mine}: give the "
                "profile as Profiled(profile=...)"
            )
        if dict(alone.methods) not in known.values():
            raise ValueError(
                f"alone must be the profile of one of the methods that are searched, {mine}, with "
                f"the same options; got one of {dict(alone.methods)}"
            )
        self._check(alone, known[alone.method])

    def run(
        self, evaluators: Sequence[Evaluator], limits: Sequence[Budget], journal: Journal
    ) -> float:
        """Profile, plan, and measure the best; returns the passes of the profile."""
        problem, profile, spent = self.problem, self.profile, 0.0
        self.evaluators = evaluators
        if profile is None:
            batches = [problem.prepared[i] for i in self._part()]
            given = problem.methods, problem.options.objective, self.options.measurements
            profile = measured(problem.model, batches, *given, journal, problem.callback)
            # The full model's answers are known already.
            spent = profile.forward_passes - _size(batches)
        self.profile, self.table = profile, profile.table(min(problem.tokens, PARTS))
        if isinstance(problem.scorer, Several):
            problem.scorer.know(profile)
        for limit, evaluator in zip(limits, evaluators, strict=True):
            # A method that does not serve this model may have been the only one that ranks earlier.
            limit.first_layer = max(limit.first_layer, profile.first_layer)
            evaluator.ranked_by = profile.ranked_by
            found = torch.tensor([limit.everything])
            if not limit.holds(limit.everything):
                found = plans(self.table, limit, self.seed, drops=self.drops)
            if not len(found):
                raise ValueError(f"no plan from layer {limit.first_layer} on holds {limit.value!r}")
            self.plans.append(found)
            begin = {_ratios(found[0], limit)}
            if self.options.rule:
                begin.add(self._other_exit(found[0], limit, evaluator))
            if self.options.rule and self.problem.kernel.free:
                begin.add(tuple(limit.harden(ramp(limit))))
            evaluator.losses(sorted(begin))
        return spent

    def others(self, journal: Journal) -> tuple[list[tuple[Problem, Planned, list[Budget]]], int]:
        """With several methods: the search with the best one alone; and what choosing it took."""
        problem, given, profile = self.problem, self.options.alone, self.profile
        if not problem.kernel.free or len(problem.methods) == 1 or profile is None:
            return [], 0
        budgets = [limit.value for limit in self.limits]
        if given:
            one, spent = problem.only(given.method), 0
            limits = reachable(one, budgets)
        elif self.options.rule:
            won = {name for row in profile.ranks.values() for name in row.values()}
            names = [name for name in problem.methods if name in won]
            one, limits, spent = best_alone(problem, names, budgets, self._part(), journal)
        else:
            return [], 0
        # Only together they may reach the budgets: one that ranks early, but nowhere best.
        if not limits:
            return [], spent
        own = replace(self.options, profile=given, alone=None)
        self.rival = rival = Planned(own, one, limits, self.seed)
        return [(one, rival, limits)], spent

    def _other_exit(self, plan: Tensor, limit: Budget, evaluator: Evaluator) -> Schedule:
        """The plan (L,) with the exit that loses least, on the profile's part of the data."""
        part = self._part()
        # All of the data is not measured twice.
        whole = _size([evaluator.prepared[i] for i in part]) == evaluator.samples
        known: dict[Schedule, float] = {}

        def loss(counts: Tensor) -> float:
            schedule = _ratios(counts, limit)
            if schedule not in known:
                (known[schedule],) = evaluator.losses([schedule], None if whole else part)
            return known[schedule]

        return _ratios(walked(plan, limit, loss, self.drops), limit)

    def _part(self) -> list[int]:
        """The numbers of the batches of the profile."""
        return drawn(self.problem.prepared, self.options.questions, self.seed)

    def _prior(self, ratios: Tensor) -> Tensor:
        return log_loss(predicted(self.table, ratios.double(), SCALE))

    def propose(self, i: int, generator: torch.Generator) -> Tensor:
        """Candidates (C, L) on budget i: plans, what is near the best, and random ones."""
        limit, near = self.limits[i], (i, i - 1, i + 1)
        found = []
        for evaluator in (self.evaluators[j] for j in near if 0 <= j < len(self.evaluators)):
            found += evaluator.ranking[:6]
        counts = _counts(torch.tensor(list(dict.fromkeys(found)), dtype=torch.float64), limit)
        few = offspring(counts, limit, 128, self.drops, generator)
        few = fill(torch.cat([few, self.plans[i]]), limit, generator) / limit.tokens
        if not self.problem.kernel.free:
            return few
        # Many small drops: where layers are few, these may be best.
        return torch.cat([few, nearby(self.evaluators, self.limits, i, generator)])

    def harden(self, i: int, ratios: Tensor) -> list[float]:
        """A schedule (L,) on the limit of budget i in whole tokens; of few drops, these stay."""
        limit = self.limits[i]
        counts = _counts(ratios, limit)
        if len(steps(counts.tolist(), limit.tokens)) <= self.drops:
            filled = fill(counts[None], limit, torch.Generator()) / limit.tokens
            if len(filled):
                return filled[0].tolist()
        return limit.harden(ratios)


def drawn(prepared: Sequence[PreparedBatch], questions: int, seed: int) -> list[int]:
    """Numbers of batches drawn at random, until they hold so many questions."""
    part, generator = list[int](), torch.Generator().manual_seed(seed)
    for i in torch.randperm(len(prepared), generator=generator).tolist():
        if _size([prepared[j] for j in part]) < questions:
            part.append(i)
    return part


def _ratios(counts: Tensor, limit: Budget) -> Schedule:
    """Keep ratios of whole tokens (L,)."""
    return tuple((counts / limit.tokens).tolist())


def _counts(ratios: Tensor, limit: Budget) -> Tensor:
    """Whole tokens (..., L) of keep ratios."""
    return (ratios * limit.tokens).round().long()


def _size(batches: Sequence[PreparedBatch]) -> int:
    return total(sum(map(len, batches)))
