"""Each built-in method against a naive implementation: eager attention weights, Python loops, one sample."""

import functools
import math

import pytest
import torch
from hypothesis import given, strategies as st

import vispco
from oracles import Constant, by_hand, decoder_inputs, pruned_with, rows_alone
from tiny import IMAGE, PER_IMAGE, batch, tiny_llava, without_labels
from vispco import PruningConfig
from vispco.context import Context
from vispco.methods.random import Random, hashed
from vispco.methods.strided import Strided
from vispco.registry import METHODS

SHAPE = {"images": (1, 2, 0, 1), "text": (9, 7, 6, 12), "before": (2, 0, 3, 8)}
SCHEDULES = [[1, 0.5, 0.5, 0.5, 0.5, 0.5], [1, 1, 0.7, 0.7, 0.3, 0.3], [1, 0.9, 0.7, 0.5, 0.3, 0.1],
             [1, 1, 1, 1, 1, 0.4]]


@functools.cache
def models(layers=6, kv_heads=2):
    """The same weights under sdpa, which is pruned, and under eager attention, which shows its weights."""
    return tiny_llava(layers, kv_heads), tiny_llava(layers, kv_heads, attention="eager")


# ---- naive methods: (scores by original position) of the tokens present at the input of a layer ------------
def naive_fastv(trace, before, inputs, embeddings, visual, text):
    """Row of the last token in layer K - 1, mean over heads."""
    weights, place = before.attention[-1][0], before.places[-1].tolist()  # (H, N, N)
    last = place.index(max(text))
    return {
        p: sum(weights[h, last, place.index(p)].item() for h in range(len(weights))) / len(weights)
        for p in visual
    }


def naive_pdrop(trace, before, inputs, embeddings, visual, text):
    """The same in layer K, as it would be without dropping before it."""
    return naive_fastv(trace, trace, inputs, embeddings, visual, text)


def naive_sparsevlm(trace, before, inputs, embeddings, visual, text):
    """Attention averaged over heads and raters: text after the image, related to it at least as the mean is."""
    text = [t for t in text if t > min(visual)]  # what comes before the image cannot rate it
    share = dict.fromkeys(text, 0.0)
    for v in visual:
        relation = [math.fsum((embeddings[v] * embeddings[t]).tolist()) for t in text]
        top = max(relation)
        total = sum(math.exp(x - top) for x in relation)
        for t, x in zip(text, relation):
            share[t] += math.exp(x - top) / total / len(visual)
    raters = [t for t in text if share[t] >= sum(share.values()) / len(text) - 1e-9]
    weights, place = before.attention[-1][0].mean(0), before.places[-1].tolist()
    return {
        p: sum(weights[place.index(t), place.index(p)].item() for t in raters) / len(raters) for p in visual
    }


def naive_random(trace, before, inputs, embeddings, visual, text, seed=0):
    """The "lowbias32" hash of the running number, in Python's integers."""
    scores, numbers = {}, [p for p, t in enumerate(inputs["input_ids"][0].tolist()) if t == IMAGE]
    for p in visual:
        x = (numbers.index(p) + (seed + 1) * 0x9E3779B9) % 2**32
        x = (x ^ x >> 15) * 0x21F0AAAD % 2**32
        x = (x ^ x >> 15) * 0x735A2D97 % 2**32
        scores[p] = x ^ x >> 15
    return scores


def naive_strided(trace, before, inputs, embeddings, visual, text):
    """Minus the running number with its binary digits mirrored."""
    numbers = [p for p, t in enumerate(inputs["input_ids"][0].tolist()) if t == IMAGE]
    return {p: -int(f"{numbers.index(p):024b}"[::-1], 2) for p in visual}


NAIVE = {name.removeprefix("naive_"): f for name, f in globals().items() if name.startswith("naive_")}


def naive_kept(model, inputs, config, naive):
    """{layer: (S,) bool}: rank by the naive scores at each step, then drop by hand before the next."""
    ids = inputs["input_ids"][0]
    embeddings = decoder_inputs(model, inputs)[0]["inputs_embeds"][0]
    present, kept, n = torch.ones_like(ids, dtype=torch.bool), {}, int((ids == IMAGE).sum())
    for layer in range(config.num_layers):
        visual = [p for p in range(len(ids)) if present[p] and ids[p] == IMAGE]
        count = math.floor(config.keep_ratios[layer] * n + 1e-6)
        count = max(count, 1) if config.keep_ratios[layer] > 0 and n else count
        if count >= len(visual):
            continue
        text = [p for p in range(len(ids)) if ids[p] != IMAGE]
        trace = by_hand(model, inputs, kept, upto=layer)
        before = by_hand(model, inputs, kept, upto=layer - 1) if layer else None
        scores = naive(trace, before, inputs, embeddings, visual, text)
        ranked = sorted(visual, key=lambda p: (-scores[p], p))
        present = present.clone()
        present[ranked[count:]] = False
        kept[layer] = present
    return kept


def test_every_built_in_method_has_a_naive_counterpart():
    built_in = {n for n in vispco.list_methods() if METHODS.get(n).__module__.startswith("vispco.")}
    assert built_in <= set(NAIVE), f"write a naive implementation of {built_in - set(NAIVE)} here"


@pytest.mark.parametrize("mode", ["deploy", "search"])
@pytest.mark.parametrize("schedule", range(len(SCHEDULES)))
@pytest.mark.parametrize("name", sorted(NAIVE))
def test_keeps_what_the_naive_method_keeps(name, schedule, mode):
    """In a mixed batch, padded on either side; also at a second and third step, on the tokens that remain."""
    sdpa, eager = models()
    config = PruningConfig(name, SCHEDULES[schedule])
    inputs = without_labels(batch(**SHAPE, padding="left" if schedule % 2 else "right", seed=schedule))
    with vispco.apply(sdpa, config, mode=mode) as handle, torch.no_grad():
        sdpa(**inputs)
        got = handle.kept()
    for b in range(4):
        alone, real = rows_alone(inputs, SHAPE["images"], b)
        expected = naive_kept(eager, alone, config, NAIVE[name])
        assert bool(expected) == (SHAPE["images"][b] > 0)
        for layer, mask in expected.items():
            assert torch.equal(got[layer][b, real], mask), f"sample {b}, layer {layer}"


@pytest.mark.parametrize("name", sorted(NAIVE))
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_one_key_head_and_one_per_query_head(name, kv_heads):
    sdpa, eager = models(3, kv_heads)
    config, inputs = (
        PruningConfig(name, [1, 0.6, 0.2]),
        without_labels(batch(images=(2,), text=(5,), before=(1,))),
    )
    with vispco.apply(sdpa, config) as handle, torch.no_grad():
        sdpa(**inputs)
        got = handle.kept()
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


def scores_of(name, model, inputs, ratios):
    """[(ctx, scores)] at each step."""
    probe = Scores(METHODS.get(name)())
    with pruned_with(model, probe, ratios), torch.no_grad():
        model(**inputs)
    return probe.seen


@pytest.mark.parametrize("layer", [1, 3, 5])
@pytest.mark.parametrize("name, at", [("fastv", -1), ("pdrop", 0)])
def test_scores_are_the_models_own_attention_weights(name, at, layer):
    """Against `output_attentions=True`: values, not only ranks."""
    sdpa, eager = models()
    inputs = without_labels(batch(images=(1, 1), text=(9, 9), before=(2, 5)))
    with torch.no_grad():
        weights = eager(**inputs, output_attentions=True).attentions[layer + at][:, :, -1].mean(1)  # (B, S)
    (_, scores), = scores_of(name, sdpa, inputs, [1.0] * layer + [0.5] * (6 - layer))
    expected = weights[inputs["input_ids"] == IMAGE].view(2, PER_IMAGE)
    assert torch.allclose(scores, expected, rtol=1e-4, atol=1e-7) and expected.std() > 0.01


def test_answers_are_not_looked_at():
    """With labels the prompt ends where the answer starts; its tokens have no say, for any method."""
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


# ---- ties --------------------------------------------------------------------------------------------------
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


# ---- sparsevlm ---------------------------------------------------------------------------------------------
def test_sparsevlm_has_raters_whatever_the_text():
    """All words equal, or a single one: every text token is a rater then, rounding or not."""
    model = models()[0]
    for words in (1, 2, 6, 9, 10, 13):
        inputs = without_labels(batch(images=(1,), text=(words,), before=(0,)))
        inputs["input_ids"][inputs["input_ids"] != IMAGE] = 7
        (_, scores), = scores_of("sparsevlm", model, inputs, [1, 1, 0.5, 0.5, 0.5, 0.5])
        assert (scores > 0).any()


def test_sparsevlm_rates_when_much_text_precedes_the_image():
    """Text before the image cannot see it: whatever the raters are, the ranking must come from attention."""
    model = models()[0]
    for seed in range(30):
        inputs = without_labels(batch(images=(1,), text=(9,), before=(8,), seed=seed))
        (_, scores), = scores_of("sparsevlm", model, inputs, [1, 1, 0.5, 0.5, 0.5, 0.5])
        assert (scores > 0).any(), f"seed {seed}: every score is 0, so the first tokens are kept"


# ---- random and strided ------------------------------------------------------------------------------------
def slots(n):
    """A context of one sample with n visual tokens, for methods that look at nothing else."""
    slot = torch.arange(n)[None]
    return Context(**dict.fromkeys(Context.__dataclass_fields__) | {"slot": slot, "layer": 0})


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
    gaps = [b - a for a, b in zip(chosen, chosen[1:])]
    assert chosen[0] == 0 and len(set(chosen)) == k
    assert not gaps or max(gaps) <= 2 * min(gaps)


def test_strided_order_is_one_to_one():
    assert len(Strided().score(slots(5000)).unique()) == 5000


def test_random_is_uniform():
    """Over seeds, every token has the mean rank, every pair is kept together as often as chance has it."""
    n, seeds = 64, 400
    ranks = torch.stack([hashed(torch.arange(n), s).argsort().argsort() for s in range(seeds)]).double()
    sigma = math.sqrt((n * n - 1) / 12 / seeds)
    assert ((ranks.mean(0) - (n - 1) / 2).abs() < 4.5 * sigma).all()
    kept = (ranks < n / 4).double()
    together = kept.T @ kept / seeds
    p = 16 * 15 / (64 * 63)
    off = together[~torch.eye(n, dtype=torch.bool)]
    assert (off - p).abs().max() < 5.5 * math.sqrt(p * (1 - p) / seeds) and abs(off.mean() - p) < 1e-3
    # Neighbouring seeds, and a seed and its neighbour's tokens, have nothing to do with each other.
    z = (ranks - ranks.mean(1, keepdim=True)) / ranks.std(1, keepdim=True)
    assert ((z[1:] * z[:-1]).mean(1).mean().abs() < 4 / math.sqrt(n * seeds))
    assert ((z[1:, :-1] * z[:-1, 1:]).mean(1).mean().abs() < 4 / math.sqrt(n * seeds))


@given(seed=st.integers(-2**40, 2**40) | st.integers(2**62, 2**70), n=st.integers(1, 100))
def test_random_hash_for_any_seed(seed, n):
    ids = {"input_ids": torch.full((1, n), IMAGE)}
    expected = naive_random(None, None, ids, None, range(n), None, seed)
    got = Random(seed).score(slots(n))[0].double()
    assert torch.allclose(
        got, torch.tensor([expected[i] / 2**32 for i in range(n)], dtype=torch.float64), atol=1e-7
    )


def test_random_seeds_differ_and_repeat():
    drawn = [tuple(top(Random(seed), 576, 288)) for seed in range(30)]
    assert len(set(drawn)) == 30 and drawn[3] == tuple(top(Random(3), 576, 288)) and Random().seed == 0
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
