"""Soft threshold and masks, against the paper's formulas written out in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from vispco import relaxation
from vispco.relaxation import descending_ranks, hard_mask, normalise, soft_mask, soft_threshold

torch.set_num_threads(1)
INF = math.inf
NORMALISATIONS = relaxation.NORMALISATIONS
ANY_FLOAT = st.floats(-INF, INF, width=32)
SEEDS = st.integers(0, 2**31 - 1)


def every(*shape):
    return torch.ones(*shape, dtype=torch.bool)


@st.composite
def scored(draw, elements=ANY_FLOAT, max_n=25):
    """Scores (with ties, huge ones and infinities) and who is alive, for a small batch."""
    batch, n = draw(st.integers(1, 3)), draw(st.integers(1, max_n))
    # Many ties.
    few = st.sampled_from([0.0, 1.0, 2.0, -1.0])
    values = draw(st.sampled_from([elements, few, st.just(3.0)]))
    scores = draw(
        st.lists(st.lists(values, min_size=n, max_size=n), min_size=batch, max_size=batch)
    )
    bools = st.sampled_from([st.booleans(), st.just(True), st.just(False)]).flatmap(
        lambda b: st.lists(b, min_size=n, max_size=n)
    )
    return torch.tensor(scores), torch.tensor(draw(st.lists(bools, min_size=batch, max_size=batch)))


def oracle_order(scores, alive):
    """Indices of the alive tokens of one sample, best first, lowest index first among equals."""
    return sorted((j for j, a in enumerate(alive) if a), key=lambda j: (-scores[j], j))


def oracle_threshold(scores, keep, sigma):
    """The published formula over a sorted list, token j centred at j - 1/2."""
    w = [math.exp(-((j - 0.5 - keep) ** 2) / (2 * sigma**2)) for j in range(1, len(scores) + 1)]
    return sum(a * b for a, b in zip(w, sorted(scores, reverse=True), strict=True)) / sum(w)


# ---- ranks and the hard mask ---------------------------------------------------------------------
@given(scored(), st.integers(0, 30))
@settings(max_examples=120)
def test_hard_mask_keeps_exactly_the_best(drawn, k):
    scores, alive = drawn
    keep = torch.tensor([k, 0, len(scores[0])][: len(scores)])
    mask = hard_mask(scores, keep, alive)
    assert mask.dtype == torch.bool
    for s, a, m, k in zip(scores.tolist(), alive.tolist(), mask, keep.tolist(), strict=True):
        assert m.nonzero()[:, 0].tolist() == sorted(oracle_order(s, a)[:k])


@given(scored())
def test_ranks_count_alive_tokens_from_the_best(drawn):
    scores, alive = drawn
    for s, a, ranks in zip(
        scores.tolist(), alive.tolist(), descending_ranks(scores, alive), strict=True
    ):
        order = oracle_order(s, a)
        assert ranks[order].tolist() == list(range(len(order)))
        assert (ranks[~torch.tensor(a)] == len(s)).all()


def test_minus_infinity_is_a_score_and_beats_the_dead():
    scores = torch.tensor([[-INF, 1.0, -INF, -INF]])
    alive = torch.tensor([[False, True, True, True]])
    assert hard_mask(scores, torch.tensor([2]), alive).tolist() == [[False, True, True, False]]
    assert hard_mask(scores, torch.tensor([9]), alive).tolist() == alive.tolist()


def test_nan_scores_are_refused_unless_dead():
    scores = torch.tensor([[1.0, math.nan, 2.0]])
    with pytest.raises(
        FloatingPointError,
        match=r"^scores contain NaN: expected numbers \(-inf for never\) that rank the tokens$",
    ):
        hard_mask(scores, torch.tensor([1]), every(1, 3))
    dead = torch.tensor([[True, False, True]])
    assert hard_mask(scores, torch.tensor([1]), dead).tolist() == [[False, False, True]]
    assert hard_mask(scores, torch.tensor([1]), every(1, 3), check=False).shape == (1, 3)


# ---- normalisations ------------------------------------------------------------------------------
def test_normalisations_by_hand():
    scores, alive = (
        torch.tensor([[8.0, 1.0, 99.0, 2.0, 1.0]]),
        torch.tensor([[True, True, False, True, True]]),
    )

    def close(how, *expected):
        torch.testing.assert_close(normalise(scores, alive, how), torch.tensor([expected]))

    close("rank", 7 / 8, 3 / 8, 0.0, 5 / 8, 1 / 8)
    close("minmax", 1.0, 0.0, 0.0, 1 / 7, 0.0)
    close("log-minmax", 1.0, 0.0, 0.0, 1 / 3, 0.0)
    close("none", 8.0, 1.0, 0.0, 2.0, 1.0)


@given(scored(), st.sampled_from(NORMALISATIONS))
@settings(max_examples=150)
def test_normalised_scores_are_finite_bounded_and_in_order(drawn, how):
    scores, alive = drawn
    s = normalise(scores, alive, how)
    assert s.dtype == torch.float32 and s.isfinite().all() and (s[~alive] == 0).all()
    if how != "none":
        assert s.min() >= 0 and s.max() <= 1
    for raw, a, row in zip(scores.tolist(), alive.tolist(), s, strict=True):
        order = oracle_order(raw, a)
        in_order = row[order]
        assert (in_order.diff() <= 0).all()
        if how == "rank" and order:
            n = len(order)
            torch.testing.assert_close(in_order, (n - torch.arange(n) - 0.5) / n)
        elif how == "minmax" and len({raw[j] for j in order if math.isfinite(raw[j])}) > 1:
            assert in_order[0] == 1 and in_order[-1] == 0


@pytest.mark.parametrize("how", ["minmax", "log-minmax"])
@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, INF, -INF, torch.finfo(torch.float32).max])
def test_all_equal_scores_are_one_half(how, value):
    assert normalise(torch.full((2, 4), value), every(2, 4), how).tolist() == [[0.5] * 4] * 2


def test_infinite_scores_count_as_the_nearest_finite_one():
    scores = torch.tensor([[-INF, 3.0, 5.0, INF, 4.0]])
    assert normalise(scores, every(1, 5), "minmax").tolist() == [[0, 0, 1, 1, 0.5]]
    assert normalise(scores, every(1, 5), "none").tolist() == [[3, 3, 5, 5, 4]]
    assert normalise(scores, every(1, 5), "rank").tolist()[0] == pytest.approx(
        [0.1, 0.3, 0.7, 0.9, 0.5]
    )


def test_log_minmax_puts_zeros_with_the_lowest_positive_score():
    s = normalise(torch.tensor([[0.0, 0.01, 0.1, 1.0, -7.0]]), every(1, 5), "log-minmax")
    torch.testing.assert_close(s, torch.tensor([[0.0, 0.0, 0.5, 1.0, 0.0]]))


def test_the_logarithm_of_a_zero_has_no_gradient():
    scores = torch.tensor([[0.0, 0.01, 0.1, 1.0, -7.0]], requires_grad=True)
    normalise(scores, every(1, 5), "log-minmax")[0, 2].backward()
    assert scores.grad.isfinite().all() and scores.grad[0, [0, 4]].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("how", "value"), [("rank", 0.5), ("minmax", 0.5), ("log-minmax", 0.5), ("none", 8.0)]
)
def test_one_token_is_in_the_middle(how, value):
    assert normalise(torch.tensor([[8.0, 99.0]]), torch.tensor([[True, False]]), how).tolist() == [
        [value, 0]
    ]


def test_without_a_finite_score_infinities_are_zero():
    assert normalise(torch.tensor([[INF, -INF]]), every(1, 2), "none").tolist() == [[0, 0]]


@pytest.mark.parametrize("how", NORMALISATIONS)
def test_double_precision_stays(how):
    scores = torch.tensor([[1 / 3, 0.2, 1.0]], dtype=torch.float64)
    by_hand = {
        "rank": [0.5, 1 / 6, 5 / 6],
        "minmax": [(1 / 3 - 0.2) / 0.8, 0, 1],
        "none": [1 / 3, 0.2, 1],
        "log-minmax": [math.log(5 / 3) / math.log(5), 0, 1],
    }
    s = normalise(scores, every(1, 3), how)
    assert s.dtype == torch.float64 and s.tolist() == [pytest.approx(by_hand[how], rel=1e-14)]


@given(
    scored(elements=st.floats(-100, 100, width=32)),
    st.sampled_from(["minmax", "log-minmax", "none"]),
)
def test_gradients_to_the_scores_are_finite(drawn, how):
    scores, alive = drawn
    scores.requires_grad_()
    keep = torch.full((len(scores),), 1.3)
    soft_mask(normalise(scores, alive, how), keep, alive).sum().backward()
    assert scores.grad.isfinite().all()


# ---- soft threshold ------------------------------------------------------------------------------
@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=30), st.floats(0, 1), st.floats(0.3, 30), SEEDS
)
@settings(max_examples=120)
def test_threshold_is_the_papers_formula_over_alive_tokens(values, ratio, sigma, seed):
    shuffle = torch.randperm(len(values) + 3, generator=torch.Generator().manual_seed(seed))
    scores = torch.tensor([[*values, 7.0, -7.0, 0.0]], dtype=torch.float64)[:, shuffle]
    alive = (torch.arange(len(values) + 3) < len(values))[None, shuffle]
    keep = ratio * len(values)
    tau = soft_threshold(scores, torch.tensor([keep], dtype=torch.float64), alive, sigma)
    assert tau.item() == pytest.approx(oracle_threshold(values, keep, sigma), abs=1e-9)


def test_extreme_windows_average_everything_alive_or_only_the_nearest():
    scores, alive = torch.tensor([[6.0, 90.0, 2.0, 1.0]]), torch.tensor([[True, False, True, True]])
    for keep, nearest in ((0.0, 6.0), (1.2, 2.0), (2.0, 1.5), (9.0, 1.0)):
        assert soft_threshold(scores, torch.tensor([keep]), alive, sigma=INF).item() == 3
        assert soft_threshold(scores, torch.tensor([keep]), alive, sigma=1e-30).item() == nearest


def test_a_sample_far_from_its_budget_does_not_depend_on_one_that_is_near():
    """Weights are scaled by each sample's own largest.

    By the largest of the batch, those of the second sample would all be 0.
    """
    scores, keep = torch.tensor([[3.0, 1.0, 2.0], [7.0, 5.0, 6.0]]), torch.tensor([0.5, 200.0])
    tau = soft_threshold(scores, keep, every(2, 3), sigma=1.0)
    alone = [
        soft_threshold(scores[i : i + 1], keep[i : i + 1], every(1, 3), sigma=1.0).item()
        for i in range(2)
    ]
    assert tau.tolist() == alone and alone[1] == pytest.approx(5)


@given(st.integers(2, 40), SEEDS)
def test_threshold_falls_between_the_kth_and_the_next_token(n, seed):
    scores = torch.rand(1, n, generator=torch.Generator().manual_seed(seed))
    ordered = scores[0].sort(descending=True).values
    for k in range(1, n):
        tau = soft_threshold(scores, torch.tensor([float(k)]), every(1, n), sigma=0.1)
        assert tau.item() == pytest.approx((ordered[k - 1] + ordered[k]).item() / 2, abs=1e-6)


def test_threshold_by_hand():
    # Sorted 4, 2, 1 at 1/2, 3/2, 5/2.
    scores, alive = torch.tensor([[1.0, 4.0, 2.0]]), every(1, 3)
    w = math.exp(-1 / 2)
    tau = soft_threshold(scores, torch.tensor([1.5]), alive, sigma=1.0)
    assert tau.item() == pytest.approx((4 * w + 2 + 1 * w) / (1 + 2 * w))
    tau = soft_threshold(scores, torch.tensor([1.5]), alive, sigma=2.0)
    w = math.exp(-1 / 8)
    assert tau.item() == pytest.approx((4 * w + 2 + 1 * w) / (1 + 2 * w))


@pytest.mark.parametrize("n", [2, 57, 64, 576, 1152])
def test_default_window_is_ten_tokens_in_576_and_never_below_one(n):
    scores, keep = (
        torch.rand(1, n, dtype=torch.float64),
        torch.tensor([0.3 * n], dtype=torch.float64),
    )
    sigma = max(1, 10 * n / 576)
    # Of the alive tokens, whatever the padding.
    padded = torch.cat([scores, torch.rand(1, 100)], -1)
    alive = (torch.arange(n + 100) < n)[None]
    expected = soft_threshold(scores, keep, every(1, n), sigma)
    torch.testing.assert_close(soft_threshold(padded, keep, alive), expected, rtol=1e-12, atol=0)


def test_soft_mask_by_hand():
    scores, keep = [0.9, 0.1, 0.4, 0.8, 0.35], 1.7
    for sigma, temperature in ((1.3, 0.1), (3.0, 0.5)):
        tau = oracle_threshold(scores, keep, sigma)
        mask = soft_mask(
            torch.tensor([scores]).double(),
            torch.tensor([keep]).double(),
            every(1, 5),
            sigma,
            temperature,
        )
        assert mask[0].tolist() == pytest.approx(
            [1 / (1 + math.exp((tau - s) / temperature)) for s in scores]
        )
    by_default = soft_mask(torch.tensor([scores]), torch.tensor([keep]), every(1, 5))
    torch.testing.assert_close(
        by_default, soft_mask(torch.tensor([scores]), torch.tensor([keep]), every(1, 5), 1.0, 0.1)
    )


def test_the_precision_is_that_of_the_scores():
    scores, keep = torch.rand(1, 9), torch.tensor([2.5], dtype=torch.float64)
    assert soft_threshold(scores, keep, every(1, 9)).dtype == torch.float32
    assert soft_mask(scores.double(), keep.float(), every(1, 9)).dtype == torch.float64


@pytest.mark.parametrize("n", [64, 576, 16384])
def test_rank_threshold_is_the_linear_one_away_from_the_ends(n):
    """Averaging a line over a symmetric window gives the line: tau = (n - k) / n."""
    scores = normalise(torch.rand(1, n), every(1, n))
    for ratio in (0.2, 0.5, 0.8):
        tau = soft_threshold(scores, torch.tensor([ratio * n]), every(1, n))
        assert tau.item() == pytest.approx(1 - ratio, abs=2e-3)


@given(
    scored(max_n=40),
    st.floats(0, 1),
    st.sampled_from([None, 1e-30, 1e-3, 0.5, 1.0, 10.0, 1e4]),
    st.sampled_from(NORMALISATIONS),
    st.sampled_from([0.01, 0.1, 1.0]),
)
@settings(max_examples=150)
def test_soft_mask_and_its_gradient_are_always_finite(drawn, ratio, sigma, how, temperature):
    scores, alive = drawn
    s = normalise(scores, alive, how).clamp(-1e6, 1e6)
    keep = (ratio * alive.sum(-1)).requires_grad_()
    mask = soft_mask(s, keep, alive, sigma, temperature)
    assert (
        mask.isfinite().all() and mask.min() >= 0 and mask.max() <= 1 and (mask[~alive] == 0).all()
    )
    mask.sum().backward()
    assert keep.grad.isfinite().all()
    for raw, a, row in zip(scores.tolist(), alive.tolist(), mask, strict=True):
        # Better tokens are kept at least as much, up to one ulp: the sigmoid of the vector lanes is
        # not the scalar one.
        assert (row[oracle_order(raw, a)].diff() <= torch.finfo(row.dtype).eps).all()


@given(scored(max_n=60), st.floats(0.001, 0.999), st.sampled_from([None, 1.0, 10.0]))
@settings(max_examples=150)
def test_rank_scores_always_have_a_gradient(drawn, ratio, sigma):
    """One token, ties, all equal, infinite: more tokens wanted always means a higher mask."""
    scores, alive = drawn
    n = alive.sum(-1)
    keep = (ratio * n).requires_grad_()
    soft_mask(normalise(scores, alive), keep, alive, sigma).sum().backward()
    assert (keep.grad[n > 0] > 0).all() and (keep.grad[n == 0] == 0).all()


@pytest.mark.parametrize("n", [64, 576, 4096])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_rank_gradient_counts_tokens(n, ratio):
    """Summed over tokens, the soft mask grows by one token for each token wanted."""
    keep = torch.tensor([ratio * n], requires_grad=True)
    soft_mask(
        normalise(torch.rand(1, n), every(1, n)), keep, every(1, n), temperature=0.03
    ).sum().backward()
    assert keep.grad.item() == pytest.approx(1, abs=0.02)


@given(
    st.integers(2, 30),
    SEEDS,
    st.floats(0.01, 0.99),
    st.sampled_from(["minmax", "log-minmax", "none"]),
)
def test_other_normalisations_have_a_gradient_between_distinct_scores(n, seed, ratio, how):
    scores = (torch.randperm(n, generator=torch.Generator().manual_seed(seed))[None] + 1) / n
    keep = torch.tensor([ratio * n], requires_grad=True)
    soft_mask(normalise(scores, every(1, n), how), keep, every(1, n)).sum().backward()
    assert keep.grad.item() > 0


@pytest.mark.parametrize("n", [2, 9])
def test_equal_scores_carry_no_order_and_no_gradient_unless_ranked(n):
    keep = torch.tensor([0.4 * n], requires_grad=True)
    mask = soft_mask(normalise(torch.full((1, n), 0.7), every(1, n), "minmax"), keep, every(1, n))
    assert mask[0].tolist() == pytest.approx([0.5] * n)
    (gradient,) = torch.autograd.grad(mask.sum(), keep)
    assert abs(gradient.item()) < 1e-5


def test_a_lone_token_is_kept_as_far_as_it_is_wanted():
    for how in ("rank", "minmax"):
        s = normalise(torch.tensor([[-3.0, 9.0]]), torch.tensor([[True, False]]), how)
        for keep, degree in (
            (0.0, 1 / (1 + math.exp(5))),
            (0.5, 0.5),
            (1.0, 1 / (1 + math.exp(-5))),
        ):
            mask = soft_mask(s, torch.tensor([keep]), torch.tensor([[True, False]]))
            assert mask.tolist()[0] == pytest.approx([degree, 0])


def test_no_tokens_at_all():
    dead = torch.zeros(2, 3, dtype=torch.bool)
    keep = torch.tensor([0.0, 1.0], requires_grad=True)
    for how in NORMALISATIONS:
        s = normalise(torch.rand(2, 3), dead, how)
        assert s.tolist() == [[0] * 3] * 2
        assert soft_threshold(s, keep, dead).tolist() == [0, 0]
        assert soft_mask(s, keep, dead).tolist() == [[0] * 3] * 2
        nothing = torch.zeros(2, 0)
        assert normalise(nothing, nothing.bool(), how).shape == (2, 0)
    assert soft_mask(nothing, keep, nothing.bool()).shape == (2, 0)
    assert hard_mask(nothing, torch.tensor([0, 1]), nothing.bool()).shape == (2, 0)
    assert hard_mask(torch.rand(2, 3), torch.tensor([0, 1]), dead).sum() == 0


@given(st.integers(2, 12), SEEDS, st.sampled_from([None, 2.0]))
def test_gradcheck_in_keep_and_scores(n, seed, sigma):
    g = torch.Generator().manual_seed(seed)
    scores = ((torch.randperm(n, generator=g)[None] + 1.0) / n).double().requires_grad_()
    keep = (torch.rand(1, generator=g, dtype=torch.float64) * n).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s, k: soft_mask(s, k, every(1, n), sigma), (scores, keep)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    scores = torch.rand(2, 300).to(dtype)
    keep, alive = torch.tensor([30.5, 299.0]), every(2, 300)
    for how in NORMALISATIONS:
        s = normalise(scores, alive, how)
        assert s.dtype == torch.float32
        assert torch.equal(s, normalise(scores.float(), alive, how))
    assert torch.equal(soft_mask(scores, keep, alive), soft_mask(scores.float(), keep, alive))
    assert torch.equal(
        hard_mask(scores, keep.long(), alive), hard_mask(scores.float(), keep.long(), alive)
    )


@pytest.mark.parametrize("how", NORMALISATIONS)
def test_samples_do_not_mix(how):
    scores, alive, keep = torch.rand(6, 20), torch.rand(6, 20) < 0.7, torch.rand(6) * 14
    scores[4], alive[5] = INF, False
    scores *= torch.tensor([1.0, 10.0, 100.0, 1000.0, 1.0, 1.0])[:, None]
    together = soft_mask(normalise(scores, alive, how), keep, alive)
    for b in range(6):
        s, a = scores[b : b + 1], alive[b : b + 1]
        torch.testing.assert_close(
            soft_mask(normalise(s, a, how), keep[b : b + 1], a), together[b : b + 1]
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda s, a, k: normalise(s, a, "ranks"),
            "'ranks': expected one of rank, minmax, log-minmax, none$",
        ),
        (
            lambda s, a, k: normalise(s[0], a[0]),
            r"expected scores \(B, N\) and a bool mask.* got scores \(3,\)",
        ),
        (
            lambda s, a, k: hard_mask(s, k.long(), a.float()),
            "bool mask alive of the same shape.* torch.float32",
        ),
        (
            lambda s, a, k: soft_mask(s, k, a[:, :2]),
            r"same shape, got scores \(2, 3\) and alive \(2, 2\)",
        ),
        (
            lambda s, a, k: soft_mask(s, k[:1], a),
            r"one number of tokens per sample, shape \(2,\), got \(1,\)",
        ),
        (
            lambda s, a, k: hard_mask(s, k[0].long(), a),
            r"number of tokens per sample, shape \(2,\), got \(\)",
        ),
        (
            lambda s, a, k: soft_threshold(s, k, a, sigma=0),
            "^sigma must be a positive number of tokens, or None for the default, got 0$",
        ),
        (lambda s, a, k: soft_mask(s, k, a, temperature=0), "temperature must be positive, got 0"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(2, 3), every(2, 3), torch.ones(2))
