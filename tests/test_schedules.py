"""Schedules found by rule.

FitPrune's fit of attention statistics, and VTW's first layer that does not show.
"""

import math

import pytest
import torch
from hypothesis import given, strategies as st

import vispco
from oracles import by_hand, rows_alone
from tiny import FAMILIES, IMAGE, PER_IMAGE, batch, our_hooks, tiny_llava, without_labels
from vispco.baselines.rules import attention_masses, fitprune_schedule, remaining, vtw_schedule
from vispco.budget import Budget
from vispco.calibration import prepare, shapes
from vispco.flops import CostModel
from vispco.registry import METHODS, adapter_for


@pytest.fixture(scope="module")
def batches():
    return [
        batch(images=(1, 2, 0), text=(9, 6, 4), before=(2, 0, 1)),
        batch(images=(2,), text=(8,), before=(3,)),
    ]


# ---- FitPrune ------------------------------------------------------------------------------------
def naive_remaining(masses, alpha):
    """Shares of tokens left at each layer, of one sample: lists of (cross, own) by layer."""
    left, shares, n = list(range(len(masses[0][0]))), [1.0], len(masses[0][0])
    for layer in masses:
        goes = set(left)
        for mass in layer:
            total, removed, prefix = sum(mass[j] for j in left), 0.0, set()
            for j in sorted(left, key=lambda j: (mass[j], j)):
                removed += mass[j]
                if removed > alpha * total:
                    break
                prefix.add(j)
            goes &= prefix
        left = [j for j in left if j not in goes]
        shares.append(len(left) / n)
    return shares


tables = st.lists(
    st.lists(st.integers(0, 9), min_size=3 * 2 * 5, max_size=3 * 2 * 5), min_size=1, max_size=3
)


@given(tables, st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.875, 1.0]), st.integers(1, 5))
def test_remaining_is_what_loops_leave(table, alpha, fewest):
    """Samples of different sizes; whole masses and binary fractions, so that ties are ties."""
    masses = torch.tensor(table, dtype=torch.float64).view(-1, 3, 2, 5)
    sizes = [max(fewest, 5 - i) for i in range(len(masses))]
    valid = torch.arange(5) < torch.tensor(sizes)[:, None]
    expected = [
        naive_remaining([[m[:n] for m in layer] for layer in masses[i].tolist()], alpha)
        for i, n in enumerate(sizes)
    ]
    mean = [sum(column) / len(column) for column in zip(*expected, strict=True)]
    assert remaining(masses, valid, alpha).tolist() == pytest.approx(mean, abs=1e-12)


def test_remaining_in_closed_form():
    """Opposite rankings share no tokens at half the mass.

    One token with all of the mass stays until alpha is 1.
    """
    valid = torch.ones(1, 8, dtype=torch.bool)
    rising = torch.arange(8.0)
    opposite = torch.stack([rising, rising.flip(0)])[None, None].expand(1, 3, 2, 8)
    assert remaining(opposite, valid, 0.2).tolist() == [1, 1, 1, 1]
    one = torch.zeros(1, 2, 2, 8).index_fill(3, torch.tensor([5]), 1.0)
    assert remaining(one, valid, 0.999).tolist() == [1, 1 / 8, 1 / 8]
    assert remaining(one, valid, 1.0).tolist() == [1, 0, 0]
    assert remaining(one, valid, 0.999, first_layer=2).tolist() == [1, 1, 1 / 8]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_masses_are_the_full_models_attention(family, batches):
    """Against eager attention weights of each sample alone, the answer left out."""
    model, eager = FAMILIES[family](), FAMILIES[family](attention="eager")
    masses, valid = attention_masses(model, prepare(model, batches))
    assert masses.shape == (3, 5, 2, 2 * PER_IMAGE) and valid.sum(1).tolist() == [16, 32, 32]
    assert not our_hooks(model)
    rows = [(batches[0], (1, 2, 0), 0), (batches[0], (1, 2, 0), 1), (batches[1], (2,), 0)]
    for s, (inputs, images, b) in enumerate(rows):
        trace = by_hand(eager, rows_alone(without_labels(inputs), images, b)[0])
        ids = inputs["input_ids"][b][inputs["attention_mask"][b].bool()].tolist()
        visual = [p for p, t in enumerate(ids) if t == IMAGE]
        # Two are the answer.
        text = [p for p, t in enumerate(ids) if t != IMAGE and p > visual[0]][:-2]
        for layer in range(5):
            most = trace.attention[layer][0].amax(0)
            expected = torch.stack([most[text][:, visual].mean(0), most[visual][:, visual].mean(0)])
            assert torch.allclose(
                masses[s, layer, :, : len(visual)], expected, rtol=1e-4, atol=1e-7
            )


@pytest.mark.parametrize(
    "method, budget", [("fitprune", 0.6), ("fastv", "40%"), ("random", 0.5), ("fastv", 0.9)]
)
def test_fitprune_schedule_is_the_least_alpha_hardened(method, budget, batches):
    """Against a scan of all alphas at which anything changes, with the loops above."""
    model = tiny_llava()
    config = fitprune_schedule(model, batches, budget, method)
    assert config == fitprune_schedule(model, batches, budget, method)
    prepared, adapter = prepare(model, batches), adapter_for(model)(model)
    masses, valid = attention_masses(model, prepared)
    cost = CostModel(adapter.dimensions(adapter.config), METHODS.get(method)())
    limit = Budget(budget, cost, *shapes(prepared))
    tables = [
        [[m[: int(v.sum())] for m in layer] for layer in mass.tolist()]
        for mass, v in zip(masses.double(), valid, strict=True)
    ]
    for i in range(1, 4001):
        columns = zip(*(naive_remaining(t, i / 4000) for t in tables), strict=True)
        mean = torch.tensor([sum(c) / len(c) for c in columns], dtype=torch.float64)
        if limit.holds((mean * limit.tokens).round().long().tolist()):
            break
    counts, expected = config.tokens(32), [round(r * 32) for r in limit.harden(mean)]
    assert max(abs(a - b) for a, b in zip(counts, expected, strict=True)) <= 1
    assert limit.holds(counts) and counts[0] == 32 and limit.share(counts) > limit.share([0] * 6)
    record = vispco.evaluate(model, batches, config)
    assert config.flops == record.flops and record.prunable_share <= limit.share(counts) + 1e-9
    assert (config.method, config.budget, config.n_visual, config.model_type) == (
        method,
        budget,
        32,
        "llava",
    )


def test_fitprune_schedule_follows_the_budget(llava, batches):
    """Fewer tokens for less; all of them for the whole budget."""
    sums = [
        sum(fitprune_schedule(llava, batches, b).keep_ratios) for b in (0.3, 0.5, 0.7, 0.9, 1.0)
    ]
    assert sums == sorted(sums) and sums[-1] == 6 and len(set(sums)) == 5


def test_fitprune_schedule_refuses(llava, batches):
    with pytest.raises(ValueError, match="reachable range"):
        fitprune_schedule(llava, batches, 0.01)
    with pytest.raises(ValueError, match="unknown method"):
        fitprune_schedule(llava, batches, 0.5, "fitprun")
    with pytest.raises(ValueError, match="batches is empty"):
        fitprune_schedule(llava, [], 0.5)
    assert not our_hooks(llava)


def test_the_model_is_as_before(batches):
    model = tiny_llava()
    model.train()
    fitprune_schedule(model, batches, 0.5)
    vtw_schedule(model, batches)
    assert (
        model.training and not our_hooks(model) and all(p.requires_grad for p in model.parameters())
    )


# ---- VTW -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [0.05, 0.3])
def test_vtw_schedule_is_the_first_layer_under_the_threshold(scale, batches):
    model = tiny_llava(scale=scale)
    configs = [vispco.PruningConfig("vtw", [1.0] * k + [0.0] * (6 - k)) for k in range(6)]
    divergences = [vispco.evaluate(model, batches, config).kl for config in configs]
    for threshold in [0, 0.003, *divergences]:
        config = vtw_schedule(model, batches, threshold)
        first = next((k for k in range(6) if divergences[k] <= threshold), 6)
        assert (
            config.keep_ratios == (1.0,) * first + (0.0,) * (6 - first)
            and config.model_type == "llava"
        )


def test_vtw_schedule_looks_at_the_first_samples_only(llava, batches):
    alone = vtw_schedule(llava, batches[:1], 0.05)
    assert all(vtw_schedule(llava, batches, 0.05, samples=n) == alone for n in (1, 3))
    assert vtw_schedule(llava, batches, math.inf).keep_ratios == (0.0,) * 6


@pytest.mark.parametrize("options", [{"threshold": -1}, {"threshold": math.nan}, {"samples": 0}])
def test_vtw_schedule_refuses(llava, batches, options):
    with pytest.raises(ValueError, match="threshold must be 0 or more and samples at least 1"):
        vtw_schedule(llava, batches, **options)
