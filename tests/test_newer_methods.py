"""Methods of 2025 and 2026: their options, what they merge, and how groups share a budget."""

import copy
import functools
import math
import statistics

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import naive
import vispco
from naive import NAIVE, naive_clusters, naive_feather, naive_kept, naive_repeated, step_at
from naive_vision import seats
from oracles import pruned_with, rows_alone
from test_methods import CASES, SCHEDULES, SHAPE, Merges, kept_by, models
from test_vision import listen
from tiny import IMAGE, PER_IMAGE, batch, make, without_labels
from vispco import PruningConfig
from vispco.methods import pairs
from vispco.methods.framefusion import FrameFusion
from vispco.methods.groups import before, shared_out
from vispco.methods.pact import PACT
from vispco.methods.prumerge import PruMerge
from vispco.pruning._arguments import unrotating
from vispco.registry import METHODS, adapter_for


# ---- fastv without rotary positions, and on a grid -----------------------------------------------
@pytest.mark.parametrize("mode", ["deploy", "search"])
@pytest.mark.parametrize(
    "case, stride", [(CASES[1], None), (CASES[1], 3), (CASES[2], 2), (CASES[5], None)]
)
def test_feather_keeps_what_the_naive_one_keeps(case, stride, mode):
    """The naive one knows pictures of 4 x 4 tokens, as LLaVA's are."""
    family, schedule, padding, size = case
    sdpa, eager = models(family)
    options = {"rotary": False, "stride": stride}
    config = PruningConfig("fastv", SCHEDULES[schedule], options)
    shape = {k: v[:size] for k, v in SHAPE.items()}
    inputs = without_labels(batch(**shape, padding=padding, seed=schedule))
    got = kept_by(sdpa, config, inputs, mode)
    for b in range(size):
        alone, real = rows_alone(inputs, SHAPE["images"], b)
        rule = functools.partial(naive_feather, stride=stride)
        for layer, mask in naive_kept(eager, alone, config, rule).items():
            assert torch.equal(got[layer][b, real], mask), f"sample {b}, layer {layer}"


def test_feather_does_not_see_where_a_token_stands():
    """All visual tokens equal in all but their places: without rotary positions they tie."""
    model = copy.deepcopy(make("llava"))
    inputs = without_labels(batch(images=(1,), text=(6,), before=(2,)))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    visual = inputs["input_ids"] == IMAGE
    embeds[visual] = torch.randn(32, generator=torch.Generator().manual_seed(1))
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    spread = {}
    for rotary in (True, False):
        seen = []

        class Probe(METHODS.get("fastv")):
            def score(self, ctx, seen=seen):
                seen.append(super().score(ctx))
                return seen[-1]

        ratios = [1, 0.5, 0.5, 0.5, 0.5, 0.5]
        with pruned_with(model, Probe(rotary=rotary), ratios) as handle, torch.no_grad():
            handle.visual_mask = visual
            model(**given)
        spread[rotary] = float(seen[0].std() / seen[0].mean())
    assert spread[False] < 1e-6 < 0.1 < spread[True]


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_the_layer_that_runs_again_is_counted(family):
    """To the FLOP; queries and keys may have a norm of their own."""
    inputs = without_labels(batch(images=(2,) * 3, text=(9,) * 3, before=(2,) * 3))
    ratios = [1, 0.8, 0.5, 0.5] + [0.25] * 4
    model = make(family)
    config = PruningConfig(
        "fastv", ratios[: len(model.get_decoder().layers)], {"rotary": False, "stride": 2}
    )
    report = vispco.count_flops(model, config, n_visual=2 * PER_IMAGE, n_text=10, n_logits=42)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        kept_by(model, config, inputs)
    assert counter.get_total_flops() == 3 * report.total_with_vision


def test_layers_without_rotary_positions_are_refused():
    assert unrotating(torch.tensor([2j])).tolist() == [2]
    with pytest.raises(ValueError, match="hands its layers none"):
        unrotating(None)


# ---- merging -------------------------------------------------------------------------------------
def merges(method, inputs, layer, keep, mode="deploy"):
    """(context, kept, into) of one drop."""
    probe = Merges(method)
    ratios = [1.0] * layer + [keep] * (6 - layer)
    with pruned_with(models()[0], probe, ratios, mode) as handle, torch.no_grad():
        models()[0](**inputs)
        assert handle.kept()
    return probe.seen[0]


def named(ctx, row, b):
    """{original position: original position, or -1} of a row of slots."""
    place = ctx.order[b, ctx.visual[1][b]].tolist()
    return {
        p: place[j] if j >= 0 else -1
        for p, j, there in zip(place, row[b].tolist(), ctx.valid[b].tolist(), strict=True)
        if there
    }


@pytest.mark.parametrize("mode", ["deploy", "search"])
@pytest.mark.parametrize("keep, cutoff", [(0.5, 0.21), (0.1, 0.9), (0.3, 1.0), (0.9, 0.6)])
def test_pact_merges_into_the_nearest_kept(keep, cutoff, mode):
    inputs, layer = without_labels(batch(**SHAPE, padding="left", seed=4)), 2
    ctx, kept, into = merges(PACT(cutoff=cutoff), inputs, layer, keep, mode)
    merged = 0
    for b, images in enumerate(SHAPE["images"]):
        alone, real = rows_alone(inputs, SHAPE["images"], b)
        if not images:
            continue
        count = PruningConfig("pact", [keep]).tokens(images * PER_IMAGE)[0]
        step = step_at(models()[1], alone, layer, {}, count)
        order = naive.ranked(naive.naive_pact(step, cutoff=cutoff))
        pool, _, _, _, far = naive_clusters(step, 0.55, cutoff)
        stay, expected = order[:count], dict.fromkeys(step.visual, -1)
        for p in pool:
            home = min(sorted(stay), key=lambda q: far[p, q])
            expected[p] = home if far[p, home] <= cutoff else -1
        expected |= {p: p for p in stay}
        first = int(real.nonzero()[0])
        got = named(ctx, into, b)
        assert {p - first: q - first if q >= 0 else -1 for p, q in got.items()} == expected
        merged += sum(q >= 0 for q in expected.values()) - count
    # Where more is kept than is important, and where keys are too far apart, nothing is merged.
    assert merged > 0 or keep >= 0.5


def repeating(noise=0.03):
    """A batch whose second picture is the first again, but for some noise."""
    inputs = without_labels(batch(images=(3, 2), text=(6, 9), before=(2, 3)))
    g = torch.Generator().manual_seed(5)
    for of in (1, 2, 4):
        inputs["pixel_values"][of] = inputs["pixel_values"][of - 1]
        change = torch.rand(3, 16, 16, generator=g) < noise
        inputs["pixel_values"][of][change] = 2.0
    return inputs


@pytest.mark.parametrize("mode", ["deploy", "search"])
@pytest.mark.parametrize("layer, keep", [(1, 0.5), (1, 0.3), (3, 0.7)])
def test_framefusion_merges_along_frames(layer, keep, mode):
    """What repeats goes first, into the first frame that stays; the rest by attention."""
    inputs, images, most = repeating(), (3, 2), 0
    ctx, kept, into = merges(FrameFusion(0.5, 0.1), inputs, layer, keep, mode)
    for b in range(2):
        alone, real = rows_alone(inputs, images, b)
        count = PruningConfig("framefusion", [keep]).tokens(images[b] * PER_IMAGE)[0]
        step = step_at(models()[1], alone, layer, {}, count)
        repeated = naive_repeated(step, 0.5, 0.1)
        stay = naive.ranked(naive.naive_framefusion(step, 0.5, 0.1))[:count]
        expected = {}
        for p in step.visual:
            home = p
            while home not in stay and home in repeated:
                home = repeated[home][1]
            expected[p] = home if home in stay else -1
        first = int(real.nonzero()[0])
        got = named(ctx, into, b)
        assert {p - first: q - first if q >= 0 else -1 for p, q in got.items()} == expected
        most = max(most, sum(p != q >= 0 for p, q in expected.items()))
    assert most > 3


def test_framefusion_of_little_that_repeats_is_fastv():
    """Less than a tenth: attention alone, and nothing is merged."""
    inputs = without_labels(batch(**SHAPE))
    schedule = SCHEDULES[0]
    plain, fused = (
        kept_by(models()[0], PruningConfig(name, schedule), inputs)
        for name in ("fastv", "framefusion")
    )
    assert torch.equal(plain[1], fused[1])


# ---- keeping fewer -------------------------------------------------------------------------------
@pytest.mark.parametrize("spaced", [0.0, 0.5])
def test_prumerge_keeps_the_outliers(spaced):
    """As many as `statistics.quantiles` finds, and their share of spaced ones."""
    model, inputs = make("llava"), without_labels(batch(**SHAPE))
    seen = []

    class Probe(PruMerge):
        def score(self, ctx):
            seen.append(ctx.vision_attention)
            return super().score(ctx)

    with pruned_with(model, Probe(adaptive=True, spaced=spaced), [0.9] * 6) as handle:
        with torch.no_grad():
            model(**inputs)
        kept = handle.kept()[0] & (inputs["input_ids"] == IMAGE)
    for b, n in enumerate(SHAPE["images"]):
        if n:
            x = seen[0][b, : n * PER_IMAGE].double().tolist()
            first, _, third = statistics.quantiles(x, n=4, method="inclusive")
            outliers = sum(a > third + 1.5 * (third - first) for a in x)
            wanted = max(1, math.floor(outliers / (1 - spaced) + 0.5))
            assert int(kept[b].sum()) == min(wanted, math.floor(0.9 * len(x)))


def test_pact_keeps_as_many_as_there_are_clusters():
    inputs, options = without_labels(batch(**SHAPE)), {"adaptive": True, "cutoff": 0.9}
    config = PruningConfig("pact", [1, 1, 0.5, 0.5, 0.5, 0.5], options)
    kept = kept_by(models()[0], config, inputs)[2] & (inputs["input_ids"] == IMAGE)
    fewer = 0
    for b, images in enumerate(SHAPE["images"]):
        if images:
            alone, _ = rows_alone(inputs, SHAPE["images"], b)
            step = step_at(models()[1], alone, 2, {}, images * PER_IMAGE // 2)
            centres = naive_clusters(step, 0.55, 0.9)[1]
            assert int(kept[b].sum()) == min(len(centres), images * PER_IMAGE // 2)
            fewer += len(centres) < images * PER_IMAGE // 2
    assert fewer


# ---- groups and pairs ----------------------------------------------------------------------------
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=5, max_size=5),
    seed=st.integers(0, 99),
)
def test_groups_share_as_parties_do(sizes, weights, seed):
    """For every number of tokens, those that are handed out one by one. Fillers have no say."""
    groups = torch.tensor([[g for g, n in enumerate(sizes) for _ in range(n)] + [0]])
    g = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    scores = torch.cat([torch.randint(4, (1, n), generator=g).float(), torch.ones(1, 1)], 1)
    valid = torch.arange(n + 1)[None] < n
    found = shared_out(scores, groups, torch.tensor([weights]), valid)[0, :n]
    members = {
        i: sorted((j for j in range(n) if groups[0, j] == i), key=lambda j: (-scores[0, j], j))
        for i in range(len(sizes))
    }
    order = found.argsort(descending=True, stable=True).tolist()
    for k in range(n + 1):
        assert sorted(order[:k]) == sorted(seats(members, dict(enumerate(weights)), k))


@given(n=st.integers(1, 20), frames=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_frame_before(n, frames, seed):
    g = torch.Generator().manual_seed(seed)
    grid = torch.randint(3, (1, n, 3), generator=g)
    grid[..., 0] = torch.randint(frames, (1, n), generator=g).sort().values
    valid = torch.rand(1, n, generator=g) < 0.8

    class Grid:
        def __init__(self):
            self.grid, self.valid = grid, valid

    found = before(Grid())[0].tolist()
    cells = [tuple(x) for x in grid[0].tolist()]
    for j in range(n):
        if valid[0, j]:
            same = [i for i in range(n) if valid[0, i] and cells[i][1:] == cells[j][1:]]
            earlier = [i for i in same if cells[i][0] < cells[j][0]]
            # Of several at one place of a frame, one is meant, and only the first has a past.
            twin = any(cells[i] == cells[j] and i < j for i in same)
            if not twin and earlier:
                assert cells[found[j]][0] == max(cells[i][0] for i in earlier)
            assert found[j] in earlier or (found[j] == -1 and (twin or not earlier))


PAIRED = ("divprune", "cdpruner", "vispruner", "visionzip", "vscan", "prumerge", "pact")


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("whole", [False, True])
def test_many_tokens_are_ranked_as_few_are(name, whole, monkeypatch):
    """Where pairs are too many to be held, rows are made in blocks: the choice is the same."""
    model, inputs = make("llava"), without_labels(batch(**SHAPE))
    config = PruningConfig(name, [0.8, 0.8, 0.5, 0.3, 0.3, 0.3])
    mode = "search" if whole else "deploy"
    held = kept_by(model, config, inputs, mode)
    for module in (pairs, *(vars(vispco.methods)[name] for name in ("vispruner", "pact"))):
        monkeypatch.setattr(module, "HELD", 0)
    monkeypatch.setattr(pairs, "BLOCK", 500)
    monkeypatch.setattr(vispco.methods.vispruner, "NEIGHBOURS", 3)
    monkeypatch.setattr(vispco.methods.vispruner, "FEW", 2)
    blocks = kept_by(model, config, inputs, mode)
    assert all(torch.equal(mask, blocks[i]) for i, mask in held.items()) and held.keys() == {
        0,
        2,
        3,
    }


def test_cdpruner_ends_where_no_direction_is_left():
    """More tokens than dimensions: steps are as many as dimensions, and the order is the same."""
    g = torch.Generator().manual_seed(0)
    from test_methods import picked
    from vispco.methods.cdpruner import CDPruner

    image = torch.randn(60, 5, generator=g).tolist()
    text = torch.randn(2, 5, generator=g).tolist()
    order = picked(CDPruner(), image, text)
    assert sorted(order) == list(range(60))
    for keep in (3, 5, 6, 40):
        assert picked(CDPruner(), image, text, keep=keep, exhaustive=False)[:keep] == order[:keep]


# ---- other layers of the tower -------------------------------------------------------------------
def test_a_shallow_layer_is_read():
    """At depth 0 as if the first layer's output became the tokens; at 1 the last layer."""
    model, inputs = copy.deepcopy(make("llava")), without_labels(batch(images=(2, 1)))
    tower, adapter, visual = listen(model, inputs)
    with pytest.raises(ValueError, match="tower, which did not run"):
        tower.read(inputs, visual, 0.0)
    handles = []
    tower.register(handles.append, depths=(0.0, 1.0))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    shallow, deep = tower.read(inputs, visual, 0.0)[0], tower.read(inputs, visual)[0]
    assert torch.equal(tower.read(inputs, visual, 1.0)[0], deep)
    model.config.vision_feature_layer = 1
    first, _, _ = listen(model, inputs)
    assert torch.equal(first.read(inputs, visual)[0], shallow) and not torch.equal(shallow, deep)


def test_layers_with_windows_are_not_read():
    """Qwen2.5-VL: the nearest layer that attends to whole frames."""
    model = copy.deepcopy(make("qwen2_5_vl"))
    adapter = adapter_for(model)(model)
    adapter.config.vision_config.fullatt_block_indexes = [7, 15, 23, 31]
    wanted = {0.0: 7, 0.5: 15, 0.6: 15, 0.61: 23, 1.0: 31}
    assert {depth: adapter.layer_at(depth, 32) for depth in wanted} == wanted


def test_a_depth_that_was_not_asked_for_is_refused():
    class Deep(METHODS.get("hiprune")):
        def score(self, ctx):
            return ctx.vision_attention_at(0.9)

    with (
        pruned_with(make("llava"), Deep(), [0.5] * 6),
        pytest.raises(ValueError, match=r"\(0.9,\)"),
    ):
        make("llava")(**without_labels(batch()))


# ---- refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "method, options, message",
    [
        ("fastv", {"rotary": 1}, "rotary must be True or False, got 1"),
        ("fastv", {"stride": 0}, "stride must be a whole number, 1 or more, got 0"),
        ("holov", {"crops": 2.5}, "crops must be a whole number"),
        ("hiprune", {"alpha": 2}, "alpha must be a share, from 0 to 1, got 2"),
        ("hiprune", {"depth": "9"}, "depth must be a share"),
        ("vscan", {"local": -1}, "local must be a share"),
        ("vscan", {"window": 0}, "window must be a whole number"),
        ("prumerge", {"adaptive": "yes"}, "adaptive must be True or False"),
        ("prumerge", {"spaced": None}, "spaced must be a share"),
        ("prumerge", {"neighbours": 0}, "neighbours must be a whole number"),
        ("ivcprune", {"positions": 1.5}, "positions must be a share"),
        ("framefusion", {"similarity": True}, "similarity must be a share"),
        ("pact", {"cutoff": 0}, "cutoff must be above 0"),
        ("pact", {"adaptive": 1}, "adaptive must be True or False"),
    ],
)
def test_options_that_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig(method, [1, 0.5], options)


def test_the_rotary_embedding_must_be_cosines_and_sines():
    """Not what a model of learned positions has."""
    from test_methods import context

    with pytest.raises(ValueError, match="hands its layers no cosines and sines"):
        context().rotary_means  # noqa: B018


def test_naive_counterparts_are_of_methods():
    assert {"ivcprune", "framefusion", "pact"} <= NAIVE.keys()
