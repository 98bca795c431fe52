"""Composite methods: each part ranks the drops of its own layers, as it would alone."""

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vispco
from naive import NAIVE, naive_kept
from oracles import pruned_with
from test_methods import models
from tiny import FAMILIES, PER_IMAGE, batch, search_with, without_labels
from vispco import PruningConfig, count_flops
from vispco.baselines.presets import presets
from vispco.dimensions import Dimensions
from vispco.flops import CostModel
from vispco.methods.composite import Composite
from vispco.methods.fastv import FastV
from vispco.profiling import Profile
from vispco.registry import METHODS, adapter_for, build_method
from vispco.solvers.several import Several

MIXED = {"images": (1, 2, 0, 1), "text": (9, 7, 6, 12), "before": (2, 0, 3, 8)}
MODES = ("deploy", "search")
RATIOS = [1, 0.75, 0.75, 0.5, 0.5, 0.25]


def outcome(model, config, mode="deploy"):
    """Logits, and what was kept."""
    inputs = without_labels(batch(**MIXED))
    with vispco.apply(model, config, mode=mode) as handle, torch.no_grad():
        return model(**inputs).logits, handle.kept()


def equal(one, other):
    """To the bit."""
    (logits, kept), (others, also) = one, other
    same = kept.keys() == also.keys() and all(torch.equal(kept[i], also[i]) for i in kept)
    return same and torch.equal(logits, others)


def gradient(model, name):
    """Of the loss in the keep ratios, and the loss."""
    ratios = torch.tensor(RATIOS, dtype=torch.float64, requires_grad=True)
    with pruned_with(model, build_method(name), ratios, "search"):
        loss = model(**batch(images=(1, 2), seed=3)).loss
        loss.backward()
    model.zero_grad()
    return torch.cat([ratios.grad, loss.detach()[None]])


# ---- the parts -----------------------------------------------------------------------------------
SAME = ["fastv+fastv@3", "pdrop+pdrop", "visionzip+visionzip@2+visionzip@4", "pool+pool@5"]


@pytest.mark.parametrize("name", SAME)
def test_parts_of_one_method_are_that_method(llava, name):
    plain = name.partition("+")[0]
    one, other = PruningConfig(name, RATIOS), PruningConfig(plain, RATIOS)
    for mode in MODES:
        assert equal(outcome(llava, one, mode), outcome(llava, other, mode))
    assert torch.equal(gradient(llava, name), gradient(llava, plain))
    assert count_flops(llava, one, 16, 9) == count_flops(llava, other, 16, 9)
    first = adapter_for(llava)(llava).first_layer
    assert first(build_method(name)) == first(build_method(plain))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("layer", "alone"), [(0, "visionzip"), (2, "visionzip"), (3, "pdrop"), (5, "pdrop")]
)
def test_one_drop_is_that_of_the_part_in_charge(llava, layer, alone, mode):
    ratios = [1.0] * layer + [0.4] * (6 - layer)
    found = [PruningConfig(name, ratios) for name in ("visionzip+pdrop@3", alone)]
    assert equal(*(outcome(llava, config, mode) for config in found))


@pytest.mark.parametrize("mode", MODES)
def test_a_later_drop_is_ranked_among_what_the_first_part_left(llava, mode):
    """A method made by hand keeps the same; and the first drop is the first part's alone."""

    @vispco.register_method("by-layer", overwrite=True)
    class ByLayer(vispco.Method):
        first_layer, reads_vision = 0, True

        def chosen(self, ctx):
            name = "vispruner" if ctx.layer == 0 else "visionzip" if ctx.layer < 4 else "fastv"
            return build_method(name)

        def score(self, ctx):
            return self.chosen(ctx).score(ctx)

        def merge(self, ctx, kept):
            return self.chosen(ctx).merge(ctx, kept)

    ratios = [0.8, 0.8, 0.5, 0.5, 0.2, 0.2]
    try:
        by_hand = outcome(llava, PruningConfig("by-layer", ratios), mode)
    finally:
        METHODS.remove("by-layer")
    name = "vispruner+visionzip@1+fastv@4"
    assert equal(outcome(llava, PruningConfig(name, ratios), mode), by_hand)
    _, alone = outcome(llava, PruningConfig("vispruner", [0.8] * 6), mode)
    _, last = outcome(llava, PruningConfig("vispruner+visionzip@1", ratios), mode)
    assert torch.equal(by_hand[1][0], alone[0])
    # It matters who ranks last.
    assert not torch.equal(by_hand[1][4], last[4])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["random+fastv@2", "strided+pdrop", "fastv+dart@3+sparsevlm@4"])
def test_keeps_what_the_naive_parts_keep(name, mode):
    """One sample at a time, by eager attention weights and Python loops."""
    sdpa, eager = models("llava")
    config, parts = PruningConfig(name, RATIOS), [p.split("@") for p in name.split("+")]
    starts = [0, *(int(part[1]) if part[1:] else 1 for part in parts[1:])]

    def naive(step):
        index = sum(start <= step.layer for start in starts) - 1
        return NAIVE[parts[index][0]](step)

    inputs = without_labels(batch(images=(2,), text=(8,), before=(2,), seed=1))
    with vispco.apply(sdpa, config, mode=mode) as handle, torch.no_grad():
        sdpa(**inputs)
        kept = handle.kept()
    expected = naive_kept(eager, inputs, config, naive)
    assert kept.keys() == expected.keys() == {1, 3, 5}
    assert all(torch.equal(kept[i][0], expected[i]) for i in kept)


def test_the_limit_is_that_of_the_part_in_charge(llava):
    """SparseVLM's adaptive count holds where it ranks, and there alone."""
    options, ratios = {"sparsevlm": {"adaptive": 1}}, [1, 0.9, 0.9, 0.8, 0.8, 0.8]
    sample = {name: x[:1] for name, x in without_labels(batch(seed=1)).items()}

    def counts(name):
        config = PruningConfig(name, ratios, options)
        with vispco.apply(llava, config) as handle, torch.no_grad():
            llava(**sample)
            return {i: int(mask.sum()) - 10 for i, mask in handle.kept().items()}

    late, early = counts("fastv+sparsevlm@2"), counts("sparsevlm+fastv@2")
    assert late[1] == 14 and late[3] < 12
    assert early[1] < 12 and 3 not in early


# ---- costs ---------------------------------------------------------------------------------------
#: Layers differ in their attention, as in some hybrid decoders.
UNEVEN = Dimensions(6, 64, (4, 4, 8, 8, 4, 4), 2, 16, 96, 100, vision_head_dim=12)


def test_every_ranking_costs_what_its_own_method_costs():
    """Summed by hand; a drop of no token costs nothing."""
    counts, n, text = torch.tensor([[30, 30, 20, 20, 7, 5], [40, 20, 10, 10, 10, 0]]), 40, 11
    cost = CostModel(UNEVEN, build_method("visionzip+pdrop@2+fastv@4"))
    bare, found = CostModel(UNEVEN)(counts, n, text), cost(counts, n, text)

    def zip_flops(before):
        return 2 * before**2 * 12

    def pdrop_flops(before, heads):
        return 2 * (before + text) * (64 * (heads + 2 * 2) * 16 + heads * 16)

    def fastv_flops(before, heads):
        return 2 * (before + text) * heads * 16

    # The attention that is looked at is that of the layer before; pdrop's is of the layer itself.
    first = zip_flops(40) + pdrop_flops(30, 8) + fastv_flops(20, 8) + fastv_flops(7, 4)
    second = zip_flops(40) + pdrop_flops(20, 8) + fastv_flops(10, 4)
    assert (found - bare).tolist() == [first, second]


@pytest.mark.parametrize(
    "ratios", [[0.5] * 6, [1, 1, 1, 0.5, 0.5, 0.5], [0.8, 0.8, 0.5, 0.5, 0.2, 0]]
)
def test_flops_of_what_ran_equal_the_count(llava, ratios):
    """The tower is read again only where a part ranks that reads it."""
    inputs = without_labels(batch(images=(1,), text=(9,), before=(2,)))
    config = PruningConfig("vispruner+fastv@3", ratios)
    with (
        vispco.apply(llava, config),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
    ):
        llava(**inputs, logits_to_keep=1)
    report = count_flops(llava, config, n_visual=PER_IMAGE, n_text=10)
    assert counter.get_total_flops() == report.total_with_vision


def test_flops_need_the_layer():
    with pytest.raises(NotImplementedError, match=r"ask method.at\(layer\)"):
        build_method("visionzip+pdrop").flops(UNEVEN, 10, 10)


# ---- by name, everywhere -------------------------------------------------------------------------
def test_written_down_and_read_again(tmp_path):
    config = PruningConfig(
        "visionzip+sparsevlm@3",
        [0.5] * 6,
        {"visionzip": {"contextual": 0.2}, "sparsevlm": {"recycle": 0.3}},
    )
    config.save(tmp_path / "config.json")
    read = PruningConfig.load(tmp_path / "config.json")
    assert read == config and read.describe().startswith("visionzip+sparsevlm@3: layer 0 keeps")
    first, second = (build_method(read.method, read.method_options).at(i) for i in (0, 3))
    assert (first.contextual, second.recycle, second.adaptive) == (0.2, 0.3, None)


def test_without_a_layer_the_second_part_begins_at_the_second_layer():
    parts = build_method("visionzip+pdrop").parts
    assert [(start, type(part).__name__) for start, part in parts] == [
        (0, "VisionZip"),
        (1, "PDrop"),
    ]


def test_search_evaluate_and_apply_take_it(llava):
    batches = [batch(images=(1, 1), seed=i) for i in range(2)]
    frontier = search_with(
        llava,
        batches,
        method={"name": "visionzip+pdrop", "visionzip": {"contextual": 0.5}},
        budgets=[0.4],
        steps=2,
        refinement=1,
    )
    point = frontier.points[0]
    assert frontier.meta["method"] == point.config.method == "visionzip+pdrop"
    assert point.config.method_options == {"visionzip": {"contextual": 0.5}}
    deploy, soft = (vispco.evaluate(llava, batches, point.config, mode=mode) for mode in MODES)
    assert deploy.flops == soft.flops == pytest.approx(point.flops)
    assert deploy.kl == pytest.approx(soft.kl, rel=1e-3) and deploy.prunable_share <= 0.4


def test_nothing_is_published_of_composites():
    assert presets("visionzip+pdrop") == {}
    with pytest.raises(ValueError, match="did you mean 'pdrop'"):
        presets("visionzip+pdropp")


def test_a_registered_name_comes_first():
    """Names with a "+" that a package registered stay what they are."""
    METHODS.register("random+fastv", FastV)
    try:
        assert type(build_method("random+fastv")) is FastV
    finally:
        METHODS.remove("random+fastv")
    assert type(build_method("random+fastv")) is Composite


# ---- mistakes ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("visionzip+fastw", "unknown method 'fastw': did you mean 'fastv'"),
        ("visionzp+fastv", "unknown method 'visionzp': did you mean 'visionzip'"),
        *((name, "is written 'visionzip\\+pdrop', or with") for name in (
            "visionzip+", "+pdrop", "+", "visionzip+pdrop@", "visionzip+pdrop@x",
            "visionzip+pdrop@-1", "visionzip+pdrop@1.5", "visionzip+pdrop@1@2", "fastv@2+pdrop@4",
            "visionzip+pdrop+fastv", "visionzip+pdrop@2+fastv", "visionzip+pdrop+fastv@4",
        )),
        ("visionzip+pdrop@4+fastv@4", "PDrop cannot rank from layer 4 on and before 4"),
        ("visionzip+pdrop@4+fastv@2", "PDrop cannot rank from layer 4 on and before 2"),
        ("visionzip+pdrop@0", "VisionZip cannot rank from layer 0 on and before 0"),
        ("fastv+pdrop", "FastV cannot rank from layer 1 on and before 1"),
    ],
)  # fmt: skip
def test_a_name_that_is_not_understood(name, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig(name, [1.0])


def test_a_part_cannot_begin_before_its_own_first_layer():
    class Late(FastV):
        first_layer = 3

    METHODS.register("late", Late)
    try:
        with pytest.raises(ValueError, match=r"Late .* from layer 1 on.* can from 3 on"):
            build_method("visionzip+late")
        assert type(build_method("visionzip+late@3").at(3)) is Late
    finally:
        METHODS.remove("late")


@pytest.mark.parametrize(
    "options",
    [{"fastv": {}}, {"contextual": 0.2}, {"visionzip": 0.2}, {"visionzip": None}, {"pdrop@1": {}}],
)
def test_options_are_given_by_part(options):
    with pytest.raises(ValueError, match=r"given by part, \{'visionzip': \{...\}\}"):
        PruningConfig("visionzip+pdrop", [1.0], options)


def test_options_that_a_part_does_not_take():
    with pytest.raises(ValueError, match="method 'visionzip' does not take the options"):
        PruningConfig("visionzip+pdrop", [1.0], {"visionzip": {"contxtual": 0.2}})


@pytest.mark.parametrize("name", ["vispruner+fastv@6", "vispruner+fastv@40"])
def test_a_part_beyond_the_last_layer_is_refused(llava, name):
    with pytest.raises(ValueError, match="FastV cannot .* and before 6"):
        vispco.apply(llava, PruningConfig(name, [1.0] * 6))
    with pytest.raises(ValueError, match="FastV cannot"):
        vispco.search(llava, [batch()], method=name)


def test_first_layers_without_attention():
    """There, a part that reads attention begins later; one that does not may come first."""
    model = FAMILIES["llava"](6)
    adapter = adapter_for(model)(model)
    # Attention in layers 3 and 5 alone.
    adapter.attends = lambda layer: layer in (3, 5)
    first = adapter.first_layer
    assert first(build_method("pdrop")) == 3 and first(build_method("fastv")) == 4
    assert first(build_method("random+pdrop@3")) == first(build_method("random+fastv@4")) == 0
    assert first(build_method("pdrop+random@4")) == 3 and first(build_method("fastv+pdrop@5")) == 4
    for name in ("random+pdrop@2", "random+fastv@3", "pdrop+random@3", "fastv+pdrop@4"):
        with pytest.raises(ValueError, match="cannot rank from layer"):
            first(build_method(name))


@given(data=st.data())
def test_several_methods_cost_what_the_composite_of_their_profile_will(data):
    """Never less, for any prompt; exactly that for the largest one, where something is kept."""
    layers, tokens = 5, 16
    names = data.draw(st.permutations(["fastv", "pdrop", "divprune", "visionzip"]))[:3]
    methods = {name: build_method(name) for name in names}
    first = min(each.first_layer for each in methods.values())
    ranks = {}
    for k in range(first, layers):
        able = [name for name in names if methods[name].first_layer <= k]
        levels = [0, *data.draw(st.sets(st.integers(1, tokens - 1), max_size=4))]
        ranks[k] = {n: data.draw(st.sampled_from(able)) for n in levels}
    rows = {k: {n: [1.0] for n in row} for k, row in ranks.items()}
    options = dict.fromkeys(names, {})
    profile = Profile(options, "llava", layers, tokens, "kl", [0.0], rows, ranks)
    counts, left = [tokens] * layers, tokens
    for k in sorted(data.draw(st.sets(st.integers(first, layers - 1), min_size=1))):
        left = data.draw(st.integers(0, left))
        counts[k:] = [left] * (layers - k)
    ratios = [n / tokens for n in counts]
    config = PruningConfig(keep_ratios=ratios, **profile.ranked_by(ratios))
    true, size = (
        build_method(config.method, config.method_options),
        Dimensions(layers, 8, 2, 2, 4, 16, 10),
    )
    for n in (tokens, data.draw(st.integers(1, tokens))):
        prompt = torch.tensor([config.tokens(n)]), torch.tensor([n]), torch.tensor([3])
        several = Several(methods)
        dearest = CostModel(size, several)(*prompt)
        several.know(profile)
        found, least = (CostModel(size, method)(*prompt) for method in (several, true))
        assert least <= found <= dearest
        assert n < tokens or not all(counts) or found == least
