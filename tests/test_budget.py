"""Budgets: parsing, feasibility, and hardening that never exceeds and never wastes a token."""

import pytest
import torch
from hypothesis import given, strategies as st

from vispco.budget import Budget, parse_budget
from vispco.config import PruningConfig
from vispco.flops import CostModel, Dimensions
from vispco.kernels import Kernel
from vispco.methods import Method
from vispco.registry import KERNELS, METHODS, list_kernels
from vispco.schedule import ramp
from vispco.solvers.descent import fit_budget

DIMENSIONS = Dimensions(layers=6, hidden=32, heads=4, kv_heads=2, head_dim=8, ffn=56, vocab=60)


def make(budget, layers=6, n_visual=(16,), n_text=(9,), first_layer=1, method="fastv", **options):
    dimensions = Dimensions(**{**vars(DIMENSIONS), "layers": layers})
    cost = CostModel(dimensions, METHODS.get(method)())
    return Budget(
        budget, cost, torch.tensor(n_visual), torch.tensor(n_text), first_layer, **options
    )


@pytest.mark.parametrize(
    "given_, expected",
    [
        (0.5, (0.5, False)),
        ("50%", (0.5, False)),
        (" 12.5 % ", (0.125, False)),
        (1, (1.0, False)),
        (0, (0.0, False)),
        ("0.3", (0.3, False)),
        (1.8e12, (1.8e12, True)),
        ("1.8TFLOPs", (1.8e12, True)),
        ("900 GFLOP", (9e11, True)),
        ("5e5 flops", (5e5, True)),
        ("3e9", (3e9, True)),
    ],
)
def test_parse(given_, expected):
    assert parse_budget(given_) == expected


@pytest.mark.parametrize(
    "bad",
    [
        -0.1,
        "-5%",
        float("nan"),
        float("inf"),
        "",
        "half",
        "1.2.3",
        "120%",
        1.5,
        17,
        True,
        None,
        [0.5],
        "1.8 Teraflops",
        "0x10",
    ],
)
def test_parse_refuses(bad):
    with pytest.raises(ValueError, match="0.5"):
        parse_budget(bad)


def monotone(values):
    return sorted(values, reverse=True)


shapes = st.lists(st.tuples(st.integers(1, 70), st.integers(0, 40)), min_size=1, max_size=4)


@given(
    st.lists(st.floats(0, 1), min_size=5, max_size=5).map(monotone),
    st.floats(0.45, 1),
    shapes,
    st.sampled_from(["fastv", "random", "pdrop"]),
)
def test_hardened_never_exceeds_and_no_token_more_fits(ratios, share, samples, method):
    """Counted again by hand for every sample.

    One token more, in any layer, breaks the budget or the order.
    """
    first = METHODS.get(method).first_layer
    n_visual, n_text = zip(*samples, strict=True)
    limit = make(share, 6, n_visual, n_text, first, method)
    hardened = limit.harden(torch.tensor([1.0, *ratios]))
    # Valid: in [0, 1], non-increasing.
    config = PruningConfig(method, hardened)
    assert list(config.keep_ratios[:first]) == [1.0] * first
    for n, t in samples:
        tokens = torch.tensor([config.tokens(n)])
        total = int(limit.cost(tokens, torch.tensor([n]), torch.tensor([t])))
        full, text = int(limit.cost.full(n, t)), int(limit.cost.text_only(t))
        assert total <= text + share * (full - text) + 1e-6 * full
    counts = config.tokens(limit.tokens)
    for i in range(first, 6):
        more = [c + (j == i) for j, c in enumerate(counts)]
        if more[i] <= (more[i - 1] if i else limit.tokens):
            assert not limit.holds(more)


@given(st.floats(0.2, 1))
def test_hardening_keeps_a_schedule_that_already_fits_exactly(share):
    """Whole-token schedules on the budget come back unchanged."""
    counts = [16, 16, 12, 12, 5, 3]
    limit = make(1.0)
    used = limit.share(counts)
    limit = make(used)
    assert [round(r * 16) for r in limit.harden(torch.tensor(counts) / 16)] == counts


def test_every_sample_is_within_the_budget_not_only_their_mean():
    limit = make(0.5, n_visual=(8, 64), n_text=(40, 2))
    counts = PruningConfig(
        "fastv", limit.harden(torch.full((6,), 0.5).index_fill(0, torch.tensor([0]), 1.0))
    )
    for n, t in ((8, 40), (64, 2)):
        cost = limit.cost(torch.tensor([counts.tokens(n)]), torch.tensor([n]), torch.tensor([t]))
        full, text = limit.cost.full(n, t), limit.cost.text_only(t)
        assert (int(cost) - int(text)) / (int(full) - int(text)) <= 0.5


@given(st.lists(st.floats(0, 1), min_size=5, max_size=5).map(monotone))
def test_slack_is_what_is_left_of_the_budget(ratios):
    limit = make(0.6)
    r = torch.tensor([1.0, *ratios], dtype=torch.float64)
    # Tokens entering each layer.
    n = r * 16 + 9
    flops = (2 * n * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 56) + 4 * n * n * 32).sum() + 2 * 32 * 60
    expected = (limit.limit - flops) / (limit.full - limit.text)
    assert torch.allclose(limit.slack(r), expected)


def test_infeasible_names_the_reachable_range():
    with pytest.raises(ValueError, match=r"0\.01.*from layer 1.*reachable range is 0\.1\d+ to 1"):
        make(0.01)
    with pytest.raises(ValueError, match="cannot be reached.*FLOPs"):
        make("1 MFLOPs")
    with pytest.raises(ValueError, match="relative_to must be"):
        make(0.5, relative_to="all")


def test_zero_and_one():
    """Budget 0 is the text alone, where the method can prune layer 0.

    Budget 1 is the full model.
    """
    assert make(0, first_layer=0, method="random").harden(torch.rand(6)) == [0.0] * 6
    assert make(1).harden(torch.full((6,), 0.3)) == [1.0] * 6
    with pytest.raises(ValueError, match="reachable"):
        make(0)


def test_total_share_means_the_full_cost():
    limit = make(0.7, relative_to="total")
    assert torch.allclose(limit.limit, 0.7 * limit.full)


@pytest.mark.parametrize("name", list_kernels())
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_every_kernel_starts_on_the_budget(name, share):
    curve: Kernel = KERNELS.get(name)(12, 1)
    limit = make(share, layers=12)
    fit_budget(curve, limit)
    assert abs(float(limit.slack(curve()).detach())) < 0.02


def test_scoring_is_part_of_the_cost():
    """A method with dear scores leaves fewer tokens."""

    class Dear(Method):
        def score(self, ctx):
            return ctx.hidden[..., 0][ctx.visual]

        def flops(self, dimensions, n_visual, n_text):
            return 20_000 * n_visual

    cheap = make(0.6)
    dear = Budget(0.6, CostModel(DIMENSIONS, Dear()), torch.tensor([16]), torch.tensor([9]))
    ratios = torch.tensor([1, 1, 1, 0.5, 0.5, 0.5])
    assert sum(dear.harden(ratios)) < sum(cheap.harden(ratios))
    counts = [round(r * 16) for r in dear.harden(ratios)]
    assert int(dear.cost(torch.tensor([counts]), torch.tensor([16]), torch.tensor([9]))) <= float(
        dear.limit
    )


@given(
    st.lists(
        st.sampled_from([1.0, 1 - 2**-53, 1 - 1e-12, 1 - 1e-7, 0.5, 1e-12, 0.0]),
        min_size=5,
        max_size=5,
    ),
    st.floats(0.2, 0.99),
)
def test_almost_nothing_dropped_is_no_way_around_the_budget(tail, share):
    """A sum of floats that should be 1 and is a little less drops nothing.

    Whatever it is scaled by.
    """
    cost = CostModel(Dimensions(6, 32, 4, 2, 8, 56, 60))
    limit = Budget(share, cost, torch.tensor([64]), torch.tensor([9]))
    ratios = torch.tensor([1.0, *sorted(tail, reverse=True)], dtype=torch.float64)
    counts = [round(r * 64) for r in limit.harden(ratios)]
    assert limit.holds(counts) and counts == sorted(counts, reverse=True)


@given(st.floats(0.25, 0.98), st.sampled_from([0.1, 0.25, 0.5, 1.0]), shapes)
def test_a_ramp_is_a_line_to_nothing_as_late_as_the_budget_allows(share, width, samples):
    limit = make(share, 6, *zip(*samples, strict=True))
    found = ramp(limit, width)
    assert float(limit.slack(found)) >= 0 and found[0] == 1
    assert (found[1:] <= found[:-1]).all() and found.min() >= 0 and found.max() <= 1
    falling = found[1:][(found[1:] > 0) & (found[1:] < 1)]
    torch.testing.assert_close(
        falling[:-1] - falling[1:], torch.full_like(falling[1:], 1 / (width * 6))
    )
    # A hundredth of a layer later, it would cost too much.
    if len(falling):
        later = torch.where(
            (found > 0) & (found < 1), (found + 0.01 / (width * 6)).clamp(max=1), found
        )
        later[0] = 1
        assert float(limit.slack(later)) < 0


def test_a_ramp_where_everything_fits_keeps_everything_and_where_nothing_fits_nothing():
    assert ramp(make(1.0)).tolist() == [1] * 6
    assert ramp(make(make(1.0).share([16, 0, 0, 0, 0, 0]) + 1e-6), 0.1).tolist() == pytest.approx(
        [1, 0, 0, 0, 0, 0], abs=0.01
    )
