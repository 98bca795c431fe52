"""The straight-through estimator: hard to the bit forward, soft backward.

What its variants add is written out by hand.
"""

import math

import pytest
import torch
from hypothesis import given, strategies as st

from tests.reproduction import estimator_zoo  # noqa: F401
from vispco.relaxation import NORMALISATIONS, hard_mask, normalise, soft_mask
from vispco.ste import (
    ESTIMATORS,
    Estimator,
    build_estimator,
    straight_through,
    straight_through_mask,
)

torch.set_num_threads(1)


HARD, SOFT = st.sampled_from([0.0, 1.0, 0.1, 1e-9]), st.floats(0, 1, width=32)


@given(
    st.lists(st.tuples(HARD, SOFT), min_size=1, max_size=50),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_value_is_hard_to_the_bit_and_gradient_is_soft(pairs, dtype):
    hard, soft = torch.tensor(pairs, dtype=dtype).T.contiguous()
    soft.requires_grad_()
    mask = straight_through(hard, soft)
    assert torch.equal(mask, hard) and mask.dtype == dtype
    weights = torch.arange(1.0, len(pairs) + 1).to(dtype)
    (mask * weights).sum().backward()
    assert torch.equal(soft.grad, weights)


def test_no_gradient_reaches_the_hard_mask():
    hard, soft = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    straight_through(hard.detach(), soft).sum().backward()
    assert hard.grad is None and soft.grad.tolist() == [1, 1, 1]


@given(
    st.integers(1, 4),
    st.integers(1, 30),
    st.integers(0, 2**31 - 1),
    st.sampled_from(NORMALISATIONS),
    st.sampled_from([None, 1.0, 10.0]),
    st.sampled_from([0.05, 0.1, 1.0]),
)
def test_mask_is_the_hard_one_with_the_soft_gradient(batch, n, seed, how, sigma, temperature):
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, n, generator=g)
    alive = torch.rand(batch, n, generator=g) < 0.8
    keep = (torch.rand(batch, generator=g) * n).requires_grad_()
    whole = keep.detach().long()
    mask = straight_through_mask(
        scores, keep, whole, alive, normalisation=how, sigma=sigma, temperature=temperature
    )
    assert torch.equal(mask, hard_mask(scores, whole, alive).float())
    assert torch.equal(mask.sum(-1).long(), whole.minimum(alive.sum(-1)))

    weights = torch.randn(batch, n, generator=g)
    (got,) = torch.autograd.grad((mask * weights).sum(), keep)
    soft = soft_mask(normalise(scores, alive, how), keep, alive, sigma, temperature)
    (expected,) = torch.autograd.grad((soft * weights).sum(), keep)
    assert torch.equal(got, expected) and got.isfinite().all()


def test_a_look_for_nan_can_be_left_out():
    scores, keep, alive = (
        torch.tensor([[0.1, math.nan, 0.5]]),
        torch.tensor([1.0]),
        torch.ones(1, 3, dtype=torch.bool),
    )
    with pytest.raises(FloatingPointError, match="scores contain NaN"):
        straight_through_mask(scores, keep, keep.long(), alive)
    assert straight_through_mask(scores, keep, keep.long(), alive, check=False).sum() == 1


def test_half_precision_scores_give_a_float32_mask():
    scores, alive = torch.tensor([[0.1, 0.9, 0.5]]), torch.ones(1, 3, dtype=torch.bool)
    mask = straight_through_mask(scores.bfloat16(), torch.tensor([2.0]), torch.tensor([2]), alive)
    assert mask.dtype == torch.float32 and mask.tolist() == [[0, 1, 1]]


def test_a_search_step_can_raise_and_lower_the_number_of_tokens():
    """Descending on a loss through the mask moves k~ to where the loss wants it.

    From both sides.
    """
    scores, alive = torch.linspace(1, 0, 20)[None], torch.ones(1, 20, dtype=torch.bool)
    # The best 8 help, the others hurt.
    useful = torch.where(torch.arange(20) < 8, -1.0, 1.0)
    for start in (1.0, 19.0):
        keep = torch.tensor([start], requires_grad=True)
        for _ in range(200):
            mask = straight_through_mask(scores, keep, keep.detach().long(), alive)
            (gradient,) = torch.autograd.grad((mask * useful).sum(), keep)
            keep = (keep - gradient).detach().requires_grad_()
        assert abs(keep.item() - 8) < 1


# ---- the variants --------------------------------------------------------------------------------
def run(scores, k, alive=None, *, copies=1, **options):
    """The mask of `copies` equal samples and the slopes dm_j / dk~.

    The mask has as many whole tokens as k~ holds.
    """
    scores = scores.expand(copies, -1)
    keep = torch.full(
        (copies,),
        float(k),
        dtype=torch.promote_types(scores.dtype, torch.float32),
        requires_grad=True,
    )
    alive = torch.ones_like(scores, dtype=torch.bool) if alive is None else alive
    mask = build_estimator(options).start()(
        scores, keep, keep.detach().long(), alive, torch.ones_like(scores)
    )
    columns = [torch.autograd.grad(column.sum(), keep, retain_graph=True)[0] for column in mask.T]
    return mask.detach(), torch.stack(columns, 1)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_variant_computes_in_single_precision_at_least(name, dtype):
    scores, expected = (
        torch.tensor([[0.1, 0.9, 0.5, 0.3]], dtype=dtype),
        torch.promote_types(dtype, torch.float32),
    )
    mask, slopes = run(scores, 2, name=name)
    assert mask.dtype == slopes.dtype == expected
    hard = build_estimator(name).start()(
        scores,
        torch.tensor([2.0]),
        torch.tensor([2]),
        torch.ones(1, 4, dtype=torch.bool),
        torch.ones_like(scores),
    )
    assert hard.dtype == expected and hard.tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_dead_have_no_weight_and_no_say(name):
    alive = torch.tensor([[False, True, True, False, True]])
    mask, slopes = run(torch.tensor([[9.0, 0.2, 0.5, 8.0, 0.3]]), 2, alive, name=name)
    assert (mask[~alive] == 0).all() and (slopes[~alive] == 0).all() and mask.sum() > 0


def test_the_papers_constants_are_the_defaults_of_the_papers_form():
    scores = torch.rand(1, 60, generator=torch.Generator().manual_seed(0))
    published = {"normalisation": "minmax", "sigma": 10.0, "temperature": 0.1}
    assert torch.equal(
        run(scores, 20, name="paper")[1], run(scores, 20, name="paper", **published)[1]
    )


@pytest.mark.parametrize("options", [{}, {"sigma": 8.0}, {"temperature": 0.4}])
def test_gumbel_without_noise_is_the_default(options):
    scores = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)) + 0.01
    for got, expected in zip(
        run(scores, 2, copies=2, name="gumbel", noise=0.0, **options),
        run(scores, 2, copies=2, **options),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_gumbel_takes_each_samples_least_positive_score_for_what_is_not_positive():
    scores = torch.tensor([[0.1, 0.2, 0.5, 0.0], [1e-4, 2e-4, 5e-4, -3.0]]).repeat(8000, 1)
    mask, _ = run(scores, 1, copies=16000, name="gumbel")
    expected = torch.tensor([1, 2, 5, 1]) / 9
    for share in (mask[::2].mean(0), mask[1::2].mean(0)):
        torch.testing.assert_close(share, expected, rtol=0, atol=0.02)


def test_perturbed_counts_how_often_noise_swaps_the_next_two():
    """Token 2 always stays.

    Token 1 comes before token 0 with probability Phi(gap / (noise sqrt 2)).
    """
    scores = torch.tensor([[0.0, 1.0, 10.0]])
    for options, gap in (
        ({"normalisation": "none", "noise": 1.0}, 1.0),
        ({"normalisation": "none", "noise": 0.5}, 2.0),
    ):
        first = 0.5 * (1 + math.erf(gap / 2))
        _, slopes = run(scores, 1, name="perturbed", samples=6000, **options)
        assert slopes[0].tolist() == pytest.approx([(1 - first) / 2, first / 2, 0.5], abs=0.01)


def test_perturbed_moves_few_ranks_by_default_and_one_sample_will_do():
    scores = torch.arange(10.0)[None]
    _, slopes = run(scores, 5, copies=500, name="perturbed")
    # Ranks are 0.1 apart, the noise is 0.1.
    assert slopes[:, 4:6].sum() > 0.6 * 500
    _, slopes = run(scores, 5, name="perturbed", samples=1)
    assert sorted(slopes[0].tolist()) == [0] * 8 + [0.5] * 2


def test_boundary_takes_one_token_on_either_side_by_default():
    assert run(torch.tensor([[9.0, 8, 7, 6, 5, 4]]), 3, name="boundary")[1].tolist() == [
        [0, 0, 0.5, 0.5, 0, 0]
    ]


@pytest.mark.parametrize("reach", [None, 2.0])
def test_fractional_weighs_as_many_tokens_as_are_wanted_give_or_take_the_reach(reach):
    mask, slopes = run(
        torch.rand(1, 12), 6, copies=4000, name="fractional", **({"reach": reach} if reach else {})
    )
    total, reach = mask.sum(-1), reach or 1.0
    # Uniform in (k~ - reach, k~ + reach),
    assert (total - 6).abs().max() <= reach + 0.02
    assert total.mean().item() == pytest.approx(6, abs=0.1 * reach)
    assert total.var().item() == pytest.approx(reach**2 / 3, rel=0.1)
    part = total % 1
    # but not for tokens so thin that slopes would explode.
    assert part.min().item() == pytest.approx(0.02, abs=1e-5)
    assert part.max().item() == pytest.approx(0.98, abs=1e-5)
    # One token says it all.
    assert (slopes.sum(-1) == 1).all() and ((slopes > 0).sum(-1) == 1).all()


def test_fractional_keeps_half_a_token_at_least_of_one_and_nothing_of_none():
    some, _ = run(torch.rand(1, 12), 1, copies=400, name="fractional")
    assert some.sum(-1).min() == 0.5 and 1.5 < some.sum(-1).max() < 2
    none, slopes = run(torch.rand(1, 12), 0.4, copies=400, name="fractional")
    # No token is kept, but the slope says what the first would be worth.
    assert (none == 0).all() and (slopes.sum(-1) == 1).all()


def test_of_two_layers_with_as_many_tokens_the_second_has_the_gradient():
    scores, whole, alive = (
        torch.tensor([[9.0, 8, 7, 6, 5, 4]]),
        torch.tensor([3]),
        torch.ones(1, 6, dtype=torch.bool),
    )
    keep, estimator = torch.tensor([3.0, 3.0], requires_grad=True), Estimator("fractional").start()
    first = estimator(scores, keep[:1], whole, alive, torch.ones(1, 6))
    second = estimator(scores, keep[1:], whole, alive, first.where(first > 0, 1))
    # Nothing is lost there.
    assert torch.equal(second.where(first > 0, 0), (first > 0).float())
    (gradient,) = torch.autograd.grad((first * second).sum(), keep)
    assert gradient.tolist() == pytest.approx([0, 1], abs=1e-6)


@pytest.mark.parametrize("name", ["gumbel", "perturbed", "fractional"])
def test_a_step_draws_the_same_whatever_was_drawn_before(name):
    estimator, fresh = Estimator(name, {"seed": 5}), Estimator(name, {"seed": 5})
    scores, alive = torch.rand(1, 40).expand(20, -1), torch.ones(20, 40, dtype=torch.bool)
    keep, whole = torch.full((20,), 15.0, requires_grad=True), torch.full((20,), 15)

    def step(estimator, number):
        mask = estimator.start(number)(scores, keep, whole, alive, torch.ones_like(scores))
        return torch.cat(
            [mask.detach().flatten(), torch.autograd.grad((mask * torch.arange(40)).sum(), keep)[0]]
        )

    first = [step(estimator, number) for number in (0, 1, 2)]
    assert torch.equal(step(fresh, 2), first[2]) and torch.equal(step(fresh, 0), first[0])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    assert not torch.equal(step(Estimator(name, {"seed": 6}), 2), first[2])


def test_fractional_at_the_midpoint_has_a_half_on_the_edge():
    mask, _ = run(torch.rand(1, 12), 6, copies=200, name="fractional", midpoint=True)
    assert set(mask.sum(-1).tolist()) == {5.5, 6.5}


# ---- errors --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (
            "papper",
            "^unknown estimator 'papper': did you mean 'paper'? there are default, paper, rank, ",
        ),
        (
            {"name": 3},
            "^unknown estimator 3: there are default, paper, rank, gumbel, perturbed, boundary, "
            "fractional$",
        ),
        (
            {"name": "boundary", "temp": 1},
            "'boundary' does not take the option 'temp': it takes reach, clip, seed$",
        ),
        (
            7,
            "^estimator must be one of default, paper, .*, or a dict of options such as .*, got 7$",
        ),
    ],
)
def test_errors_list_what_there_is(estimator, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        build_estimator(estimator)


def test_no_name_is_the_default():
    assert Estimator().name == build_estimator({}).name == "default"
