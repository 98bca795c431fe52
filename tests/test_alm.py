"""The augmented Lagrangian.

Updates by hand, closed-form optima with multipliers, KKT conditions on random problems.
"""

import json
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from vispco.alm import AugmentedLagrangian, minimise

torch.set_num_threads(1)


def point(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def solve(objective, slack, start, **options):
    """Minimise to high accuracy; returns (x, multipliers, result)."""
    x = point(*start)
    alm = AugmentedLagrangian(**{"epsilon": 1e-7, **options})
    result = minimise(lambda: objective(x), lambda: slack(x), [x], alm, tolerance=1e-6)
    assert result.converged
    return x.tolist(), alm.multiplier, result


# ---- phi and the updates, by hand ----------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "w", "lam", "c", "phi", "new_w", "violation"),
    [
        # Inactive: nothing happens.
        ("inequality", 0.0, 2.0, 3.0, 10.0, 0.0, 0.0),
        # z = 6
        ("inequality", 0.0, 2.0, -3.0, 10 + 36 / 4, 6.0, 3.0),
        # z = 7
        ("inequality", 1.0, 2.0, -3.0, 10 + (49 - 1) / 4, 7.0, 3.0),
        # z = 1/2: met, not yet settled
        ("inequality", 1.0, 2.0, 0.25, 10 + (0.25 - 1) / 4, 0.5, 0.25),
        # z = 9
        ("inequality", 3.0, 2.0, -3.0, 10 + (81 - 9) / 4, 9.0, 3.0),
        # z = 0, w / lambda = 1/2
        ("inequality", 1.0, 2.0, 4.0, 10 - 1 / 4, 0.0, 0.5),
        ("equality", 0.0, 2.0, 3.0, 10 + 9.0, -6.0, 3.0),
        ("equality", 1.0, 2.0, -3.0, 10 + 3 + 9.0, 7.0, 3.0),
        ("equality", -1.0, 0.5, 2.0, 10 + 2 + 1.0, -2.0, 2.0),
    ],
)
def test_loss_and_update_by_hand(kind, w, lam, c, phi, new_w, violation):
    alm = AugmentedLagrangian(kind=kind, multiplier=w, penalty=lam)
    assert alm.loss(torch.tensor(10.0), torch.tensor([c])).item() == pytest.approx(phi)
    assert alm.loss(torch.tensor(10.0), torch.tensor(c)).shape == ()
    alm.update(torch.tensor([c]))
    assert alm.multiplier == (new_w,) and alm.violation == (violation,) and alm.penalty == (lam,)


@given(
    st.sampled_from(["inequality", "equality"]),
    st.floats(0, 10),
    st.floats(0.1, 100),
    st.floats(-5, 5),
)
def test_the_gradient_of_phi_is_that_of_the_lagrangian_at_the_new_multiplier(kind, w, lam, c):
    alm = AugmentedLagrangian(kind=kind, multiplier=w, penalty=lam)
    slack = point(c)
    alm.loss(torch.tensor(0.0), slack).backward()
    alm.update(slack)
    assert slack.grad.item() == pytest.approx(-alm.multiplier[0], abs=1e-9)


def test_penalty_grows_only_where_the_violation_did_not_shrink_enough():
    alm = AugmentedLagrangian(
        3, "equality", penalty=(1.0, 2.0, 4.0), alpha=3, beta=0.5, epsilon=0.01, max_penalty=15
    )
    alm.update([1.0, 1.0, 1.0])
    # Nothing to compare with yet.
    assert alm.penalty == (1, 2, 4)
    alm.update([0.5, -0.49, 0.9])
    # Exactly beta counts as too little.
    assert alm.penalty == (3, 2, 12)
    alm.update([0.5, 0.009, 0.9])
    # Capped.
    assert alm.penalty == (9, 2, 15)
    alm.update([0.5, 0.009, 0.9])
    # Within epsilon: left alone though it did not shrink.
    assert alm.penalty == (15, 2, 15)
    assert alm.multiplier == pytest.approx(
        (-1 - 0.5 - 3 * 0.5 - 9 * 0.5, -2 + 0.98 - 0.018 - 0.018, -4 - 3.6 - 10.8 - 13.5)
    )


def test_multiplier_step_uses_the_penalty_that_phi_was_minimised_with():
    alm = AugmentedLagrangian(kind="equality", penalty=1.0, alpha=10)
    alm.update(1.0)
    # Stuck: the penalty becomes 10, but after the step of 1.
    alm.update(1.0)
    assert alm.multiplier == (-2,) and alm.penalty == (10,)


def test_a_violation_of_epsilon_is_no_violation():
    alm = AugmentedLagrangian(kind="equality", epsilon=0.25)
    for _ in range(3):
        alm.update(0.25)
    assert alm.penalty == (1,)


def test_an_inactive_inequality_never_raises_its_penalty():
    alm = AugmentedLagrangian()
    for slack in (0.3, 0.3, 0.3):
        alm.update(slack)
        assert alm.satisfied(slack)
    assert alm.penalty == (1,) and alm.multiplier == (0,) and alm.violation == (0,)


@pytest.mark.parametrize(
    ("slack", "satisfied"),
    [(0.005, True), (-0.005, True), (0.01, True), (-0.01, True), (0.02, False), (-0.02, False)],
)
def test_satisfied_equality(slack, satisfied):
    assert AugmentedLagrangian(kind="equality", epsilon=0.01).satisfied(slack) is satisfied


@pytest.mark.parametrize(
    ("w", "slack", "satisfied"),
    [
        (0.0, 5.0, True),
        (0.0, -0.005, True),
        (0.0, -0.02, False),
        (1.0, 5.0, False),
        (1.0, 0.005, True),
        (0.001, 5.0, True),
    ],
)
def test_satisfied_inequality_means_feasible_and_complementary(w, slack, satisfied):
    assert AugmentedLagrangian(multiplier=w, epsilon=0.01).satisfied(slack) is satisfied


def test_mixed_kinds():
    alm = AugmentedLagrangian(
        2, kind=("inequality", "equality"), multiplier=(1.0, 1.0), penalty=(2.0, 4.0)
    )
    phi = alm.loss(torch.tensor(0.0), torch.tensor([4.0, 0.5]))
    assert phi.item() == pytest.approx(-1 / 4 + (4 / 2 * 0.25 - 0.5))
    alm.update([4.0, 0.5])
    assert alm.multiplier == (0, -1)


def test_loss_follows_the_precision_of_the_slack():
    for dtype in (torch.float32, torch.float64):
        objective, slack = torch.tensor([1.0, -0.1], dtype=dtype)
        assert AugmentedLagrangian(penalty=1e6).loss(objective, slack).dtype == dtype


# ---- state ---------------------------------------------------------------------------------------
@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), max_size=8), st.integers(0, 8))
def test_a_saved_state_continues_to_the_bit(slacks, cut):
    def fresh():
        return AugmentedLagrangian(
            2, ("inequality", "equality"), multiplier=0.3, penalty=0.7, alpha=1.7
        )

    straight, first, second = fresh(), fresh(), fresh()
    for slack in slacks:
        straight.update(slack)
    for slack in slacks[:cut]:
        first.update(slack)
    state = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    second.load_state_dict(state)
    assert second.state_dict() == state
    for slack in slacks[cut:]:
        second.update(slack)
    assert second.state_dict() == straight.state_dict()
    assert second.violation == straight.violation


def test_a_state_does_not_share_memory():
    alm = AugmentedLagrangian()
    state = alm.state_dict()
    alm.update(-1.0)
    start = torch.ones(1, dtype=torch.float64)
    other = AugmentedLagrangian(multiplier=start)
    start += 1
    assert other.multiplier == (1,)
    assert state == {
        "kind": ["inequality"],
        "multiplier": [0.0],
        "penalty": [1.0],
        "violation": [None],
    }
    assert alm.state_dict()["violation"] == [1.0]


# ---- closed forms --------------------------------------------------------------------------------
def distance(x):
    """Squared distance to (2, 1)."""
    return (x[0] - 2) ** 2 + (x[1] - 1) ** 2


@pytest.mark.parametrize("penalty", [0.1, 1.0, 100.0])
def test_active_linear_constraint(penalty):
    for kind in ("inequality", "equality"):
        x, w, _ = solve(distance, lambda x: 1 - x.sum(), (0.0, 0.0), kind=kind, penalty=penalty)
        assert x == pytest.approx([1, 0], abs=1e-5) and w == pytest.approx((2,), abs=1e-4)


def test_inactive_inequality_has_no_multiplier_even_if_it_started_with_one():
    x, w, _ = solve(distance, lambda x: 10 - x.sum(), (0.0, 0.0), multiplier=5.0)
    assert x == pytest.approx([2, 1], abs=1e-5) and w == (0,)


def test_equality_pulls_from_either_side():
    x, w, _ = solve(distance, lambda x: 5 - x.sum(), (0.0, 0.0), kind="equality")
    assert x == pytest.approx([3, 2], abs=1e-5) and w == pytest.approx((-2,), abs=1e-4)


@pytest.mark.parametrize("kind", ["inequality", "equality"])
def test_lowest_point_of_a_circle(kind):
    """min x + y on x^2 + y^2 = 2 (Nocedal & Wright, example 12.1): (-1, -1), multiplier 1/2."""
    x, w, _ = solve(lambda x: x.sum(), lambda x: 2 - (x**2).sum(), (0.5, -0.3), kind=kind)
    assert x == pytest.approx([-1, -1], abs=1e-5) and w == pytest.approx((0.5,), abs=1e-4)


def rosenbrock(x):
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def test_rosenbrock_on_discs():
    x, w, _ = solve(rosenbrock, lambda x: 2.5 - (x**2).sum(), (0.0, 0.0))
    # The optimum is inside.
    assert x == pytest.approx([1, 1], abs=1e-3) and w == pytest.approx((0,), abs=1e-6)

    x, w, _ = solve(rosenbrock, lambda x: 1 - (x**2).sum(), (0.0, 0.0))
    a, b = x
    assert [a, b] == pytest.approx([0.78642, 0.61770], abs=1e-4) and a**2 + b**2 == pytest.approx(
        1, abs=1e-6
    )
    assert w[0] == pytest.approx((2 * (1 - a) + 400 * a * (b - a**2)) / (2 * a), abs=1e-3)
    # Both rows agree.
    assert w[0] == pytest.approx(-200 * (b - a**2) / (2 * b), abs=1e-3)


def test_rosenbrock_from_its_classical_start_takes_one_minimisation():
    """About 40 iterations, all within the first outer step."""
    x = point(-1.2, 1.0)
    result = minimise(
        lambda: rosenbrock(x), lambda: 9 - (x**2).sum(), [x], AugmentedLagrangian(), outer=1
    )
    assert result.converged and x.tolist() == pytest.approx([1, 1], abs=1e-4)


def test_mixed_constraints_together():
    """Nearest point to (2, 1, 3) with x + y + z = 3, z <= 1 (active) and x <= 5 (not)."""
    target = torch.tensor([2.0, 1.0, 3.0])
    x, w, _ = solve(
        lambda x: ((x - target) ** 2).sum(),
        lambda x: torch.stack([3 - x.sum(), 1 - x[2], 5 - x[0]]),
        (0.0, 0.0, 0.0),
        num_constraints=3,
        kind=("equality", "inequality", "inequality"),
    )
    assert x == pytest.approx([1.5, 0.5, 1], abs=1e-5) and w == pytest.approx((1, 3, 0), abs=1e-4)


def test_the_multiplier_is_the_price_of_budget():
    def best(budget):
        x, w, result = solve(lambda x: (x**-1).sum(), lambda x: budget - x.sum(), (0.2, 0.3))
        return result.history[-1].objective, w[0]

    (low, w), (high, _) = best(2.0), best(2.001)
    assert (low - high) / 0.001 == pytest.approx(w, rel=1e-2)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31 - 1), st.data())
@settings(max_examples=40)
def test_random_quadratic_programs_meet_the_kkt_conditions(n, m, seed, data):
    """min x'Qx/2 - b'x with A x <= d or A x = d, feasible by construction."""
    g = torch.Generator().manual_seed(seed)
    root, a = (torch.randn(k, n, generator=g, dtype=torch.float64) for k in (n, m))
    q, b = root.T @ root + torch.eye(n), torch.randn(n, generator=g, dtype=torch.float64) * 3
    kinds = [
        data.draw(st.sampled_from(["inequality", "equality"])) if j < n - 1 else "inequality"
        for j in range(m)
    ]
    room = torch.tensor([0.0 if kind == "equality" else 0.3 for kind in kinds], dtype=torch.float64)
    d = a @ torch.randn(n, generator=g, dtype=torch.float64) + room

    x = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    alm = AugmentedLagrangian(m, kinds, penalty=10.0, epsilon=1e-6)
    result = minimise(
        lambda: x @ q @ x / 2 - b @ x, lambda: d - a @ x, [x], alm, tolerance=1e-5, outer=200
    )
    assert result.converged
    with torch.no_grad():
        c, w = d - a @ x, torch.tensor(alm.multiplier, dtype=torch.float64)
        assert (q @ x - b + a.T @ w).abs().max() < 1e-4
        for kind, slack, price in zip(kinds, c, w, strict=True):
            if kind == "equality":
                assert abs(slack) < 1e-5
            else:
                assert slack > -1e-5 and price >= 0 and min(slack, price) < 1e-4


# ---- the solver ----------------------------------------------------------------------------------
def test_history_records_every_outer_step():
    x = point(0.0, 0.0)
    alm = AugmentedLagrangian(epsilon=1e-7, penalty=1.0, alpha=4.0)
    result = minimise(lambda: distance(x), lambda: 1 - x.sum(), [x], alm)
    first, last = result.history[0], result.history[-1]
    assert first.multiplier == (0,) and first.penalty == (1,)
    # The minimiser of phi_0.
    assert first.slack == pytest.approx((-1,)) and first.objective == pytest.approx(0.5)
    assert last.objective == pytest.approx(2, abs=1e-5) and last.slack == pytest.approx(
        (0,), abs=1e-6
    )
    assert max(step.gradient_norm for step in result.history) < 1e-5
    violations = [abs(step.slack[0]) for step in result.history]
    assert all(b < a for a, b in zip(violations, violations[1:], strict=False))


def test_feasible_is_not_yet_optimal():
    """One short gradient step: the slack is fine, the gradient at the point reached is not."""
    x = point(0.0, 0.0)
    result = minimise(
        lambda: distance(x),
        lambda: 10 - x.sum(),
        [x],
        AugmentedLagrangian(),
        inner=1,
        outer=2,
        optimizer=torch.optim.SGD([x], lr=0.1),
    )
    assert not result.converged and len(result.history) == 2
    # It was 4 before the step.
    assert result.history[0].gradient_norm == pytest.approx(4 * 0.8)
    assert x.tolist() == pytest.approx([0.72, 0.36])


@pytest.mark.parametrize(("tolerance", "converged"), [(2.0, True), (1.99, False)])
def test_a_gradient_at_the_tolerance_is_small_enough(tolerance, converged):
    x = point(0.0, 0.0)
    result = minimise(
        lambda: 2 * x[0] - x[1],
        lambda: 1 + 0 * x,
        [x],
        AugmentedLagrangian(2),
        inner=1,
        outer=1,
        tolerance=tolerance,
        optimizer=torch.optim.SGD([x], lr=0.0),
    )
    assert result.history[0].gradient_norm == 2 and result.converged is converged


@pytest.mark.parametrize("tolerance", [1e-3, 1e-9])
def test_the_inner_minimisation_is_as_accurate_as_asked(tolerance):
    x = point(0.0, 0.0)
    result = minimise(
        lambda: (x.exp() - x * torch.tensor([2.0, 5.0])).sum(),
        lambda: 9 - x.sum(),
        [x],
        AugmentedLagrangian(),
        outer=1,
        tolerance=tolerance,
    )
    assert result.converged and result.history[0].gradient_norm <= tolerance
    assert x.tolist() == pytest.approx([math.log(2), math.log(5)], abs=tolerance)


def test_any_torch_optimiser_will_do():
    x = point(0.0, 0.0)
    alm = AugmentedLagrangian(epsilon=1e-3, penalty=5.0)
    result = minimise(
        lambda: distance(x),
        lambda: 1 - x.sum(),
        [x],
        alm,
        inner=200,
        tolerance=1e-2,
        optimizer=torch.optim.Adam([x], lr=0.02),
    )
    assert result.converged
    assert x.tolist() == pytest.approx([1, 0], abs=5e-3) and alm.multiplier == pytest.approx(
        (2,), abs=2e-2
    )


def test_it_says_when_it_did_not_converge():
    x = point(0.0)
    result = minimise(
        lambda: (x**2).sum(), lambda: x.sum() * 0 - 1, [x], AugmentedLagrangian(), outer=3
    )
    # There is no feasible point.
    assert not result.converged and len(result.history) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["objective", "slack"])
@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD])
def test_nan_names_the_outer_step_and_restores_the_parameters(bad, where, optimizer):
    x, ends = point(0.0, 0.0), []

    class Recording(AugmentedLagrangian):
        def update(self, slack):
            super().update(slack)
            ends.append((x.tolist(), self.state_dict()))

    # Breaks in the third outer step, as soon as x moves.
    def broken(name):
        return bad if where == name and len(ends) == 2 and x.tolist() != ends[-1][0] else 0

    alm = Recording(epsilon=1e-9)
    options = {"optimizer": optimizer([x], lr=0.05), "inner": 20} if optimizer else {}
    with pytest.raises(
        FloatingPointError, match=f"outer step 2: objective .*{bad}.*smaller learning rate"
    ):
        minimise(
            lambda: distance(x) + broken("objective"),
            lambda: 1 - x.sum() + broken("slack"),
            [x],
            alm,
            **options,
        )
    assert (x.tolist(), alm.state_dict()) == ends[-1]


def test_parameters_need_not_be_one_tensor():
    x, y = point(0.0), point(0.0)
    alm = AugmentedLagrangian(epsilon=1e-7)
    minimise(
        lambda: (x - 2).square().sum() + (y - 1).square().sum(),
        lambda: 1 - x - y,
        iter([x, y]),
        alm,
    )
    assert [x.item(), y.item()] == pytest.approx([1, 0], abs=1e-5)


# ---- errors --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_constraints": 0}, "num_constraints must be at least 1, got 0"),
        ({"kind": "at most"}, "kind must be 'inequality' or 'equality'.* got 'at most'"),
        ({"num_constraints": 2, "kind": ["equality"]}, r"one each \(2\), got \['equality'\]"),
        ({"penalty": 0.0}, r"penalty must be positive \(phi divides by it\), got 0.0"),
        ({"penalty": -1.0}, "penalty must be positive"),
        ({"penalty": math.nan}, "penalty must be finite"),
        ({"num_constraints": 2, "penalty": (1.0, 0.0)}, "penalty must be positive"),
        (
            {"num_constraints": 2, "penalty": (1.0, 1.0, 1.0)},
            r"penalty must be one number per constraint \(2\)",
        ),
        ({"multiplier": -1.0}, "multiplier must be >= 0 for inequalities, got -1.0"),
        ({"multiplier": math.inf}, "multiplier must be finite"),
        ({"alpha": 0.5}, "alpha must be at least 1, got 0.5"),
        ({"alpha": math.inf}, "alpha must be at least 1, got inf"),
        ({"beta": 0.0}, r"beta must be in \(0, 1\], got 0.0"),
        ({"beta": 1.5}, r"beta must be in \(0, 1\]"),
        ({"epsilon": -1.0}, "epsilon must be at least 0, got -1.0"),
        ({"epsilon": math.inf}, "epsilon must be at least 0, got inf"),
        ({"epsilon": math.nan}, "epsilon must be at least 0"),
        (
            {"penalty": 10.0, "max_penalty": 5.0},
            "max_penalty must be at least the penalty, got 5.0",
        ),
    ],
)
def test_constructor_errors(options, message):
    with pytest.raises(ValueError, match=message):
        AugmentedLagrangian(**options)


def test_bounds_belong_to_the_ranges():
    alm = AugmentedLagrangian(alpha=1, beta=1, epsilon=0, penalty=0.1, max_penalty=0.1)
    for slack in (-1.0, -1.0):
        alm.update(slack)
    # In double precision; it never grows.
    assert alm.penalty == (0.1,) and alm.multiplier == (0.2,)
    assert alm.satisfied(0.0) and not alm.satisfied(-1e-9) and not alm.satisfied(2.0)


def test_a_negative_multiplier_is_fine_for_an_equality():
    assert AugmentedLagrangian(kind="equality", multiplier=-2.0).multiplier == (-2,)


def test_slack_errors():
    alm = AugmentedLagrangian(2)
    for call in (alm.update, alm.satisfied, lambda c: alm.loss(torch.tensor(0.0), torch.tensor(c))):
        with pytest.raises(
            ValueError, match=r"slack must be one number per constraint \(2\), got .*\[1\.0?\]"
        ):
            call([1.0])
    before = alm.state_dict()
    with pytest.raises(FloatingPointError, match="slack must be finite, got"):
        alm.update([math.nan, 1.0])
    assert alm.state_dict() == before


def test_state_errors():
    alm = AugmentedLagrangian()
    state = alm.state_dict()
    with pytest.raises(
        ValueError,
        match=r"^state must be a dict of kind, multiplier, penalty, violation, got \['kind'\]",
    ):
        alm.load_state_dict({"kind": ["inequality"]})
    with pytest.raises(
        ValueError, match=r"state's kind must be \('inequality',\), got \['equality'\]"
    ):
        alm.load_state_dict({**state, "kind": ["equality"]})
    for name in ("multiplier", "penalty", "violation"):
        with pytest.raises(ValueError, match=f"^{name} must be one number per constraint"):
            alm.load_state_dict({**state, name: [1.0, 2.0]})


def test_minimise_needs_parameters():
    with pytest.raises(
        ValueError,
        match="^minimise needs at least one parameter tensor that requires a gradient, got none$",
    ):
        minimise(lambda: None, lambda: None, [], AugmentedLagrangian())
