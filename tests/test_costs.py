"""Costs other than FLOPs, several limits at once, and what a budget of several may look like."""

import json
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings, strategies as st

import vispco
from tiny import batch, tiny_llava
from vispco import testbed
from vispco.budget import Budget, Joint, check_budget, limit_for, parse_budget
from vispco.config import PruningConfig
from vispco.flops import CostModel, Dimensions, KVCacheMemory
from vispco.latency.table import LatencyTable
from vispco.registry import adapter_for
from vispco.solvers.descent import fit_budget
from vispco.solvers.problem import cost_models
from vispco.visual_tokens import VisualTokens

LAYERS = 5
DIMENSIONS = Dimensions(layers=LAYERS, hidden=32, heads=4, kv_heads=2, head_dim=8, ffn=56, vocab=60)
# Steeper and steeper, as attention is.
TABLE = LatencyTable(DIMENSIONS, (8, 16, 24, 40), (2e-3, 2.5e-3, 4e-3, 9e-3))
COSTS = {"flops": CostModel(DIMENSIONS), "kv_cache": KVCacheMemory(DIMENSIONS), "latency": TABLE}
COSTS["tokens"] = VisualTokens(DIMENSIONS)


def prompts(samples=((16, 9),)):
    return tuple(torch.tensor(column) for column in zip(*samples, strict=True))


def one(name, budget=0.6, samples=((16, 9),), first=1):
    return Budget(budget, COSTS[name], *prompts(samples), first)


def descending(size):
    return st.lists(st.floats(0, 1), min_size=size, max_size=size).map(
        lambda v: sorted(v, reverse=True)
    )


names = st.sampled_from(list(COSTS))
shapes = st.lists(st.tuples(st.integers(4, 40), st.integers(9, 30)), min_size=1, max_size=3)
schedules = descending(LAYERS - 1).map(
    lambda ratios: torch.tensor([1.0, *ratios], dtype=torch.float64)
)


# ---- memory --------------------------------------------------------------------------------------
def cache_bytes(model, inputs, config=None):
    """Bytes that a prefill leaves in the cache, counted in its tensors."""
    with torch.no_grad(), nullcontext() if config is None else vispco.apply(model, config):
        cache = model(**inputs, use_cache=True).past_key_values
    return sum(t.numel() * t.itemsize for layer in cache.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize("name", ["testbed-llava", "testbed-qwen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_the_deployed_cache(name, dtype):
    """Sample by sample, pruned and in full, in both of the testbed's architectures."""
    model, _ = testbed.load(name)
    model = model.to(dtype)
    adapter = adapter_for(model)(model)
    cost, layers = cost_models(adapter)["kv_cache"], len(adapter.layers)
    config = PruningConfig("fastv", [1.0, 1.0, *torch.linspace(0.9, 0.0, layers - 2).tolist()])
    for inputs in testbed.batches("test", n=2, batch_size=1, seed=3, model=name):
        inputs = {
            k: v.to(dtype) if v.is_floating_point() else v
            for k, v in inputs.items()
            if k != "labels"
        }
        n_visual = int(adapter.visual_mask(inputs["input_ids"], None).sum())
        n_text = inputs["input_ids"].shape[1] - n_visual
        assert int(cost(torch.tensor(config.tokens(n_visual)), n_visual, n_text)) == cache_bytes(
            model, inputs, config
        )
        assert int(cost.full(n_visual, n_text)) == cache_bytes(model, inputs)


@pytest.mark.parametrize("bad", [0, -2, None, True, "2"])
def test_bytes_per_element_are_checked(bad):
    with pytest.raises(ValueError, match="bytes_per_element must be"):
        KVCacheMemory(DIMENSIONS, bad)


# ---- the latency table ---------------------------------------------------------------------------
def test_table_between_and_beyond_its_lengths():
    """By hand: at the lengths, between, held constant below and continued beyond."""
    at = torch.tensor([1.0, 8, 12, 16, 20, 40, 56])
    expected = torch.tensor([2.0, 2, 2.25, 2.5, 3.25, 9, 14], dtype=torch.float64) / 1000
    assert torch.allclose(TABLE.layer(at), expected)


def test_times_that_fall_are_raised():
    """Noise never makes a longer sequence cheaper.

    The table never says less than what was measured.
    """
    assert LatencyTable(DIMENSIONS, (4, 8, 12), (3.0, 2.0, 5.0)).seconds == (3.0, 3.0, 5.0)


@given(
    st.lists(st.floats(1e-6, 1.0), min_size=3, max_size=6),
    st.lists(st.floats(0, 60), min_size=2, max_size=20),
)
def test_table_never_falls(seconds, at):
    table = LatencyTable(DIMENSIONS, tuple(range(5, 5 + 7 * len(seconds), 7)), tuple(seconds))
    found = table.layer(torch.tensor(sorted(at), dtype=torch.float64))
    assert bool((found[1:] >= found[:-1] - 1e-12).all()) and bool((found >= seconds[0]).all())


@given(names, schedules)
def test_cost_is_the_sum_over_layers_and_its_gradient_is_right(name, ratios):
    """Against one layer at a time, and finite differences away from the table's corners."""
    cost, counts = COSTS[name], (ratios * 15.9 + 0.03).requires_grad_()
    alone = [cost(counts[i : i + 1], 16, 9) - getattr(cost, "lm_head", 0) for i in range(LAYERS)]
    total = cost(counts, 16, 9)
    assert torch.allclose(total, sum(alone) + getattr(cost, "lm_head", 0))
    (gradient,) = torch.autograd.grad(total, counts)
    for i in range(LAYERS):
        step = torch.zeros(LAYERS, dtype=torch.float64).index_fill(0, torch.tensor(i), 1e-4)
        with torch.no_grad():
            sides = (
                (cost(counts + step, 16, 9) - total) / 1e-4,
                (total - cost(counts - step, 16, 9)) / 1e-4,
            )
        # At a corner, one of the two.
        assert any(torch.allclose(gradient[i], side, rtol=1e-3) for side in sides)


@pytest.mark.parametrize(
    "lengths, seconds, match",
    [
        ((8,), (1.0,), "two or more increasing"),
        ((8, 8), (1.0, 2.0), "two or more increasing"),
        ((16, 8), (1.0, 2.0), "two or more increasing"),
        ((0, 8), (1.0, 2.0), "two or more increasing"),
        ((8.0, 16.0), (1.0, 2.0), "two or more increasing"),
        ((8, 16), (1.0,), "one positive number per length"),
        ((8, 16), (1.0, 0.0), "one positive number"),
        ((8, 16), (1.0, float("nan")), "one positive number"),
        ((8, 16), (1.0, "2"), "one positive number"),
    ],
)
def test_bad_tables_are_refused(lengths, seconds, match):
    with pytest.raises(ValueError, match=match):
        LatencyTable(DIMENSIONS, lengths, seconds)


def test_table_as_a_file(tmp_path):
    path = tmp_path / "latency.json"
    table = LatencyTable(DIMENSIONS, [8, 16], [1e-3, 2e-3], {"device": "a fast one"})
    table.save(path)
    again = LatencyTable.load(path)
    assert again == table and again.meta == table.meta
    good = json.loads(path.read_text())
    for change, match in (
        ({"lengths": "ab"}, "lengths"),
        ({"seconds": 3}, "lists"),
        ({"dimensions": []}, "dimensions"),
        ({"dimensions": {"layers": 2}}, "dimensions"),
        ({"schema_version": 99}, "schema_version"),
        ({"more": 1}, "unknown keys"),
        ({"seconds": [1e-3, None]}, "one positive number"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=f"latency.json: .*{match}"):
            LatencyTable.load(path)


class Clock:
    """A clock that moves only while the decoder runs.

    A layer takes a second per token. The first rounds and one later round are slow.
    """

    def __init__(self, model, slow=()):
        self.now, self.passes, self.slow, self.shapes = 0.0, 0, slow, []
        self.layers = len(model.get_decoder().layers)
        self.hook = model.get_decoder().register_forward_hook(self.tick, with_kwargs=True)

    def tick(self, module, args, kwargs, output):
        size = tuple(kwargs["inputs_embeds"].shape[:2])
        self.now += size[1] * self.layers * (50.0 if self.passes in self.slow else 1.0)
        self.passes += 1
        self.shapes.append(size)

    def __call__(self):
        return self.now


def test_measuring_takes_medians_of_turns(family):
    """Every family's decoder, with a clock of our own.

    Slow warm-up rounds and one slow moment leave no trace.
    """
    clock, state = Clock(family, slow={0, 1, 2, 3, 6}), torch.get_rng_state()
    try:
        table = LatencyTable.measure(family, [3, 7], repeats=3, batch_size=2, clock=clock)
    finally:
        clock.hook.remove()
    assert table.lengths == (3, 7) and table.seconds == (3.0, 7.0)
    # The lengths are timed in turns.
    assert clock.shapes == ([(2, 3), (2, 7)] + [(2, 7), (2, 3)]) * 2 + [(2, 3), (2, 7)]
    assert table.dimensions == adapter_for(family).dimensions(family.config)
    assert table.meta["device"] == "cpu" and table.meta["batch_size"] == 2
    assert LatencyTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    assert torch.equal(state, torch.get_rng_state())


def test_measuring_leaves_the_model_as_it_was():
    model, modes = tiny_llava(layers=2).train(), set()
    hook = model.get_decoder().register_forward_hook(
        lambda module, args, output: modes.add(module.training)
    )
    LatencyTable.measure(model, [4, 8], repeats=1)
    hook.remove()
    assert modes == {False} and model.training and all(p.requires_grad for p in model.parameters())


def test_measuring_refuses(llava):
    with pytest.raises(ValueError, match="two or more increasing"):
        LatencyTable.measure(llava, [16])
    with pytest.raises(ValueError, match="repeats and batch_size"):
        LatencyTable.measure(llava, [8, 16], repeats=0)
    config = PruningConfig("fastv", [1, 1, 0.5, 0.5, 0.5, 0.5])
    message = "have hooks: measure the full model"
    with vispco.apply(llava, config), pytest.raises(ValueError, match=message):
        LatencyTable.measure(llava, [8, 16])


def test_a_table_belongs_to_its_decoder(llava):
    adapter = adapter_for(llava)(llava)
    assert list(cost_models(adapter)) == ["flops", "kv_cache"]
    table = LatencyTable.measure(llava, [8, 32], repeats=1)
    assert cost_models(adapter, latency=table)["latency"] is table
    for wrong in (TABLE, 0.6, {"seconds": [1]}):
        with pytest.raises(ValueError, match="LatencyTable of this model's decoder"):
            cost_models(adapter, latency=wrong)


# ---- one budget of any cost ----------------------------------------------------------------------
@given(names, schedules, st.floats(0.45, 1), shapes)
@settings(max_examples=80)
def test_hardened_never_exceeds_and_no_token_more_fits(name, ratios, share, samples):
    """Counted for every sample with its own whole tokens.

    One token more, in any layer, breaks the budget.
    """
    limit = one(name, share, samples)
    config = PruningConfig("random", limit.harden(ratios))
    for n, t in samples:
        cost = float(limit.cost(torch.tensor(config.tokens(n)), n, t))
        full, text = float(limit.cost.full(n, t)), float(limit.cost.text_only(t))
        assert cost <= text + share * (full - text) + 1e-12 * full
    no_token_more(limit, config.tokens(limit.tokens))


def no_token_more(limit, counts):
    """`counts` hold; with one token more in any layer that can have it, they do not."""
    assert limit.holds(counts) and counts[0] == limit.tokens
    for i in range(limit.first_layer, limit.layers):
        if counts[i] < counts[i - 1]:
            assert not limit.holds([c + (j == i) for j, c in enumerate(counts)])


@given(names, schedules, st.floats(0.45, 1))
def test_share_and_slack(name, ratios, share):
    limit = one(name, share, ((16, 9), (11, 20)))
    counts = (ratios * 16).long().tolist()
    assert 0 <= limit.share(counts) <= 1
    assert limit.share([16] * LAYERS) == 1 and limit.share([0] * LAYERS) == pytest.approx(
        0, abs=1e-12
    )
    free = (ratios * 0.98 + 0.01).requires_grad_()
    (gradient,) = torch.autograd.grad(limit.slack(free), free)
    direction = torch.linspace(1, 2, LAYERS, dtype=torch.float64) * 1e-6
    with torch.no_grad():
        sides = [
            (limit.slack(free + d) - limit.slack(free - e)) / 1e-6
            for d, e in ((direction, 0), (0 * direction, direction))
        ]
    wanted = float(gradient @ direction / 1e-6)
    # At a corner, one of the two.
    assert any(float(side) == pytest.approx(wanted, rel=1e-3) for side in sides)


@pytest.mark.parametrize(
    "name, budget, match",
    [
        ("kv_cache", 0.05, r"reachable range is 0\.2\d* to 1"),
        ("latency", 0.05, r"reachable range is 0\.\d+ to 1"),
        ("kv_cache", "1 kB", r"reachable range is 3904 to 8000 bytes"),
        ("latency", "1 ms", r"reachable range is 0\.01256 to 0\.02156 seconds"),
    ],
)
def test_unreachable_budgets_name_the_range_and_the_unit(name, budget, match):
    with pytest.raises(ValueError, match=match):
        one(name, budget)


def test_the_ends_of_the_range_are_exact():
    """1 is the full model, 0 the text alone, however seconds are rounded.

    Rounding matters: text + (full - text) is not always full.
    """
    for seconds in torch.rand(
        300, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).tolist():
        table = LatencyTable(DIMENSIONS, (9, 25), tuple(sorted(seconds)))
        assert Budget(1, table, *prompts()).holds([16] * LAYERS)
        assert Budget(0, table, *prompts(), 0).holds([0] * LAYERS)


def test_absolute_budgets_with_units():
    assert (
        float(one("kv_cache", "6 kB").limit) == 6000
        and float(one("kv_cache", "6KiB").limit) == 6144
    )
    assert float(one("latency", "18 ms").limit) == pytest.approx(0.018)
    assert one("latency", "18 ms").holds([16, 16, 8, 8, 8]) and not one("latency", "18 ms").holds(
        [16] * LAYERS
    )
    assert one("kv_cache", 1e7).harden(torch.ones(LAYERS)) == [1.0] * LAYERS


@pytest.mark.parametrize(
    "given_, unit, expected",
    [
        ("1.5 GB", "bytes", 1.5e9),
        ("2GiB", "bytes", 2**31),
        ("512 bytes", "bytes", 512.0),
        (2e9, "bytes", 2e9),
        ("20ms", "seconds", 0.02),
        ("0.3 s", "seconds", 0.3),
        ("250 us", "seconds", 2.5e-4),
        ("3 joules", "joules", 3.0),
    ],
)
def test_parse_units(given_, unit, expected):
    assert parse_budget(given_, unit) == (pytest.approx(expected, rel=1e-15), True)
    assert parse_budget("50%", unit) == (0.5, False)


@pytest.mark.parametrize(
    "bad, unit",
    [
        ("1.8TFLOPs", "bytes"),
        ("20 ms", "FLOPs"),
        ("1.5 GB", "seconds"),
        (20, "seconds"),
        ("-1 ms", "seconds"),
        ("1e999 GB", "bytes"),
    ],
)
def test_parse_refuses_other_units(bad, unit):
    with pytest.raises(ValueError, match=f"absolute {unit} such as"):
        parse_budget(bad, unit)


def test_a_cost_that_pruning_cannot_lower_is_refused():
    """A device on which short and long prompts take the same time."""
    flat = LatencyTable(DIMENSIONS, (8, 64), (1e-3, 1e-3))
    with pytest.raises(ValueError, match="16 visual tokens beside 9 of text cost no seconds"):
        Budget(0.5, flat, *prompts())


@pytest.mark.parametrize("name", COSTS)
def test_kernels_are_fitted_to_any_cost(name):
    curve, limit = vispco.registry.KERNELS.get("monotone")(LAYERS, 1), one(name, 0.6)
    fit_budget(curve, limit)
    assert abs(float(limit.slack(curve()).detach())) < 0.02


# ---- several at once -----------------------------------------------------------------------------
several = st.dictionaries(names, st.floats(0.45, 1), min_size=1)


def joint(budget, samples=((16, 9),)):
    return limit_for(budget, COSTS, *prompts(samples))


@given(several, schedules, shapes)
def test_joint_never_exceeds_any_and_no_token_more_fits(budget, ratios, samples):
    limit = joint(budget, samples)
    counts = [round(r * limit.tokens) for r in limit.harden(ratios)]
    for name, share in budget.items():
        assert one(name, share, samples).holds(counts)
        assert 0 <= limit.shares(counts)[name] <= share + 1e-12
    no_token_more(limit, counts)


@given(several, schedules)
def test_joint_slacks_are_those_of_its_budgets(budget, ratios):
    limit, ratios = joint(budget), ratios.requires_grad_()
    slacks = limit.slacks(ratios)
    alone = {name: one(name, share).slack(ratios) for name, share in budget.items()}
    # FLOPs first, whatever the dict's order.
    assert list(limit.limits) == [name for name in COSTS if name in budget]
    assert torch.equal(slacks, torch.stack([alone[name] for name in limit.limits]))
    assert torch.equal(limit.slack(ratios), min(alone.values()))
    slacks.sum().backward()
    assert bool((ratios.grad < 0).all())


@given(schedules, st.floats(0.45, 0.9), names)
def test_joint_whose_first_budget_binds_is_that_budget(ratios, share, other):
    alone, both = (
        one("flops", share),
        Joint({"flops": one("flops", share), "other": one(other, 1.0)}),
    )
    counts = [16, 16, 8, 3, 0]
    assert both.harden(ratios) == alone.harden(ratios)
    assert both.share(counts) == alone.share(counts) and both.holds(counts) == alone.holds(counts)
    for name in ("limit", "full", "text"):
        assert torch.equal(getattr(both, name), getattr(alone, name))
    for name in ("cost", "tokens", "layers", "first_layer"):
        assert getattr(both, name) == getattr(alone, name)


def test_joint_of_budgets_that_differ_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        Joint({})
    samples = [((16, 8),), ((15, 9),), ((16, 9), (8, 9))]
    for other in (*(one("kv_cache", samples=s) for s in samples), one("kv_cache", first=0)):
        with pytest.raises(ValueError, match="same samples, layers and first layer"):
            Joint({"flops": one("flops"), "kv_cache": other})


def test_kernels_are_fitted_to_the_tightest():
    curve, limit = (
        vispco.registry.KERNELS.get("monotone")(LAYERS, 1),
        joint({"flops": 0.8, "kv_cache": 0.5}),
    )
    fit_budget(curve, limit)
    slacks = limit.slacks(curve()).detach()
    assert abs(float(slacks[1])) < 0.02 and float(slacks[0]) > 0.1


# ---- how users write them ------------------------------------------------------------------------
def test_limit_for():
    plain = limit_for("60%", COSTS, *prompts())
    assert type(plain) is Budget and plain.value == "60%" and plain.cost is COSTS["flops"]
    several = limit_for(
        {"latency": "18 ms", "kv_cache": 0.7}, COSTS, *prompts(), relative_to="total"
    )
    assert json.loads(json.dumps(several.value)) == {"kv_cache": 0.7, "latency": "18 ms"}
    assert torch.allclose(several.limit, 0.7 * COSTS["kv_cache"].full(*prompts()).double())
    with pytest.raises(ValueError, match=r"limits latency.*LatencyTable\.measure"):
        limit_for(
            {"flops": 0.5, "latency": 0.5},
            {k: v for k, v in COSTS.items() if k != "latency"},
            *prompts(),
        )
    with pytest.raises(ValueError, match="cannot be reached"):
        limit_for({"flops": 0.5, "kv_cache": 0.01}, COSTS, *prompts())


@pytest.mark.parametrize(
    "bad, match",
    [
        ({}, "is empty: limit some of flops, kv_cache, latency"),
        ({"kvcache": 0.5}, "did you mean 'kv_cache'"),
        ({3: 0.5}, "cannot limit 3"),
        ({"flops": "20 ms"}, "absolute FLOPs"),
        ({"latency": 3}, "absolute seconds"),
        ({"flops": {"flops": 0.5}}, "must be a share"),
        ([0.5], "must be a share"),
        (None, "must be a share"),
        ("1.5 GB", "absolute FLOPs"),
    ],
)
def test_malformed_budgets_are_refused(bad, match):
    with pytest.raises(ValueError, match=match):
        check_budget(bad)
    with pytest.raises(ValueError, match=match):
        limit_for(bad, COSTS, *prompts())


@pytest.mark.parametrize(
    "good", [0.5, "50%", "1.8TFLOPs", {"flops": 0.5}, {"kv_cache": "1.5GB", "latency": "20 ms"}]
)
def test_well_formed_budgets_pass(good):
    check_budget(good)


@given(schedules, st.integers(8, 40), shapes)
def test_tokens_are_the_papers_unit(ratios, most, samples):
    """On average over the layers, of every prompt; no token more fits."""
    limit = limit_for(f"{most} tokens", {"flops": COSTS["flops"]}, *prompts(samples))
    counts = [round(r * limit.tokens) for r in limit.harden(ratios)]
    config = PruningConfig("fastv", [c / limit.tokens for c in counts])
    for n_visual, _ in samples:
        assert sum(config.tokens(n_visual)) / LAYERS <= most + 1e-9
    no_token_more(limit, counts)
    assert limit.value == f"{most} tokens"


def test_tokens_do_not_count_text_and_are_refused_where_they_cannot_be():
    cost = COSTS["tokens"]
    counts = torch.tensor([16, 16, 8, 3, 0])
    assert float(cost(counts, 16, 9)) == float(cost(counts, 16, 900)) == 43 / 5
    assert float(cost.full(torch.tensor(16), 9)) == 16 and float(cost.text_only(9)) == 0
    with pytest.raises(ValueError, match=r"cannot be reached.* 3\.2 to 16 tokens"):
        limit_for("2 tokens", COSTS, *prompts())
    for bad in ("-3 tokens", "many tokens", {"flops": "3 tokens"}):
        with pytest.raises(ValueError, match="expected|must be"):
            check_budget(bad)


def test_slack_orders_budgets_of_any_units():
    """What is left of the full model compares shares, absolute FLOPs and several limits."""
    everything = torch.ones(LAYERS)
    limits = [
        joint(b)
        for b in (0.5, {"kv_cache": 0.9, "latency": 0.7}, {"flops": 0.8}, 1e9, {"latency": 0.6})
    ]
    order = sorted(limits, key=lambda limit: float(limit.slack(everything)))
    assert [limit.value for limit in order] == [
        0.5,
        {"latency": 0.6},
        {"kv_cache": 0.9, "latency": 0.7},
        {"flops": 0.8},
        1e9,
    ]


def test_deployed_within_memory_and_time(llava):
    """From measuring to hardening on a real decoder.

    Each limit holds for the configuration that comes out.
    """
    adapter = adapter_for(llava)(llava)
    table = LatencyTable(adapter.dimensions(adapter.config), (8, 24, 48), (1e-3, 2e-3, 5e-3))
    costs = cost_models(adapter, latency=table)
    limit = limit_for(
        {"flops": 0.9, "kv_cache": "60%", "latency": 0.7}, costs, *prompts(((16, 8), (32, 8)))
    )
    config = PruningConfig("random", limit.harden(torch.linspace(1, 0.2, 6)))
    inputs = {k: v for k, v in batch(images=(2,), text=(9,), before=(2,)).items() if k != "labels"}
    n_text = inputs["input_ids"].shape[1] - 32
    assert cache_bytes(llava, inputs, config) == int(
        costs["kv_cache"](torch.tensor(config.tokens(32)), 32, n_text)
    )
    assert all(
        share <= wanted
        for share, wanted in zip(
            limit.shares(config.tokens(32)).values(), (0.9, 0.6, 0.7), strict=True
        )
    )
