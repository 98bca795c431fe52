"""Decoders, measured on blank models: against PyTorch's counter on real ones, and by hand."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DynamicCache,
    Gemma3Config,
    PaliGemmaConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)

from test_flops import llava_7b
from tiny import FAMILIES, make
from vispco.dimensions import Dimensions
from vispco.flops import CostModel, KVCacheMemory
from vispco.models.structure import find_decoder
from vispco.pruning._hearing import Hearing
from vispco.registry import METHODS, adapter_for

LENGTHS = [1, 5, 64, 65, 129]


class Reached(Exception):
    """The attention function is about to run."""


def spent(run):
    """FLOPs by PyTorch's counter; a run may stop at an attention function."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            try:
                run()
            except Reached:
                pass
    return counter.get_total_flops()


def layer_calls(model, n):
    """A call of each decoder layer with what the decoder gives it for n tokens of text."""
    decoder, layers = find_decoder(model)
    calls, hooks = [], []
    for layer in layers:
        keep = lambda module, args, kwargs: calls.append(  # noqa: E731
            lambda: module(*args, **{**kwargs, "past_key_values": None})
        )
        hooks.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
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
    for n in LENGTHS:
        calls = layer_calls(model, n)
        assert size.flops(torch.tensor(n)).tolist() == [spent(call) for call in calls]

        def stop(query, key, options):
            raise Reached

        hearing = Hearing([*find_decoder(model)[0].modules()], stop)
        ahead = [spent(call) + 2 * n * size.heads * size.head_dim for call in calls]
        hearing.remove()
        assert size.ahead(torch.tensor(n)).tolist() == ahead


@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_of_the_cache(name):
    model, n = make(name), 5
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.no_grad():
        find_decoder(model)[0](
            inputs_embeds=torch.randn(1, n, model.config.get_text_config().hidden_size),
            past_key_values=cache,
        )
    size = adapter_for(model).dimensions(model.config)
    held = [(layer.keys.numel() + layer.values.numel()) // n for layer in cache.layers]
    assert size.cached().tolist() == held


# ---- against closed forms, at true sizes ---------------------------------------------------------
TRUE = {
    "LLaVA-1.5 7B": llava_7b(),
    "Qwen2-VL 7B": Qwen2VLConfig(),
    "Qwen2.5-VL 72B": Qwen2_5_VLConfig(),
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
    pairs = zip((found.flops, found.ahead), (by_hand.flops, by_hand.ahead), strict=True)
    assert all(torch.equal(a(counts), b(counts)) for a, b in pairs)
    assert all(torch.equal(a(counts / 7), b(counts.double() / 7)) for a, b in [])
    memory = [KVCacheMemory(size)(counts, 3000, 7) for size in (found, by_hand)]
    assert torch.equal(*memory)
    for method in METHODS.names():
        costs = [
            CostModel(size, METHODS.get(method)())(counts, 3000, 7) for size in (found, by_hand)
        ]
        assert torch.equal(*costs), method
