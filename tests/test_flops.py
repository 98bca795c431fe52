"""FLOPs: PyTorch's own counter, closed forms, and the figures that were published."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

import vispco
from tiny import make
from vispco import PruningConfig, count_flops
from vispco.flops import CONVENTIONS, CostModel, Dimensions
from vispco.registry import METHODS

VISUAL, TEXT = 576, 64


def llava_7b():
    """LLaVA-1.5-7B's true sizes."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(vocab_size=32064),
        vision_feature_layer=-2,
    )


BIG = llava_7b()
SEVEN = Dimensions(
    layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, ffn=11008, vocab=32064
)
GQA = Dimensions(layers=4, hidden=96, heads=8, kv_heads=2, head_dim=16, ffn=200, vocab=500)


def measured_prefill(model, tokens, logits=1):
    """What the counter sees of a language model's prefill, on the meta device."""
    embeds = torch.empty(1, tokens, model.config.hidden_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(
            inputs_embeds=embeds,
            past_key_values=DynamicCache(config=model.config),
            logits_to_keep=logits,
        )
    return counter.get_total_flops()


# ---- against PyTorch's counter -------------------------------------------------------------------
def test_llava_7b_at_true_size():
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava_7b()).eval()
    report = count_flops(model, n_visual=VISUAL, n_text=TEXT)
    assert report.total == 8_504_297_914_368
    embeds = torch.empty(1, VISUAL + TEXT, 4096, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cache = DynamicCache(config=model.config.text_config)
        states = model.model.language_model(
            inputs_embeds=embeds, past_key_values=cache
        ).last_hidden_state
        model.lm_head(states[:, -1:])
    assert counter.get_total_flops() == report.total

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.get_image_features(torch.empty(1, 3, 336, 336, device="meta"))
    assert counter.get_total_flops() == report.vision + report.projector == 406_077_407_232
    assert report.total_with_vision == 8_504_297_914_368 + 406_077_407_232


def test_all_logits():
    assert count_flops(BIG, n_logits=VISUAL + TEXT).total == 8_672_142_950_400


@settings(max_examples=6)
@given(
    layers=st.integers(1, 2),
    heads=st.integers(1, 4),
    groups=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    hidden=st.integers(1, 5),
    ffn=st.integers(1, 50),
    vocab=st.integers(8, 40),
    tokens=st.integers(1, 30),
    tied=st.booleans(),
)
def test_any_llama(layers, heads, groups, head_dim, hidden, ffn, vocab, tokens, tied):
    """Grouped-query attention, a head size of its own, an FFN of any width."""
    config = LlamaConfig(
        hidden_size=hidden * heads * groups,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads * groups,
        num_key_value_heads=heads,
        head_dim=2 * head_dim,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    report = count_flops(
        LlavaConfig(vision_config=CLIPVisionConfig(), text_config=config), n_visual=0, n_text=tokens
    )
    assert report.total == measured_prefill(model, tokens)


@pytest.mark.parametrize(
    "strategy, layers, images", [("default", -2, 1), ("full", -1, 2), ("default", [-2, -1], 3)]
)
def test_vision_tower_and_projector(strategy, layers, images):
    """With and without the CLS token, one or several feature layers, several images."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=20,
            patch_size=4,
        ),
        text_config=LlamaConfig(
            hidden_size=32,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=20,
        ),
        vision_feature_layer=layers,
        vision_feature_select_strategy=strategy,
        image_token_id=5,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.get_image_features(torch.empty(images, 3, 20, 20, device="meta"))
    per_image = 25 + (strategy == "full")
    report = count_flops(config, n_visual=images * per_image)
    assert report.vision + report.projector == counter.get_total_flops()


def test_a_pruned_layer_costs_what_fewer_tokens_cost():
    """Each layer of a pruned model equals, to the FLOP, a full model fed with that many tokens."""
    pruned = count_flops(BIG, PruningConfig.from_pdrop(num_layers=32), VISUAL, TEXT)
    for layer, visual in ((0, 576), (8, 288), (16, 144), (31, 72)):
        full = count_flops(BIG, n_visual=visual, n_text=TEXT)
        assert pruned.tokens[layer] == visual and pruned.per_layer[layer] == full.per_layer[layer]
    assert (
        pruned.total == sum(pruned.per_layer) + pruned.scoring + pruned.lm_head
        and pruned.scoring > 0
    )


# ---- one formula for integers and tensors --------------------------------------------------------
counts = st.lists(st.integers(0, 700), min_size=4, max_size=4)
names = st.sampled_from(sorted(CONVENTIONS))


@given(counts=counts, text=st.integers(0, 200))
def test_the_exact_formula_in_integers(counts, text):
    """2 n (2 d h e + 2 d g e + 3 d m) + 4 n^2 h e a layer, and the logits: no rounding."""
    total = 2 * 3 * 96 * 500
    for n in counts:
        n += text
        total += 2 * n * (2 * 96 * 128 + 2 * 96 * 32 + 3 * 96 * 200) + 4 * n * n * 128
    assert CostModel(GQA, n_logits=3)(torch.tensor(counts), 700, text).item() == total


@given(counts=counts, text=st.integers(0, 200), name=names)
def test_fractions_count_as_integers(counts, text, name):
    cost, whole = CostModel(GQA, convention=name), torch.tensor(counts)
    assert cost(whole.double(), 700, text).item() == cost(whole, 700, text).item()


@given(counts=counts, text=st.integers(0, 200), name=names)
def test_gradient_is_the_derivative(counts, text, name):
    """A quadratic's central difference is exact, whatever the step."""
    cost, x = (
        CostModel(GQA, convention=name),
        torch.tensor(counts, dtype=torch.float64, requires_grad=True),
    )
    cost(x, 700, text).backward()
    for i in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[i] = 8.0
        slope = (cost(x.detach() + step, 700, text) - cost(x.detach() - step, 700, text)) / 16
        assert math.isclose(x.grad[i], slope, rel_tol=1e-9)
    n = torch.tensor(counts, dtype=torch.float64) + text
    if name == "exact":
        assert torch.allclose(
            x.grad, 2 * (2 * 96 * 128 + 2 * 96 * 32 + 3 * 96 * 200) + 8 * n * 128, rtol=1e-12
        )


@pytest.mark.parametrize("method", vispco.list_methods())
def test_batches_of_counts(method):
    """A leading dimension of counts, visual and text tokens gives one total each.

    Scoring is included.
    """
    cost = CostModel(GQA, METHODS.get(method)())
    many, visual, text = (
        torch.tensor([[9, 5, 2, 0], [9, 9, 9, 9], [7, 7, 1, 1]]),
        torch.tensor([9, 9, 8]),
        [3, 4, 0],
    )
    totals = cost(many, visual, torch.tensor(text))
    assert totals.tolist() == [
        cost(c, int(v), t).item() for c, v, t in zip(many, visual, text, strict=True)
    ]
    assert cost.full(visual, torch.tensor(text)).tolist() == [
        cost(torch.full((4,), v), v, t).item() for v, t in zip(visual.tolist(), text, strict=True)
    ]
    assert cost.text_only(torch.tensor(text)).tolist() == [
        cost(torch.zeros(4, dtype=torch.long), 0, t).item() for t in text
    ]


# ---- conventions in the literature ---------------------------------------------------------------
def test_pyramiddrop_published():
    """3.82 T in full, 1.78 T at layers 8, 16, 24 with lambda 1/2, over the visual tokens alone."""
    report = count_flops(
        BIG, PruningConfig.from_pdrop(num_layers=32), VISUAL, 0, convention="pdrop"
    )
    assert f"{report.full / 1e12:.2f}" == "3.82" and f"{report.total / 1e12:.2f}" == "1.78"
    with_text = count_flops(
        BIG, PruningConfig.from_pdrop(num_layers=32), VISUAL, 64, convention="pdrop"
    )
    assert with_text.total == report.total


def test_fastv_published():
    """K = 2, 50 % dropped, 64 text tokens: 57 %."""
    report = count_flops(
        BIG, PruningConfig.from_fastv(2, 0.5, num_layers=32), VISUAL, TEXT, convention="fastv"
    )
    assert f"{report.share:.0%}" == "57%"


# Of one layer with n tokens, by the formula as printed; d = 4096, m = 11008.
BY_HAND = {
    "fastv": lambda n, d=4096, m=11008: 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m,
    "sparsevlm": lambda n, d=4096, m=11008: 4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m,
    "vispco": lambda n, d=4096: 24 * n * d**2 + 4 * n**2 * d,
    "exact": lambda n, d=4096, m=11008: 2 * (4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m),
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize(
    "config",
    [
        PruningConfig.from_fastv(2, 0.5, num_layers=32),
        PruningConfig.from_fastv(3, 0.75, num_layers=32),
        PruningConfig.from_sparsevlm(num_layers=32),
    ],
)
def test_formulas_as_printed(name, config):
    report = count_flops(BIG, config, VISUAL, TEXT, convention=name)
    assert report.per_layer == [
        BY_HAND[name](int(VISUAL * r + 0.5) + TEXT) for r in config.keep_ratios
    ]
    if name != "exact":
        assert report.scoring == report.lm_head == report.vision == report.projector == 0


def test_every_convention_is_covered_here():
    assert set(CONVENTIONS) == {*BY_HAND, "pdrop"}


def test_pdrop_counts_no_text():
    config = PruningConfig.from_pdrop(num_layers=32)
    report = count_flops(BIG, config, VISUAL, TEXT, convention="pdrop")
    assert report.per_layer == [BY_HAND["sparsevlm"](n) for n in config.tokens(VISUAL)]
    assert count_flops(BIG, n_visual=0, n_text=TEXT, convention="pdrop").total == 0


def test_the_papers_formula_ignores_grouped_queries():
    """24nd^2 is no function of the FFN or of the key-value heads.

    That is why `exact` is the default.
    """
    other = dataclasses.replace(SEVEN, kv_heads=4, ffn=99)
    assert CostModel(SEVEN, convention="vispco").full(5, 5) == CostModel(
        other, convention="vispco"
    ).full(5, 5)
    assert CostModel(SEVEN).full(5, 5) > CostModel(other).full(5, 5)


# ---- the report ----------------------------------------------------------------------------------
SMALL = LlavaConfig(
    vision_config=CLIPVisionConfig(),
    text_config=LlamaConfig(
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
)
ratios = st.lists(st.floats(0, 1), min_size=5, max_size=5).map(lambda r: sorted(r, reverse=True))


@given(low=ratios, high=ratios, n=st.integers(1, 600), text=st.integers(0, 100), name=names)
def test_more_tokens_never_cost_less(low, high, n, text, name):
    high = [max(pair) for pair in zip(low, high, strict=True)]
    a, b = (
        count_flops(SMALL, PruningConfig("random", r), n, text, convention=name)
        for r in (low, high)
    )
    assert a.total <= b.total <= b.full == a.full and 0 <= a.prunable_share <= b.prunable_share <= 1
    assert 0 <= a.share <= b.share <= 1
    assert (a.total < b.total) == (a.tokens != b.tokens)


@pytest.mark.parametrize("name", sorted(CONVENTIONS))
@pytest.mark.parametrize("text", [0, 5])
def test_a_sample_without_images_costs_what_it_costs(name, text):
    """Also where a convention counts nothing at all."""
    report = count_flops(SMALL, PruningConfig("random", [0.5] * 5), 0, text, convention=name)
    assert (
        report.share == report.prunable_share == 1
        and report.total == report.full == report.text_only
    )
    assert "100.0% of the full model" in report.table()


def test_shares_at_the_ends():
    nothing = count_flops(BIG, PruningConfig("random", [0.0] * 32))
    everything = count_flops(BIG, PruningConfig("fastv", [1.0] * 32))
    assert nothing.prunable_share == 0 and nothing.total == count_flops(BIG, n_visual=0).total
    assert everything.prunable_share == everything.share == 1 and everything.scoring == 0
    assert everything.total == everything.full == count_flops(BIG).total


def test_prunable_share_is_linear_in_the_prunable_cost():
    """Half the layers without any visual token: half of what could be saved."""
    report = count_flops(BIG, PruningConfig("random", [1.0] * 16 + [0.0] * 16))
    assert report.prunable_share == pytest.approx(0.5, abs=1e-12) and report.share > 0.5


@pytest.mark.parametrize(
    "method, per_step",
    [
        ("fastv", lambda n, t: 2 * 4096 * (n + t)),
        ("pdrop", lambda n, t: 3 * 2 * (n + t) * 4096 * 4096 + 2 * (n + t) * 4096),
        ("sparsevlm", lambda n, t: 2 * t * 4096 * (n + t) + 2 * n * t * 4096),
        ("random", lambda n, t: 0),
        ("strided", lambda n, t: 0),
    ],
)
def test_scoring_is_paid_for_what_is_ranked(method, per_step):
    """At each step, over the tokens present BEFORE it."""
    config = PruningConfig(method, [1.0] * 2 + [0.5] * 10 + [0.25] * 20)
    assert count_flops(BIG, config).scoring == per_step(576, 64) + per_step(288, 64)


def test_whole_counts_include_the_scoring_and_fractional_ones_do_not():
    config = PruningConfig.from_fastv(2, 0.5, num_layers=32)
    report, counts = count_flops(BIG, config), torch.tensor(config.tokens(VISUAL))
    cost = CostModel(SEVEN, METHODS.get("fastv")())
    assert cost(counts, VISUAL, TEXT) == report.total and report.scoring > 0
    assert cost(counts.double(), VISUAL, TEXT) == report.total - report.scoring
    # Of one position.
    assert cost.lm_head == 2 * 4096 * 32064


def test_a_methods_options_are_paid_for():
    """Recycling ranks a second time."""
    once, twice = (
        count_flops(BIG, PruningConfig("sparsevlm", [1.0] * 16 + [0.5] * 16, options)).scoring
        for options in ({}, {"recycle": 0.1})
    )
    assert twice == 2 * once > 0


def test_reading_a_tower_without_class_token_is_paid_for_where_something_is_dropped():
    """VisionZip needs q k^T of one layer: 2 * 25^2 patches * 24, for each of two images."""
    tower = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=20,
        patch_size=4,
    )
    model = LlavaConfig(
        vision_config=tower, text_config=SMALL.text_config, vision_feature_select_strategy="full"
    )

    def vision(method, ratios, **options):
        return count_flops(model, PruningConfig(method, ratios), n_visual=50, **options).vision

    full = count_flops(model, n_visual=50).vision
    assert vision("visionzip", [1, 1, 1, 0.5, 0.5]) == full + 2 * (2 * 25**2 * 24)
    assert vision("visionzip", [1] * 5) == vision("fastv", [1, 1, 1, 0.5, 0.5]) == full
    assert vision("visionzip", [1, 1, 1, 0.5, 0.5], convention="vispco") == 0


def test_images_of_another_shape_cost_the_tower_something_else():
    """Qwen2-VL attends within a frame: 4 frames of 16 patches against one of 64."""
    model = make("qwen2_vl")
    v, layers = model.config.vision_config, model.config.text_config.num_hidden_layers

    def vision(grid, config=None):
        return count_flops(model, config, n_visual=16, images=[grid]).vision

    squares = 64**2 - 4 * 16**2
    assert vision((1, 8, 8)) - vision((4, 4, 4)) == v.depth * 4 * squares * v.embed_dim
    config = PruningConfig("visionzip", [1.0] + [0.5] * (layers - 1))
    read = {grid: vision(grid, config) - vision(grid) for grid in ((1, 8, 8), (4, 4, 4))}
    assert read == {(1, 8, 8): 2 * 64**2 * v.embed_dim, (4, 4, 4): 2 * 4 * 16**2 * v.embed_dim}


def test_table_shows_every_layer_and_the_totals():
    config = PruningConfig.from_fastv(2, 0.5, num_layers=32)
    report = count_flops(BIG, config)
    lines = report.table().splitlines()
    assert [line.split() for line in lines[1:33]] == [
        [str(i), str(n), "64", f"{f / 1e9:.4f}"]
        for i, (n, f) in enumerate(zip(report.tokens, report.per_layer, strict=True))
    ]
    assert lines[0].split() == ["layer", "visual", "text", "GFLOPs"]
    parts = {
        "scoring": report.scoring,
        "lm_head": report.lm_head,
        "total": report.total,
        "vision tower": report.vision,
        "projector": report.projector,
        "with vision": report.total_with_vision,
    }
    assert [line.split() for line in lines[33:-1]] == [
        [*k.split(), f"{f / 1e9:.4f}"] for k, f in parts.items()
    ]
    assert (
        "% of the full model" in lines[-1]
        and "'exact'" in lines[-1]
        and len({len(x) for x in lines[:-1]}) == 1
    )


# ---- errors --------------------------------------------------------------------------------------
def test_unknown_convention_lists_those_there_are():
    with pytest.raises(
        ValueError, match="unknown FLOPs convention 'macs'.*exact, fastv, sparsevlm, pdrop, vispco"
    ):
        count_flops(BIG, convention="macs")


@pytest.mark.parametrize("name", ["n_visual", "n_text", "n_logits"])
@pytest.mark.parametrize("value", [-1, 1.5, "4"])
def test_tokens_are_whole_numbers(name, value):
    with pytest.raises(
        ValueError, match=f"^{name} must be a whole number of tokens, got {value!r}$"
    ):
        count_flops(BIG, **{name: value})


def test_wrong_number_of_layers():
    with pytest.raises(ValueError, match="has 4 keep_ratios, but the model has 32 decoder layers"):
        count_flops(BIG, PruningConfig("random", [1, 1, 1, 1]))


def test_unknown_model():
    with pytest.raises(
        ValueError, match="cannot prune 'llama' models: a language model without a vision part"
    ):
        count_flops(LlamaConfig())


def test_a_model_and_its_configuration_count_alike(llava):
    config = PruningConfig.from_fastv(2, 0.5, num_layers=6)
    assert count_flops(llava, config, 16, 9) == count_flops(llava.config, config, 16, 9)


def test_every_method_has_a_cost():
    for name in vispco.list_methods():
        flops = METHODS.get(name)().flops(SEVEN, VISUAL, TEXT)
        assert isinstance(flops, int) and 0 <= flops < count_flops(BIG).per_layer[0]
