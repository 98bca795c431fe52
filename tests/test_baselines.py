"""Competitors of the search.

Allowances, budgets and seeds are kept, and more passes help. On a toy the clever ones beat the
random ones.
"""

import statistics
import sys
import types

import pytest
import torch

import vispco
from vispco import testbed
from vispco.baselines.grids import paper_grid, published, single_layer_grid
from vispco.baselines.presets import PUBLISHED, presets
from vispco.baselines.searchers import (
    SEARCHERS,
    greedy_layers,
    nsga2,
    nsga2_frontier,
    random_schedules,
    random_search,
    tpe,
)
from vispco.budget import Budget
from vispco.calibration import prepare, run_teacher, shapes
from vispco.flops import CostModel, Dimensions
from vispco.pareto import is_non_dominated
from vispco.registry import adapter_for, build_method
from vispco.solvers.refine import Evaluator

LAYERS, TOKENS, QUESTIONS = 8, 64, 32
TARGET = (1, 1, 1, 0.9, 0.6, 0.3, 0.1, 0)
ALL = pytest.mark.parametrize("searcher", SEARCHERS.values(), ids=SEARCHERS)
optuna = pytest.importorskip("optuna", reason="needs the extra baselines")


def limit(budget=0.5, first_layer=1, layers=LAYERS):
    """A budget for samples of 64 visual and 9 text tokens."""
    cost = CostModel(Dimensions(layers, 32, 4, 2, 8, 56, 60))
    return Budget(budget, cost, torch.tensor([TOKENS]), torch.tensor([9]), first_layer)


class Known(Evaluator):
    """An evaluator of 8 batches of 4 questions that runs no model.

    Its KL is what each layer misses of a target, squared.
    """

    def __init__(self, target=TARGET):
        super().__init__(None, [[None] * 4] * 8, {"method": "fastv"})
        self.target, self.asked = torch.tensor(target, dtype=torch.float64), []

    def _run(self, schedule, part):
        if part is None and schedule in self.records:
            return self.records[schedule]
        self.passes += 4 * (8 if part is None else len(part))
        missed = (self.target - torch.tensor(schedule, dtype=torch.float64)).clamp(min=0)
        record = types.SimpleNamespace(kl=float(missed.square().sum()), flops=1.0)
        if part is None:
            self.records[schedule] = record
        return record


def found(searcher, evaluations, seed=0, budget=0.5, **options):
    """KL that a searcher reaches."""
    evaluator = Known(limit(budget).harden(torch.tensor(TARGET)))
    searcher(evaluator, limit(budget), evaluations * QUESTIONS, seed, **options)
    return evaluator.records[evaluator.best].kl


# ---- every searcher ------------------------------------------------------------------------------
@ALL
@pytest.mark.parametrize("passes", [QUESTIONS, 10 * QUESTIONS - 1, 30 * QUESTIONS + 5])
def test_allowance_and_budget(searcher, passes):
    """Never a pass more, never an evaluation fewer.

    All schedules are within the budget, filled up, non-increasing.
    """
    evaluator = Known()
    # What was spent before is not counted.
    evaluator.passes = 17
    own = limit(0.4, first_layer=2)
    searcher(evaluator, own, passes, seed=0)
    assert evaluator.passes - 17 <= passes
    # A step of all layers may be too dear.
    assert evaluator.passes - 17 > passes - QUESTIONS or searcher is greedy_layers
    for schedule in evaluator.records:
        # Validates that it does not increase.
        config = evaluator.config(schedule)
        counts = config.tokens(TOKENS)
        assert own.holds(counts) and counts[:2] == [TOKENS] * 2
        assert not any(
            own.holds([*counts[:i], counts[i] + 1, *counts[i + 1 :]])
            for i in range(2, LAYERS)
            if counts[i] < counts[i - 1]
        )


@ALL
def test_seeds(searcher):
    """The same seed asks for the same schedules; another asks for others, where there is chance."""
    runs = []
    for seed in (0, 0, 1):
        evaluator = Known()
        searcher(evaluator, limit(), 15 * QUESTIONS, seed)
        runs.append(list(evaluator.records))
    assert runs[0] == runs[1]
    # All parts of these prepared are alike.
    assert runs[0] != runs[2] or searcher is greedy_layers


@ALL
def test_the_global_generator_is_left_alone(searcher):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found(searcher, 3)
    assert torch.equal(before, torch.get_rng_state())


@ALL
def test_more_passes_help(searcher):
    few, many = (statistics.mean(found(searcher, n, seed) for seed in range(3)) for n in (5, 60))
    assert many < 0.8 * few


@ALL
def test_too_few_passes(searcher):
    with pytest.raises(
        ValueError, match="passes must pay for one schedule at least, on all 32 .* got 31"
    ):
        searcher(Known(), limit(), 31, 0)


@ALL
def test_an_exhausted_space_ends(searcher):
    """One layer to choose for: only one schedule fills the budget.

    It is known after one evaluation.
    """
    evaluator = Known((1.0, 0.5))
    searcher(evaluator, limit(0.7, layers=2), 10 * QUESTIONS, 0)
    assert len(evaluator.records) == 1


# ---- one by one ----------------------------------------------------------------------------------
@pytest.mark.parametrize("searcher", [nsga2, tpe])
def test_clever_searchers_beat_random(searcher):
    """At equal cost, in the mean over seeds, by half."""
    chance, clever = ([found(s, 60, seed) for seed in range(3)] for s in (random_search, searcher))
    assert statistics.mean(clever) < 0.5 * statistics.mean(chance)


def test_random_search_is_the_best_of_random_schedules():
    evaluator, own = Known(), limit()
    random_search(evaluator, own, 12 * QUESTIONS, seed=3)
    assert list(evaluator.records) == [
        c.keep_ratios for c in random_schedules("fastv", own, 12, seed=3)
    ]


def test_the_first_population_is_as_random():
    """The variables' prior is that of `random_schedules`: the mean schedules agree."""
    own, evaluator = limit(), Known()
    nsga2(evaluator, own, 100 * QUESTIONS, 0, population=100)
    drawn = torch.tensor(list(evaluator.records)).mean(0)
    chance = torch.tensor(
        [c.keep_ratios for c in random_schedules("fastv", own, 100, seed=1)]
    ).mean(0)
    torch.testing.assert_close(drawn, chance, rtol=0, atol=0.07)


def test_greedy_by_hand():
    """A KL to which the last three layers add nothing.

    Greedy search empties these, from the cheapest on, and is done.
    """
    evaluator, own = Known((1,) * 5 + (0,) * 3), limit(0.7)
    greedy_layers(evaluator, own)
    assert evaluator.best[:5] == (1.0,) * 5 and evaluator.records[evaluator.best].kl == 0
    assert own.holds(evaluator.config(evaluator.best).tokens(TOKENS))


def test_greedy_compares_on_a_part():
    """What is above the budget never enters the records.

    A measurement on a part of the batches is paid for as that part.
    """
    evaluator = Known()
    greedy_layers(evaluator, limit(), share=0.25)
    whole = len(evaluator.records) * QUESTIONS
    assert 1 <= len(evaluator.records) <= 4 and (evaluator.passes - whole) % (QUESTIONS // 4) == 0


def test_greedy_at_the_full_budget():
    evaluator = Known()
    greedy_layers(evaluator, limit(1.0), 5 * QUESTIONS)
    assert evaluator.best == (1.0,) * LAYERS and evaluator.passes == QUESTIONS


def test_the_frontier_at_once():
    """No point dominates another, none was missed, and shares are what the schedules cost."""
    evaluator, own = Known(), limit()
    points = nsga2_frontier(evaluator, own, 60 * QUESTIONS, seed=0)
    pairs = [(p.loss, p.share) for p in points]
    assert (
        len(points) > 5
        and bool(is_non_dominated(pairs).all())
        and evaluator.passes <= 60 * QUESTIONS
    )
    assert [p.share for p in points] == sorted(p.share for p in points)
    assert all(p.share == own.share(p.config.tokens(TOKENS)) <= p.budget + 1e-9 for p in points)
    for schedule, record in evaluator.records.items():
        share = own.share(evaluator.config(schedule).tokens(TOKENS))
        assert any(loss <= record.kl and s <= share for loss, s in pairs)
    again = nsga2_frontier(Known(), own, 60 * QUESTIONS, seed=0)
    assert [p.config for p in again] == [p.config for p in points]


def test_without_optuna(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    for searcher in (nsga2, tpe, nsga2_frontier):
        with pytest.raises(ImportError, match=r"pip install 'vispco\[baselines\]'"):
            searcher(Known(), limit(), 100, 0)


def test_optuna_is_silent(capfd, recwarn):
    level = optuna.logging.get_verbosity()
    found(nsga2, 3), found(tpe, 12)
    assert (
        capfd.readouterr() == ("", "")
        and not recwarn.list
        and optuna.logging.get_verbosity() == level
    )


# ---- what needs no search ------------------------------------------------------------------------
def test_the_papers_grid():
    grid = paper_grid("fastv", 36)
    assert len({c.keep_ratios for c in grid}) == 700
    assert {len(c.steps) for c in grid} == {1} and {min(c.steps) for c in grid} == set(range(1, 36))
    assert [c.keep_ratios for c in single_layer_grid("fastv", 3, [0, 0.5], 2)] == [
        (1, 1, 0),
        (1, 1, 0.5),
    ]


@pytest.mark.parametrize("method", [*PUBLISHED, "strided"])
def test_published(method):
    for layers in (8, 32, 40):
        assert published(method, layers) == {
            name: p.config for name, p in presets(method, layers).items()
        }
        same = published(method, layers, at="layer")
        for name, config in same.items():
            steps = PUBLISHED[method][name].steps
            assert config.num_layers == layers and config.steps == dict(steps)
        assert all(
            max(p.steps) >= layers
            for name, p in PUBLISHED.get(method, {}).items()
            if name not in same
        )
    with pytest.raises(ValueError, match="at must be"):
        published(method, 32, at="top")


# ---- a real model --------------------------------------------------------------------------------
def test_on_the_testbed():
    """Sixteen questions, one harness, one loop.

    Nobody exceeds budget or allowance, and the clever ones beat the random ones.
    """
    model, _ = testbed.load()
    prepared = run_teacher(model, prepare(model, testbed.batches("calibration", 16, 4, 0)))
    adapter, method = adapter_for(model)(model), build_method("fastv")
    cost = CostModel(adapter.dimensions(adapter.config), method)
    own = Budget(0.5, cost, *shapes(prepared), method.first_layer)
    results = {}
    for name, searcher in SEARCHERS.items():
        evaluator = Evaluator(model, prepared, {"method": "fastv"})
        searcher(evaluator, own, 12 * 16, 0)
        point = evaluator.point(own)
        assert evaluator.passes <= 12 * 16 and point.share <= 0.5
        assert point.loss == pytest.approx(vispco.evaluate(model, prepared, point.config).kl)
        results[name] = point.loss
    assert max(results["nsga2"], results["tpe"]) < results["random"]
