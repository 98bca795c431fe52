"""Straight-through estimator: hard to the bit forward, soft backward."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vispco.relaxation import NORMALISATIONS, hard_mask, normalise, soft_mask
from vispco.ste import straight_through, straight_through_mask

torch.set_num_threads(1)


HARD, SOFT = st.sampled_from([0., 1., .1, 1e-9]), st.floats(0, 1, width=32)


@given(st.lists(st.tuples(HARD, SOFT), min_size=1, max_size=50),
       st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_value_is_hard_to_the_bit_and_gradient_is_soft(pairs, dtype):
    hard, soft = torch.tensor(pairs, dtype=dtype).T.contiguous()
    soft.requires_grad_()
    mask = straight_through(hard, soft)
    assert torch.equal(mask, hard) and mask.dtype == dtype
    weights = torch.arange(1., len(pairs) + 1).to(dtype)
    (mask * weights).sum().backward()
    assert torch.equal(soft.grad, weights)


def test_no_gradient_reaches_the_hard_mask():
    hard, soft = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    straight_through(hard.detach(), soft).sum().backward()
    assert hard.grad is None and soft.grad.tolist() == [1, 1, 1]


@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 2**31 - 1), st.sampled_from(NORMALISATIONS),
       st.sampled_from([None, 1., 10.]), st.sampled_from([.05, .1, 1.]))
def test_mask_is_the_hard_one_with_the_soft_gradient(batch, n, seed, how, sigma, temperature):
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, n, generator=g)
    alive = torch.rand(batch, n, generator=g) < .8
    keep = (torch.rand(batch, generator=g) * n).requires_grad_()
    whole = keep.detach().long()
    mask = straight_through_mask(scores, keep, whole, alive, normalisation=how, sigma=sigma,
                                 temperature=temperature)
    assert torch.equal(mask, hard_mask(scores, whole, alive).float())
    assert torch.equal(mask.sum(-1).long(), whole.minimum(alive.sum(-1)))

    weights = torch.randn(batch, n, generator=g)
    got, = torch.autograd.grad((mask * weights).sum(), keep)
    soft = soft_mask(normalise(scores, alive, how), keep, alive, sigma, temperature)
    expected, = torch.autograd.grad((soft * weights).sum(), keep)
    assert torch.equal(got, expected) and got.isfinite().all()


def test_half_precision_scores_give_a_float32_mask():
    scores, alive = torch.tensor([[.1, .9, .5]]), torch.ones(1, 3, dtype=torch.bool)
    mask = straight_through_mask(scores.bfloat16(), torch.tensor([2.]), torch.tensor([2]), alive)
    assert mask.dtype == torch.float32 and mask.tolist() == [[0, 1, 1]]


def test_a_search_step_can_raise_and_lower_the_number_of_tokens():
    """Descending on a loss through the mask moves k~ to where the loss wants it, from both sides."""
    scores, alive = torch.linspace(1, 0, 20)[None], torch.ones(1, 20, dtype=torch.bool)
    useful = torch.where(torch.arange(20) < 8, -1., 1.)  # the best 8 help, the others hurt
    for start in (1., 19.):
        keep = torch.tensor([start], requires_grad=True)
        for _ in range(200):
            mask = straight_through_mask(scores, keep, keep.detach().long(), alive)
            gradient, = torch.autograd.grad((mask * useful).sum(), keep)
            keep = (keep - gradient).detach().requires_grad_()
        assert abs(keep.item() - 8) < 1
