"""Refinement.

Moves are schedules, the budget holds, nothing gets worse, and the cost is what is said.
"""

import types

import pytest
import torch
from hypothesis import given, strategies as st

import vispco
from tiny import batch
from vispco.budget import Budget
from vispco.flops import CostModel, Dimensions
from vispco.schedule import fit
from vispco.solvers.evaluator import Evaluator
from vispco.solvers.refine import moves, nearby, refine

LAYERS, TOKENS = 10, 64


def limit(budget, first_layer=1):
    """A budget on a decoder of ten layers, for samples of 64 visual and 9 text tokens."""
    cost = CostModel(Dimensions(LAYERS, 32, 4, 2, 8, 56, 60))
    return Budget(budget, cost, torch.tensor([TOKENS]), torch.tensor([9]), first_layer)


class Known(Evaluator):
    """An evaluator whose KL is the distance to a known schedule.

    Each batch adds noise of its own, zero in the mean.
    """

    def __init__(self, target, noise=0.0, prepared=8):
        super().__init__(None, [[None] * 4] * prepared, {})
        self.target, self.asked = torch.tensor(target), []
        self.noise = noise * torch.linspace(-1, 1, prepared)

    def _run(self, schedule, part):
        if part is None and schedule in self.records:
            return self.records[schedule]
        numbers = range(len(self.prepared)) if part is None else part
        self.asked.append((schedule, len(numbers)))
        self.passes += 4 * len(numbers)
        kl = (torch.tensor(schedule) - self.target).square().sum() + self.noise[
            list(numbers)
        ].mean()
        record = types.SimpleNamespace(kl=float(kl), task_loss=0.0)
        if part is None:
            self.records[schedule] = record
        return record


def schedules(first_layer=0):
    """A few schedules (C, L), drawn by hypothesis."""
    one = st.lists(st.floats(0, 1), min_size=LAYERS, max_size=LAYERS)
    return st.lists(one, min_size=1, max_size=4).map(
        lambda rows: torch.tensor(
            [[1.0] * first_layer + sorted(r, reverse=True)[first_layer:] for r in rows],
            dtype=torch.float64,
        )
    )


def check_schedules(found, first_layer):
    assert ((found >= 0) & (found <= 1)).all() and (found[:, :first_layer] == 1).all()
    assert (found[:, 1:] <= found[:, :-1] + 1e-12).all()


@given(data=st.data(), first=st.integers(0, 3), seed=st.integers(0, 99))
def test_moves_are_schedules(data, first, seed):
    ratios = data.draw(schedules(first))
    moved = moves(ratios, first, torch.Generator().manual_seed(seed))
    assert moved.shape == ratios.shape
    check_schedules(moved, first)


@given(rounds=st.integers(0, 2), seed=st.integers(0, 99), data=st.data())
def test_a_larger_budget_is_never_worse_off(rounds, seed, data):
    """What a smaller one has found is within it, too: that costs nothing."""
    limits = [limit(budget) for budget in (0.2, 0.5, 0.8)]
    target = data.draw(schedules())[0].tolist()
    evaluators = [Known(target) for _ in limits]
    for evaluator, own in zip(evaluators, limits, strict=True):
        evaluator.losses([tuple(own.harden(data.draw(schedules(1))[0]))])
    first = [evaluator.best_loss for evaluator in evaluators]
    refine(evaluators, limits, rounds, seed)
    found = [evaluator.best_loss for evaluator in evaluators]
    assert found == sorted(found, reverse=True)
    assert all(new <= old for new, old in zip(found, first, strict=True))
    for evaluator, own in zip(evaluators, limits, strict=True):
        assert own.holds([round(ratio * TOKENS) for ratio in evaluator.best])
    # Each has one schedule of its own, and the refinement's.
    assert sum(evaluator.passes for evaluator in evaluators) <= 32 * 3 * (1 + rounds)
    assert sum(len(evaluator.asked) for evaluator in evaluators) <= 3 * (1 + rounds)


def test_every_schedule_can_be_reached():
    """From one step, moves lead to steps at every layer, and to keeping everything."""
    start = torch.tensor([1.0] * 5 + [0.5] * 5, dtype=torch.float64)
    found = moves(start.expand(400, -1), 1, torch.Generator().manual_seed(0))
    drops = {i for r in found for i in range(1, LAYERS) if r[i] < r[i - 1] - 1e-9}
    assert drops == set(range(1, LAYERS)) and any(r.eq(1).all() for r in found)


@given(data=st.data(), first=st.integers(0, 3), budget=st.floats(0.35, 0.95))
def test_what_is_fitted_is_on_the_budget_or_cannot_be(data, first, budget):
    ratios, b = data.draw(schedules(first)), limit(budget, first)
    found = fit(ratios, b, lower=False)
    check_schedules(found, first)
    assert (b.slack(found) >= 0).all()
    # There is nothing to scale.
    full = (ratios == 1).all(1)
    fits = torch.tensor([b.reachable(r) for r in ratios]) & ~full
    assert len(found) >= int(fits.sum())
    with_lowered = fit(ratios, b)
    check_schedules(with_lowered, first)
    assert (b.slack(with_lowered) >= 0).all()
    above = int((b.slack(ratios) < 0).sum())
    # Lowered, any schedule fits.
    assert len(with_lowered) == len(found) + above


def test_near_schedules_are_within_the_budget_and_new_at_every_layer():
    b = limit(0.4)
    evaluator = Known([1.0] * LAYERS)
    evaluator.losses([tuple(b.harden(torch.linspace(1, 0, LAYERS)))])
    found = nearby([evaluator], [b], 0, torch.Generator().manual_seed(0))
    check_schedules(found, 1)
    assert (b.slack(found) >= 0).all() and len(found) > 200 and (found.std(0)[1:] > 0.05).all()


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("budget", [0.2, 0.7])
def test_walks_to_the_optimum_within_the_budget(budget, noise):
    b = limit(budget)
    target = tuple(b.harden(torch.tensor([1.0, 1, 1, 0.8, 0.6, 0.3, 0.1, 0, 0, 0])))
    start = tuple(b.harden(torch.full((LAYERS,), 0.5).index_fill(0, torch.tensor([0]), 1.0)))
    evaluator = Known(target, noise)
    (before,) = evaluator.losses([start])
    refine([evaluator], [b], rounds=25)
    after = evaluator.losses([evaluator.best])[0]
    assert after < 0.3 * before
    for schedule in evaluator.records:
        assert b.holds([round(r * TOKENS) for r in schedule])


def test_never_worse_and_never_twice():
    b = limit(0.4)
    start = tuple(b.harden(torch.linspace(1, 0, LAYERS)))
    # It starts at the optimum.
    evaluator = Known(start)
    evaluator.losses([start])
    refine([evaluator], [b], rounds=6)
    assert evaluator.best == start
    whole = [schedule for schedule, n in evaluator.asked if n == 8]
    assert len(whole) == len(set(whole))


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_costs_no_more_than_it_says(rounds):
    b, data = limit(0.4), 8 * 4
    evaluator = Known([1.0] * LAYERS)
    evaluator.losses([tuple(b.harden(torch.linspace(1, 0, LAYERS)))])
    refine([evaluator], [b], rounds)
    assert evaluator.passes - data == rounds * data


@pytest.mark.parametrize("passes", [0, 31, 100, 300])
def test_never_costs_more_than_allowed(passes):
    b, data = limit(0.4), 8 * 4
    evaluator = Known([1.0] * LAYERS)
    evaluator.losses([tuple(b.harden(torch.linspace(1, 0, LAYERS)))])
    refine([evaluator], [b], 50, passes=passes)
    assert passes - data < evaluator.passes - data <= passes


def test_neighbours_learn_from_each_other():
    """A schedule that only the larger budget has found comes down to the smaller one.

    It does so as if by itself.
    """
    small, large = limit(0.3), limit(0.5)
    target = torch.tensor([1.0, 1, 1, 1, 0.9, 0, 0, 0, 0, 0], dtype=torch.float64)
    evaluators = [Known(small.harden(target)), Known(large.harden(target))]
    evaluators[0].losses(
        [tuple(small.harden(torch.full((LAYERS,), 0.5).index_fill(0, torch.tensor([0]), 1.0)))]
    )
    evaluators[1].losses([tuple(large.harden(target))])
    refine(evaluators, [small, large], 2)
    assert evaluators[0].losses([evaluators[0].best])[0] < 0.1


def test_where_nothing_is_to_be_gained_nothing_is_spent():
    """Of two budgets, one is at its optimum, 0: the other gets nearly all of the rounds."""
    small, large = limit(0.3), limit(0.8)
    flat = torch.full((LAYERS,), 0.6).index_fill(0, torch.tensor([0]), 1.0)
    evaluators = [
        Known(small.harden(torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0, 0, 0]))),
        Known(large.harden(flat)),
    ]
    for evaluator, b in zip(evaluators, (small, large), strict=True):
        evaluator.losses([tuple(b.harden(flat))])
    refine(evaluators, [small, large], 6)
    assert len(evaluators[0].records) >= 10 > 4 >= len(evaluators[1].records)


def test_stops_when_every_schedule_has_been_measured():
    """One visual token in two layers: two schedules in all."""
    cost = CostModel(Dimensions(2, 32, 4, 2, 8, 56, 60))
    b = Budget(0.9, cost, torch.tensor([1]), torch.tensor([9]))
    evaluator = Known([1.0, 1.0])
    evaluator.losses([(1.0, 0.0)])
    refine([evaluator], [b], 50)
    assert set(evaluator.records) == {(1.0, 0.0)}


def test_a_cut_stays_a_cut_when_the_budget_is_filled():
    b = limit(0.6)
    cut = torch.tensor([[1.0, 0.5, 0.4, 0.3, 0.2, 0.2, 0, 0, 0, 0]], dtype=torch.float64)
    (grown,) = fit(cut, b)
    assert (grown[6:] == 0).all() and (grown >= cut[0]).all() and 0 <= float(b.slack(grown)) < 1e-3
    (scaled,) = fit(cut, b, hold_cuts=False)
    assert (scaled[6:] > 0).all() and 0 <= float(b.slack(scaled)) < 1e-3
    torch.testing.assert_close(
        (1 - scaled) / (1 - cut[0]).clamp(min=1e-9), (1 - scaled[1]) / 0.5 * (cut[0] < 1).double()
    )


def test_same_seed_same_moves():
    b = limit(0.4)
    evaluators = [Known([1.0] * LAYERS) for _ in range(3)]
    for evaluator, seed in zip(evaluators, (1, 1, 2), strict=True):
        evaluator.losses([tuple(b.harden(torch.linspace(1, 0, LAYERS)))])
        refine([evaluator], [b], 2, seed)
    assert evaluators[0].asked == evaluators[1].asked != evaluators[2].asked


def test_search_is_better_for_it_and_other_kernels_keep_their_form(llava):
    batches = [batch(images=(1, 1, 1, 1), text=(9,) * 4, before=(2,) * 4, seed=s) for s in range(4)]
    plain, refined = (
        vispco.search(
            llava, batches, budgets=[0.4], refinement=n, start=vispco.Gradient(steps=2)
        ).points[0]
        for n in (0, 4)
    )
    assert refined.loss <= plain.loss and refined.share <= 0.4
    single = vispco.search(
        llava, batches, kernel="single_layer", budgets=[0.4], start=vispco.Gradient(steps=2)
    ).points[0]
    # One step, and the tokens that filling up the budget adds before it.
    assert len(single.config.steps) <= 2


def test_refuses_a_negative_number_of_rounds(llava):
    with pytest.raises(ValueError, match="refinement must be at least 0 rounds, got -1"):
        vispco.search(llava, [batch()], budgets=[0.5], refinement=-1)
