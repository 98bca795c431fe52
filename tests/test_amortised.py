"""The ratio predictor and the amortised search.

On budget at every step, and for any budget afterwards.
"""

import pytest
import torch
from hypothesis import given, strategies as st

import vispco
from tiny import batch, our_hooks, search_with
from vispco import testbed
from vispco.budget import Budget
from vispco.calibration import prepare, shapes
from vispco.flops import CostModel, Dimensions
from vispco.kernels import Monotone, SingleLayer
from vispco.registry import METHODS, adapter_for
from vispco.schedule import project, ramp
from vispco.solvers.predictor import RatioPredictor
from vispco.solvers.shared import features

COST = CostModel(Dimensions(6, 32, 4, 2, 8, 56, 60))
REAL = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


@pytest.fixture(scope="module")
def batches():
    return [batch(images=(1, 2), text=(9, 6), before=(2, 0), seed=s) for s in range(3)]


# ---- onto the budget -----------------------------------------------------------------------------
@given(
    theta=st.lists(st.floats(-4, 4), min_size=6, max_size=6),
    share=st.floats(0.2, 0.99),
    n=st.integers(16, 600),
)
def test_any_schedule_is_scaled_onto_its_budget(theta, share, n):
    n, text = torch.tensor([n, 2 * n]), torch.tensor([9, 30])
    floor, full = COST.text_only(text).double(), COST.full(n, text).double()
    limit = floor + torch.tensor([share, 0.5]) * (full - floor)
    ratios = Monotone(6).schedule(torch.tensor([theta] * 2, dtype=torch.float64))
    found = project(ratios, COST, n, text, limit)
    assert ((COST(found * n[:, None], n, text) - limit).abs() < 1e-6 * full).all()
    assert (found[:, 1:] <= found[:, :-1] + 1e-12).all() and (found[:, 0] == 1).all()


def test_its_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    n, text = torch.tensor([64, 40]), torch.tensor([9, 12])
    floor, full = COST.text_only(text).double(), COST.full(n, text).double()
    limit = floor + torch.tensor([0.4, 0.7]) * (full - floor)
    theta = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)

    def scaled(theta):
        return project(Monotone(6).schedule(theta), COST, n, text, limit)

    assert torch.autograd.gradcheck(scaled, theta, atol=1e-5)


def test_what_no_scale_reaches_drops_everything_it_can():
    n, text = torch.tensor([64]), torch.tensor([9])
    # Layer 0 alone costs more.
    limit = COST.text_only(text).double()
    assert project(torch.tensor([[1, 0.9, 0.5, 0.5, 0.2, 0.1]]), COST, n, text, limit).tolist() == [
        [1, 0, 0, 0, 0, 0]
    ]


def test_it_starts_at_a_ramp_on_every_budget(llava, batches):
    learned = vispco.search(
        llava, batches, budgets=(), start=vispco.Shared(steps=1, learning_rate=1e-12)
    )
    adapter = adapter_for(llava)(llava)
    cost = CostModel(adapter.dimensions(adapter.config), METHODS.get("fastv")())
    for knot, theta in list(
        zip(learned.again.predictor.knots, learned.again.predictor.table, strict=True)
    )[1:]:
        rule = ramp(Budget(knot, cost, *shapes(learned.again.problem.prepared), first_layer=1))
        assert (learned.again.problem.kernel.schedule(theta) - rule).abs().max() < 0.01


# ---- the predictor -------------------------------------------------------------------------------
@pytest.mark.parametrize("hidden", [None, 8])
def test_starts_as_the_kernel_does_whatever_the_budget(hidden):
    kernel = SingleLayer(6)
    predictor = RatioPredictor(kernel, hidden)
    theta = predictor(torch.tensor([0.1, 0.9]), torch.randn(2, 5, 8), REAL)
    assert torch.equal(theta, kernel.initial().expand(2, -1)) and predictor.conditioned == (
        hidden is not None
    )


@pytest.mark.parametrize("hidden", [None, 8])
def test_gradients_reach_every_parameter_after_the_first_step(hidden):
    torch.manual_seed(0)
    predictor = RatioPredictor(Monotone(6), hidden)
    optimizer = torch.optim.SGD(predictor.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        theta = predictor(torch.tensor([0.1, 0.9]), torch.randn(2, 5, 8), REAL)
        (theta * torch.randn_like(theta)).sum().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in predictor.parameters())


def test_padding_and_batch_mates_have_no_say():
    torch.manual_seed(0)
    predictor = RatioPredictor(Monotone(6), 8)
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter)
    x, budget = torch.randn(2, 5, 8), torch.tensor([0.3, 0.6])
    both, other = (
        predictor(budget, x, REAL),
        predictor(budget, x.masked_fill(~REAL[..., None], 7.0), REAL),
    )
    alone = predictor(budget[:1], x[:1, :3], REAL[:1, :3])
    assert torch.allclose(both, other) and torch.allclose(both[:1], alone, rtol=1e-3)
    # The budget has a say in it.
    assert not torch.allclose(both, predictor(budget.flip(0), x, REAL))


def test_a_predictor_that_looks_needs_something_to_look_at():
    with pytest.raises(ValueError, match="this predictor looks at the prompt: give its embeddings"):
        RatioPredictor(Monotone(6), 8)(torch.tensor([0.5]))


# ---- the search ----------------------------------------------------------------------------------
@pytest.mark.parametrize("conditioned", [False, True])
def test_one_run_any_budget_and_the_model_is_untouched(llava, batches, conditioned):
    state = {k: v.clone() for k, v in llava.state_dict().items()}
    seen = []
    learned = vispco.search(
        llava,
        batches,
        budgets=(),
        callback=seen.append,
        start=vispco.Shared(steps=4, conditioned=conditioned),
    )
    assert [s["step"] for s in seen] == [0, 1, 2, 3] and learned.meta[
        "forward_passes"
    ] == 6 + 3 * 4 * 2
    frontier = learned.frontier([0.3, 0.55, 0.8])
    for point, budget in zip(frontier.points, (0.3, 0.55, 0.8), strict=True):
        assert budget - 0.05 < point.share <= budget
        assert vispco.evaluate(llava, batches, point.config).kl == pytest.approx(point.loss)
    assert learned.config(0.55) == frontier.points[1].config
    assert all(torch.equal(v, state[k]) for k, v in llava.state_dict().items()) and not our_hooks(
        llava
    )
    assert all(p.requires_grad and p.grad is None for p in llava.parameters())


def test_same_seed_same_frontier(llava, batches):
    one, two, other = (
        vispco.search(llava, batches, budgets=(), seed=s, start=vispco.Shared(steps=3)).ratios(0.5)
        for s in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_learning_lowers_the_divergence():
    """On the trained testbed, which has read the image by layer 6.

    Dropping early is dear, dropping late is free.
    """
    model, _ = testbed.load("testbed-llava")
    batches = testbed.batches("calibration", n=64, batch_size=8)
    before, after = (
        vispco.search(
            model,
            batches,
            budgets=(),
            start=vispco.Shared(between=(0.6, 0.8), steps=n, learning_rate=rate),
        ).config(0.7)
        for n, rate in ((1, 1e-9), (64, 0.1))
    )
    kl = [vispco.evaluate(model, batches, config).kl for config in (before, after)]
    assert kl[1] < 0.5 * kl[0]


def test_each_sample_of_a_batch_can_have_its_own_schedule(llava, batches):
    """(B, L) ratios keep, of each sample, what (L,) ratios keep of it."""
    from oracles import pruned_with
    from tiny import without_labels
    from vispco.registry import build_method

    inputs = without_labels(batches[0])
    rows = torch.tensor(
        [[1, 0.75, 0.75, 0.5, 0.5, 0.5], [1, 1, 0.25, 0.25, 0.0, 0.0]], dtype=torch.float64
    )
    for mode in ("deploy", "search"):
        with pruned_with(llava, build_method("fastv"), rows, mode) as handle, torch.no_grad():
            llava(**inputs)
            both = handle.kept()
        for b, row in enumerate(rows):
            with pruned_with(llava, build_method("fastv"), row, mode) as handle, torch.no_grad():
                llava(**inputs)
                alone = handle.kept()
            last = [kept[max(kept)][b] for kept in (both, alone)]
            assert torch.equal(*last)


def test_features_are_the_decoders_input(llava, batches):
    predictor = RatioPredictor(Monotone(6), 32)
    (prepared_batch,) = prepare(llava, batches[:1])
    x, real = features(llava, prepared_batch, predictor)
    assert x.shape == (*prepared_batch.labels.shape, 32) and not our_hooks(llava)
    # Without the answer.
    assert (real.sum(1) == prepared_batch.n_visual + prepared_batch.n_text).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"between": (0.8, 0.3)}, "between must be two increasing shares"),
        ({"between": (0.001, 0.3)}, "between must be two increasing shares in"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"method": "fastw"}, "did you mean 'fastv'"),
    ],
)
def test_refusals(llava, batches, options, message):
    with pytest.raises(ValueError, match=message):
        search_with(llava, batches, vispco.Shared, budgets=(), **options)
