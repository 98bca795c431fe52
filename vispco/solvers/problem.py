"""A search problem, prepared once: model, method, kernel, calibration data, costs, options."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..budget import Budget, limit_for
from ..calibration import frozen, prepare, run_teacher, shapes
from ..flops import CostModel, KVCacheMemory
from ..frontier import FrontierPoint
from ..latency.table import LatencyTable
from ..methods import Method
from ..profiling import has_films, named_methods
from ..pruning.forward import check_objective
from ..registry import KERNELS, adapter_for, build_method, named_options
from ..schedule import ramp
from ..utils.distributed import total
from ..utils.journal import Journal, opened
from ..utils.version import versions
from .evaluator import Evaluator
from .refine import refine
from .several import Several


@dataclass(frozen=True)
class SearchOptions:
    """What most searches leave as it is.

    objective: what is minimised: "kl", the divergence from the full model's answers, or "task", the
        cross-entropy of the right answers.
    relative_to: what a budget's share is of: "prunable", the cost that pruning can save, or
        "total".
    latency: the table that a limit on latency needs, from `LatencyTable.measure`.
    journal: a file that holds every step as soon as it is done. The same search with the same
        journal goes on after the last step, and ends as if it had never stopped, to the bit. The
        callback hears of all steps again.
    Raises ValueError for another objective.
    """

    objective: str = "kl"
    relative_to: str = "prunable"
    latency: LatencyTable | None = None
    journal: Journal | str | os.PathLike | None = None

    def __post_init__(self):
        check_objective(self.objective)


class Problem:
    """What every start, the refinement and the result need.

    model: any vision-language model whose decoder holds visual tokens.
    method, kernel: names, or mappings of a name and options; of methods also several, see
        `vispco.profile`.
    Raises ValueError for bad input, before the language model runs.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping],
        method: str | Mapping | Sequence,
        kernel: str | Mapping,
        options: SearchOptions,
        callback: Callable[[dict], Any] | None = None,
    ):
        self.model, self.options, self.callback = model, options, callback
        self.adapter = adapter_for(model)(model)
        self.layers = len(self.adapter.layers)
        named_methods(method)
        self.kernel_name, self.kernel_options = named_options("kernel", kernel)
        self.prepared = prepare(model, batches, keep_features=True)
        self.methods = named_methods(method, has_films(model, self.prepared))
        built = {name: build_method(name, options) for name, options in self.methods.items()}
        self._rank_by(built)
        self.n_visual, self.n_text = shapes(self.prepared)
        self.tokens = int(self.n_visual.max())
        self.samples = total(sum(map(len, self.prepared)))
        self.model_type = self.adapter.config.model_type

    def _rank_by(self, built: Mapping[str, Method]) -> None:
        """Set what depends on the methods."""
        self.method, self.method_options = ", ".join(self.methods), self.methods
        self.scorer: Method = Several(built)
        if len(built) == 1:
            self.method_options, self.scorer = self.methods[self.method], built[self.method]
        self.first_layer = min(map(self.adapter.first_layer, built.values()))
        build_kernel = KERNELS.get(self.kernel_name)
        self.kernel = build_kernel(self.layers, self.first_layer, **self.kernel_options)
        self.costs = cost_models(self.adapter, self.scorer, self.options.latency)

    def only(self, name: str) -> Problem:
        """The same problem with one of its methods."""
        one = copy.copy(self)
        one.methods = {name: self.methods[name]}
        one._rank_by({name: build_method(name, one.methods[name])})
        return one

    def limit(self, budget: float | str | Mapping) -> Budget:
        """The limit that a budget stands for, on the calibration data."""
        prompts = self.n_visual, self.n_text
        relative_to = self.options.relative_to
        return limit_for(budget, self.costs, *prompts, self.first_layer, relative_to)

    def evaluator(self, limit: Budget, journal: Journal) -> Evaluator:
        """An evaluator of schedules for one limit."""
        template: dict[str, Any] = {"method": self.method, "method_options": self.method_options}
        template |= {"model_type": self.model_type, "budget": limit.value}
        template |= {"n_visual": limit.tokens, "versions": versions()}
        return Evaluator(self.model, self.prepared, template, self.options.objective, journal)

    def solve(
        self,
        start: Any,
        budgets: Sequence,
        refinement: int | Mapping,
        seed: int,
        journal: Journal | str | os.PathLike | None,
    ) -> tuple[list[FrontierPoint], dict[str, Any], Any]:
        """Start, refine, harden: one point per budget, the search's record, and the solver.

        start: its `solver(problem, limits, seed)` checks that it can start here. The solver's
            `run(evaluators, limits, journal)` measures one schedule or more with every evaluator,
            and returns the other forward passes that it needed. Its `guidance` are arguments of
            `refine`: what may be measured, and what is known of it. Its `others(journal)`, if it
            has such, are further searches, of which each budget may have its configuration.
        """
        started = time.perf_counter()
        rounds, passes = _refinement(refinement)
        limits = self._limits(budgets, start)
        solver = start.solver(self, limits, seed)
        record: dict[str, Any] = {"method": self.method, "kernel": self.kernel_name, "seed": seed}
        record |= {"objective": self.options.objective, "relative_to": self.options.relative_to}
        record |= {"start": start.name, **solver.arguments()}
        latency = self.options.latency
        asked: dict[str, Any] = {"budgets": list(budgets), "refinement": refinement}
        asked |= {"method_options": self.method_options, "kernel_options": self.kernel_options}
        asked |= {"latency": latency and latency.to_dict()}
        with opened(journal) as kept, frozen(self.model, start.checkpoint):
            kept.begin("vispco.search", self.model, self.prepared, {**record, **asked})
            run_teacher(self.model, self.prepared)
            points, spent = self._points(solver, limits, rounds, passes, seed, kept)
            spent += self.samples
            others, more = getattr(solver, "others", _none)(kept)
            spent += more
            for problem, other, own in others:
                found, more = problem._points(other, own, rounds, passes, seed, kept)
                spent += more
                alone = {str(point.budget): point for point in found}
                pairs = [(point, alone.get(str(point.budget), point)) for point in points]
                points = [min(pair, key=lambda point: point.loss) for pair in pairs]
                record["alone"] = problem.method
            seconds = round(time.perf_counter() - started + kept.seconds, 3)
        record |= {**self._facts(), "forward_passes": spent, "seconds": seconds}
        return points, record, solver

    def _points(
        self,
        solver: Any,
        limits: list[Budget],
        rounds: int,
        passes: float,
        seed: int,
        journal: Journal,
    ) -> tuple[list[FrontierPoint], float]:
        """Run a solver and refine: a point of each limit, and the forward passes."""
        evaluators = [self.evaluator(limit, journal) for limit in limits]
        spent = solver.run(evaluators, limits, journal)
        how = {"callback": self.callback, **solver.guidance}
        refine(evaluators, limits, rounds, seed, passes=passes, **how)
        spent += sum(evaluator.passes for evaluator in evaluators)
        both = zip(evaluators, limits, strict=True)
        return [evaluator.point(limit) for evaluator, limit in both], spent

    def _limits(self, budgets: Sequence, start: Any) -> list[Budget]:
        """The limits of the budgets, in the order in which the start takes them."""
        is_one = isinstance(budgets, str | float | int | Mapping)
        if is_one or not (len(budgets) or start.any_budget):
            raise ValueError(f"budgets must be a sequence such as [0.2, 0.5, 0.8], got {budgets!r}")
        full = torch.ones(self.layers)

        def slack(limit: Budget) -> float:
            return float(limit.slack(full))

        return sorted(map(self.limit, budgets), key=slack, reverse=start.largest_first)

    def _facts(self) -> dict[str, Any]:
        """What a frontier records of the model and the calibration data."""
        cost = self.costs["flops"]
        full = cost.full(self.n_visual, self.n_text).double()
        text = cost.text_only(self.n_text).double()
        facts: dict[str, Any] = {"model_type": self.model_type, "num_layers": self.layers}
        facts |= {"n_visual": self.tokens, "samples": self.samples, "versions": versions()}
        return {**facts, "full_flops": float(full.mean()), "text_flops": float(text.mean())}


@dataclass(frozen=True)
class Start:
    """What every start says of itself. Its `solver` is what `Problem.solve` runs."""

    name: ClassVar[str]
    #: Schedules per budget that are measured afterwards, if nothing else is asked for.
    refinement: ClassVar[int] = 6
    #: Whether it answers other budgets afterwards.
    any_budget: ClassVar[bool] = False
    #: Whether it takes the budgets from the largest down.
    largest_first: ClassVar[bool] = False
    # Whether layers run again for the backward pass. Some starts have it as an option.
    checkpoint = False


@dataclass(frozen=True)
class Ramp(Start):
    """`start="ramp"`: a line from all tokens to none, as late as each budget allows."""

    name: ClassVar[str] = "ramp"
    guidance: ClassVar[dict] = {}

    def arguments(self) -> dict[str, Any]:
        """What decides the result, for journal and frontier."""
        return {}

    def solver(self, problem: Problem, limits: Sequence[Budget], seed: int) -> Ramp:
        """This start itself. Raises ValueError for a kernel that cannot form every schedule."""
        if not problem.kernel.free:
            raise ValueError(
                "start='ramp' needs a kernel that forms every schedule, such as 'monotone', got "
                f"{problem.kernel_name!r}; use start='gradient', with steps=0 for no gradient"
            )
        return self

    def run(
        self, evaluators: Sequence[Evaluator], limits: Sequence[Budget], journal: Journal
    ) -> int:
        """Measure the ramp of every limit; returns 0, as all passes are the evaluators'."""
        for limit, evaluator in zip(limits, evaluators, strict=True):
            evaluator.losses([tuple(limit.harden(ramp(limit)))])
        return 0


def _none(journal: Journal) -> tuple[list, int]:
    return [], 0


def _refinement(refinement: int | Mapping) -> tuple[int, float]:
    """(rounds per budget, most forward passes of one question)."""
    given = dict(refinement) if isinstance(refinement, Mapping) else {"rounds": refinement}
    rounds, passes = given.pop("rounds", 6), given.pop("passes", math.inf)
    if given or not isinstance(rounds, int) or rounds < 0:
        raise ValueError(
            f"refinement must be at least 0 rounds, got {refinement!r}, or a mapping of rounds and "
            "passes"
        )
    return rounds, passes


def cost_models(adapter, method=None, latency: LatencyTable | None = None) -> dict[str, Any]:
    """{name: cost} of all that a budget can limit (`vispco.budget.LIMITS`) on the adapter's model.

    method: its ranking counts as FLOPs.
    latency: a table measured on such a model; without one, no budget can limit latency.
    Raises ValueError for a table of another decoder.
    """
    dimensions = adapter.dimensions(adapter.config)
    costs: dict[str, Any] = {"flops": CostModel(dimensions, method)}
    costs["kv_cache"] = KVCacheMemory(dimensions, adapter.model.dtype.itemsize)
    if latency is None:
        return costs
    is_table = isinstance(latency, LatencyTable)
    if not is_table or latency.dimensions != dimensions:
        given = f"one of {latency.dimensions}" if is_table else repr(latency)
        raise ValueError(
            f"latency must be a LatencyTable of this model's decoder, {dimensions}, got {given}: "
            "measure one with LatencyTable.measure(model, lengths)"
        )
    return {**costs, "latency": latency}
