"""Competitors of the search, in the same space and counted alike: random, evolution, Parzen estimators, greedy.

A searcher is called `searcher(evaluator, limit, passes, seed)`. It measures schedules that are filled up to the limit in
whole tokens, `evaluator.losses`, until another would cost more forward passes of one question than `passes`; `evaluator.best` is
its result. SEARCHERS names them all. What needs none: `grids.py`, `rules.py`, `presets.py`.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor

from ..budget import Budget, Limit
from ..config import PruningConfig
from ..frontier import FrontierPoint
from ..pareto import is_non_dominated
from ..solvers.refine import Evaluator, Schedule, from_drops

#: A searcher that asks for schedules it already knows, which costs nothing, ends after so many times its evaluations.
PATIENCE = 10


# ---- random --------------------------------------------------------------------------------------
def random_schedules(method: str, limit: Limit, count: int, seed: int = 0) -> list[PruningConfig]:
    """Random non-increasing schedules, each filled up to the budget in whole tokens.

    Drops are uniform on the simplex (the space of the `monotone` kernel), then scaled to the budget.
    """
    return [PruningConfig(method, schedule) for schedule in islice(_random(limit, seed), count)]


def random_search(evaluator: Evaluator, limit: Limit, passes: int, seed: int = 0) -> None:
    """Best of as many `random_schedules` as the passes pay for.

    Raises ValueError if that is not one.
    """
    purse = _Purse(evaluator, passes)
    for schedule in islice(_random(limit, seed), purse.trials):
        if not purse.pays():
            break
        evaluator.losses([schedule])


def _random(limit: Limit, seed: int) -> Iterator[Schedule]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        drops = torch.empty(limit.layers - limit.first_layer + 1, dtype=torch.float64)
        yield _filled(limit, drops.exponential_(generator=generator))


def _filled(limit: Limit, drops: Tensor) -> Schedule:
    """The schedule whose drops before each layer that can be pruned, and after the last, are in these proportions."""
    return tuple(limit.harden(from_drops(drops / drops.sum().clamp(min=1e-12), limit.first_layer)))


class _Purse:
    """The passes that a searcher may spend on a evaluator."""

    def __init__(self, evaluator: Evaluator, passes: float):
        self.evaluator, self.passes, self.end = evaluator, passes, evaluator.passes + passes
        if passes < evaluator.samples:
            raise ValueError(
                f"passes must pay for one schedule at least, on all {evaluator.samples} calibration questions, "
                f"got {passes!r}"
            )

    @property
    def trials(self) -> int:
        """How often a schedule may be asked for, at most."""
        return PATIENCE * int(self.passes // self.evaluator.samples)

    def pays(self, passes: int = 0) -> bool:
        """Whether one more schedule can be measured on all prepared, after `passes` for other things."""
        return self.evaluator.passes + passes + self.evaluator.samples <= self.end


# ---- optuna's ------------------------------------------------------------------------------------
def nsga2(
    evaluator: Evaluator, limit: Limit, passes: int, seed: int = 0, *, population: int = 20
) -> None:
    """NSGA-II (Deb et al. 2002) with KL as its one objective: an elitist evolution, by optuna.

    One variable x in [0, 1] for each layer that can be pruned; the drops are as -log(1 - x), so that the first
    population, uniform in x, is one of `random_schedules`. Optuna's crossover (uniform, 0.9) and mutation (one
    variable in each child, on average). population: 20 are 8 generations in 160 evaluations.
    Raises ValueError if the passes do not pay for one schedule, ImportError without optuna.
    """
    _minimise(
        evaluator,
        limit,
        passes,
        lambda optuna: optuna.samplers.NSGAIISampler(population_size=population, seed=seed),
    )


def tpe(evaluator: Evaluator, limit: Limit, passes: int, seed: int = 0) -> None:
    """The tree-structured Parzen estimator (Bergstra et al. 2011), multivariate, by optuna.

    Variables as of `nsga2`; the first 10 schedules are random, the others drawn where those of low KL are dense and
    those of high KL are not. Raises what `nsga2` does.
    """
    _minimise(
        evaluator,
        limit,
        passes,
        lambda optuna: optuna.samplers.TPESampler(multivariate=True, seed=seed),
    )


def nsga2_frontier(
    evaluator: Evaluator, limit: Budget, passes: int, seed: int = 0, *, population: int = 20
) -> list[FrontierPoint]:
    """NSGA-II on the whole frontier in one run: KL and the share of the prunable FLOPs are minimised at once.

    The share is one more variable, between the least that can be reached and 1; each schedule is filled up to its own.
    limit: any budget on the samples, of which only the shapes and the first layer are used.
    Returns the points that no other dominates, by share. Raises what `nsga2` does.
    """
    least = limit.share(limit.least)
    points: dict[Schedule, FrontierPoint] = {}

    def objectives(trial) -> tuple[float, float]:
        share = trial.suggest_float("share", min(1.0, least + 1e-6), 1.0)
        own = Budget(share, limit.cost, limit.n_visual, limit.n_text, limit.first_layer)
        schedule = _asked(trial, own)
        (kl,) = evaluator.losses([schedule])
        config = evaluator.config(schedule)
        spent = own.share(config.tokens(own.tokens))
        points[schedule] = FrontierPoint(
            config, share, evaluator.records[schedule].flops, spent, kl
        )
        return kl, spent

    _ask(
        evaluator,
        passes,
        objectives,
        2,
        lambda optuna: optuna.samplers.NSGAIISampler(population_size=population, seed=seed),
    )
    found = sorted(points.values(), key=lambda point: (point.share, point.loss))
    best = is_non_dominated([(point.loss, point.share) for point in found]).tolist()
    return [point for point, stays in zip(found, best) if stays]


def _minimise(evaluator: Evaluator, limit: Limit, passes: int, sampler: Callable) -> None:
    _ask(
        evaluator, passes, lambda trial: tuple(evaluator.losses([_asked(trial, limit)])), 1, sampler
    )


def _asked(trial, limit: Limit) -> Schedule:
    """The schedule that a trial asks for."""
    x = [trial.suggest_float(f"x{i}", 0.0, 1.0) for i in range(limit.first_layer, limit.layers)]
    drops = -torch.log1p(-torch.tensor([*x, 0.0], dtype=torch.float64).clamp(max=1 - 1e-9))
    return _filled(limit, drops)


def _ask(
    evaluator: Evaluator, passes: int, objectives: Callable, count: int, sampler: Callable
) -> None:
    """Let a sampler of optuna ask for schedules as long as the passes last."""
    purse = _Purse(evaluator, passes)
    with _optuna() as optuna:
        study = optuna.create_study(directions=["minimize"] * count, sampler=sampler(optuna))
        for _ in range(purse.trials):
            if not purse.pays():
                break
            trial = study.ask()
            study.tell(trial, objectives(trial))


@contextmanager
def _optuna():
    """The module, silent."""
    try:
        import optuna
    except ImportError:
        raise ImportError("NSGA-II and TPE need optuna: pip install 'vispco[baselines]'") from None
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield optuna
    finally:
        optuna.logging.set_verbosity(level)


# ---- greedy --------------------------------------------------------------------------------------
def greedy_layers(
    evaluator: Evaluator,
    limit: Limit,
    passes: int | None = None,
    seed: int = 0,
    *,
    share: float = 0.25,
) -> None:
    """Greedy per layer: from nothing dropped, again and again drop a chunk at the layer where that costs least KL.

    A chunk before a layer is as few tokens as save 1 / n of what the budget asks for, or all that are left there:

        layer = argmin  (KL after - KL before) / (FLOPs before - FLOPs after)

    until the budget is met. Coarse to fine: this is done for n = 2, 4, 8, ...; each result is filled up to the budget,
    and measured on all prepared. share: of the prepared, drawn by `seed` once, on which layers are compared.
    passes: None: n = 2 ... 16, whatever that costs. Where they end in the middle of a run, what it has left is
    brought onto the budget. Raises ValueError if they do not pay for one schedule.
    """
    purse = _Purse(evaluator, float("inf") if passes is None else passes)
    order = torch.randperm(
        len(evaluator.prepared), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    part = order[: max(1, round(share * len(order)))]
    finest = 16 if passes is None else limit.tokens * (limit.layers - limit.first_layer)
    known: dict[
        Schedule, float
    ] = {}  # KL on the part, of schedules that are above the budget as yet
    pieces = 2
    while purse.pays():
        ratios = _greedy(evaluator, limit, purse, part, pieces, known)
        evaluator.losses([tuple(limit.harden(ratios))])
        pieces *= 2
        if pieces > finest:
            break


def _greedy(
    evaluator: Evaluator,
    limit: Limit,
    purse: _Purse,
    part: list[int],
    pieces: int,
    known: dict[Schedule, float],
) -> Tensor:
    """One run with chunks of 1 / `pieces` of what is to be saved: keep ratios (L,)."""
    ratios, kl = torch.ones(limit.layers, dtype=torch.float64), 0.0
    slack = float(limit.slack(ratios))
    chunk = -slack / pieces
    while slack < 0:
        options = _chunks(limit, ratios, min(slack + chunk, 0.0))
        new = [schedule for schedule in options if schedule not in known]
        if not options or not purse.pays(len(new) * sum(len(evaluator.prepared[i]) for i in part)):
            break
        known.update(zip(new, evaluator.losses(new, part)))
        best = min(
            options, key=lambda schedule: (known[schedule] - kl) / (options[schedule] - slack)
        )
        ratios, kl, slack = torch.tensor(best, dtype=torch.float64), known[best], options[best]
    return ratios


def _chunks(limit: Limit, ratios: Tensor, target: float) -> dict[Schedule, float]:
    """{schedule: its slack}: before one layer, as few tokens fewer as bring the slack to `target`, or all."""
    found = {}
    for layer in range(limit.first_layer, limit.layers):
        left = round(float(ratios[layer]) * limit.tokens)

        def without(count: int) -> Tensor:
            capped = ratios[layer:].clamp(max=(left - count) / limit.tokens)
            return torch.cat([ratios[:layer], capped])

        if left:
            enough = bisect_left(
                range(1, left), target, key=lambda count: float(limit.slack(without(count)))
            )
            fewer = without(1 + enough)
            found[tuple(fewer.tolist())] = float(limit.slack(fewer))
    return found


SEARCHERS: dict[str, Callable[..., None]] = {
    "random": random_search,
    "nsga2": nsga2,
    "tpe": tpe,
    "greedy": greedy_layers,
}
