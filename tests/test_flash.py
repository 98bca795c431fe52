"""FlashAttention and flex attention under deploy: as sdpa, by transformers' own code."""

import copy
import functools

import pytest
import torch

import vispco
from flash_reference import PACKAGES, installed, switched
from oracles import error
from tiny import FAMILIES, PER_IMAGE, batch, make, without_labels
from tiny_families import processed
from vispco import PruningConfig
from vispco.registry import adapter_for

CLOSE = 1e-4
RATIOS = [1, 1, 0.5, 0.5, 0.25, 0.25]
SHAPES = {
    "one": {"images": (1,), "text": (9,), "before": (2,)},
    "equal": {"images": (1, 1), "text": (9, 9), "before": (2, 5)},
    "padded": {"images": (2, 1, 0, 3), "text": (7, 9, 12, 3), "before": (1, 2, 5, 0)},
}
WINDOWS = {name for name in FAMILIES if adapter_for(make(name))(make(name)).slides}
SUPPORTED = [name for name in FAMILIES if make(name)._supports_flash_attn and name not in WINDOWS]


@functools.cache
def under(family, name):
    """A family's tiny model under an attention implementation."""
    return switched(copy.deepcopy(make(family)), name)


def pruned(model, config, inputs):
    """Logits at real tokens, and the tokens kept."""
    with torch.no_grad(), vispco.apply(model, config) as handle:
        logits = model(**inputs).logits
    return logits[inputs["attention_mask"].bool()], handle.kept()


def equal(found, expected):
    assert error(found[0], expected[0]) <= CLOSE
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(mask, found[1][i]) for i, mask in expected[1].items())


@pytest.mark.parametrize(
    "family, method",
    [(family, "fastv") for family in SUPPORTED]
    + [(family, m) for family in ("llava", "qwen2_5_vl") for m in ("pdrop", "visionzip")],
)
def test_flash_attention_keeps_and_answers_as_sdpa(family, method):
    """Every family that supports it: alone, in a batch, and padded."""
    config = PruningConfig(method, RATIOS)
    with installed("flash_attention_2"):
        for shape in SHAPES.values():
            inputs = without_labels(batch(**shape))
            expected = pruned(under(family, "sdpa"), config, inputs)
            equal(pruned(under(family, "flash_attention_2"), config, inputs), expected)


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_are_asked_for_the_tokens_that_are_left(shape, name):
    """Dense calls where no sample has fillers or padding, else unpadded ones, of just these."""
    inputs = without_labels(batch(**SHAPES[shape]))
    model, config = under("llava", name), PruningConfig("fastv", RATIOS)
    with installed(name) as calls:
        pruned(model, config, inputs)
    text = inputs["attention_mask"].sum(1) - PER_IMAGE * torch.tensor(SHAPES[shape]["images"])
    visual = [config.tokens(PER_IMAGE * n) for n in SHAPES[shape]["images"]]
    lengths = [[int(t) + row[i] for t, row in zip(text, visual, strict=True)] for i in range(6)]
    if shape == "padded":
        expected = [("varlen", row, row) for row in lengths]
    else:
        expected = [("dense", (len(row), row[0]), row[0]) for row in lengths]
    # The tower's two layers come first.
    assert calls[2:] == expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_flash_attention_generates_as_sdpa(family, options, shape):
    inputs = without_labels(batch(**SHAPES[shape]))
    inputs = inputs if family == "llava" else processed(make(family), inputs)
    length = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [2, 3, 4, 5]}
    length |= {"output_logits": True, "return_dict_in_generate": True, **options}
    found = []
    with installed("flash_attention_2"):
        for name in ("sdpa", "flash_attention_2"):
            model = under(family, name)
            with vispco.apply(model, PruningConfig("fastv", RATIOS)):
                found.append(model.generate(**inputs, **length))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert error(torch.stack(found[0].logits), torch.stack(found[1].logits)) <= CLOSE


def test_flash_attention_checks_several_guesses_at_a_step():
    inputs = without_labels(batch(images=(1,), text=(24,), before=(1,)))
    inputs["input_ids"][0, -11:] = inputs["input_ids"][0, -22:-11]
    model = under("llava", "flash_attention_2")
    options = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": [2, 5]}
    with (
        installed("flash_attention_2") as calls,
        vispco.apply(model, PruningConfig("fastv", RATIOS)),
    ):
        greedy = model.generate(**inputs, **options)
        calls.clear()
        found = model.generate(**inputs, **options, prompt_lookup_num_tokens=3)
    assert torch.equal(found, greedy)
    assert any(shape[1] in (2, 3, 4) for kind, shape, _ in calls if kind == "dense")


@pytest.mark.parametrize("name", PACKAGES)
def test_where_nothing_is_dropped_nothing_changes(name):
    inputs = without_labels(batch(**SHAPES["padded"]))
    model = under("llava", name)
    with installed(name), torch.no_grad():
        full = model(**inputs).logits
        with vispco.apply(model, PruningConfig("fastv", [1.0] * 6)):
            assert torch.equal(model(**inputs).logits, full)


def test_a_window_of_tokens_that_are_left_is_refused():
    model = under("gemma3", "flash_attention_2")
    assert "gemma3" in WINDOWS
    refusal = pytest.raises(ValueError, match="counts a sliding window in the tokens that are left")
    with vispco.apply(model, PruningConfig("fastv", RATIOS)), refusal:
        model(**without_labels(batch()))


@pytest.mark.parametrize("name", [*PACKAGES, "flex_attention"])
def test_a_search_needs_a_mask_of_numbers(name):
    model = under("llava", name)
    refusal = pytest.raises(ValueError, match="search with model.set_attn_implementation")
    with vispco.apply(model, PruningConfig("fastv", RATIOS), mode="search"), refusal:
        model(**without_labels(batch()))


# ---- flex attention ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "family, method", [("llava", "fastv"), ("qwen2_5_vl", "pdrop"), ("gemma3", "fastv")]
)
def test_flex_attention_keeps_and_answers_as_sdpa(family, method):
    """Windows and images that see ahead included: the mask is a function of original positions."""
    config = PruningConfig(method, RATIOS)
    for shape in SHAPES.values():
        inputs = without_labels(batch(**shape))
        expected = pruned(under(family, "sdpa"), config, inputs)
        equal(pruned(under(family, "flex_attention"), config, inputs), expected)


@pytest.mark.parametrize("shape", ["one", "padded"])
def test_flex_attention_generates_as_sdpa(shape):
    inputs = without_labels(batch(**SHAPES[shape]))
    length = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [2, 5]}
    length |= {"output_logits": True, "return_dict_in_generate": True}
    found = []
    for name in ("sdpa", "flex_attention"):
        model = under("llava", name)
        with vispco.apply(model, PruningConfig("fastv", RATIOS)):
            found.append(model.generate(**inputs, **length))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert error(torch.stack(found[0].logits), torch.stack(found[1].logits)) <= CLOSE
