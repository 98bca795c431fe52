"""Generation with a pruned KV cache against recomputation of everything without one."""

import copy
import functools

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
)

import vispco
from oracles import Replay, Witness, error, pruned_with
from tiny import BOS, IMAGE, PAD, PER_IMAGE, VOCAB, batch, tiny_llava, without_labels
from vispco import PruningConfig
from vispco.registry import METHODS

# float32, relative to the largest logit; pruning itself moves logits by more than 0.1
CLOSE = 1e-4
SCHEDULES = {
    "layer 0": [0.5] * 6,
    "layer 0 and 3": [0.5] * 3 + [0.2] * 3,
    "layer 1": [1.0] + [0.4] * 5,
    "several": [1.0, 0.8, 0.8, 0.5, 0.3, 0.1],
    "last layer": [1.0] * 5 + [0.25],
    "drop all at 0": [0.0] * 6,
    "drop all at 3": [1.0, 0.5, 0.5, 0.0, 0.0, 0.0],
}
BATCHES = {
    "one": {"images": (1,), "text": (9,), "before": (2,)},
    "equal": {"images": (1, 1, 1), "text": (9, 9, 9), "before": (0, 3, 8)},
    "left": {"images": (2, 1, 0, 3), "text": (7, 9, 12, 3), "before": (1, 2, 5, 0)},
    "right": {
        "images": (2, 1, 0, 3),
        "text": (7, 9, 12, 3),
        "before": (1, 2, 5, 0),
        "padding": "right",
    },
}
IDS = {"suppress_tokens": [IMAGE, 2]}


@functools.cache
def tiny(attention):
    """The tiny LLaVA under one attention implementation."""
    return tiny_llava(attention=attention)


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    """The tiny LLaVA under both attention implementations."""
    return tiny(request.param)


def methods_for(ratios):
    """The registered methods that can prune so early."""
    return [
        m
        for m in vispco.list_methods()
        if min(ratios[: METHODS.get(m).first_layer], default=1) == 1
    ]


def generate(model, inputs, new=6, **options):
    """Greedy generation unless told otherwise.

    Returns the ids of the prompt and the new tokens, the raw logits, and the cache.
    """
    options = {"do_sample": False, "max_new_tokens": new, **IDS, **options}
    out = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits, 1), out.past_key_values


def positions_of(model, run):
    """The result of `run()`, and position ids.

    These are the ids that Hugging Face gave to all the tokens on the way.
    """
    seen = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda m, a, kw: seen.append(kw["position_ids"]), with_kwargs=True
    )
    result = run()
    hook.remove()
    return result, torch.cat(seen, -1)


def recomputed(model, inputs, sequences, kept, ratios, position_ids, merged=None):
    """Logits of each new token, each from one pass over all tokens before it.

    Without a cache; the same tokens are kept and merged.
    """
    start, steps = inputs["input_ids"].shape[1], []
    with pruned_with(model, Replay(kept, merged), ratios), torch.no_grad():
        for end in range(start, sequences.shape[1]):
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, end - start), value=1)
            again = {
                **inputs,
                "input_ids": sequences[:, :end],
                "attention_mask": mask,
                "position_ids": position_ids[:, :end],
            }
            steps.append(model(**again, use_cache=False).logits[:, -1])
    return torch.stack(steps, 1)


#: All methods with these two schedules, a few with all of them.
MOST = "layer 0 and 3", "several"
CASES = [
    (attention, s, m)
    for attention in ("sdpa", "eager")
    for s, ratios in SCHEDULES.items()
    for m in methods_for(ratios)
    if m in ("fastv", "random")
    or (attention == "sdpa" and (s in MOST or m in ("pdrop", "pool", "visionzip")))
]


@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("model, schedule, method", CASES, indirect=["model"])
def test_cached_generation_equals_recomputation(model, schedule, method, shape):
    ratios, shape = SCHEDULES[schedule], BATCHES[shape]
    inputs, config = without_labels(batch(**shape)), PruningConfig(method, ratios)
    witness = Witness(METHODS.get(method)())
    with pruned_with(model, witness, ratios) as handle:
        (sequences, logits, cache), positions = positions_of(
            model, lambda: generate(model, inputs, new=4)
        )
        kept = handle.kept()
    assert (
        error(logits, recomputed(model, inputs, sequences, kept, ratios, positions, witness.merged))
        <= CLOSE
    )
    # Pruning is felt, in the first token already.
    with torch.no_grad():
        full = model(**inputs).logits[:, -1]
    seen = torch.tensor(shape["images"]) > 0
    assert error(logits[seen, 0], full[seen]) > (0.1 if schedule != "last layer" else 1e-3)

    # The cache holds the tokens kept, padded to the longest sample, and the new tokens except the
    # last.
    text = torch.tensor(shape["text"]) + 1
    tail = (inputs["attention_mask"][:, -1] == 0).long()
    for i, layer in enumerate(cache.layers):
        visual = torch.tensor([config.tokens(n * PER_IMAGE)[i] for n in shape["images"]])
        pruned = any(step <= i for step in kept)
        longest = (text + visual + tail).max() if pruned else inputs["input_ids"].shape[1]
        assert layer.keys.shape[-2] == layer.values.shape[-2] == longest + 3


@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("method, ratio", [("random", 0.5), ("pdrop", 0.3), ("strided", 0.0)])
def test_generation_equals_an_unhooked_model_that_may_not_look(model, method, ratio, shape):
    """Tokens dropped at layer 0 are as good as hidden from all.

    One unhooked pass with a mask gives every step.

    Where the prompt is padded on the right, the first new token comes from the last column, even if
    that is padding.
    """
    inputs = without_labels(batch(**BATCHES[shape]))
    with vispco.apply(model, PruningConfig(method, [ratio] * 6)) as handle:
        (sequences, found, _), positions = positions_of(
            model, lambda: generate(model, inputs, new=4)
        )
        kept = handle.kept()[0]
    size = sequences.shape[1] - 1
    visible = torch.nn.functional.pad(kept, (0, 3), value=True)[:, None, None]
    mask = (
        torch.ones(size, size, dtype=torch.bool).tril() & visible
        | torch.eye(size, dtype=torch.bool) & ~visible
    )
    tail = inputs["attention_mask"][:, -1] == 0
    mask[tail, :, inputs["input_ids"].shape[1] - 1, inputs["input_ids"].shape[1] - 1] = False
    if model.config.text_config._attn_implementation == "eager":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    whole = {
        **inputs,
        "input_ids": sequences[:, :size],
        "attention_mask": mask,
        "position_ids": positions[:, :size],
    }
    with torch.no_grad():
        expected = model(**whole, use_cache=False).logits[:, -4:]
    assert error(found, expected) <= CLOSE


STRATEGIES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2, "temperature": 0.7},
    "two of four beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
}


@pytest.mark.parametrize("shape", ["left", "right"])
@pytest.mark.parametrize(
    "schedule, method", [("several", m) for m in methods_for(SCHEDULES["several"])]
)
def test_without_a_cache_the_prompt_ends_where_it_did(llava, schedule, method, shape):
    """Each pass ranks by the prompt, not by what was generated since."""
    inputs, found, kept = without_labels(batch(**BATCHES[shape])), [], []
    with vispco.apply(llava, PruningConfig(method, SCHEDULES[schedule])) as handle:
        for use_cache in (True, False):
            found.append(generate(llava, inputs, new=4, use_cache=use_cache))
            kept.append(handle.kept())
    assert torch.equal(found[0][0], found[1][0]) and error(found[0][1], found[1][1]) <= CLOSE
    assert kept[0] and kept[0].keys() == kept[1].keys()
    assert all(torch.equal(mask, kept[1][i]) for i, mask in kept[0].items())


def test_without_a_cache_a_prompt_may_end_in_an_image(llava):
    """The token that the answer is read off is never dropped, later neither."""
    inputs = without_labels(batch(images=(1,), text=(9,), before=(9,)))
    found = []
    for use_cache in (True, False):
        with vispco.apply(llava, PruningConfig("fastv", SCHEDULES["several"])):
            found.append(generate(llava, inputs, new=4, use_cache=use_cache)[1])
    assert error(*found) <= CLOSE


@pytest.mark.parametrize(
    "method, schedule, shape",
    [
        ("random", "layer 0", "left"),
        ("fastv", "several", "one"),
        ("sparsevlm", "several", "left"),
        ("strided", "layer 0", "equal"),
    ],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_equal_those_without_a_cache(llava, method, schedule, shape, strategy):
    """Also where generation copies its rows."""
    inputs, options = without_labels(batch(**BATCHES[shape])), STRATEGIES[strategy]
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        with vispco.apply(llava, PruningConfig(method, SCHEDULES[schedule])):
            found.append(generate(llava, inputs, new=5, use_cache=use_cache, **options))
    torch.manual_seed(3)
    full = generate(llava, inputs, new=5, **options)
    assert torch.equal(found[0][0], found[1][0])
    assert (
        error(found[0][1], found[1][1]) <= CLOSE and error(found[0][1][:, 0], full[1][:, 0]) > 0.1
    )


@pytest.mark.parametrize("method", vispco.list_methods())
def test_beams_keep_what_greedy_keeps(llava, method):
    """All beams of a sample share its prompt, so they share its tokens.

    Their scores equal recomputation.
    """
    inputs, ratios = without_labels(batch(**BATCHES["left"])), SCHEDULES["several"]
    witness = Witness(METHODS.get(method)())
    with pruned_with(llava, witness, ratios) as handle:
        generate(llava, inputs, new=1)
        greedy = handle.kept()
        out, positions = positions_of(
            llava,
            lambda: llava.generate(
                **inputs,
                num_beams=3,
                num_return_sequences=3,
                max_new_tokens=4,
                do_sample=False,
                **IDS,
                length_penalty=0.0,
                return_dict_in_generate=True,
                output_scores=True,
            ),
        )
        beams = handle.kept()
    assert greedy and all(
        torch.equal(mask.repeat_interleave(3, 0), beams[i]) for i, mask in greedy.items()
    )
    wide = {k: v.repeat_interleave(3, 0) for k, v in inputs.items() if k != "pixel_values"}
    wide["pixel_values"] = torch.cat(
        [i for i in inputs["pixel_values"].split(BATCHES["left"]["images"]) for _ in range(3)]
    )
    logits = recomputed(llava, wide, out.sequences, beams, ratios, positions, witness.merged)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    score = logits.log_softmax(-1).gather(-1, new[..., None]).sum((1, 2))
    assert torch.allclose(score, out.sequences_scores, atol=1e-3)


@pytest.mark.parametrize(
    "method, schedule",
    [
        ("fastv", "layer 1"),
        ("strided", "layer 0"),
        ("sparsevlm", "several"),
        ("pdrop", "several"),
        ("strided", "drop all at 3"),
    ],
)
def test_prompt_lookup_equals_greedy(model, method, schedule):
    """Speculative decoding: several tokens at a step.

    The cache is cropped where the guess was wrong. The first guess is part of the first pass, but
    no part of the prompt: tokens are not ranked by it.
    """
    inputs = without_labels(batch(images=(1,), text=(24,), before=(1,)))
    # Something to look up.
    inputs["input_ids"][0, -11:] = inputs["input_ids"][0, -22:-11]
    widths = []
    with vispco.apply(model, PruningConfig(method, SCHEDULES[schedule])):
        greedy, _, _ = generate(model, inputs, new=20)
        hook = (
            model.get_decoder()
            .layers[0]
            .register_forward_pre_hook(lambda m, args: widths.append(args[0].shape[1]))
        )
        found = model.generate(
            **inputs, prompt_lookup_num_tokens=3, max_new_tokens=20, do_sample=False, **IDS
        )
        hook.remove()
    assert torch.equal(found, greedy)
    # Guessed, and not always right.
    assert max(widths[1:]) > 1 and sum(widths[1:]) > 19


class Lines(LogitsProcessor):
    """An answer of several lines: the word after which, in the prompt, the picture begins."""

    def __init__(self, start, word):
        self.start, self.word = start, word

    def __call__(self, ids, scores):
        step = ids.shape[1] - self.start
        said = self.word if step % 3 == 1 else 20 + step % 7
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([said]), 0)


@pytest.mark.parametrize("guesses", [2, 5])
def test_a_guess_may_be_a_picture(llava, guesses):
    """What follows a word is looked up in the prompt: there, it is the picture's tokens."""
    inputs = without_labels(batch(images=(1,), text=(9,), before=(2,)))
    ids = inputs["input_ids"]
    says = LogitsProcessorList([Lines(ids.shape[1], int(ids[0, 2]))])
    options = {"max_new_tokens": 10, "do_sample": False, "logits_processor": says}
    with vispco.apply(llava, PruningConfig("fastv", SCHEDULES["several"])):
        greedy = llava.generate(**inputs, **options)
        found = llava.generate(**inputs, **options, prompt_lookup_num_tokens=guesses)
    assert torch.equal(found, greedy)


@pytest.mark.parametrize("schedule", ["layer 0", "several"])
def test_assisted_generation_equals_greedy(model, schedule):
    """A text-only draft model; the pruned model verifies."""
    torch.manual_seed(1)
    draft = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=VOCAB,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=2,
            initializer_range=0.3,
        )
    ).eval()
    inputs = without_labels(batch(**BATCHES["one"]))
    with vispco.apply(model, PruningConfig("random", SCHEDULES[schedule])):
        greedy, _, _ = generate(model, inputs, new=10)
        found = model.generate(
            **inputs, assistant_model=draft, max_new_tokens=10, do_sample=False, **IDS
        )
    assert torch.equal(found, greedy)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("padded", [False, True])
def test_manual_decoding_equals_one_pass(model, schedule, padded, chunk):
    """Without position ids, one or more tokens a step.

    `random` sees only places, so one pass is exact.
    """
    shape = BATCHES["left" if padded else "equal"]
    inputs, size = without_labels(batch(**shape)), len(shape["text"])
    new = torch.randint(6, VOCAB, (size, 7), generator=torch.Generator().manual_seed(0))
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    whole = {
        **inputs,
        "input_ids": torch.cat([ids, new], 1),
        "attention_mask": torch.cat([mask, torch.ones_like(new)], 1),
    }
    with vispco.apply(model, PruningConfig("random", SCHEDULES[schedule])), torch.no_grad():
        expected = model(**whole, use_cache=False).logits[:, -7:]
        cache, parts = model(**inputs, use_cache=True).past_key_values, []
        for at in range(0, 7, chunk):
            part = new[:, at : at + chunk]
            seen = whole["attention_mask"][:, : ids.shape[1] + at + part.shape[1]]
            parts.append(model(input_ids=part, attention_mask=seen, past_key_values=cache).logits)
        assert cache.get_seq_length() == whole["input_ids"].shape[1] or schedule != "layer 0"
    with torch.no_grad():
        full = model(**whole, use_cache=False).logits[:, -7:]
    got = torch.cat(parts, 1)
    assert error(got, expected) <= CLOSE and error(full, expected) > (
        0.1 if schedule != "last layer" else 1e-2
    )


def test_decoding_without_an_attention_mask(model):
    """An unpadded prompt needs none."""
    inputs = without_labels(batch(**BATCHES["equal"]))
    bare = {k: v for k, v in inputs.items() if k != "attention_mask"}
    with vispco.apply(model, PruningConfig("fastv", SCHEDULES["several"])), torch.no_grad():
        expected, got = model(**inputs), model(**bare)
        step = torch.full((3, 1), 7)
        longer = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        next_expected = model(
            input_ids=step, attention_mask=longer, past_key_values=expected.past_key_values
        )
        next_got = model(input_ids=step, past_key_values=got.past_key_values)
    assert (
        error(got.logits, expected.logits) <= CLOSE
        and error(next_got.logits, next_expected.logits) <= CLOSE
    )


@pytest.mark.parametrize("method", vispco.list_methods())
def test_several_generations_in_a_row(llava, method):
    """Each is as if it were the first, whatever shape the one before had."""
    config = PruningConfig(method, SCHEDULES["several"])
    prompts = [
        without_labels(batch(**BATCHES[name], seed=3)) for name in ("left", "one", "equal", "one")
    ]
    with vispco.apply(llava, config):
        row = [generate(llava, p)[1] for p in prompts]
    for prompt, logits in zip(prompts, row, strict=True):
        with vispco.apply(llava, config):
            assert torch.equal(generate(llava, prompt)[1], logits)


def test_two_caches_side_by_side(llava):
    """What was dropped belongs to the cache, not to the model.

    Two conversations may be decoded in turns.
    """
    prompts = [without_labels(batch(**BATCHES[name], seed=5)) for name in ("one", "left")]
    steps = [torch.full((len(p["input_ids"]), 1), 9) for p in prompts]
    masks = [torch.nn.functional.pad(p["attention_mask"], (0, 1), value=1) for p in prompts]

    def step(k, cache):
        return llava(input_ids=steps[k], attention_mask=masks[k], past_key_values=cache).logits

    with vispco.apply(llava, PruningConfig("random", SCHEDULES["layer 0 and 3"])), torch.no_grad():
        alone = [step(k, llava(**p).past_key_values) for k, p in enumerate(prompts)]
        caches = [llava(**p).past_key_values for p in prompts]
        turns = [step(k, cache) for k, cache in enumerate(caches)]
    assert all(torch.equal(a, b) for a, b in zip(alone, turns, strict=True))


def test_a_conversation_goes_on_with_text(llava):
    """A second turn on the same cache equals one pass over the whole conversation."""
    inputs = without_labels(batch(**BATCHES["one"]))
    more = torch.tensor([[11, 12, 13]])
    with vispco.apply(llava, PruningConfig("random", SCHEDULES["layer 0 and 3"])):
        sequences, _, cache = generate(llava, inputs, new=4)
        ids = torch.cat([sequences, more], 1)
        second = llava.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            **IDS,
            max_new_tokens=4,
            do_sample=False,
        )
        again = llava.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **IDS,
            max_new_tokens=4,
            pixel_values=inputs["pixel_values"],
            do_sample=False,
        )
    assert torch.equal(second, again)


@pytest.mark.parametrize("method", vispco.list_methods())
@pytest.mark.parametrize("padding", ["left", "right"])
def test_text_only_prompts_generate_as_unhooked(model, method, padding):
    inputs = without_labels(batch(images=(0, 0), text=(9, 5), padding=padding))
    plain, logits, _ = generate(model, inputs)
    with vispco.apply(model, PruningConfig(method, SCHEDULES["several"])):
        pruned, pruned_logits, _ = generate(model, inputs)
    assert torch.equal(plain, pruned) and torch.equal(logits, pruned_logits)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_prompt_that_ends_in_an_image(model, padding):
    """The next token is read off the last column.

    It must be there, and be what masking the others gives.
    """
    inputs = without_labels(batch(images=(1, 1), text=(9, 5), before=(9, 2), padding=padding))
    # The last token is not among those it keeps.
    config = PruningConfig("strided", SCHEDULES["several"])
    last = []
    for mode in ("deploy", "search"):
        with vispco.apply(model, config, mode=mode) as handle, torch.no_grad():
            last.append(model(**inputs).logits[inputs["attention_mask"][:, -1].bool(), -1])
            texts = [
                int((mask & inputs["input_ids"].ne(IMAGE)).sum()) for mask in handle.kept().values()
            ]
            # Whatever happens to the image, no text is lost.
            assert set(texts) == {16}
    assert error(*last) <= CLOSE


@pytest.mark.parametrize("method", ["random", "fastv"])
def test_search_mode_generates_as_deploy_or_refuses(llava, method):
    """Masked tokens are in the cache; decoding must not see them."""
    inputs, config = (
        without_labels(batch(**BATCHES["left"])),
        PruningConfig(method, SCHEDULES["several"]),
    )
    with vispco.apply(llava, config):
        expected = generate(llava, inputs)[1]
    with vispco.apply(llava, config, mode="search"):
        try:
            got = generate(llava, inputs)[1]
        except ValueError as refused:
            assert "deploy" in str(refused)
        else:
            assert error(got, expected) <= CLOSE


# ---- caches --------------------------------------------------------------------------------------
def test_a_cache_of_ones_own_is_used(llava):
    """An empty DynamicCache passed in gives the same as none."""
    inputs = without_labels(batch(**BATCHES["left"]))
    with vispco.apply(llava, PruningConfig("random", SCHEDULES["layer 0"])):
        expected = generate(llava, inputs)[0]
        cache = DynamicCache(config=copy.deepcopy(llava.config.text_config))
        assert torch.equal(generate(llava, inputs, past_key_values=cache)[0], expected)
