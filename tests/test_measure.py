"""Decoders, measured on blank models: against PyTorch's counter on real ones, and by hand."""

from contextlib import suppress

import pytest
import torch
import transformers
from hypothesis import given, settings, strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DynamicCache,
    Gemma3Config,
    PaliGemmaConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)

import vispco
from test_flops import llava_7b
from tiny import FAMILIES, make
from tiny_families import QWEN_ROPE, QWEN_VISION, TEXT
from vispco.dimensions import Dimensions
from vispco.flops import CostModel, KVCacheMemory, count_flops
from vispco.reading.blank import Blueprint, blank, counting
from vispco.reading.growth import Growth, Rule, find_rule
from vispco.reading.hearing import Hearing
from vispco.reading.measure import CHUNKS, LENGTHS, MORE, measured
from vispco.reading.structure import find_decoder
from vispco.registry import METHODS, adapter_for


class Reached(Exception):
    """The attention function is about to run."""


def spent(run):
    """FLOPs by PyTorch's counter; a run may stop at an attention function."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter, suppress(Reached):
        run()
    return counter.get_total_flops()


def layer_calls(model, n):
    """A call of each decoder layer with what the decoder gives it for n tokens of text."""
    decoder, layers = find_decoder(model)
    calls = []

    def keep(module, args, kwargs):
        calls.append(lambda: module(*args, **{**kwargs, "past_key_values": None}))

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        decoder(inputs_embeds=torch.randn(1, n, model.config.get_text_config().hidden_size))
    for hook in hooks:
        hook.remove()
    return calls


# ---- against the counter -------------------------------------------------------------------------
@pytest.mark.parametrize("name", FAMILIES)
def test_each_layer_costs_what_the_counter_sees(name):
    """All of a layer, and all of it up to its attention function with one row of q k^T."""
    model = make(name)
    size = adapter_for(model).dimensions(model.config)
    for n in (1, 5, 64, 65, 129):
        calls = layer_calls(model, n)
        assert size.flops(torch.tensor(n)).tolist() == [spent(call) for call in calls]

        def stop(query, key, options):
            raise Reached

        hearing = Hearing([*find_decoder(model)[0].modules()], stop)
        ahead = [spent(call) + 2 * n * size.heads * size.head_dim for call in calls]
        hearing.remove()
        assert size.ahead(torch.tensor(n)).tolist() == ahead


@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_in_the_cache(name):
    model, n = make(name), 5
    text = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=text)
    with torch.no_grad():
        states = torch.randn(1, n, text.hidden_size)
        find_decoder(model)[0](inputs_embeds=states, past_key_values=cache)
    size = adapter_for(model).dimensions(model.config)
    held = [(layer.keys.numel() + layer.values.numel()) // n for layer in cache.layers]
    assert size.cached.tolist() == held


# ---- against closed forms, at true sizes ---------------------------------------------------------
TRUE = {
    "LLaVA-1.5 7B": llava_7b(),
    "Qwen2-VL": Qwen2VLConfig(text_config={"rope_parameters": QWEN_ROPE}),
    "Qwen2.5-VL": Qwen2_5_VLConfig(text_config={"rope_parameters": QWEN_ROPE}),
    "Qwen3-VL": Qwen3VLConfig(),
    "Gemma 3": Gemma3Config(),
    "PaliGemma": PaliGemmaConfig(),
}


@pytest.mark.parametrize("name", TRUE)
def test_true_sizes_cost_what_the_closed_forms_say(name):
    config = TRUE[name]
    text = config.get_text_config(decoder=True)
    found = adapter_for(config).dimensions(config)
    by_hand = Dimensions(
        text.num_hidden_layers,
        text.hidden_size,
        text.num_attention_heads,
        text.num_key_value_heads,
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        text.intermediate_size,
        text.vocab_size,
        vision_head_dim=found.vision_head_dim,
    )
    assert found == by_hand and by_hand.measured is None
    counts = torch.randint(0, 3000, (20, text.num_hidden_layers))
    assert torch.equal(found.flops(counts), by_hand.flops(counts))
    assert torch.allclose(found.flops(counts / 7), by_hand.flops(counts.double() / 7))
    costs = [[KVCacheMemory(size)(counts, 3000, 7) for size in (found, by_hand)]]
    for method in METHODS.names():
        pair = (CostModel(size, METHODS.get(method)()) for size in (found, by_hand))
        costs.append([cost(counts, 3000, 7) for cost in pair])
    assert all(torch.equal(*pair) for pair in costs)


# ---- layers that differ --------------------------------------------------------------------------
def newer(name):
    """Some models are not in older releases of transformers."""
    return pytest.mark.skipif(not hasattr(transformers, name), reason=f"no {name}")


def qwen3_5():
    """Every second layer is linear attention."""
    kinds = ["linear_attention", "full_attention"] * 2
    text = {**TEXT, "num_hidden_layers": 4, "layer_types": kinds}
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    return transformers.Qwen3_5Config(text_config={**text, **linear}, vision_config=QWEN_VISION)


@newer("Qwen3_5Config")
def test_linear_attention_works_in_chunks():
    """Every second layer has no attention function, and pays for each chunk of 64 tokens."""
    config = qwen3_5()
    model = transformers.Qwen3_5ForConditionalGeneration(config).eval()
    size = vispco.Adapter.dimensions(config)
    for n in (1, 3, 63, 64, 65, 127, 128, 200):
        assert size.flops(torch.tensor(n)).tolist() == [spent(c) for c in layer_calls(model, n)]
    assert [a is None for a in size.measured.attention] == [True, False] * 2
    e = config.text_config.head_dim
    assert size.cached.tolist() == [0, 2 * 2 * e] * 2 and (size.heads, size.head_dim) == (4, e)
    # One row of the attention before; none before the first attention.
    row = 2 * 9 * 4 * e
    assert size.ahead(torch.tensor(9)).tolist()[::2] == [0, row]
    ends = (size.flops(torch.tensor(n))[::2] for n in (64, 65))
    start, quarter = next(ends), size.flops(torch.tensor([64.25] * 4))[::2]
    assert torch.equal(4 * (quarter - start), (next(ends) - start).double())


@newer("Qwen3_5Config")
def test_layers_of_no_known_rule_are_estimated(monkeypatch):
    """With a warning. At the longest lengths that were measured, the estimate is exact."""
    blueprint = Blueprint.of(vispco.Adapter, qwen3_5())
    exact = measured(blueprint).flops
    monkeypatch.setattr("vispco.reading.measure.CHUNKS", ())
    with pytest.warns(UserWarning, match="layer 0 of Qwen3_5ForCond.* no rule.* are estimates"):
        estimate = measured.__wrapped__(blueprint).flops
    for n in sorted(MORE)[-2:]:
        assert torch.equal(estimate(torch.tensor(n)), exact(torch.tensor(n)))
    off = (estimate(torch.arange(256, 531)[:, None]) / exact(torch.arange(256, 531)[:, None])) - 1
    assert 0 < off.abs().max() < 0.3


@newer("Qwen3VLMoeConfig")
def test_experts_that_are_active_are_counted():
    """Two of eight. Of a router, each token pays for all."""
    d, h, g, e, m, experts = 32, 4, 2, 8, 24, 8
    sizes = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": m}
    config = transformers.Qwen3VLMoeConfig(
        text_config={**TEXT, "num_hidden_layers": 2, "head_dim": e, **sizes},
        vision_config={**QWEN_VISION, "deepstack_visual_indexes": [0]},
    )
    attention = 2 * d * (h + g) * e
    for n in (1, 7, 100):
        layer = 2 * n * (attention + d * experts + 2 * 3 * d * m) + 4 * n * n * h * e
        assert vispco.Adapter.dimensions(config).flops(torch.tensor(n)).tolist() == [layer] * 2


def test_heads_that_differ_by_layer():
    """A score of the layer before costs what that layer's heads are, and only there."""
    size = Dimensions(4, 32, (4, 2, 8, 8), 2, (8, 8, 16, 16), 56, 60)
    counts = torch.tensor([[16, 9, 9, 4], [16, 16, 5, 5]])
    found = CostModel(size, METHODS.get("fastv")()).scoring(counts, 16, 3)
    row = [2 * h * e for h, e in zip(size.heads, size.head_dim, strict=True)]
    assert found.tolist() == [row[0] * (16 + 3) + row[2] * (9 + 3), row[1] * (16 + 3)]
    ahead = [
        2 * 19 * (32 * (h + 4) + h) * e for h, e in zip(size.heads, size.head_dim, strict=True)
    ]
    assert size.ahead(torch.tensor(19)).tolist() == ahead
    assert CostModel(size, METHODS.get("pdrop")()).scoring(counts[1], 16, 3) == ahead[2]
    memory = KVCacheMemory(size)(counts, 16, 3)
    per_token = torch.tensor([2 * 2 * e * 2 for e in (8, 8, 16, 16)])
    assert torch.equal(memory, ((counts + 3) * per_token).sum(-1))


# ---- rules ---------------------------------------------------------------------------------------
factors = st.tuples(*[st.integers(0, 10**6)] * 6)


@settings(max_examples=25)
@given(factors, st.sampled_from(CHUNKS), st.booleans())
def test_a_rule_is_found_from_a_few_lengths(numbers, chunk, full):
    """Chunks of any size, of which the last may be left out or paid for in full."""
    c, a, b, d, e, f = numbers

    def true(n):
        p = (n if full else n + chunk - 1) // chunk
        return c + a * n + b * n * n + p * (d + e * n + f * p)

    rule = find_rule({n: true(n) for n in LENGTHS + MORE}, CHUNKS)
    n = torch.arange(700)
    assert Growth([rule])(n[:, None])[:, 0].tolist() == [true(x) for x in n.tolist()]


@settings(max_examples=25)
@given(factors, st.sampled_from(CHUNKS))
def test_chunks_are_never_taken_for_a_polynomial(numbers, chunk):
    """Four lengths show that there are some."""
    c, a, b, *_ = numbers
    true = {n: c + a * n + b * n * n - (-n // chunk) for n in LENGTHS}
    assert find_rule(true) is None


def test_a_rule_between_whole_tokens():
    """Linear in the chunks, so that a gradient is that of the tokens on both sides."""
    growth = Growth([Rule((1, 2, 3, 5, 0, 0), chunk=4, offset=3), Rule((0, 2, 0, 0, 0, 0))])
    n = torch.tensor([4.5, 7.0], dtype=torch.float64, requires_grad=True)
    value = growth(n)
    assert value.tolist() == [1 + 2 * 4.5 + 3 * 4.5**2 + 5 * 1.5, 14.0]
    value.sum().backward()
    assert n.grad.tolist() == [2 + 6 * 4.5 + 5, 2]
    assert growth(torch.tensor([4, 7])).tolist() == [1 + 8 + 48 + 5, 14]


# ---- blank models --------------------------------------------------------------------------------
def test_a_large_model_takes_no_memory():
    """72 billion parameters are a handful of numbers; what is computed is none at all."""
    config = Qwen2_5_VLConfig(text_config={"rope_parameters": QWEN_ROPE})
    adapter = Blueprint.of(adapter_for(config), config).adapter()
    tensors = [*adapter.model.parameters(), *adapter.model.buffers()]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    assert sum(x.numel() for x in tensors) > 7e10 and sum(storages.values()) < 1e5
    with counting():
        states = adapter.decoder(inputs_embeds=blank(1, 50, 8192)).last_hidden_state
    assert states.shape == (1, 50, 8192) and states.untyped_storage().nbytes() == 4


def test_integers_are_computed_and_blanks_stay_blank():
    x = blank(3, 4)
    with counting() as counter:
        y = x.exp() @ blank(4, 5)
        y += 1
        places = (torch.arange(6) % 3).nonzero()[:, 0]
        picked = y[places[places < 3]]
        chosen = y.topk(2).indices
        y.unsqueeze_(0)
    assert counter.total == 2 * 3 * 4 * 5
    assert (
        y.shape == (1, 3, 5) and picked.shape == (2, 5) and picked.untyped_storage().nbytes() == 4
    )
    assert chosen.shape == (3, 2) and bool((chosen[:, 0] != chosen[:, 1]).all())
    assert bool((x == 1).all())


def test_models_that_cannot_be_built():
    class Unknown(PreTrainedConfig):
        model_type = "unknown"

    with pytest.raises(ValueError, match="no class of models is known for Unknown.*load the model"):
        vispco.Adapter.dimensions(Unknown())
    # 7 x 7 patches in squares of 2 x 2.
    config = SmolVLMConfig(vision_config={"image_size": 224, "patch_size": 32}, pad_token_id=0)
    assert count_flops(config).vision is None


def test_a_configuration_of_another_dtype_counts_alike():
    """Of the decoder alone, say, as files of weights leave it behind."""
    config = make("llava").config.to_dict()
    expected = count_flops(make("llava"), n_visual=16, n_text=5)
    for parts in (["text_config"], ["vision_config"], ["text_config", "vision_config"]):
        half = {part: {**config[part], "dtype": "bfloat16"} for part in parts}
        changed = type(make("llava").config)(**{**config, **half})
        assert changed.get_text_config().dtype == (
            torch.bfloat16 if "text_config" in parts else None
        )
        assert count_flops(changed, n_visual=16, n_text=5) == expected


def test_counting_leaves_no_trace():
    """No random numbers are drawn, and the configuration is left as it was."""
    config, state = llava_7b(), torch.get_rng_state()
    config.text_config.vocab_size = 32063
    before = config.to_dict()
    config._attn_implementation = "eager"
    adapter_for(config).dimensions(config)
    assert torch.equal(state, torch.get_rng_state()) and config.to_dict() == before
    assert config._attn_implementation == "eager"
