"""Conversations: pictures in later turns, on the KV cache of the earlier ones."""

import copy
import functools

import pytest
import torch
from transformers import DynamicCache

import vispco
from flash_reference import installed, switched
from oracles import Replay, Witness, error, pruned_with
from tiny import PER_IMAGE, batch, make, tiny_llava, without_labels
from vispco import PruningConfig
from vispco.registry import METHODS

CLOSE = 1e-4
OPTIONS = {"do_sample": False, "suppress_tokens": [2, 3, 4, 5]}
OPTIONS |= {"output_logits": True, "return_dict_in_generate": True}
SCHEDULES = {
    "layer 0": [0.5] * 3 + [0.25] * 3,
    "several": [1, 1, 0.5, 0.5, 0.25, 0.25],
    "all": [1, 1, 1, 0.0, 0.0, 0.0],
}
TURNS = [
    {"images": (1, 1), "text": (9, 6), "before": (2, 1), "seed": 0},
    {"images": (1, 1), "text": (7, 7), "before": (1, 3), "seed": 5},
    {"images": (1, 1), "text": (5, 5), "before": (0, 2), "seed": 9},
]


@functools.cache
def under(attention, family="llava"):
    return switched(copy.deepcopy(make(family)), attention)


def turns(rows, number=2):
    """Prompts of `rows` samples, one after the other; the first may be padded."""
    keys = ("images", "text", "before")
    told = [{k: turn[k][:rows] if k in keys else turn[k] for k in turn} for turn in TURNS]
    return [without_labels(batch(**turn)) for turn in told[:number]]


def converse(model, prompts, handle, new=3):
    """Each turn on the cache of those before: its logits, what it kept, where it began and ended.

    Then the ids of all turns, their mask and the cache. What it merged, if a `Witness` saw it, is
    in `MERGED`, by the turn's beginning.
    """
    MERGED.clear()
    ids = mask = cache = None
    seen = []
    for turn in prompts:
        ids = turn["input_ids"] if ids is None else torch.cat([ids, turn["input_ids"]], 1)
        told = turn["attention_mask"]
        mask = told if mask is None else torch.cat([mask, told], 1)
        past = 0 if cache is None else cache.get_seq_length()
        given = {"input_ids": ids, "attention_mask": mask, "pixel_values": turn["pixel_values"]}
        out = model.generate(**given, past_key_values=cache, max_new_tokens=new, **OPTIONS)
        seen.append((torch.stack(out.logits, 1), handle.kept(), past, ids.shape[1]))
        MERGED[past] = dict(getattr(handle.method, "merged", {}))
        ids, cache = out.sequences, out.past_key_values
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    return seen, ids, mask, cache


MERGED = {}


def merged(seen, width):
    """Where each token of the conversation was averaged into, or -1, at each layer that merged."""
    into = {}
    for _, _, past, _ in seen:
        for layer, told in MERGED[past].items():
            told = torch.where(told < 0, told, told + past)
            all_turns = into.setdefault(layer, torch.full((len(told), width), -1))
            all_turns[:, past : past + told.shape[1]] = told
    return into


def whole(model, prompts, seen, ids, mask, ratios):
    """Logits of each new token, from one pass over all before it, without a cache.

    Of each turn's pictures, the tokens are kept that the turn kept.
    """
    steps = sorted({layer for _, kept, _, _ in seen for layer in kept})
    pixels = [turn["pixel_values"] for turn in prompts]
    logits = []
    for number, (found, _, _, start) in enumerate(seen):
        for end in range(start, start + found.shape[1]):
            kept = {}
            for layer in steps:
                kept[layer] = mask[:, :end].bool().clone()
                for _, told, past, _ in seen[: number + 1]:
                    entered = [at for at in told if at <= layer]
                    if entered:
                        last = told[max(entered)]
                        kept[layer][:, past : past + last.shape[1]] = last
            given = {
                "input_ids": ids[:, :end],
                "attention_mask": mask[:, :end],
                # Sample by sample.
                "pixel_values": torch.stack(pixels[: number + 1], 1).flatten(0, 1),
            }
            replay = Replay(kept, merged(seen[: number + 1], end))
            with pruned_with(model, replay, ratios), torch.no_grad():
                logits.append(model(**given, use_cache=False).logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_later_turns_equal_the_whole_conversation_without_a_cache(attention, schedule, rows):
    """Three turns with a picture each, padded where there are two samples."""
    model, ratios, prompts = under(attention), SCHEDULES[schedule], turns(rows, 3)
    method = "pdrop" if schedule == "layer 0" else "fastv"
    with pruned_with(model, METHODS.get(method)(), ratios) as handle:
        seen, ids, mask, cache = converse(model, prompts, handle)
    expected = whole(model, prompts, seen, ids, mask, ratios)
    assert error(torch.cat([logits for logits, *_ in seen], 1), expected) <= CLOSE
    # Each layer holds what entered it.
    for layer, keys in enumerate(cache.layers):
        dropped = 3 * (PER_IMAGE - int(PER_IMAGE * ratios[layer]))
        padding = 3 if rows == 2 else 0
        held = ids.shape[1] - 1 - dropped
        assert held - padding <= keys.keys.shape[-2] <= held


@pytest.mark.parametrize("method", vispco.list_methods())
def test_every_method_in_a_later_turn(method):
    first = METHODS.get(method).first_layer
    ratios = [1] * first + [0.5, 0.5, 0.5, 0.25, 0.25, 0.25][first:]
    model, prompts = under("sdpa"), turns(1)
    with pruned_with(model, Witness(METHODS.get(method)()), ratios) as handle:
        seen, ids, mask, _ = converse(model, prompts, handle)
    counts = [int(kept[3].sum()) for _, kept, _, _ in seen]
    sizes = [kept[3].shape[1] for _, kept, _, _ in seen]
    assert counts == [size - 12 for size in sizes]
    expected = whole(model, prompts, seen, ids, mask, ratios)
    assert error(torch.cat([logits for logits, *_ in seen], 1), expected) <= CLOSE


class Rows(vispco.Method):
    """Keeps the first tokens, and writes down what the last prompt token attends to."""

    reads_next = True

    def __init__(self):
        self.rows = []

    def score(self, ctx):
        now, coming = ctx.attention(), ctx.attention(layer=ctx.layer)
        self.rows.append((ctx.layer, [x[:, :, 0][:, :, ctx.visual[1][0]] for x in (now, coming)]))
        return -ctx.slot.float()


def test_rows_of_a_later_turn_are_those_that_the_layer_computes():
    """What earlier turns hold takes its share, after drops in them, too."""
    model, prompts, method = under("eager"), turns(1), Rows()
    with pruned_with(model, method, SCHEDULES["several"]) as handle:
        seen, ids, _, _ = converse(model, prompts, handle, new=2)
    kept = {}
    for layer in (2, 4):
        kept[layer] = torch.ones(1, seen[1][3], dtype=torch.bool)
        for _, told, past, _ in seen:
            kept[layer][:, past : past + told[layer].shape[1]] = told[layer]
    pictures = torch.cat([turn["pixel_values"] for turn in prompts])
    given = {"input_ids": ids[:, : seen[1][3]], "pixel_values": pictures, "use_cache": False}
    for layer, rows in method.rows[2:]:
        # The drop at this layer itself has not happened yet.
        before = {at: mask for at, mask in kept.items() if at < layer}
        ratios = [1.0 if at < 2 else 0.5 if before else 1.0 for at in range(6)]
        with pruned_with(model, Replay(before), ratios), torch.no_grad():
            maps = model(**given, output_attentions=True).attentions
        places = before[2][0].nonzero()[:, 0] if before else torch.arange(seen[1][3])
        visual = (given["input_ids"][0, places] == 5) & (places >= seen[1][2])
        for found, at in zip(rows, (layer - 1, layer), strict=True):
            if at == layer:
                # There, the first turn's tokens were dropped already, and this turn's not.
                continue
            assert error(found, maps[at][:, :, -1][:, :, visual]) <= CLOSE


def test_flash_attention_in_a_later_turn():
    config, prompts, found = PruningConfig("fastv", SCHEDULES["several"]), turns(2), []
    for name in ("sdpa", "flash_attention_2"):
        with installed("flash_attention_2"), vispco.apply(under(name), config) as handle:
            found.append(converse(under(name), prompts, handle))
    assert torch.equal(found[0][1], found[1][1])
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert error(other[0], one[0]) <= CLOSE


def test_a_turn_of_text_and_a_prefix_that_somebody_else_filled():
    """Text in between, and a cache that was filled before the model was pruned."""
    model, prompts, ratios = tiny_llava(), turns(1), SCHEDULES["several"]
    words = torch.tensor([[11, 12, 13, 14]])
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=words, past_key_values=cache)
    with pruned_with(model, METHODS.get("fastv")(), ratios) as handle, torch.no_grad():
        first = model(**{**prompts[0], "attention_mask": None}, past_key_values=cache).logits
        one = handle.kept()
        model(input_ids=words, past_key_values=cache)
        second = model(**{**prompts[1], "attention_mask": None}, past_key_values=cache).logits
        two = handle.kept()
    ids = torch.cat([words, prompts[0]["input_ids"], words, prompts[1]["input_ids"]], 1)
    kept, size = {}, prompts[0]["input_ids"].shape[1]
    for layer in one:
        kept[layer] = torch.ones_like(ids, dtype=torch.bool)
        kept[layer][:, 4 : 4 + size] = one[layer]
        kept[layer][:, 8 + size :] = two[layer]
    pictures = torch.cat([turn["pixel_values"] for turn in prompts])
    with pruned_with(model, Replay(kept), ratios), torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pictures, use_cache=False).logits
    assert error(first[:, -1], expected[:, 3 + size]) <= CLOSE
    assert error(second[:, -1], expected[:, -1]) <= CLOSE


def test_caches_of_other_kinds_are_refused():
    model, prompts = make("gemma3"), turns(1)
    cache = DynamicCache(config=model.config.get_text_config())
    refusal = pytest.raises(ValueError, match="second image.*start again from the whole prompt")
    with torch.no_grad():
        # Not pruned: its layers have windows.
        model(input_ids=torch.tensor([[11, 12]]), past_key_values=cache)
        with vispco.apply(model, PruningConfig("random", [0.5] * 6)), refusal:
            model(**prompts[0], past_key_values=cache)
