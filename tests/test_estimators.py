"""Gradient estimators.

Their formulas written out, hard values, reproducible noise, and toys with known gradients.
"""

import math

import pytest
import torch
from hypothesis import given, strategies as st

from oracles import pruned_with
from tests.reproduction import estimator_zoo  # noqa: F401
from tests.reproduction.gradients import central_difference, score_function
from tiny import batch, tiny_llava
from vispco.registry import METHODS
from vispco.relaxation import hard_mask
from vispco.ste import ESTIMATORS, Estimator, build_estimator

torch.set_num_threads(1)

RATIOS = [1.0, 0.75, 0.75, 0.5, 0.25, 0.25]
# value = the mask that will be deployed
HARD = [name for name in ESTIMATORS if name not in ("gumbel", "fractional")]


def every(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def drawn(batch_size, n, seed):
    """Scores, a wanted and a whole number of tokens, and who is alive."""
    g = torch.Generator().manual_seed(seed)
    alive = torch.rand(batch_size, n, generator=g) < 0.8
    keep = torch.rand(batch_size, generator=g) * alive.sum(-1)
    return (
        torch.rand(batch_size, n, generator=g),
        keep.requires_grad_(),
        keep.detach().long(),
        alive,
    )


def masked(estimator, scores, keep, whole, alive, weight=None, seed=0):
    """The mask of the first layer of a pass, where all tokens weigh 1, or of a later one."""
    return estimator.start(seed)(
        scores, keep, whole, alive, torch.ones_like(scores) if weight is None else weight
    )


def slopes(estimator, scores, keep, whole, alive, weight=None, seed=0):
    """dm_j / dk~ (B, N), every token's own."""
    mask = masked(estimator, scores, keep, whole, alive, weight, seed)
    return torch.stack(
        [
            torch.autograd.grad(mask[:, j].sum(), keep, retain_graph=True)[0]
            for j in range(mask.shape[1])
        ],
        1,
    )


# ---- values --------------------------------------------------------------------------------------
@given(
    st.integers(1, 4),
    st.integers(1, 30),
    st.integers(0, 2**31 - 1),
    st.sampled_from(sorted(ESTIMATORS)),
)
def test_masks_are_hard_and_gradients_finite(size, n, seed, name):
    scores, keep, whole, alive = drawn(size, n, seed)
    mask = masked(Estimator(name), scores, keep, whole, alive)
    assert mask.shape == scores.shape and (mask[~alive] == 0).all() and mask.isfinite().all()
    if name in HARD:
        assert torch.equal(mask, hard_mask(scores, whole, alive).float())
    elif name == "gumbel":
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(mask.sum(-1).long(), whole.minimum(alive.sum(-1)))
    else:
        # One token in part.
        assert ((mask > 0) & (mask < 1)).sum(-1).max() <= 1 and mask.max() <= 1
    (gradient,) = torch.autograd.grad(mask.sum(), keep)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_without_gradient_the_value_is_what_will_be_deployed(name):
    scores, keep, whole, alive = drawn(3, 20, 1)
    expected = hard_mask(scores, whole, alive).float()
    assert torch.equal(masked(Estimator(name), scores, keep.detach(), whole, alive), expected)
    with torch.no_grad():
        assert torch.equal(masked(Estimator(name), scores, keep, whole, alive), expected)


@pytest.mark.parametrize("name", ["gumbel", "perturbed", "fractional"])
def test_noise_is_a_function_of_the_seed(name):
    scores, keep, whole, alive = drawn(4, 40, 2)
    first, second = Estimator(name), Estimator(name)
    runs = [
        slopes(e, scores, keep, whole, alive, seed=seed)
        for e, seed in ((first, 0), (first, 1), (second, 0), (second, 1))
    ]
    assert (
        torch.equal(runs[0], runs[2])
        and torch.equal(runs[1], runs[3])
        and not torch.equal(runs[0], runs[1])
    )
    assert not torch.equal(
        runs[0], slopes(Estimator(name, {"seed": 1}), scores, keep, whole, alive)
    )
    steps = []
    for estimator, step in ((first, 3), (first, 4), (second, 4), (Estimator(name, {"seed": 1}), 4)):
        steps.append(
            slopes(estimator, scores, keep, whole, alive, seed=step)
        )  # whatever was drawn before
    assert (
        torch.equal(steps[1], steps[2])
        and not torch.equal(steps[0], steps[1])
        and not torch.equal(steps[2], steps[3])
    )


# ---- the formulas --------------------------------------------------------------------------------
@given(
    st.integers(2, 40),
    st.integers(0, 2**31 - 1),
    st.sampled_from([1.0, 10.0]),
    st.sampled_from([0.05, 0.1]),
)
def test_paper_is_the_formula_written_out(n, seed, sigma, temperature):
    """dm_j / dk = -sigmoid' (dtau / dk) / T, with tokens at j = 1..n and min-max scores."""
    g = torch.Generator().manual_seed(seed)
    scores, k = (
        torch.rand(1, n, generator=g, dtype=torch.float64),
        float(torch.rand((), generator=g)) * n,
    )
    s = ((scores - scores.min()) / (scores.max() - scores.min()))[0].tolist()

    def tau(k):
        w = [math.exp(-((j - k) ** 2) / (2 * sigma**2)) for j in range(1, n + 1)]
        return sum(a * b for a, b in zip(w, sorted(s, reverse=True), strict=True)) / sum(w)

    slope = (tau(k + 1e-5) - tau(k - 1e-5)) / 2e-5
    soft = [1 / (1 + math.exp(-(x - tau(k)) / temperature)) for x in s]
    expected = torch.tensor(
        [[-m * (1 - m) * slope / temperature for m in soft]], dtype=torch.float64
    )
    keep = torch.tensor([k], dtype=torch.float64, requires_grad=True)
    estimator = build_estimator({"name": "paper", "sigma": sigma, "temperature": temperature})
    got = slopes(estimator, scores, keep, keep.detach().long(), every(1, n))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
    assert not estimator.clip and build_estimator("rank").clip


def test_boundary_by_hand():
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4]])
    keep, whole = torch.tensor([3.0], requires_grad=True), torch.tensor([3])
    assert slopes(
        Estimator("boundary", {"reach": 1}), scores, keep, whole, every(1, 6)
    ).tolist() == [[0, 0, 0.5, 0.5, 0, 0]]
    assert slopes(
        Estimator("boundary", {"reach": 2}), scores, keep, whole, every(1, 6)
    ).tolist() == [[0, 0.25, 0.25, 0.25, 0.25, 0]]
    # One more place at the end: the sum stays 1.
    alive = torch.tensor([[True, True, True, False, False, True]])
    assert slopes(Estimator("boundary", {"reach": 2}), scores, keep, whole, alive)[
        0
    ].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 0, 0, 1 / 3])


@given(st.integers(1, 30), st.integers(0, 2**31 - 1), st.sampled_from(["boundary", "perturbed"]))
def test_one_token_wanted_is_one_token_more(n, seed, name):
    scores, keep, whole, alive = drawn(2, n, seed)
    total = slopes(Estimator(name), scores, keep, whole, alive).sum(-1)
    torch.testing.assert_close(total, (alive.sum(-1) > 0).float())


def test_perturbed_is_the_derivative_of_the_expected_top_k():
    """With little noise, the neighbours of the edge; with much, uniform."""
    scores = torch.rand(1, 8, generator=torch.Generator().manual_seed(0))
    keep, whole, order = (
        torch.tensor([3.0], requires_grad=True),
        torch.tensor([3]),
        scores[0].argsort(descending=True),
    )
    calm = slopes(Estimator("perturbed", {"noise": 1e-6}), scores, keep, whole, every(1, 8))[0][
        order
    ]
    assert calm.tolist() == [0, 0, 0.5, 0.5, 0, 0, 0, 0]
    wild = slopes(
        Estimator("perturbed", {"noise": 1e3, "samples": 4000}), scores, keep, whole, every(1, 8)
    )
    torch.testing.assert_close(wild, torch.full((1, 8), 1 / 8), rtol=0, atol=0.02)


def test_gumbel_draws_in_proportion_to_the_scores():
    scores = torch.tensor([[1.0, 2.0, 5.0, 0.0]]).expand(20000, 4)
    keep = torch.ones(20000, requires_grad=True)
    share = masked(
        Estimator("gumbel"), scores, keep, torch.ones(20000).long(), every(20000, 4)
    ).mean(0)
    torch.testing.assert_close(
        share.detach(), torch.tensor([1, 2, 5, 1]) / 9, rtol=0, atol=0.02
    )  # 0 counts as 1


# ---- fractional: the exact calculus of one token on the edge -------------------------------------
def weighted_loss(mask, value):
    """A loss that is far from linear in the mask: softmax with policy, as in attention."""
    return ((mask * value.exp() * value).sum(-1) / (mask * value.exp()).sum(-1)) ** 2


def test_fractional_is_unbiased_for_the_secant_of_the_hard_loss():
    n, k, reach, draws = 12, 6, 2, 40000
    g = torch.Generator().manual_seed(3)
    scores, value = torch.rand(1, n, generator=g), 2 * torch.randn(1, n, generator=g)

    def hard(k):
        return float(
            weighted_loss(hard_mask(scores, torch.tensor([k]), every(1, n)).float(), value)
        )

    expected = (hard(k + reach) - hard(k - reach)) / (2 * reach)
    keep = torch.full((draws,), float(k), requires_grad=True)
    estimator = Estimator("fractional", {"reach": float(reach)})
    mask = masked(
        estimator, scores.expand(draws, n), keep, torch.full((draws,), k), every(draws, n)
    )
    (each,) = torch.autograd.grad(weighted_loss(mask, value).sum(), keep)
    assert abs(float(each.mean()) - expected) < 4 * float(each.std()) / draws**0.5 + 0.02 * abs(
        expected
    )


def test_a_plateau_gives_up_a_token_once():
    """Two layers with the same number of tokens: moving both together is one token, not two."""
    scores, whole = torch.tensor([[9.0, 8, 7, 6, 5, 4]]), torch.tensor([3])
    keep = torch.tensor([3.0, 3.0], requires_grad=True)
    estimate = Estimator("fractional", {"reach": 1.0}).start()
    first = estimate(scores, keep[:1], whole, every(1, 6), torch.ones(1, 6))
    second = estimate(scores, keep[1:], whole, first > 0, first)
    (gradient,) = torch.autograd.grad(
        (first * second).sum(), keep
    )  # of the weight in the second layer
    assert float(gradient.sum()) == pytest.approx(1.0)


# ---- in the pruner -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


def gradient(model, estimator, bound=None):
    """Of the answer's loss in the keep ratios, and the logits."""
    inputs, r = batch(), torch.tensor(RATIOS, dtype=torch.float64, requires_grad=True)
    with pruned_with(model, METHODS.get("fastv")(), r, "search", estimator) as handle:
        output = model(**inputs)
        handle.bound.value = bound
        output.loss.backward()
    return r.grad, output.logits.detach()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_searches(llava, name):
    grad, logits = gradient(llava, name)
    again, same = gradient(llava, {"name": name})
    assert (
        grad.isfinite().all()
        and grad[1:].abs().max() > 0
        and torch.equal(grad, again)
        and torch.equal(logits, same)
    )
    if name in HARD:
        with torch.no_grad(), pruned_with(llava, METHODS.get("fastv")(), RATIOS, "search"):
            assert torch.allclose(llava(**batch()).logits, logits, atol=1e-5)


def test_only_clipped_estimators_are_bounded(llava):
    tiny_bound = torch.full((2,), 1e-9)
    assert torch.equal(gradient(llava, "paper", tiny_bound)[0], gradient(llava, "paper")[0])
    for estimator in ("rank", {"name": "paper", "clip": True}):
        assert (
            gradient(llava, estimator, tiny_bound)[0].abs().max()
            < 1e-4
            < gradient(llava, estimator)[0].abs().max()
        )


def test_temperature_can_be_annealed(llava):
    r = torch.tensor(RATIOS, dtype=torch.float64, requires_grad=True)
    grads = []
    with pruned_with(llava, METHODS.get("fastv")(), r, "search") as handle:
        for temperature in (1.0, 0.1):
            handle.estimator = build_estimator({"name": "rank", "temperature": temperature})
            grads += torch.autograd.grad(llava(**batch()).loss, r)
    assert not torch.allclose(*grads) and torch.equal(grads[1], gradient(llava, "rank")[0])


# ---- without a backward pass ---------------------------------------------------------------------
A = torch.tensor([[2.0, -1.0, 0.0], [-1.0, 3.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
B = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
POINT = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)


def quadratic(x):
    """x'Ax / 2 + b'x, plus what differs between the samples."""
    return (x @ A * x).sum(-1) / 2 + x @ B + 100 * torch.arange(len(x))


@pytest.mark.parametrize(
    ("estimate", "spread"),
    [(score_function, 0.5), (central_difference, 0.5), (central_difference, 5.0)],
)
def test_unbiased_on_a_quadratic(estimate, spread):
    """Smoothing a quadratic by noise of mean 0 leaves its gradient, A x + b.

    The samples' own levels cancel.
    """
    each = estimate(
        quadratic,
        POINT,
        20000,
        spread=spread,
        generator=torch.Generator().manual_seed(0),
        mean=False,
    )
    error = each.std(0) / len(each) ** 0.5
    assert ((each.mean(0) - (A @ POINT + B)).abs() < 4 * error).all() and error.max() < 0.2


def test_the_variance_of_a_central_difference_by_hand():
    """For a linear loss b'x, sample p is e_p sum_q b_q e_q = b_p + sum of +-b_q.

    Its variance is |b|^2 - b_p^2.
    """
    each = central_difference(
        lambda x: x @ B,
        POINT,
        40000,
        spread=0.1,
        generator=torch.Generator().manual_seed(0),
        mean=False,
    )
    torch.testing.assert_close(each.var(0), (B @ B - B**2), rtol=0.05, atol=0)


def test_more_draws_have_less_variance_and_the_mean_is_the_mean():
    spread = []
    for draws in (2, 8):
        options = {"spread": 0.5, "draws": draws}
        each = score_function(
            quadratic,
            POINT,
            4000,
            generator=torch.Generator().manual_seed(1),
            mean=False,
            **options,
        )
        assert each.shape == (4000, 3)
        mean = score_function(
            quadratic, POINT, 4000, generator=torch.Generator().manual_seed(1), **options
        )
        torch.testing.assert_close(mean, each.mean(0))
        spread.append(each.var(0))
    assert (spread[1] < spread[0] / 3).all()


# ---- errors --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        ("papper", "unknown estimator 'papper': did you mean 'paper'"),
        ({"name": 3}, "unknown estimator 3"),
        (7, "estimator must be one of default.*got 7"),
        ({"sigm": 1}, "'default' does not take the option 'sigm': it takes"),
        (
            {"name": "boundary", "temperature": 1},
            "'boundary' does not take the option 'temperature': it takes reach",
        ),
    ],
)
def test_unknown_names_and_options(estimator, message):
    with pytest.raises(ValueError, match=message):
        build_estimator(estimator)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        ({"sigma": -1}, "sigma must be"),
        ({"temperature": 0}, "temperature must be"),
        ({"name": "boundary", "reach": 0}, "reach"),
        ({"name": "fractional", "reach": 0}, "reach"),
        ({"name": "perturbed", "samples": 0}, "samples"),
        ({"normalisation": "ranks"}, "unknown normalisation"),
    ],
)
def test_bad_values(estimator, message):
    with pytest.raises(ValueError, match=message):
        masked(
            build_estimator(estimator),
            torch.rand(1, 4),
            torch.ones(1, requires_grad=True),
            torch.tensor([1]),
            every(1, 4),
        )


@pytest.mark.parametrize("name", ESTIMATORS)
def test_nan_scores_are_refused(name):
    with pytest.raises(FloatingPointError, match="scores contain NaN"):
        masked(
            Estimator(name),
            torch.full((1, 3), math.nan),
            torch.ones(1, requires_grad=True),
            torch.tensor([1]),
            every(1, 3),
        )


@pytest.mark.parametrize("estimate", [score_function, central_difference])
def test_bad_points_and_spreads(estimate):
    for change, message in (
        ({"spread": 0}, "spread"),
        ({"point": torch.zeros(2, 2)}, r"one vector.*\(2, 2\)"),
        ({"point": torch.zeros(3).long()}, "floating"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate(quadratic, **{"point": POINT, "samples": 2, "spread": 1.0, **change})
    with pytest.raises(ValueError, match="draws must be at least 2"):
        score_function(quadratic, POINT, 2, spread=1.0, draws=1)


def test_an_estimator_passes_through():
    estimator = Estimator("boundary")
    assert build_estimator(estimator) is estimator and build_estimator(None).name == "default"
