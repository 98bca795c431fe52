"""Static KV caches, and compiled decoding in them: the tokens of eager decoding."""

import copy
import functools

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

import vispco
from flash_reference import installed, switched
from oracles import error
from test_generation import BATCHES
from tiny import PER_IMAGE, batch, make, without_labels
from tiny_families import processed
from vispco import PruningConfig

CLOSE = 1e-4
SCHEDULES = {
    "fastv": [1, 1, 0.5, 0.5, 0.25, 0.25],
    "pdrop": [0.5] * 3 + [0.2] * 3,
    "sparsevlm": [1, 1, 1, 0.0, 0.0, 0.0],
}
SHAPES = {name: BATCHES[name] for name in ("one", "left", "right")}


@functools.cache
def model_of(family, attention="sdpa"):
    """A model of this file's own: transformers notes on it how long its caches were."""
    return switched(copy.deepcopy(make(family)), attention)


def prompt(family, shape):
    inputs = without_labels(batch(**shape))
    return inputs if family == "llava" else processed(make(family), inputs)


def generate(model, inputs, **options):
    """Greedy, unless told otherwise: ids, logits and cache."""
    options = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [2, 3, 4, 5], **options}
    out = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits), out.past_key_values


def compiled(backend="eager"):
    """As on a GPU, where `generate` compiles decoding in a static cache of itself."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=None, dynamic=False)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def equal(found, expected):
    assert torch.equal(found[0], expected[0]) and error(found[1], expected[1]) <= CLOSE


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", SCHEDULES)
@pytest.mark.parametrize("family, attention", [("llava", "sdpa"), ("llava", "eager")])
def test_a_static_cache_holds_what_entered_each_layer(family, attention, method, shape):
    model, inputs = model_of(family, attention), prompt(family, SHAPES[shape])
    with vispco.apply(model, PruningConfig(method, SCHEDULES[method])):
        dynamic = generate(model, inputs)
        static = generate(model, inputs, cache_implementation="static")
        equal(static, dynamic)
        room = static[2].layers[0].max_cache_len + static[2].layers[0].dropped
        for mine, other in zip(static[2].layers, dynamic[2].layers, strict=True):
            # What was dropped has no room: the cache is shorter by as much.
            dropped = inputs["input_ids"].shape[1] + 4 - other.keys.shape[-2]
            assert mine.keys.shape[-2] == room - dropped
            seen = int(mine.cumulative_length)
            assert seen == other.keys.shape[-2]
            if shape == "one":
                # Without padding, whose keys may be anything.
                assert error(mine.keys[:, :, :seen], other.keys) <= CLOSE
        equal(
            generate(model, inputs, cache_implementation="static", num_beams=2)[:2],
            generate(model, inputs, num_beams=2)[:2],
        )


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_static_caches_of_other_families(family):
    model, inputs = model_of(family), prompt(family, SHAPES["left"])
    with vispco.apply(model, PruningConfig("fastv", SCHEDULES["fastv"])):
        static = generate(model, inputs, cache_implementation="static")
        equal(static, generate(model, inputs))


def test_a_static_cache_is_used_again():
    """After a reset it holds another prompt, of which other tokens are dropped."""
    model, inputs = model_of("llava"), prompt("llava", SHAPES["one"])
    cache = StaticCache(model.config.get_text_config(), max_cache_len=60)
    with vispco.apply(model, PruningConfig("fastv", SCHEDULES["fastv"])) as handle:
        for ratios in (SCHEDULES["fastv"], [1, 1, 1, 0.2, 0.2, 0.2], SCHEDULES["fastv"]):
            handle.ratios = torch.tensor(ratios, dtype=torch.float64)
            equal(generate(model, inputs, past_key_values=cache), generate(model, inputs))
            lengths = [layer.keys.shape[-2] for layer in cache.layers]
            assert lengths == [60 - PER_IMAGE + round(PER_IMAGE * r) for r in map(kept, ratios)]
            cache.reset()


def kept(ratio):
    """The share of 16 tokens that is kept."""
    return int(PER_IMAGE * ratio) / PER_IMAGE


@pytest.mark.parametrize("shape", ["one", "left"])
def test_flash_attention_in_a_static_cache(shape):
    model, inputs = model_of("llava", "flash_attention_2"), prompt("llava", SHAPES[shape])
    config = PruningConfig("fastv", SCHEDULES["fastv"])
    with installed("flash_attention_2"), vispco.apply(model, config):
        found = generate(model, inputs, cache_implementation="static")
    with vispco.apply(model_of("llava"), config):
        equal(found, generate(model_of("llava"), inputs))


def test_flex_attention_in_a_static_cache_is_refused():
    """`generate` of transformers cannot do it either."""
    model, inputs = model_of("llava", "flex_attention"), prompt("llava", SHAPES["one"])
    cache = StaticCache(model.config.get_text_config(), max_cache_len=60)
    refusal = pytest.raises(ValueError, match="flex attention with a static KV cache")
    with vispco.apply(model, PruningConfig("fastv", SCHEDULES["fastv"])), refusal, torch.no_grad():
        model(**inputs, past_key_values=cache)


# ---- compiled ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "family, shape, method", [("llava", "left", "pdrop"), ("qwen2_5_vl", "one", "fastv")]
)
def test_compiled_decoding_is_one_graph_and_equals_eager(family, shape, method):
    model, inputs = model_of(family), prompt(family, SHAPES[shape])
    with vispco.apply(model, PruningConfig(method, SCHEDULES[method])):
        expected = generate(model, inputs)
        counters.clear()
        equal(generate(model, inputs, **compiled()), expected)
        assert counters["stats"]["unique_graphs"] == 1
        # Tokens that come by another way, on other caches, in between.
        equal(generate(model, inputs), expected)
        equal(generate(model, inputs, **compiled()), expected)
        assert counters["stats"]["unique_graphs"] == 1


def test_code_is_not_compiled_again_for_prompts_of_other_lengths():
    """As long as cache and picture have the same size."""
    model = model_of("llava")
    with vispco.apply(model, PruningConfig("fastv", SCHEDULES["fastv"])):
        counters.clear()
        for text in (9, 7, 12):
            inputs = prompt("llava", {"images": (1,), "text": (text,), "before": (2,)})
            options = {"max_new_tokens": None, "max_length": 60}
            expected = generate(model, inputs, **options)
            equal(generate(model, inputs, **options, **compiled()), expected)
        assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_compiled_decoding_before_within_and_after():
    """Code of the full model is not taken for the pruned one's, nor that of another schedule."""
    model, inputs = model_of("llava"), prompt("llava", SHAPES["one"])
    full = generate(model, inputs)
    equal(generate(model, inputs, **compiled()), full)
    for ratios in ([1, 1, 0.5, 0.5, 0.25, 0.25], [1, 0.25, 0.25, 0.25, 0.25, 0.25]):
        with vispco.apply(model, PruningConfig("fastv", ratios)):
            expected = generate(model, inputs)
            assert error(expected[1], full[1]) > 0.1
            equal(generate(model, inputs, **compiled()), expected)
    equal(generate(model, inputs, **compiled()), full)


@pytest.mark.slow
def test_compiled_by_inductor():
    """The kernels that a service would run."""
    model, inputs = model_of("llava"), prompt("llava", SHAPES["left"])
    with vispco.apply(model, PruningConfig("fastv", SCHEDULES["fastv"])):
        equal(generate(model, inputs, **compiled("inductor")), generate(model, inputs))
