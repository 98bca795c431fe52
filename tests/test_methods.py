"""Each built-in method against its naive counterpart, and what each promises besides."""

import functools
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import naive
import naive_vision
import vispco
from naive import NAIVE, naive_kept, naive_rank, naive_recycled, ranked, step_at
from oracles import Constant, Witness, pruned_with, rows_alone
from tiny import FAMILIES, IMAGE, PER_IMAGE, batch, without_labels
from vispco import PruningConfig
from vispco.methods import fitprune
from vispco.methods.cdpruner import CDPruner
from vispco.methods.dart import DART
from vispco.methods.divprune import DivPrune
from vispco.methods.random import Random, hashed
from vispco.methods.sparsevlm import SparseVLM
from vispco.methods.strided import Strided
from vispco.pruning.context import Context
from vispco.registry import METHODS

SHAPE = {"images": (1, 2, 0, 1), "text": (9, 7, 6, 12), "before": (2, 0, 3, 8)}
SCHEDULES = [
    [1, 0.5, 0.5, 0.5, 0.5, 0.5],
    [1, 1, 0.7, 0.7, 0.3, 0.3],
    [1, 0.9, 0.7, 0.5, 0.3, 0.1],
    [1, 1, 1, 1, 1, 0.4],
]


#: family, schedule, padding, number of samples
CASES = [
    ("llava", 0, "right", 4),
    ("llava", 1, "left", 4),
    ("llava", 2, "left", 3),
    ("llava", 2, "right", 2),
    ("llava", 3, "left", 1),
    ("qwen2_5_vl", 2, "left", 2),
    ("qwen2_5_vl", 1, "right", 4),
]


@functools.cache
def models(family="llava", layers=6, kv_heads=2):
    """The same weights twice.

    Under sdpa, which is pruned, and under eager attention, which shows its weights.
    """
    build = FAMILIES[family]
    options = {"kv_heads": kv_heads} if family == "llava" else {"num_key_value_heads": kv_heads}
    return build(layers, **options), build(layers, attention="eager", **options)


def kept_by(model, config, inputs, mode="deploy"):
    """{layer: (B, S) bool} that vispco keeps."""
    with vispco.apply(model, config, mode=mode) as handle, torch.no_grad():
        model(**inputs)
        return handle.kept()


def test_every_built_in_method_has_a_naive_counterpart():
    built_in = {n for n in vispco.list_methods() if METHODS.get(n).__module__.startswith("vispco.")}
    written = {n.removeprefix("naive_") for module in (naive, naive_vision) for n in vars(module)}
    assert built_in <= written, (
        f"write a naive implementation of {built_in - written} in tests/naive.py"
    )


def fitting(name, ratios):
    """The schedule, a layer earlier for methods that can prune layer 0."""
    return PruningConfig(
        name, ratios if METHODS.get(name).first_layer else [*ratios[1:], ratios[-1]]
    )


@pytest.mark.parametrize("mode", ["deploy", "search"])
@pytest.mark.parametrize("family, schedule, padding, size", CASES)
@pytest.mark.parametrize("name", sorted(NAIVE))
def test_keeps_what_the_naive_method_keeps(name, family, schedule, padding, size, mode):
    """In a mixed batch, padded on either side.

    Also at a second and a third step, on the tokens that remain.
    """
    sdpa, eager = models(family)
    config, shape = fitting(name, SCHEDULES[schedule]), {k: v[:size] for k, v in SHAPE.items()}
    inputs = without_labels(batch(**shape, padding=padding, seed=schedule))
    got = kept_by(sdpa, config, inputs, mode)
    for b in range(size):
        alone, real = rows_alone(inputs, SHAPE["images"], b)
        expected = naive_kept(eager, alone, config, NAIVE[name])
        assert bool(expected) == (SHAPE["images"][b] > 0)
        for layer, mask in expected.items():
            assert torch.equal(got[layer][b, real], mask), f"sample {b}, layer {layer}"


@pytest.mark.parametrize("name, layer", [("dart", 2), ("divprune", 0), ("cdpruner", 0)])
def test_search_sees_the_naive_order_of_all_tokens(name, layer):
    """Not only which come first: the soft threshold looks past the last one kept."""
    sdpa, eager = models()
    inputs = without_labels(batch(images=(2,), text=(7,), before=(1,)))
    ((ctx, scores),) = scores_of(name, sdpa, inputs, [1.0] * layer + [0.5] * (6 - layer), "search")
    order = ctx.visual[1][0, scores[0].argsort(descending=True, stable=True)].tolist()
    assert order == ranked(NAIVE[name](step_at(eager, inputs, layer, {}, 16)))


@pytest.mark.parametrize("name", sorted(NAIVE))
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_one_key_head_and_one_per_query_head(name, kv_heads):
    sdpa, eager = models("llava", 3, kv_heads)
    config = PruningConfig(name, [1, 0.6, 0.2])
    inputs = without_labels(batch(images=(2,), text=(5,), before=(1,)))
    got = kept_by(sdpa, config, inputs)
    for layer, mask in naive_kept(eager, inputs, config, NAIVE[name]).items():
        assert torch.equal(got[layer][0], mask)


class Scores(vispco.Method):
    """Runs another method and writes down what it returned."""

    first_layer = 0

    def __init__(self, method):
        self.method, self.seen = method, []

    def score(self, ctx):
        scores = self.method.score(ctx)
        self.seen.append((ctx, scores))
        return scores


class Merges(Witness):
    """Runs another method and writes down what it was asked and what it merges."""

    def __init__(self, method):
        super().__init__(method)
        self.seen = []

    def merge(self, ctx, kept):
        into = super().merge(ctx, kept)
        self.seen.append((ctx, kept, into))
        return into


def context(**fields):
    """A context that knows nothing else."""
    return Context(**dict.fromkeys(Context.__dataclass_fields__) | {"layer": 0} | fields)


def scores_of(name, model, inputs, ratios, mode="deploy"):
    """[(ctx, scores)] at each step."""
    probe = Scores(METHODS.get(name)())
    with pruned_with(model, probe, ratios, mode), torch.no_grad():
        model(**inputs)
    return probe.seen


@pytest.mark.parametrize("layer", [1, 3, 5])
@pytest.mark.parametrize("name, at", [("fastv", -1), ("pdrop", 0)])
def test_scores_are_the_models_own_attention_weights(name, at, layer):
    """Against `output_attentions=True`: values, not only ranks."""
    sdpa, eager = models()
    inputs = without_labels(batch(images=(1, 1), text=(9, 9), before=(2, 5)))
    with torch.no_grad():
        weights = (
            eager(**inputs, output_attentions=True).attentions[layer + at][:, :, -1].mean(1)
        )  # (B, S)
    ((_, scores),) = scores_of(name, sdpa, inputs, [1.0] * layer + [0.5] * (6 - layer))
    expected = weights[inputs["input_ids"] == IMAGE].view(2, PER_IMAGE)
    assert torch.allclose(scores, expected, rtol=1e-4, atol=1e-7) and expected.std() > 0.01


def test_answers_are_not_looked_at():
    """With labels the prompt ends where the answer starts.

    The tokens of the answer have no say, for any method.
    """
    model = models()[0]
    inputs = batch(images=(1,), text=(9,), before=(2,), answer=4)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -4:] = torch.tensor([50, 51, 52, 53])
    for name in vispco.list_methods():
        with vispco.apply(model, PruningConfig(name, SCHEDULES[2])) as handle, torch.no_grad():
            model(**inputs)
            one = handle.kept()
            model(**other)
            two = handle.kept()
        prompt = {k: v[:, :-4] for k, v in without_labels(inputs).items() if k != "pixel_values"}
        with vispco.apply(model, PruningConfig(name, SCHEDULES[2])) as handle, torch.no_grad():
            model(**prompt, pixel_values=inputs["pixel_values"])
            alone = handle.kept()
        for i, mask in one.items():
            assert torch.equal(mask, two[i]) and torch.equal(mask[:, :-4], alone[i])


# ---- ties ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["deploy", "search"])
def test_ties_go_to_the_lowest_index(mode):
    model, inputs = models()[0], without_labels(batch(**SHAPE))
    with pruned_with(model, Constant(), SCHEDULES[2], mode) as handle, torch.no_grad():
        model(**inputs)
    visual = inputs["input_ids"] == IMAGE
    for layer, mask in handle.kept().items():
        for b, n in enumerate(SHAPE["images"]):
            count = PruningConfig("random", SCHEDULES[2]).tokens(n * PER_IMAGE)[layer]
            assert mask[b, visual[b]].tolist() == [True] * count + [False] * (n * PER_IMAGE - count)


@pytest.mark.parametrize("seed", range(4))
def test_coarse_scores_are_ranked_stably(seed):
    """Scores with many ties, a different set at each layer."""

    class Coarse(Constant):
        def score(self, ctx):
            return table[ctx.layer][ctx.slot]

    model, inputs = models()[0], without_labels(batch(images=(2,), text=(5,), before=(1,)))
    table = torch.randint(0, 3, (6, 64), generator=torch.Generator().manual_seed(seed)).float()
    with pruned_with(model, Coarse(), SCHEDULES[2]) as handle, torch.no_grad():
        model(**inputs)
    left, places = list(range(32)), (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0].tolist()
    for layer, mask in handle.kept().items():
        count = PruningConfig("random", SCHEDULES[2]).tokens(32)[layer]
        left = sorted(sorted(left, key=lambda j: (-table[layer, j], j))[:count])
        assert [j for j in range(32) if mask[0, places[j]]] == left


# ---- sparsevlm -----------------------------------------------------------------------------------
def test_sparsevlm_has_raters_whatever_the_text():
    """All words equal, or a single one: every text token is a rater then, rounding or not."""
    model = models()[0]
    for words in (1, 2, 6, 9, 10, 13):
        inputs = without_labels(batch(images=(1,), text=(words,), before=(0,)))
        inputs["input_ids"][inputs["input_ids"] != IMAGE] = 7
        ((_, scores),) = scores_of("sparsevlm", model, inputs, [1, 1, 0.5, 0.5, 0.5, 0.5])
        assert (scores > 0).any()


def test_sparsevlm_rates_when_much_text_precedes_the_image():
    """Text before the image cannot see it.

    Whatever the raters are, the ranking must come from attention.
    """
    model = models()[0]
    for seed in range(30):
        inputs = without_labels(batch(images=(1,), text=(9,), before=(8,), seed=seed))
        ((_, scores),) = scores_of("sparsevlm", model, inputs, [1, 1, 0.5, 0.5, 0.5, 0.5])
        assert (scores > 0).any(), f"seed {seed}: every score is 0, so the first tokens are kept"


@pytest.mark.parametrize("mode", ["deploy", "search"])
@pytest.mark.parametrize("family, schedule, padding, size", CASES[:3] + CASES[-1:])
def test_adaptive_keeps_as_many_as_the_rank_allows(family, schedule, padding, size, mode):
    """At every step, and no more than configured."""
    sdpa, eager = models(family)
    config = PruningConfig("sparsevlm", SCHEDULES[schedule], {"adaptive": 1.5})
    inputs = without_labels(
        batch(**{k: v[:size] for k, v in SHAPE.items()}, padding=padding, seed=schedule)
    )
    got, plain = (
        kept_by(sdpa, PruningConfig("sparsevlm", SCHEDULES[schedule], o), inputs, mode)
        for o in (config.method_options, {})
    )
    assert sum(int(mask.sum()) for mask in got.values()) < sum(
        int(mask.sum()) for mask in plain.values()
    )
    for b in range(size):
        alone, real = rows_alone(inputs, SHAPE["images"], b)
        expected = naive_kept(
            eager,
            alone,
            config,
            NAIVE["sparsevlm"],
            lambda step: max(1, math.floor(1.5 * naive_rank(step))),
        )
        for layer, mask in expected.items():
            assert torch.equal(got[layer][b, real], mask)


def test_adaptive_without_raters_leaves_the_count():
    """A prompt that ends in the image has no text to rate with, so no rank either."""
    inputs = without_labels(batch(images=(1,), text=(3,), before=(3,)))
    config = PruningConfig("sparsevlm", SCHEDULES[0], {"adaptive": 1.0, "recycle": 0.5})
    assert kept_by(models()[0], config, inputs)[1].sum() == 4 + PER_IMAGE // 2


@pytest.mark.parametrize("mode", ["deploy", "search"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "keep, share", [(0.5, 0.3), (0.375, 1.0), (0.2, 1.0), (0.05, 0.9), (0.9, 0.3)]
)
def test_recycled_tokens_join_the_naive_centres(family, keep, share, padding, mode):
    """Which tokens stay, which are merged, and into which.

    The count is that of the configuration.
    """
    sdpa, eager = models(family)
    inputs = without_labels(batch(**SHAPE, padding=padding, seed=4))
    probe, layer = Merges(SparseVLM(recycle=share)), 2
    with pruned_with(sdpa, probe, [1.0, 1.0] + [keep] * 4, mode), torch.no_grad():
        sdpa(**inputs)
    ((ctx, kept, into),) = probe.seen
    for b, images in enumerate(SHAPE["images"]):
        alone, real = rows_alone(inputs, SHAPE["images"], b)
        if not images:
            continue
        count = PruningConfig("sparsevlm", [keep]).tokens(images * PER_IMAGE)[0]
        step = step_at(eager, alone, layer, {}, count)
        stay, homes = naive_recycled(step, share)
        place = dict(zip(real.nonzero()[:, 0].tolist(), step.now.places[-1].tolist(), strict=True))
        slots = {place[p]: j for j, p in enumerate(ctx.visual[1][b].tolist()) if ctx.valid[b, j]}
        assert len(stay) == count and {p for p, j in slots.items() if kept[b, j]} == stay
        expected = {
            p: slots[p] if p in stay else slots[homes[p]] if p in homes else -1 for p in slots
        }
        assert {p: int(into[b, j]) for p, j in slots.items()} == expected


def test_recycling_changes_states_not_counts():
    """And with both options the budget is still an upper bound."""
    model, inputs = models()[0], without_labels(batch(**SHAPE))
    plain, recycled, both = (
        kept_by(model, PruningConfig("sparsevlm", [1, 1, 0.25, 0.25, 0.25, 0.25], options), inputs)[
            2
        ]
        for options in ({}, {"recycle": 0.3}, {"recycle": 0.3, "adaptive": 1.0})
    )
    assert torch.equal(plain.sum(1), recycled.sum(1)) and not torch.equal(plain, recycled)
    assert (both.sum(1) <= plain.sum(1)).all() and both.sum() < plain.sum()


@pytest.mark.parametrize(
    "options", [{"adaptive": 1e9}, {"recycle": 0.3}, {"adaptive": 1e9, "recycle": 0.3}]
)
def test_sparsevlm_options_are_counted(options):
    """To the FLOP: `adaptive` and `recycle` rate the tokens again."""
    inputs = without_labels(batch(images=(2,) * 3, text=(9,) * 3, before=(2,) * 3))
    model, config = models()[0], PruningConfig("sparsevlm", SCHEDULES[2], options)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        kept_by(model, config, inputs)
    report = vispco.count_flops(model, config, n_visual=2 * PER_IMAGE, n_text=10, n_logits=42)
    assert counter.get_total_flops() == 3 * report.total_with_vision


@pytest.mark.parametrize(
    "options, message",
    [
        ({"adaptive": 0}, "adaptive must be None or a positive number"),
        ({"adaptive": "1"}, "adaptive must be"),
        ({"adaptive": True}, "adaptive must be"),
        ({"recycle": 1.1}, "recycle must be a share"),
        ({"recycle": -0.1}, "recycle must be"),
        ({"recycle": None}, "recycle must be"),
    ],
)
def test_sparsevlm_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        SparseVLM(**options)


# ---- fitprune ------------------------------------------------------------------------------------
def test_fitprune_in_blocks_of_rows(monkeypatch):
    """However many rows of attention are computed at a time, the scores are the same."""
    model, inputs = models()[0], without_labels(batch(**SHAPE))
    ((ctx, whole),) = scores_of("fitprune", model, inputs, SCHEDULES[3])
    monkeypatch.setattr(fitprune, "ROWS", 7)
    ((_, blocks),) = scores_of("fitprune", model, inputs, SCHEDULES[3])
    assert torch.allclose(whole[ctx.valid], blocks[ctx.valid], rtol=1e-5, atol=0)


def test_fitprune_without_text_after_the_image():
    """The image's own attention ranks alone then."""
    inputs = without_labels(batch(images=(1,), text=(3,), before=(3,)))
    ((_, scores),) = scores_of("fitprune", models()[0], inputs, SCHEDULES[3])
    assert (scores > 0).all() and len(scores.unique()) == PER_IMAGE


# ---- dart ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options", [{"visual": 1, "text": 0}, {"visual": 0, "text": 2}, {"visual": 20, "text": 9}]
)
def test_dart_with_other_pivots(options):
    """Fewer, none of a kind, or more than there are tokens."""
    sdpa, eager = models()
    config, inputs = PruningConfig("dart", SCHEDULES[2], options), without_labels(batch(**SHAPE))
    got = kept_by(sdpa, config, inputs)
    for b in range(4):
        alone, real = rows_alone(inputs, SHAPE["images"], b)
        expected = naive_kept(eager, alone, config, lambda step: NAIVE["dart"](step, **options))
        assert all(torch.equal(got[layer][b, real], mask) for layer, mask in expected.items())


@pytest.mark.parametrize(
    "options", [{"visual": -1}, {"text": 1.5}, {"visual": True}, {"visual": 0, "text": 0}]
)
def test_dart_refuses(options):
    with pytest.raises(ValueError, match="pivot"):
        DART(**options)


# ---- divprune and cdpruner -----------------------------------------------------------------------
def features(image, text=None, keep=None, exhaustive=True):
    """A context of one sample with these features (V, D), for methods that look at nothing else."""
    v, x = len(image), torch.tensor([*image, *(text or [])])[None]
    order = torch.arange(x.shape[1])[None]
    visual = order < v
    return context(
        inputs=x,
        order=order,
        visual=(torch.zeros(1, 1).long(), order[:, :v]),
        valid=visual[:, :v],
        visual_mask=visual,
        text_mask=~visual,
        exhaustive=exhaustive,
        keep=torch.tensor([v if keep is None else keep]),
    )


def picked(method, *args, **kwargs):
    """Slots in the order of picking."""
    return method.score(features(*args, **kwargs))[0].argsort(descending=True, stable=True).tolist()


def test_divprune_by_hand():
    """Angles: 200 is loneliest, 10 farthest from it, 100 between, then 0.

    A second 10 adds nothing.
    """
    angles = [[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in (0, 10, 10, 100, 200)]
    assert picked(DivPrune(), angles) == [4, 1, 3, 0, 2]


def test_divprune_does_not_see_lengths():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20, 8, generator=g)
    assert picked(DivPrune(), x.tolist()) == picked(
        DivPrune(), (x * torch.rand(20, 1, generator=g)).tolist()
    )


def test_cdpruner_takes_orthogonal_tokens_by_relevance():
    """And a copy of a picked one only when nothing else is left, whatever its relevance."""
    image = [[1.0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert picked(CDPruner(), image, [[3.0, 2, 1, 0]]) == [0, 1, 3, 2, 4]


def test_cdpruner_goes_on_by_relevance():
    """The least relevant direction counts for nothing, so a copy of the other comes first."""
    assert picked(CDPruner(), [[0.0, 1], [1, 0], [0, 1], [1, 0]], [[3.0, 2]]) == [1, 3, 0, 2]


def test_cdpruner_without_text_is_greedy_volume():
    """Equal relevance everywhere.

    There are no more directions than dimensions; after these, the first come first.
    """
    g = torch.Generator().manual_seed(1)
    image = torch.randn(12, 4, generator=g).tolist()
    order = picked(CDPruner(), image)
    unit, base = torch.nn.functional.normalize(torch.tensor(image).double(), dim=-1), [0]
    while len(base) < 4:
        left = [j for j in range(12) if j not in base]
        base.append(max(left, key=lambda j: torch.linalg.svdvals(unit[[*base, j]]).prod().item()))
    assert order[:4] == base and order[4:] == sorted(order[4:])


@pytest.mark.parametrize("method", [DivPrune(), CDPruner()])
@given(
    n=st.integers(1, 12), keep=st.integers(0, 12), kinds=st.integers(1, 4), seed=st.integers(0, 99)
)
def test_greedy_methods_may_stop_early(method, n, keep, kinds, seed):
    """What comes first does not depend on how far the order is needed.

    Also with copies, and where all are equal.
    """
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(kinds, 3, generator=g)[torch.randint(kinds, (n,), generator=g)].tolist()
    text, keep = torch.randn(2, 3, generator=g).tolist(), min(keep, n)
    whole = picked(method, image, text)
    assert sorted(whole) == list(range(n)) and method.score(features(image, text)).isfinite().all()
    assert picked(method, image, text, keep=keep, exhaustive=False)[:keep] == whole[:keep]


# ---- vtw -----------------------------------------------------------------------------------------
def test_vtw_drops_all_or_the_last():
    inputs = without_labels(batch(images=(2,), text=(5,), before=(1,)))
    visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    kept = kept_by(models()[0], PruningConfig("vtw", [1, 0.5, 0.5, 0, 0, 0]), inputs)
    assert (
        kept[1][0, visual].tolist() == [True] * 16 + [False] * 16 and not kept[3][0, visual].any()
    )


# ---- random and strided --------------------------------------------------------------------------
def slots(n):
    """A context of one sample with n visual tokens, for methods that look at nothing else."""
    return context(slot=torch.arange(n)[None])


def top(method, n, k):
    """Running numbers of the k tokens kept of n."""
    return sorted(method.score(slots(n))[0].argsort(descending=True, stable=True)[:k].tolist())


@given(power=st.integers(1, 10), level=st.integers(0, 10))
def test_strided_is_every_second_fourth_and_so_on(power, level):
    n, step = 2**power, 2 ** min(level, power)
    assert top(Strided(), n, n // step) == list(range(0, n, step))


@given(n=st.integers(1, 700), k=st.integers(1, 700))
def test_strided_is_even(n, k):
    """No gap between kept tokens is more than twice another."""
    k = min(k, n)
    chosen = top(Strided(), n, k)
    gaps = [b - a for a, b in pairwise(chosen)]
    assert chosen[0] == 0 and len(set(chosen)) == k
    assert not gaps or max(gaps) <= 2 * min(gaps)


def test_strided_order_is_one_to_one():
    assert len(Strided().score(slots(5000)).unique()) == 5000


def test_random_is_uniform():
    """Over seeds, every token has the mean rank.

    Every pair is kept together as often as chance has it.
    """
    n, seeds = 64, 400
    ranks = torch.stack(
        [hashed(torch.arange(n), s).argsort().argsort() for s in range(seeds)]
    ).double()
    sigma = math.sqrt((n * n - 1) / 12 / seeds)
    assert ((ranks.mean(0) - (n - 1) / 2).abs() < 4.5 * sigma).all()
    kept = (ranks < n / 4).double()
    together = kept.T @ kept / seeds
    p = 16 * 15 / (64 * 63)
    off = together[~torch.eye(n, dtype=torch.bool)]
    assert (off - p).abs().max() < 5.5 * math.sqrt(p * (1 - p) / seeds) and abs(
        off.mean() - p
    ) < 1e-3
    # Neighbouring seeds, and a seed and its neighbour's tokens, have nothing to do with each other.
    z = (ranks - ranks.mean(1, keepdim=True)) / ranks.std(1, keepdim=True)
    assert (z[1:] * z[:-1]).mean(1).mean().abs() < 4 / math.sqrt(n * seeds)
    assert (z[1:, :-1] * z[:-1, 1:]).mean(1).mean().abs() < 4 / math.sqrt(n * seeds)


@given(seed=st.integers(-(2**40), 2**40) | st.integers(2**62, 2**70), n=st.integers(1, 100))
def test_random_hash_for_any_seed(seed, n):
    step = SimpleNamespace(visual=range(n), numbers=range(n))
    expected = NAIVE["random"](step, seed)
    got = Random(seed).score(slots(n))[0].double()
    assert torch.allclose(
        got, torch.tensor([expected[i] / 2**32 for i in range(n)], dtype=torch.float64), atol=1e-7
    )


def test_random_seeds_differ_and_repeat():
    drawn = [tuple(top(Random(seed), 576, 288)) for seed in range(30)]
    assert (
        len(set(drawn)) == 30 and drawn[3] == tuple(top(Random(3), 576, 288)) and Random().seed == 0
    )
    model, inputs = models()[0], without_labels(batch(**SHAPE))
    kept = []
    for seed in (0, 1, 1):
        with (
            vispco.apply(model, PruningConfig("random", SCHEDULES[0], {"seed": seed})) as handle,
            torch.no_grad(),
        ):
            model(**inputs)
            kept.append(handle.kept()[1])
    assert torch.equal(kept[1], kept[2]) and not torch.equal(kept[0], kept[1])


@pytest.mark.parametrize("seed", [1.0, "1", None, True, [1]])
def test_random_refuses_a_seed_that_is_no_integer(seed):
    with pytest.raises(ValueError, match="seed must be an integer, got"):
        Random(seed)
