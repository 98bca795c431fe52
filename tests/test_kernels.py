"""Kernel functions.

Bounds and monotonicity for any theta, gradients, and the published formulas by hand.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from vispco.config import PruningConfig
from vispco.kernels import Exponential, Kernel, Linear, Monotone, MultiStep, PSigmoid, SingleLayer
from vispco.registry import KERNELS, list_kernels

torch.set_num_threads(1)
NAMES = list_kernels()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@st.composite
def kernels(draw):
    """A registered kernel of any size, and an arbitrary theta for it."""
    num_layers = draw(st.integers(1, 40))
    first_layer = draw(st.integers(0, min(3, num_layers - 1)))
    kernel = KERNELS.get(draw(st.sampled_from(NAMES)))(num_layers, first_layer)
    theta = draw(
        st.lists(
            st.floats(-20, 20, width=32),
            min_size=kernel.num_parameters,
            max_size=kernel.num_parameters,
        )
    )
    return kernel, torch.tensor(theta)


def test_the_papers_five_and_a_free_one_are_registered():
    assert {"single_layer", "p_sigmoid", "exponential", "linear", "multi_step", "monotone"} <= set(
        NAMES
    )


@given(kernels())
@settings(max_examples=300)
def test_any_theta_is_a_valid_schedule_with_finite_gradients(drawn):
    kernel, theta = drawn
    theta.requires_grad_()
    ratios = kernel(theta)
    assert ratios.shape == (kernel.num_layers,)
    assert ratios.min() >= 0 and ratios.max() <= 1
    assert (ratios.diff() <= 0).all()
    assert (ratios[: kernel.first_layer] == 1).all()
    ratios.sum().backward()
    assert theta.grad.isfinite().all()
    # Strict about rounding.
    assert PruningConfig("fastv", ratios.tolist()).num_layers == kernel.num_layers


@pytest.mark.parametrize("extreme", [-1e4, 1e4, -math.inf, math.inf])
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"monotone", "multi_step"}))
def test_saturated_theta_stays_a_schedule(name, extreme):
    kernel = KERNELS.get(name)(12)
    ratios = kernel(torch.full((kernel.num_parameters,), extreme))
    assert ratios.isfinite().all() and (ratios.diff() <= 0).all() and ratios[0] == 1


@given(st.sampled_from(NAMES), st.integers(1, 40), st.integers(0, 2))
def test_the_initial_theta_prunes_something_and_every_parameter_has_a_gradient(
    name, num_layers, first_layer
):
    kernel = KERNELS.get(name)(num_layers, min(first_layer, num_layers - 1))
    ratios = kernel()
    ratios.sum().backward()
    gradient = kernel.theta.grad
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    assert 0 < ratios[-1] < 1
    # The sum is one direction: a weighted one reaches every parameter.
    if num_layers >= 4:
        kernel.theta.grad = None
        (kernel() * torch.linspace(1, 3, num_layers) ** 2).sum().backward()
        assert (kernel.theta.grad != 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_where_smooth(name):
    kernel = KERNELS.get(name)(7, first_layer=2).double()
    theta = kernel.theta.detach() + torch.linspace(
        -0.1, 0.13, kernel.num_parameters, dtype=torch.float64
    )
    assert torch.autograd.gradcheck(kernel.schedule, theta.requires_grad_())


@given(
    st.sampled_from(NAMES),
    st.integers(0, 2**31 - 1),
    st.sampled_from([(), (1,), (4,), (2, 3), (0,)]),
)
def test_batched_theta_equals_a_loop(name, seed, shape):
    kernel = KERNELS.get(name)(9)
    theta = 3 * torch.randn(
        *shape, kernel.num_parameters, generator=torch.Generator().manual_seed(seed)
    )
    batched = kernel.schedule(theta)
    assert batched.shape == (*shape, 9)
    for one, row in zip(
        batched.reshape(-1, 9), theta.reshape(-1, kernel.num_parameters), strict=True
    ):
        torch.testing.assert_close(one, kernel.schedule(row), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_forward_is_the_schedule_of_its_own_theta(name):
    kernel = KERNELS.get(name)(8)
    assert torch.equal(kernel(), kernel.schedule(kernel.theta))
    assert [p.shape for p in kernel.parameters()] == [(kernel.num_parameters,)]
    # Computed in theta's precision.
    assert kernel.double()().dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_describe_is_plain_numbers(name):
    for value in KERNELS.get(name)(8).describe().values():
        assert all(isinstance(v, float) for v in (value if isinstance(value, list) else [value]))


def test_describe_names_one_number_or_several():
    assert SingleLayer(28).describe() == {"k": 14, "r": 0.5}
    assert MultiStep(4, steps=2).describe() == {
        "k": pytest.approx([1, 3]),
        "v": [0.5, 0.5],
        "r": 0.5,
    }


# ---- the formulas, by hand -----------------------------------------------------------------------
# Sigmoid: 3/4 and 1/5.
THETA = torch.tensor([math.log(3), -math.log(4)], dtype=torch.float64)


def by_hand(kernel, formula):
    i = range(kernel.num_layers)
    expected = [1.0 if j < kernel.first_layer else min(1, max(0, formula(j))) for j in i]
    got = kernel(THETA if kernel.num_parameters == 2 else THETA[1:])
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_p_sigmoid_formula():
    by_hand(PSigmoid(8), lambda i: 1 + (0.2 - 1) * sigmoid(i - 6))
    by_hand(PSigmoid(8, gamma=2.5), lambda i: 1 + (0.2 - 1) * sigmoid(2.5 * (i - 6)))
    by_hand(PSigmoid(8, first_layer=0), lambda i: 1 + (0.2 - 1) * sigmoid(i - 6))
    # half-way at i = k
    assert PSigmoid(8)(THETA)[6].item() == pytest.approx(0.6)


def test_single_layer_formula():
    by_hand(SingleLayer(8), lambda i: 1 + (0.2 - 1) * sigmoid(10 * (i - 6)))
    # k = 5.5: a clean step
    between = torch.tensor([math.log(5.5 / 2.5), -math.log(4)])
    assert [round(r, 1) for r in SingleLayer(8)(between).tolist()] == [1, 1, 1, 1, 1, 1, 0.2, 0.2]


def test_exponential_formula():
    by_hand(Exponential(8), lambda i: 0.2 * math.exp(-0.75 * i))
    by_hand(Exponential(8, first_layer=0), lambda i: 0.2 * math.exp(-0.75 * i))


def test_linear_formula():
    by_hand(Linear(8), lambda i: 0.2 - 0.2 * 0.75 * i)
    by_hand(Linear(8, first_layer=3), lambda i: 0.2 - 0.2 * 0.75 / 3 * i)
    by_hand(Linear(8, first_layer=0), lambda i: 0.2 - 0.2 * 0.75 * i)


@given(
    st.integers(1, 40),
    st.integers(0, 5),
    st.floats(-20, 20, width=32),
    st.floats(-20, 20, width=32),
)
def test_linear_never_loses_its_gradient(num_layers, first_layer, a, b):
    kernel = Linear(num_layers, min(first_layer, num_layers - 1))
    theta = torch.tensor([a, b], dtype=torch.float64, requires_grad=True)
    kernel(theta).sum().backward()
    assert theta.grad[1] > 0


def test_multi_step_is_the_papers_form_without_learning():
    kernel = MultiStep(12, steps=4, gamma=3, learn_positions=False, learn_weights=False)
    by_hand(
        kernel,
        lambda i: 1 - sum(0.8 / 4 * sigmoid(3 * (i - (2 * j - 1) * 12 / 8)) for j in range(1, 5)),
    )


def test_multi_step_starts_as_the_papers_form():
    fixed, free = MultiStep(12, learn_positions=False, learn_weights=False), MultiStep(12)
    torch.testing.assert_close(free(), fixed())
    assert free.describe()["v"] == pytest.approx([1 / 3] * 3)
    assert free.describe()["k"] == pytest.approx([2, 6, 10])


def test_multi_step_learned_formula():
    theta = torch.tensor([math.log(3), 0.0, math.log(2), 0.0, -math.log(4)], dtype=torch.float64)
    # k = 6 and 4, v = 2/3 and 1/3, r = 1/5
    got = MultiStep(8, steps=2)(theta)
    expected = [
        1 - 0.8 * (2 / 3 * sigmoid(10 * (i - 6)) + 1 / 3 * sigmoid(10 * (i - 4))) for i in range(8)
    ]
    torch.testing.assert_close(got, torch.tensor([1.0, *expected[1:]], dtype=torch.float64))


@given(st.integers(1, 5), st.floats(-5, 5), st.floats(-5, 5), st.integers(2, 30))
def test_multi_step_contains_single_layer(steps, a, b, num_layers):
    multi, single = MultiStep(num_layers, steps=steps), SingleLayer(num_layers)
    # Any: they sum to 1.
    weights = torch.linspace(-2, 2, steps if multi.learn_weights else 0)
    theta = torch.cat([torch.full((steps,), a), weights, torch.tensor([b])])
    torch.testing.assert_close(multi(theta), single(torch.tensor([a, b])), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("positions", "weights", "steps", "size"),
    [
        (True, True, 3, 7),
        (True, False, 3, 4),
        (False, True, 3, 4),
        (False, False, 3, 1),
        (True, True, 1, 2),
        (False, True, 1, 1),
    ],
)
def test_multi_step_has_no_idle_parameters(positions, weights, steps, size):
    kernel = MultiStep(12, steps=steps, learn_positions=positions, learn_weights=weights)
    assert kernel.num_parameters == size
    (kernel() * torch.linspace(1, 3, 12) ** 2).sum().backward()
    assert (kernel.theta.grad != 0).all()


def test_monotone_formula():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    got = Monotone(4)(p.log())
    torch.testing.assert_close(got, torch.tensor([1.0, 0.9, 0.7, 0.4], dtype=torch.float64))
    torch.testing.assert_close(
        Monotone(3, first_layer=0)(p.log()), torch.tensor([0.9, 0.7, 0.4]).double()
    )


@given(st.integers(1, 12), st.integers(0, 2**31 - 1))
def test_monotone_reaches_every_schedule(num_layers, seed):
    drops = (
        torch.rand(num_layers + 1, generator=torch.Generator().manual_seed(seed)).double() + 0.01
    )
    drops /= drops.sum()
    kernel = Monotone(num_layers, first_layer=0)
    torch.testing.assert_close(kernel(drops.log()), 1 - drops.cumsum(0)[:-1])


# ---- where a search starts, and what is deployed -------------------------------------------------
def staircase(num_layers, *steps):
    """Ratios that fall to `ratio` before `layer`, for each (layer, ratio)."""
    return [min([1, *(ratio for layer, ratio in steps if i >= layer)]) for i in range(num_layers)]


def rows(ratios):
    return [pytest.approx(row, abs=1e-3) for row in ratios]


@pytest.mark.parametrize("name", NAMES)
def test_only_layer_0_is_whole_by_default(name):
    kernel = KERNELS.get(name)(8)
    assert kernel.first_layer == 1 and kernel.settled(kernel.initial() - 5)[1] < 1


@pytest.mark.parametrize(("make", "k"), [(Exponential, 1 / 28), (Linear, sigmoid(2) / 28)])
def test_losses_from_layer_to_layer_start_so_that_some_tokens_reach_the_end(make, k):
    assert make(27).describe() == {"k": pytest.approx(k), "r": pytest.approx(sigmoid(2))}


@pytest.mark.parametrize("first_layer", [1, 3])
def test_a_search_for_one_step_starts_before_each_layer(first_layer):
    kernel = SingleLayer(8, first_layer)
    first, *others = kernel.starts()
    assert torch.equal(first, kernel.initial())
    assert [kernel.settled(theta).tolist() for theta in others] == rows(
        staircase(8, (layer, 0.5)) for layer in range(first_layer, 8)
    )


def test_a_place_before_layer_0_is_as_near_to_it_as_a_sigmoid_comes():
    starts = PSigmoid(5, first_layer=0).starts()
    assert (5 * starts[1:, 0].sigmoid()).tolist() == pytest.approx([0.25, 0.5, 1.5, 2.5, 3.5])
    assert starts.shape == (6, 2) and (starts[:, 1] == 0).all()


@pytest.mark.parametrize("weights", [True, False])
def test_a_search_for_steps_starts_at_one_layer_or_drops_everything_at_a_second(weights):
    kernel = MultiStep(12, steps=3, learn_weights=weights)
    starts = kernel.starts()
    assert torch.equal(starts[0], kernel.initial()) and starts.dtype == torch.float32
    single = [staircase(12, (layer, 0.5)) for layer in range(1, 12)]
    # Eight of the eleven.
    spread = [1, 2, 4, 5, 7, 8, 10, 11]
    double = [staircase(12, (a, 1 / 3), (b, 0)) for a, b in itertools.combinations(spread, 2)]
    assert kernel.settled(starts)[1:].tolist() == rows(single + double)


def test_fewer_steps_or_layers_have_fewer_starts():
    assert MultiStep(12, steps=1).settled(MultiStep(12, steps=1).starts()[1:]).tolist() == rows(
        staircase(12, (layer, 0.5)) for layer in range(1, 12)
    )
    short = MultiStep(4, steps=2)
    assert short.settled(short.starts()[4:]).tolist() == rows(
        staircase(4, (a, 0.5), (b, 0)) for a, b in ((1, 2), (1, 3), (2, 3))
    )
    fixed = MultiStep(12, learn_positions=False)
    assert torch.equal(fixed.starts(), fixed.initial()[None])


def test_a_free_search_starts_at_equal_drops_or_at_a_large_one_before_each_layer():
    kernel = Monotone(6, first_layer=2)
    large, small = math.exp(3) / (math.exp(3) + 4), 1 / (math.exp(3) + 4)
    drops = -kernel.schedule(kernel.starts())[:, 1:].diff()  # (5, 4), before layers 2 to 5
    expected = torch.full((5, 4), small) + (large - small) * torch.eye(5, 4).roll(1, 0)
    expected[0] = 1 / 5
    torch.testing.assert_close(drops, expected)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_deployed_needs_no_gradient_and_is_of_its_own_theta_by_default(name):
    kernel = KERNELS.get(name)(8)
    with torch.no_grad():
        kernel.theta += torch.linspace(-1, 1, kernel.num_parameters)
    own, other = kernel.settled(), torch.full_like(kernel.theta, 0.3)
    assert not own.requires_grad and torch.equal(own, kernel.settled(kernel.theta))
    assert not torch.equal(own, kernel.settled(other))
    if not kernel.stairs:
        assert torch.equal(own, kernel()) and torch.equal(kernel.settled(other), kernel(other))


def test_steps_are_deployed_sharp_and_learned_gently():
    kernel = SingleLayer(8, gamma=0.5)
    gentle = kernel()
    assert kernel.settled(
        torch.tensor([math.log(5.2 / 2.8), -math.log(4)])
    ).tolist() == pytest.approx(staircase(8, (6, 0.2)))
    with pytest.raises(ValueError, match="theta must have shape"):
        kernel.settled(torch.zeros(3))
    # Also after the error.
    assert kernel.gamma == 0.5 and torch.equal(kernel(), gentle)


@pytest.mark.parametrize(("left", "deployed"), [(0.0049, 0), (0.0051, 0.0051), (0.3, 0.3)])
def test_steps_that_leave_next_to_nothing_leave_nothing(left, deployed):
    theta = torch.tensor([0.0, math.log(left / (1 - left))], dtype=torch.float64)
    assert SingleLayer(9).settled(theta)[-1].item() == pytest.approx(deployed)
    assert SingleLayer(9)(theta)[-1].item() == pytest.approx(left)


# ---- errors and extension ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SingleLayer(0), "num_layers must be at least 1, got 0"),
        (
            lambda: SingleLayer(4, first_layer=4),
            r"^first_layer must be in 0\.\.3, got 4: no layer would be left to prune; "
            r"pass a smaller first_layer$",
        ),
        (lambda: SingleLayer(4, first_layer=-1), r"first_layer must be in 0\.\.3, got -1"),
        (lambda: PSigmoid(4, gamma=0), "gamma must be a positive number, got 0"),
        (lambda: SingleLayer(4, gamma=-1), "gamma must be a positive"),
        (lambda: PSigmoid(4, gamma=math.nan), "gamma must be a positive"),
        (lambda: MultiStep(4, steps=0), "steps must be at least 1, got 0"),
        (lambda: MultiStep(4, gamma=math.inf), "gamma must be a positive"),
        (
            lambda: SingleLayer(4)(torch.zeros(3)),
            r"theta must have shape \(\.\.\., 2\), got \(3,\)",
        ),
        (lambda: SingleLayer(4)(torch.tensor(0.0)), r"theta must have shape"),
    ],
)
def test_errors_say_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_kernel_needs_two_short_methods_and_says_which():
    with pytest.raises(NotImplementedError, match=r"Empty must define initial\(\)"):
        type("Empty", (Kernel,), {})(4)
    half = type("Half", (Kernel,), {"initial": lambda self: torch.zeros(1)})(4)
    with pytest.raises(NotImplementedError, match=r"Half must define ratios"):
        half()


def test_a_rough_formula_is_clipped_and_never_rises():
    class Wild(Kernel):
        def initial(self):
            return torch.tensor([2.0, 0.5, 0.8, -1.0])

        def ratios(self, i, theta):
            return theta

    assert Wild(4, first_layer=0)().tolist() == [1, 0.5, 0.5, 0]


@given(
    st.lists(st.floats(0, 1), min_size=5, max_size=5).map(
        lambda values: sorted(values, reverse=True)
    ),
    st.integers(0, 3),
)
def test_the_free_kernel_has_every_schedule_but_for_a_thousandth_a_layer(ratios, first_layer):
    kernel = Monotone(6, first_layer)
    schedule = torch.tensor([1.0] * max(1, first_layer) + ratios)[:6].double()
    schedule[:first_layer] = 1
    theta = kernel.double().inverse(schedule)
    assert (kernel.schedule(theta) - schedule).abs().max() <= 1e-3 * len(theta)
    # Nowhere without a gradient.
    assert kernel.schedule(theta).diff().abs()[max(0, first_layer - 1) :].min() > 5e-4
