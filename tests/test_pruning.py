"""The pruner.

Its life, its inputs and outputs, and the gradient of search, against recomputation by hand.
"""

import copy
import functools
import gc
import itertools
import weakref

import pytest
import torch
from hypothesis import given, strategies as st
from transformers import DynamicCache

import vispco
from oracles import Constant, Replay, by_hand, decoder_inputs, error, hook_counts, pruned_with
from tiny import IMAGE, PER_IMAGE, batch, make, tiny_llava, without_labels
from vispco import PruningConfig
from vispco.methods.random import hashed
from vispco.pruning._arguments import gathered
from vispco.pruning._masks import Packed, log_policy, pack, soft_bias
from vispco.pruning.context import positions, take
from vispco.registry import METHODS
from vispco.relaxation import normalise, soft_mask
from vispco.utils.version import versions

TRANSFORMERS = tuple(map(int, versions()["transformers"].split(".")[:2]))
SHAPE = {"images": (1, 2, 0, 1), "text": (9, 7, 6, 12), "before": (2, 0, 3, 8)}
RATIOS = [1, 0.8, 0.8, 0.5, 0.3, 0.1]
CLOSE = 2e-5


def logits(model, inputs, **kwargs):
    """Logits, without gradient."""
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


# ---- small parts against brute force -------------------------------------------------------------
masks = st.integers(1, 6).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=4)
)


@given(mask=masks)
def test_positions_and_pack(mask):
    """The True places in order: `positions` from the left, `pack` at the right."""
    table = torch.tensor(mask)
    width = max(map(sum, mask))
    index, real = positions(table, width)
    places = torch.arange(table.shape[1]).expand(table.shape)[index]
    packed = pack(table, width)
    for b, row in enumerate(mask):
        where = [i for i, x in enumerate(row) if x]
        assert places[b, real[b]].tolist() == where and real[b].tolist() == [True] * len(where) + [
            False
        ] * (width - len(where))
        assert packed[b].tolist()[width - len(where) :] == where
        assert len(set(packed[b].tolist())) == width


@given(mask=masks, seed=st.integers(0, 9))
def test_packed_states_go_back_where_they_were(mask, seed):
    table = torch.tensor(mask)
    hidden = torch.randn(*table.shape, 3, generator=torch.Generator().manual_seed(seed))
    order = pack(table, max(map(sum, mask)))
    packed = Packed(order, take(table, order), table.shape[1], dense=False, plain=False)
    assert torch.equal(packed.restore(take(hidden, order)), hidden * table[..., None])
    assert torch.equal(packed.kept(), table)


@pytest.mark.parametrize("shape", [(1, 7, 4), (2, 7, 4), (3, 2, 7, 4), (3, 1, 7, 4), (2, 1, 7, 4)])
def test_arguments_of_any_layout_are_gathered(shape):
    """Batch 1 for all samples, one per sample, or three sections (multimodal rotary embeddings)."""
    x, index = torch.randn(shape), torch.tensor([[0, 3, 6], [5, 5, 1]])
    got = gathered(x, index, length=7)
    # (2, 1, 7, 4) has one head for all.
    heads = shape == (2, 1, 7, 4)
    full = x[:, 0] if heads else x.expand(*shape[:-3], 2, 7, 4)
    got = got[:, 0] if heads else got
    for b, k in itertools.product(range(2), range(3)):
        assert torch.equal(got[..., b, k, :], full[..., b, index[b, k], :])


def test_arguments_of_the_sequence_alone_and_others():
    """Angles without samples get them; what has no axis of tokens stays as it is."""
    index = torch.tensor([[0, 3, 6], [5, 5, 1]])
    angles, other = torch.randn(7, 4), torch.randn(2, 5)
    assert torch.equal(gathered(angles, index, 7), angles[index])
    assert gathered(other, index, 7) is other


@given(
    seed=st.integers(0, 50),
    size=st.integers(1, 6),
    kind=st.sampled_from(["none", "bool", "additive"]),
)
def test_soft_bias_is_softmax_with_policy(seed, size, kind):
    """m_n exp(a_n) / sum m exp(a), each token seeing itself.

    Values, and gradients of dropped tokens.
    """
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 1, size, size, generator=g, dtype=torch.float64) * 4
    causal = torch.ones(size, size, dtype=torch.bool).tril()[None, None]
    policy = torch.rand(1, size, generator=g, dtype=torch.float64)
    policy[policy < 0.4] = 0.0
    weight = torch.randn(scores.shape, generator=g, dtype=torch.float64)
    mask = {
        "none": None,
        "bool": causal,
        "additive": torch.zeros_like(scores).masked_fill(~causal, torch.finfo(torch.float64).min),
    }[kind]

    def multiplied(p):
        p = torch.where(torch.eye(size, dtype=torch.bool), 1.0, p[:, None, None, :]) * causal
        e = p * scores.exp()
        return e / e.sum(-1, keepdim=True)

    results = []
    for f in (
        multiplied,
        lambda p: (scores + soft_bias(mask, log_policy(p), torch.float64)).softmax(-1),
    ):
        p = policy.clone().requires_grad_()
        value = f(p)
        (value * weight).sum().backward()
        results.append((value.detach(), p.grad))
    assert torch.allclose(results[1][0], results[0][0], atol=1e-12)
    assert torch.allclose(results[1][1], results[0][1], rtol=1e-9, atol=1e-12)


# ---- search: the gradient by the chain rule ------------------------------------------------------
def turn(t, cos, sin):
    """Rotary embedding."""
    half = t.shape[-1] // 2
    return t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin


def forward_with_policies(model, inputs, policies):
    """Logits of a Llama decoder written out, in which keys have weights.

    policies: {layer: (S,) policy}, cumulative.
    """
    decoder, (seen, given) = model.get_decoder(), decoder_inputs(model, without_labels(inputs))
    hidden, policy = (
        seen["inputs_embeds"],
        torch.ones(seen["inputs_embeds"].shape[1], dtype=torch.float64),
    )
    size = hidden.shape[1]
    for i, layer in enumerate(decoder.layers):
        policy = policy * policies[i] if i in policies else policy
        a, x = layer.self_attn, layer.input_layernorm(hidden)
        q, k, v = (
            p(x).view(1, size, -1, a.head_dim).transpose(1, 2)
            for p in (a.q_proj, a.k_proj, a.v_proj)
        )
        cos, sin = (part[:, None] for part in given[i]["position_embeddings"])
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        weights = (
            torch.where(torch.eye(size, dtype=torch.bool), 1.0, policy)
            * torch.ones(size, size).tril()
        )
        e = weights * (q @ k.transpose(-1, -2) * a.scaling).exp()
        out = (e / e.sum(-1, keepdim=True)) @ v
        hidden = hidden + a.o_proj(out.transpose(1, 2).reshape(1, size, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(decoder.norm(hidden))


def soft_mask_of(ranked, alive, k):
    """The soft mask of one sample."""
    return soft_mask(ranked, k, alive)[0]


def answer_loss(result, inputs):
    """Cross entropy of the answer (Hugging Face's own would be float32)."""
    return torch.nn.functional.cross_entropy(
        result[0, :-1], inputs["labels"][0, 1:], ignore_index=-100
    )


@pytest.mark.parametrize(
    "ratios", [[1.0, 0.8, 0.6, 0.6, 0.4, 0.2], [0.9, 0.5, 0.5, 0.5, 0.5, 0.5], [0.7] * 6]
)
def test_search_gradients_by_the_chain_rule(llava, ratios):
    """dL/dr_i = sum_j dL/dm_ij * d soft_ij/dk * n.

    dL/dm comes from attention written out with weighted keys.
    """
    model = copy.deepcopy(llava).double()
    inputs = batch(images=(1,), text=(9,), before=(2,))
    inputs["pixel_values"] = inputs["pixel_values"].double()
    r = torch.tensor(ratios, dtype=torch.float64, requires_grad=True)
    with pruned_with(model, METHODS.get("random")(seed=4), r, "search") as handle:
        loss = answer_loss(model(**inputs).logits, inputs)
        loss.backward()
        kept = handle.kept()

    visual, scores = inputs["input_ids"][0] == IMAGE, hashed(torch.arange(PER_IMAGE), 4)[None]
    policies, slopes, alive = {}, [], torch.ones(1, PER_IMAGE, dtype=torch.bool)
    for i in range(6):
        ranked, k = (
            normalise(scores, alive),
            torch.tensor([ratios[i] * PER_IMAGE], dtype=torch.float64),
        )
        mask = functools.partial(soft_mask_of, ranked, alive)
        slopes.append(torch.autograd.functional.jacobian(mask, k)[:, 0])
        alive = kept[i][:, visual]
        policies[i] = (
            torch.ones(len(visual), dtype=torch.float64)
            .masked_fill(~kept[i][0], 0)
            .requires_grad_()
        )
    expected_loss = answer_loss(forward_with_policies(model, inputs, policies), inputs)
    by_policy = torch.autograd.grad(expected_loss, list(policies.values()))
    expected = torch.stack(
        [(g[visual] * slope).sum() * PER_IMAGE for g, slope in zip(by_policy, slopes, strict=True)]
    )
    assert abs(loss - expected_loss) < 1e-10
    assert torch.allclose(r.grad, expected, rtol=1e-4, atol=1e-8) and expected.abs().max() > 1e-3


def test_gradient_checkpointing_changes_nothing(llava):
    grads = []
    for checkpointing in (False, True):
        model = copy.deepcopy(llava).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        r = torch.tensor(RATIOS, dtype=torch.float64, requires_grad=True)
        with pruned_with(model, METHODS.get("fastv")(), r, "search"):
            loss = model(**batch(**SHAPE)).loss
            if checkpointing and TRANSFORMERS < (5, 23):
                with pytest.raises(
                    ValueError,
                    match="gradient checkpointing does so before transformers 5.23: update it",
                ):
                    loss.backward()
                return
            loss.backward()
        grads.append(r.grad)
    assert torch.allclose(*grads, rtol=1e-4) and grads[0].abs().max() > 0


def test_ratios_may_be_replaced_between_passes(llava):
    """As a search does: one handle, a new schedule each time."""
    inputs, schedules = (
        without_labels(batch(**SHAPE)),
        [RATIOS, [1, 1, 1, 0.5, 0.5, 0.5], [1, 0, 0, 0, 0, 0], [1] * 6],
    )
    expected = []
    for ratios in schedules:
        with vispco.apply(llava, PruningConfig("fastv", ratios), mode="search") as handle:
            expected.append((logits(llava, inputs), handle.kept()))
    r = torch.ones(6, dtype=torch.float64, requires_grad=True)
    with pruned_with(llava, METHODS.get("fastv")(), r, "search") as handle:
        for ratios, (wanted, kept) in zip(schedules, expected, strict=True):
            handle.ratios = torch.tensor(ratios, dtype=torch.float64, requires_grad=True)
            assert error(logits(llava, inputs), wanted) <= CLOSE
            assert handle.kept().keys() == kept.keys()
            assert all(torch.equal(m, kept[i]) for i, m in handle.kept().items())


@pytest.mark.parametrize("mode", ["deploy", "search"])
def test_deploy_ratios_may_be_replaced_too(llava, mode):
    """The handle's docstring says so.

    Also where the new schedule prunes at layers that the old one did not.
    """
    inputs, wanted = without_labels(batch(**SHAPE)), PruningConfig("fastv", RATIOS)
    with vispco.apply(llava, wanted, mode=mode):
        expected = logits(llava, inputs)
    with vispco.apply(llava, PruningConfig("fastv", [1, 1, 1, 1, 0.5, 0.5]), mode=mode) as handle:
        handle.ratios = torch.tensor(RATIOS, dtype=torch.float64)
        assert error(logits(llava, inputs), expected) <= CLOSE


# ---- life ----------------------------------------------------------------------------------------
def test_nested_apply_is_refused(llava):
    config = PruningConfig("random", [0.5] * 6)
    with vispco.apply(llava, config):
        with pytest.raises(
            ValueError, match="is pruned already: leave that `with` block or call .remove()"
        ):
            vispco.apply(llava, config)
        with pytest.raises(ValueError, match="is pruned already"):
            vispco.apply(llava, PruningConfig("strided", [0.5] * 6), mode="search")
    vispco.apply(llava, config).remove()


def test_remove_twice_is_harmless(llava):
    before, config = hook_counts(llava), PruningConfig("random", [0.5] * 6)
    first = vispco.apply(llava, config)
    first.remove(), first.remove()
    second = vispco.apply(llava, config)
    # Must not take the other's registration away.
    first.remove()
    with pytest.raises(ValueError, match="is pruned already"):
        vispco.apply(llava, config)
    second.remove()
    assert hook_counts(llava) == before


def test_unknown_mode(llava):
    with pytest.raises(ValueError, match="mode must be 'deploy' or 'search', got 'train'"):
        vispco.apply(llava, PruningConfig("random", [0.5] * 6), mode="train")


def test_a_refused_apply_leaves_no_hooks(llava, monkeypatch):
    """Also where the refusal comes from half-way through: the model can be pruned afterwards."""
    model, config = copy.deepcopy(llava), PruningConfig("fastv", RATIOS)
    before, adapter = hook_counts(model), vispco.registry.ADAPTERS.get("llava")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(adapter, "key_projection", lambda self, i: 1 // 0)
        vispco.apply(model, config)
    assert hook_counts(model) == before
    vispco.apply(model, config).remove()


def test_two_models_at_once(llava):
    other, inputs = copy.deepcopy(llava), without_labels(batch(**SHAPE))
    a, b = PruningConfig("random", RATIOS), PruningConfig("fastv", RATIOS)
    with vispco.apply(llava, a):
        expected = logits(llava, inputs)
    with vispco.apply(llava, a), vispco.apply(other, b) as handle:
        mixed = logits(other, inputs)
        assert torch.equal(logits(llava, inputs), expected)
    with vispco.apply(llava, b) as alone:
        assert torch.equal(logits(llava, inputs), mixed)
        assert all(torch.equal(m, handle.kept()[i]) for i, m in alone.kept().items())


def test_a_pruned_model_can_be_collected():
    """vispco holds no model alive."""
    model = tiny_llava(layers=2)
    vispco.apply(model, PruningConfig("random", [0.5, 0.5])).remove()
    ghost = weakref.ref(model)
    del model
    gc.collect()
    assert ghost() is None


# ---- inputs and outputs --------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["deploy", "search"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("method", vispco.list_methods())
def test_eager_attention_equals_sdpa(llava, method, mode, padded):
    """No attention implementation is forced, and none changes the result."""
    eager = tiny_llava(attention="eager")
    inputs = without_labels(
        batch(**SHAPE) if padded else batch(images=(1, 1), text=(9, 9), before=(2, 5))
    )
    results = []
    for model in (llava, eager):
        with vispco.apply(model, PruningConfig(method, RATIOS), mode=mode) as handle:
            results.append((logits(model, inputs), handle.kept()))
    (a, kept), (b, kept_eager) = results
    assert all(torch.equal(kept[i], kept_eager[i]) for i in kept)
    there = torch.stack([inputs["attention_mask"].bool(), *kept.values()]).all(0)
    assert (
        error(b[there], a[there]) <= CLOSE and error(logits(llava, inputs)[there], a[there]) > 0.1
    )


def test_the_mask_may_be_left_out_or_four_dimensional(llava):
    """An unpadded batch with no mask, one of ones, or the causal mask spelt out."""
    inputs = without_labels(batch(images=(1, 1), text=(9, 9), before=(2, 5)))
    size = inputs["input_ids"].shape[1]
    bare = {k: v for k, v in inputs.items() if k != "attention_mask"}
    spelt = torch.ones(2, 1, size, size, dtype=torch.bool).tril()
    for method in ("fastv", "sparsevlm"):
        with vispco.apply(llava, PruningConfig(method, RATIOS)):
            expected = logits(llava, inputs)
            assert error(logits(llava, bare), expected) <= CLOSE
            assert error(logits(llava, {**bare, "attention_mask": spelt}), expected) <= CLOSE


def test_a_mask_that_is_more_than_causal(llava):
    """A user's own mask is gathered, not replaced: here each token sees the last ten at most."""
    inputs = without_labels(batch(images=(1,), text=(9,), before=(2,)))
    size = inputs["input_ids"].shape[1]
    band = torch.ones(1, 1, size, size, dtype=torch.bool).tril().triu(-9)
    windowed = {**inputs, "attention_mask": band}
    with vispco.apply(llava, PruningConfig("random", RATIOS)) as handle:
        got, kept = logits(llava, windowed), handle.kept()
    expected = by_hand(llava, windowed, {i: m[0] for i, m in kept.items()}).logits
    there = torch.stack(list(kept.values())).all(0)
    assert error(got[there], expected[0]) <= CLOSE
    assert error(by_hand(llava, inputs, {i: m[0] for i, m in kept.items()}).logits, expected) > 0.1


@pytest.mark.parametrize("mode", ["deploy", "search"])
def test_embeddings_instead_of_ids(llava, mode):
    inputs = without_labels(batch(**SHAPE))
    embeds = {k: v for k, v in inputs.items() if k != "input_ids"}
    embeds["inputs_embeds"] = llava.get_input_embeddings()(inputs["input_ids"]).detach()
    with vispco.apply(llava, PruningConfig("fastv", RATIOS), mode=mode):
        assert torch.equal(logits(llava, embeds), logits(llava, inputs))


@pytest.mark.parametrize("mode", ["deploy", "search"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"use_cache": False},
        {"use_cache": True},
        {"logits_to_keep": 3},
        {"logits_to_keep": torch.tensor([-2, -1])},
        {"return_dict": False},
        {"output_hidden_states": True},
    ],
    ids=["no cache", "cache", "last 3", "indices", "tuple", "hidden states"],
)
def test_the_callers_options_work_as_before(llava, mode, kwargs):
    inputs = without_labels(batch(**SHAPE))
    with vispco.apply(llava, PruningConfig("fastv", RATIOS), mode=mode), torch.no_grad():
        expected = llava(**inputs).logits
        output = llava(**inputs, **kwargs)
    got = output[0] if isinstance(output, tuple) else output.logits
    keep = kwargs.get("logits_to_keep", slice(None))
    expected = expected[:, -keep:] if isinstance(keep, int) else expected[:, keep]
    assert got.shape == expected.shape and error(got, expected) <= CLOSE


def test_loss_of_deploy_equals_that_of_search(llava):
    """Answers come after the image, so that the tokens that predict them are there in both."""
    inputs, losses = batch(**SHAPE), []
    for mode in ("deploy", "search"):
        with vispco.apply(llava, PruningConfig("pdrop", RATIOS), mode=mode), torch.no_grad():
            losses.append(llava(**inputs).loss)
    with torch.no_grad():
        full = llava(**inputs).loss
    assert abs(losses[0] - losses[1]) < 1e-4 < 0.01 < abs(losses[0] - full)


def test_labels_do_not_stick(llava):
    """Labels of one call say nothing about the next."""
    inputs, config = (
        batch(images=(1,), text=(9,), before=(2,), answer=5),
        PruningConfig("fastv", RATIOS),
    )
    with vispco.apply(llava, config) as handle, torch.no_grad():
        llava(**without_labels(inputs))
        plain = handle.kept()
        llava(**inputs)
        labelled = handle.kept()
        llava(**without_labels(inputs))
        again = handle.kept()
    assert all(torch.equal(m, again[i]) for i, m in plain.items())
    assert any(not torch.equal(m, labelled[i]) for i, m in plain.items())


def test_a_cache_holds_what_was_kept(llava):
    """The very keys of the tokens kept, in order.

    As a full pass over them would make them.
    """
    inputs = without_labels(batch(images=(1,), text=(9,), before=(2,)))
    with vispco.apply(llava, PruningConfig("fastv", RATIOS)) as handle, torch.no_grad():
        cache = DynamicCache(config=llava.config.text_config)
        llava(**inputs, past_key_values=cache)
        kept = {i: m[0] for i, m in handle.kept().items()}
    trace, (_, given) = by_hand(llava, inputs, kept), decoder_inputs(llava, inputs)
    for i, layer in enumerate(llava.get_decoder().layers):
        k = layer.self_attn.k_proj(layer.input_layernorm(trace.hidden[i])).detach()
        k = k.view(
            1, -1, layer.self_attn.config.num_key_value_heads, layer.self_attn.head_dim
        ).transpose(1, 2)
        cos, sin = (part[:, None, trace.places[i]] for part in given[i]["position_embeddings"])
        half = k.shape[-1] // 2
        k = k * cos + torch.cat([-k[..., half:], k[..., :half]], -1) * sin
        assert error(cache.layers[i].keys, k) <= CLOSE


# ---- faulty methods ------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["deploy", "search"])
@pytest.mark.parametrize(
    "wrong, match",
    [
        (
            lambda ctx: ctx.hidden.norm(dim=-1),
            r"Faulty.score returned shape \(4, 40\), expected one score per visual slot, "
            r"\(4, 32\): index with \[ctx.visual\]",
        ),
        (lambda ctx: ctx.hidden.norm(dim=-1)[ctx.visual][0], "returned shape"),
        (
            lambda ctx: torch.full(ctx.valid.shape, float("nan")),
            "scores at layer 1 contain NaN or infinity: expected numbers",
        ),
        (
            lambda ctx: torch.full(ctx.valid.shape, float("inf")),
            "scores at layer 1 contain NaN or infinity",
        ),
    ],
)
def test_faulty_scores_are_explained(llava, mode, wrong, match):
    class Faulty(Constant):
        def score(self, ctx):
            return wrong(ctx)

    inputs = without_labels(batch(**SHAPE))
    before = logits(llava, inputs)
    with (
        pytest.raises((ValueError, FloatingPointError), match=match),
        pruned_with(llava, Faulty(), RATIOS, mode),
    ):
        logits(llava, inputs)
    assert torch.equal(logits(llava, inputs), before)


@pytest.mark.parametrize("layer", [0, 1, 4, 5, -1])
def test_layers_that_a_method_cannot_read(llava, layer):
    """Only the layer just run and the next have queries and keys for these tokens."""

    class Reader(Constant):
        def score(self, ctx):
            return ctx.attention(layer).mean(1)[:, 0][ctx.visual]

    match = f"tokens entering layer 3 have queries and keys of layer 2 .* not of layer {layer};"
    pruning = pruned_with(llava, Reader(), [1, 1, 1, 0.5, 0.5, 0.5])
    with pytest.raises(ValueError, match=match), pruning:
        logits(llava, without_labels(batch(**SHAPE)))


def test_nothing_runs_before_layer_0(llava):
    class Reader(Constant):
        def score(self, ctx):
            return ctx.attention().mean(1)[:, 0][ctx.visual]

    with (
        pytest.raises(ValueError, match="cannot prune before layer 1"),
        pruned_with(llava, Reader(), [0.5] * 6),
    ):
        logits(llava, without_labels(batch(**SHAPE)))


def test_replayed_sets_give_the_same_logits(llava):
    """The oracle of the generation tests.

    `Replay` keeps what another method kept, and nothing else changes.
    """
    inputs = without_labels(batch(**SHAPE))
    with vispco.apply(llava, PruningConfig("sparsevlm", RATIOS)) as handle:
        expected, kept = logits(llava, inputs), handle.kept()
    with pruned_with(llava, Replay(kept), RATIOS) as handle:
        assert torch.equal(logits(llava, inputs), expected)
        assert all(torch.equal(m, kept[i]) for i, m in handle.kept().items())


def test_a_limit_is_for_samples_that_drop_something():
    """One that keeps all it has left, and is only there for its batch mates, is as it is alone."""

    class Limited(Constant):
        def limit(self, ctx, scores):
            first = ctx.inputs[:, -1, 0] == marker
            return torch.where(first, 4, 99) if ctx.layer == 1 else torch.ones_like(ctx.keep)

    llava, ratios = make("llava"), [1, 0.5, 0.5, 0.25, 0.25, 0.25]
    inputs = without_labels(batch(images=(1, 1), text=(9, 9), before=(2, 2)))
    marker = llava.get_input_embeddings()(inputs["input_ids"][0, -1])[0]
    visual = inputs["input_ids"] == IMAGE
    for mode in ("deploy", "search"):
        with pruned_with(llava, Limited(), ratios, mode) as handle, torch.no_grad():
            llava(**inputs)
        kept = handle.kept()
        assert [(mask & visual).sum(1).tolist() for mask in kept.values()] == [[4, 8], [4, 1]]
