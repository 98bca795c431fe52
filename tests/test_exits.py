"""The exit of a plan: what is moved holds the budget, and is what the questions like better."""

import torch
from hypothesis import given, strategies as st

from vispco import search, testbed
from vispco.budget import Budget
from vispco.flops import CostModel, Dimensions
from vispco.solvers.exits import exit_of, walked, with_exit
from vispco.solvers.plan import fill, random_plans, steps
from vispco.solvers.profiled import Profiled

LAYERS, TOKENS, DROPS = 10, 64, 4


def limit(budget, first_layer=1):
    cost = CostModel(Dimensions(LAYERS, 32, 4, 2, 8, 56, 60))
    return Budget(budget, cost, torch.tensor([TOKENS]), torch.tensor([9]), first_layer)


@st.composite
def planned(draw):
    """A budget, and a plan on it."""
    own = limit(draw(st.floats(0.25, 0.9)), draw(st.integers(0, 2)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    found = fill(random_plans(own, 8, DROPS, generator), own, generator)
    return own, found[0]


@given(planned(), st.integers(-1, LAYERS + 1))
def test_a_moved_exit_holds_the_budget(given_, layer):
    own, plan = given_
    moved = with_exit(plan, layer, own, DROPS)
    if moved is None:
        return
    assert own.holds(moved.tolist()) and (moved[1:] <= moved[:-1]).all()
    assert (moved[: own.first_layer] == TOKENS).all() and (moved[layer:] == 0).all()
    assert len(steps(moved.tolist(), TOKENS)) <= DROPS
    # Nothing is left to give back: one more token anywhere is too much, or above the drop before.
    before = [TOKENS, *moved.tolist()]
    for at in steps(moved.tolist(), TOKENS):
        # All layers of a step rise together.
        last = next((k for k in range(at, LAYERS) if moved[k] != moved[at]), LAYERS)
        more = moved.clone()
        more[at:last] += 1
        assert at == layer or more[at] > before[at] or not own.holds(more.tolist())


@given(planned())
def test_there_is_an_exit_wherever_one_can_be(given_):
    """Early drops pay for any exit that all of the tokens reach within the budget, and for more."""
    own, plan = given_
    for layer in range(own.first_layer, LAYERS + 1):
        whole = [TOKENS] * layer + [0] * (LAYERS - layer)
        if own.holds(whole):
            assert with_exit(plan, layer, own, DROPS) is not None
    assert with_exit(plan, own.first_layer - 1, own, DROPS) is None
    assert with_exit(plan, LAYERS + 1, own, DROPS) is None
    assert with_exit(plan, LAYERS, own, 0) is None


@given(planned(), st.integers(0, LAYERS), st.integers(0, 99))
def test_the_walk_finds_the_best_exit_of_a_valley(given_, best, noise):
    """Where the loss rises on both sides of one exit, nothing of all exits is better."""
    own, plan = given_

    def loss(counts):
        return 1 + abs(exit_of(counts) - best)

    found = walked(plan, own, loss, DROPS)
    assert own.holds(found.tolist()) and loss(found) <= loss(plan)
    # All that the walk can come past, one layer after the other.
    at, known = plan, [plan]
    step = 1 if best > exit_of(plan) else -1
    while (at := with_exit(at, exit_of(at) + step, own, DROPS)) is not None:
        known.append(at)
        if exit_of(at) in (0, LAYERS):
            break
    assert loss(found) == min(map(loss, known))


@given(planned())
def test_what_loses_nothing_stays(given_):
    own, plan = given_
    asked = []

    def loss(counts):
        asked.append(counts)
        return 0.001

    assert torch.equal(walked(plan, own, loss, DROPS), plan) and len(asked) == 1


def test_a_search_tries_other_exits_on_the_profile_s_part():
    """Without the rule, each budget's plan is measured once, and nothing else."""
    model, _ = testbed.load("testbed-llava")
    batches = testbed.batches("calibration", n=16, batch_size=8)

    def found(profile=None, rule=True):
        start = Profiled(questions=8, measurements=2, rule=rule, profile=profile)
        return search(model, batches, budgets=[0.3], start=start, refinement=0)

    profile = found().profile
    compared, plain = found(profile), found(profile, rule=False)
    # The full model and the plan.
    assert plain.meta["forward_passes"] == 16 * 2
    # The ramp, too, and on 8 questions the plan and an exit or more.
    assert compared.meta["forward_passes"] >= 16 * 3 + 8 * 2
    assert compared[0].loss <= plain[0].loss and max(compared[0].share, plain[0].share) <= 0.3
