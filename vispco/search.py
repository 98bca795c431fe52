"""`vispco.search`: one pruning configuration per budget.

Start from a schedule on the budget, refine it by a surrogate, harden it to whole tokens, return a
`Frontier`. The starts:

    "ramp"       a rule that costs no forward pass (`vispco.schedule.ramp`)
    "gradient"   the paper's way: descent for each budget, under the augmented Lagrangian
                 (`vispco.solvers.descent`)
    "profile"    what each single drop costs, measured once; every budget is planned from it
                 (`vispco.solvers.profiled`)
    "before_llm" one drop before the language model, by the best of several methods, for serving
                 engines (`vispco.solvers.before`)
    "shared"     a predictor learned for all budgets at once, which then answers any budget
                 (`vispco.solvers.shared`)
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from .config import PruningConfig
from .frontier import Frontier
from .pruning import unwrapped
from .registry import KERNELS, did_you_mean, named_options
from .solvers.before import BeforeLLM, before_llm
from .solvers.descent import Gradient
from .solvers.problem import Problem, Ramp, SearchOptions, Start
from .solvers.profiled import Profiled
from .solvers.shared import Shared
from .utils.distributed import rank
from .utils.journal import Journal
from .utils.progress import Progress, visible

#: Where a search can start: the options of each start.
STARTS: dict[str, type[Start]] = {
    start.name: start for start in (Ramp, Gradient, Shared, Profiled, BeforeLLM)
}


def search(
    model: nn.Module,
    batches: Sequence[Mapping],
    method: str | Mapping | Sequence = "fastv",
    budgets: Sequence[float | str | Mapping] = (0.2, 0.35, 0.5, 0.7, 0.9),
    *,
    start: str | Mapping | Start | None = None,
    kernel: str | Mapping = "monotone",
    refinement: int | Mapping | None = None,
    seed: int = 0,
    options: SearchOptions | Mapping | None = None,
    callback: Callable[[dict], Any] | None = None,
    progress: bool | None = None,
) -> Frontier:
    """Find one pruning configuration per budget.

    model: any vision-language model whose decoder holds visual tokens. Its weights are not changed.
    batches: the calibration data, dicts of model inputs with `labels` (-100 outside the answer).
        The vision tower runs once on each batch, and what it makes is kept in main memory.
    method: a registered pruning method, a name or a mapping {"name": ..., **options}; a composite
        such as "visionzip+pdrop"; or several of them, a list or "auto": with start="profile", each
        drop has its layer's best, and the method that is best alone is searched alone, too
        (`vispco.solvers.alone`); with start="before_llm", each budget has its best ("auto": all
        that rank before the language model).
    budgets: shares of the prunable cost (`0.5`, `"50%"`), or absolute FLOPs; or several limits at
        once, `{"flops": 0.5, "kv_cache": "40%", "latency": "20 ms"}`. No calibration sample ever
        exceeds its budget.
    start: "profile", "ramp", "gradient", "before_llm" or "shared"; or its options, as
        `Gradient(steps=10)` or as a mapping {"name": "gradient", "steps": 10}. None: "profile", or
        "gradient" for a kernel that forms no staircases. Through layers that
        run on the tokens that are left alone (linear attention, sparse indexers) no gradient flows;
        where there are no others, the search says so and goes without.
    kernel: the registered curve over the layers, a name or a mapping {"name": ..., **options}.
    refinement: schedules that are tried per budget after the start, of those that the kernel can
        form (`vispco.solvers.refine`); or {"rounds": n, "passes": most forward passes of one
        question}. None: 6.
    options: objective, what a share is of, latency table, journal; see `SearchOptions`.
    callback: called with a dict after every measurement of a profile, or of a method before the
        language model (layer, tokens, method, loss), after every gradient step (budget, step, loss,
        slack, multiplier, penalty, ...), and after every schedule of the refinement (budget,
        schedule, loss, best).
    progress: whether a bar on stderr shows budget, loss and time left; None: on a terminal and in a
        notebook.

    Returns the frontier. With start="shared" it is a `SharedFrontier`, which answers other budgets
    too; then `budgets` may be empty. With start="profile" it is a `ProfiledFrontier`, which plans
    other budgets from the same profile.
    Raises ValueError for bad input, or a journal of another search, before the language model runs.
    Raises FloatingPointError, naming budget, step and layer, for numbers that are not finite:
    logits, hidden states, scores, the loss or its gradient.

    >>> from vispco import testbed
    >>> model, _ = testbed.load("testbed-llava")
    >>> batches = testbed.batches("calibration", n=32, batch_size=32)
    >>> frontier = search(model, batches, budgets=[0.5], start=Gradient(steps=5))
    >>> frontier.points[0].share <= 0.5
    True
    """
    chosen, model = _options_of(default_start(kernel) if start is None else start), unwrapped(model)
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise ValueError(f"seed must be a whole number, got {seed!r}")
    if not (callback is None or callable(callback)):
        raise ValueError(f"callback must be a function of a dict, got {callback!r}")
    if not isinstance(options, SearchOptions | Mapping | None):
        raise ValueError(
            f"options must be SearchOptions(...), or a mapping of them, got {options!r}"
        )
    if not isinstance(options, SearchOptions):
        options = _with_options(SearchOptions, "the options of a search do", options or {})
    if isinstance(chosen, BeforeLLM) and method == "auto":
        method = before_llm()
    problem = Problem(model, batches, method, kernel, options)
    if len(problem.methods) > 1 and not isinstance(chosen, Profiled | BeforeLLM):
        raise ValueError(
            f"start={chosen.name!r} searches with one method, got {method!r}: use start='profile' "
            "or 'before_llm', or a composite such as 'visionzip+pdrop'"
        )
    if not problem.adapter.differentiable(problem.scorer):
        chosen = _without_gradient(chosen, problem)
    refinement = chosen.refinement if refinement is None else refinement
    hidden = rank() > 0 or not (visible() if progress is None else progress)
    # With several methods, the best one is searched alone, too.
    searches = 2 if isinstance(chosen, Profiled) and len(problem.methods) > 1 else 1
    steps = searches * _steps(chosen, budgets, refinement)
    with Progress(steps, "search", hidden, always=bool(progress)) as bar:
        if callback is not None or not hidden:
            problem.callback = partial(_heard, bar, callback)
        bar.layers = problem.layers
        bar.say(f"full model on {problem.samples:,} questions")
        points, meta, solver = problem.solve(chosen, budgets, refinement, seed, options.journal)
    problem.callback = callback
    if isinstance(chosen, Shared):
        return SharedFrontier(points, meta, problem, solver)
    if isinstance(chosen, Profiled):
        return ProfiledFrontier(points, meta, problem, solver.again(), solver.profile)
    return Frontier(points, meta)


@dataclass(repr=False)
class AnyBudget(Frontier):
    """A frontier that also answers budgets that it has no point for.

    problem: the model and the calibration data of the search. again: the start that knows what the
    search has learned. Neither is saved.
    """

    problem: Any = field(default=None, repr=False, compare=False)
    again: Any = field(default=None, repr=False, compare=False)

    def frontier(
        self,
        budgets: Sequence[float | str | Mapping],
        refinement: int | Mapping = 0,
        seed: int = 0,
        journal: Journal | str | os.PathLike | None = None,
    ) -> Frontier:
        """One configuration per budget, in whole tokens, never above it.

        All are measured on the calibration data.
        refinement, seed, journal: as of `vispco.search`; the journal is another file than the
        search had.
        """
        points, meta, _ = self.problem.solve(self.again, budgets, refinement, seed, journal)
        # How it was learned stays: start, steps, seed.
        spent = {name: meta[name] for name in ("forward_passes", "seconds")}
        return Frontier(points, {**self.meta, **spent})

    def config(self, budget: float | str | Mapping) -> PruningConfig:
        """The configuration for one budget, in whole tokens, never above it."""
        return self.frontier([budget]).points[0].config


@dataclass(repr=False)
class SharedFrontier(AnyBudget):
    """A frontier found by start="shared": its predictor answers any budget.

    >>> from vispco import testbed
    >>> model, _ = testbed.load("testbed-llava")
    >>> batches = testbed.batches("calibration", n=32, batch_size=16)
    >>> found = search(model, batches, budgets=(), start=Shared(steps=4))
    >>> [round(found.frontier([budget])[0].share, 1) for budget in (0.3, 0.6)]
    [0.3, 0.6]
    """

    def ratios(self, budget: float) -> Tensor:
        """The schedule (L,) for a share of the prunable cost, not yet in whole tokens."""
        return self.again.ratios(budget)


@dataclass(repr=False)
class ProfiledFrontier(AnyBudget):
    """A frontier found by start="profile": any other budget is planned from the same profile.

    profile: what was measured of the model, a `vispco.Profile`. It is saved by its own `save`.

    >>> from vispco import testbed
    >>> model, _ = testbed.load("testbed-llava")
    >>> batches = testbed.batches("calibration", n=32, batch_size=32)
    >>> found = search(model, batches, budgets=[0.5], start="profile", refinement=0)
    >>> found.profile.exit(), found.config(0.3).describe()[:5]
    (6, 'fastv')
    """

    profile: Any = field(default=None, repr=False, compare=False)


def _steps(start: Any, budgets: Sequence, refinement: int | Mapping) -> int:
    """How many times the callback will be called, as far as is known before."""
    several = hasattr(budgets, "__len__") and not isinstance(budgets, str | Mapping)
    count = len(budgets) if several else 0
    rounds = refinement.get("rounds", 6) if isinstance(refinement, Mapping) else refinement
    tried = rounds if isinstance(rounds, int) else 0
    return getattr(start, "steps", 0) * (1 if start.any_budget else count) + count * tried


def _heard(bar: Progress, callback: Callable[[dict], Any] | None, record: dict) -> None:
    """One step, told to the bar and to the caller."""
    bar(record)
    if callback is not None:
        callback(record)


def _without_gradient(start: Any, problem: Problem) -> Any:
    """The same start without gradient steps, said aloud. Raises ValueError if it needs them."""
    if isinstance(start, Ramp | Profiled | BeforeLLM):
        return start
    model = type(problem.model).__name__
    why = f"no gradient flows through {model}: none of its layers takes a mask that hides a token"
    if isinstance(start, Shared):
        raise ValueError(f"{why}; start='shared' learns by it: use start='ramp'")
    if start.steps:
        warnings.warn(f"{why}; the search goes without, and refines", stacklevel=3)
    return replace(start, steps=0)


def default_start(kernel: str | Mapping) -> str:
    """The name of the start for a kernel: "profile", or "gradient" if it forms no staircases.

    >>> default_start("monotone"), default_start("p_sigmoid")
    ('profile', 'gradient')
    """
    name, _ = named_options("kernel", kernel)
    family = KERNELS.get(name)
    return Profiled.name if family.free or family.stairs else Gradient.name


def _options_of(start: Any) -> Any:
    """The options of a start, from themselves, a name, or a mapping."""
    if isinstance(start, Start):
        return start
    name, options = named_options("start", start)
    if name not in STARTS:
        hint = did_you_mean(name, STARTS)
        raise ValueError(f"unknown start {name!r}: {hint}there are {', '.join(STARTS)}")
    return _with_options(STARTS[name], f"start {name!r} does", options)


def _with_options(cls: Any, who: str, options: Mapping) -> Any:
    """`cls(**options)`. Raises ValueError, with the nearest name, for one that it does not take."""
    known = [option.name for option in fields(cls)]
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known)
            takes = ", ".join(known) or "no options"
            raise ValueError(f"{who} not take {option!r}: {hint}it takes {takes}")
    return cls(**options)
