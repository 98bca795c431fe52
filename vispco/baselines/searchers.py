"""Competitors of the search, counted alike: random, evolution, Parzen estimator, greedy.

A searcher is called `searcher(evaluator, limit, passes, seed)`. It measures schedules that are
filled up to the limit in whole tokens, `evaluator.losses`, until another would cost more forward
passes of one question than `passes`; `evaluator.best` is its result. SEARCHERS names them all.
What needs no searcher: `grids.py`, `rules.py`, `presets.py`.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor

from ..budget import Budget
from ..config import PruningConfig
from ..frontier import FrontierPoint
from ..pareto import is_non_dominated
from ..schedule import from_drops
from ..solvers.evaluator import Evaluator, Schedule

#: Schedules that are known cost nothing. A searcher may ask for this many times as many schedules
#: as its passes pay for; then it ends.
PATIENCE = 10


class EvaluationBudget:
    """The forward passes of one question that a searcher may spend on an evaluator.

    Raises ValueError if they do not pay for one schedule.
    """

    def __init__(self, evaluator: Evaluator, passes: float):
        if passes < evaluator.samples:
            raise ValueError(
                f"passes must pay for one schedule at least, on all {evaluator.samples} "
                f"calibration questions, got {passes!r}"
            )
        self.evaluator, self.passes = evaluator, passes
        self.end = evaluator.passes + passes

    def allows(self, extra: int = 0) -> bool:
        """Whether one more schedule can be measured on all questions, after `extra` passes."""
        return self.evaluator.passes + extra + self.evaluator.samples <= self.end

    def trials(self) -> Iterator[int]:
        """Count schedules to ask for, as long as one more can be measured."""
        for trial in range(PATIENCE * int(self.passes // self.evaluator.samples)):
            if not self.allows():
                return
            yield trial


# ---- random --------------------------------------------------------------------------------------
def random_schedules(method: str, limit: Budget, count: int, seed: int = 0) -> list[PruningConfig]:
    """Random non-increasing schedules, each filled up to the budget in whole tokens.

    Drops are uniform on the simplex (the space of the `monotone` kernel), then scaled to the
    budget.
    """
    return [PruningConfig(method, schedule) for schedule in islice(_random(limit, seed), count)]


def random_search(evaluator: Evaluator, limit: Budget, passes: int, seed: int = 0) -> None:
    """Best of as many `random_schedules` as the passes pay for.

    Raises ValueError if they do not pay for one.
    """
    trials = EvaluationBudget(evaluator, passes).trials()
    for _, schedule in zip(trials, _random(limit, seed), strict=False):
        evaluator.losses([schedule])


def _random(limit: Budget, seed: int) -> Iterator[Schedule]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        drops = torch.empty(limit.layers - limit.first_layer + 1, dtype=torch.float64)
        yield _filled(limit, drops.exponential_(generator=generator))


def _filled(limit: Budget, drops: Tensor) -> Schedule:
    """The schedule on the budget whose drops, before each layer and never, have these proportions.

    drops: (L - first_layer + 1,), see `vispco.schedule.to_drops`.
    """
    return tuple(limit.harden(from_drops(drops / drops.sum().clamp(min=1e-12), limit.first_layer)))


# ---- optuna's searchers --------------------------------------------------------------------------
def nsga2(
    evaluator: Evaluator, limit: Budget, passes: int, seed: int = 0, *, population: int = 20
) -> None:
    """NSGA-II (Deb et al. 2002) with KL as its one objective: an elitist evolution, by optuna.

    One variable x in [0, 1] for each layer that can be pruned. The drops are as -log(1 - x), so the
    first population, uniform in x, is one of `random_schedules`. Optuna's crossover (uniform, 0.9)
    and mutation (one variable in each child, on average).
    population: 20 are 8 generations in 160 evaluations.
    Raises ValueError if the passes do not pay for one schedule, ImportError without optuna.
    """
    options = {"population_size": population, "seed": seed}
    _minimise_loss(evaluator, limit, passes, "NSGAIISampler", options)


def tpe(evaluator: Evaluator, limit: Budget, passes: int, seed: int = 0) -> None:
    """The tree-structured Parzen estimator (Bergstra et al. 2011), multivariate, by optuna.

    Variables as of `nsga2`. The first 10 schedules are random; the others are drawn where those of
    low KL are dense and those of high KL are not. Raises what `nsga2` does.
    """
    options = {"multivariate": True, "seed": seed}
    _minimise_loss(evaluator, limit, passes, "TPESampler", options)


def nsga2_frontier(
    evaluator: Evaluator, limit: Budget, passes: int, seed: int = 0, *, population: int = 20
) -> list[FrontierPoint]:
    """NSGA-II on the whole frontier in one run: KL and the share of the prunable FLOPs at once.

    The share is one more variable, between the least that can be reached and 1. Each schedule is
    filled up to its own share.
    limit: any budget on the samples; only its shapes and its first layer are used.
    Returns the points that no other dominates, by share. Raises what `nsga2` does.
    """
    least = limit.share(limit.least)
    points: dict[Schedule, FrontierPoint] = {}

    def objectives(trial) -> tuple[float, float]:
        share = trial.suggest_float("share", min(1.0, least + 1e-6), 1.0)
        own = Budget(share, limit.cost, limit.n_visual, limit.n_text, limit.first_layer)
        schedule = _suggested(trial, own)
        (kl,) = evaluator.losses([schedule])
        config, flops = evaluator.config(schedule), evaluator.records[schedule].flops
        spent = own.share(config.tokens(own.tokens))
        points[schedule] = FrontierPoint(config, share, flops, spent, kl)
        return kl, spent

    options = {"population_size": population, "seed": seed}
    _minimise(evaluator, passes, objectives, 2, "NSGAIISampler", options)
    found = sorted(points.values(), key=lambda point: (point.share, point.loss))
    best = is_non_dominated([(point.loss, point.share) for point in found]).tolist()
    return [point for point, stays in zip(found, best, strict=True) if stays]


def _suggested(trial, limit: Budget) -> Schedule:
    """The schedule that a trial asks for."""
    x = [trial.suggest_float(f"x{i}", 0.0, 1.0) for i in range(limit.first_layer, limit.layers)]
    drops = -torch.log1p(-torch.tensor([*x, 0.0], dtype=torch.float64).clamp(max=1 - 1e-9))
    return _filled(limit, drops)


def _minimise_loss(
    evaluator: Evaluator, limit: Budget, passes: int, sampler: str, options: dict
) -> None:
    def loss(trial) -> list[float]:
        return evaluator.losses([_suggested(trial, limit)])

    _minimise(evaluator, passes, loss, 1, sampler, options)


def _minimise(
    evaluator: Evaluator, passes: int, objectives: Callable, count: int, sampler: str, options: dict
) -> None:
    """Let one of optuna's samplers minimise `count` objectives as long as the passes last."""
    budget = EvaluationBudget(evaluator, passes)
    with _optuna() as optuna:
        asks = getattr(optuna.samplers, sampler)(**options)
        study = optuna.create_study(directions=["minimize"] * count, sampler=asks)
        for _ in budget.trials():
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
    limit: Budget,
    passes: int | None = None,
    seed: int = 0,
    *,
    share: float = 0.25,
) -> None:
    """Greedy per layer: again and again drop a chunk at the layer where that costs least KL.

    At first nothing is dropped. A chunk before a layer is as few tokens as save 1 / n of what the
    budget asks for, or all that are left there:

        layer = argmin  (KL after - KL before) / (FLOPs before - FLOPs after)

    until the budget is met. Coarse to fine: this is done for n = 2, 4, 8, ... Each result is filled
    up to the budget, and measured on all calibration questions.
    passes: None: n = 2 ... 16, whatever that costs. Where they end in the middle of a run, what it
        has left is brought onto the budget.
    share: of the calibration batches, drawn by `seed` once, on which layers are compared.
    Raises ValueError if the passes do not pay for one schedule.
    """
    budget = EvaluationBudget(evaluator, float("inf") if passes is None else passes)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(evaluator.prepared), generator=generator).tolist()
    part = order[: max(1, round(share * len(order)))]
    part_samples = sum(len(evaluator.prepared[i]) for i in part)
    # KL on the part, of schedules that are above the budget as yet.
    known: dict[Schedule, float] = {}

    def run(pieces: int) -> Tensor:
        """Keep ratios (L,) after a run with chunks of 1 / `pieces` of what is to be saved."""
        ratios, kl = torch.ones(limit.layers, dtype=torch.float64), 0.0
        slack = float(limit.slack(ratios))
        chunk = -slack / pieces
        while slack < 0:
            options = _chunks(limit, ratios, min(slack + chunk, 0.0))
            new = [schedule for schedule in options if schedule not in known]
            if not options or not budget.allows(len(new) * part_samples):
                break
            known.update(zip(new, evaluator.losses(new, part), strict=True))
            price = {s: (known[s] - kl) / (options[s] - slack) for s in options}
            best = min(options, key=price.__getitem__)
            ratios = torch.tensor(best, dtype=torch.float64)
            kl, slack = known[best], options[best]
        return ratios

    finest = 16 if passes is None else limit.tokens * (limit.layers - limit.first_layer)
    pieces = 2
    while budget.allows():
        evaluator.losses([tuple(limit.harden(run(pieces)))])
        pieces *= 2
        if pieces > finest:
            break


def _chunks(limit: Budget, ratios: Tensor, target: float) -> dict[Schedule, float]:
    """{schedule: its slack}, one for each layer before which tokens can still be dropped.

    Before that layer as few tokens are dropped as bring the slack to `target`, or all.
    """
    left = (ratios * limit.tokens).round().int().tolist()
    layers = [i for i in range(limit.first_layer, limit.layers) if left[i]]
    return dict(_chunk(limit, ratios, i, left[i], target) for i in layers)


def _chunk(limit, ratios: Tensor, layer: int, left: int, target: float) -> tuple[Schedule, float]:
    def without(count: int) -> Tensor:
        capped = ratios[layer:].clamp(max=(left - count) / limit.tokens)
        return torch.cat([ratios[:layer], capped])

    def slack(count: int) -> float:
        return float(limit.slack(without(count)))

    count = 1 + bisect_left(range(1, left), target, key=slack)
    return tuple(without(count).tolist()), slack(count)


SEARCHERS: dict[str, Callable[..., None]] = {
    "random": random_search,
    "nsga2": nsga2,
    "tpe": tpe,
    "greedy": greedy_layers,
}
