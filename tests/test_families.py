"""What the contract suite does not ask of a family.

Its own inputs, generation, eager scores, tower costs.

The contract runs every family on plain batches. Here prompts are those of the family's processor:
images of several sizes, several in a prompt, video, text-only samples between them.
"""

import copy
import functools

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vispco
from oracles import error, pruned_with
from tiny_families import BUILDERS, EOS, GRIDS, IMAGE, SIZES, VIDEO, VIDEOS, prompts, tile_count
from vispco import PruningConfig
from vispco.methods.fastv import FastV
from vispco.models.llava_next import LlavaNext
from vispco.registry import adapter_for

IMAGES = [[2, ("image", 0), 5], [1, ("image", 1), 2, ("image", 2), 4], [7], [("image", 2), 12]]
VIDEO_SAMPLES = [
    [2, ("video", 0), 5],
    [1, ("image", 1), 2, ("video", 1), 4],
    [6],
    [("image", 0), 3],
]
SCHEDULES = {
    "layer 0": [0.5] * 6,
    "layer 1": [1, 0.4] + [0.4] * 4,
    "middle": [1, 1, 1, 0.3, 0.3, 0.3],
    "several": [0.9, 0.7, 0.5, 0.5, 0.2, 0.0],
}
# float32, relative to the largest logit; pruning itself moves logits by more than 0.05
CLOSE = 5e-5


@functools.cache
def build(name, attention="sdpa"):
    """A family's tiny model."""
    return BUILDERS[name](attention=attention)


@functools.cache
def mixed(name, samples="images", padding="left"):
    """Inputs and numbers of visual tokens."""
    return prompts(build(name), {"images": IMAGES, "video": VIDEO_SAMPLES}[samples], padding)


def run(model, inputs, config=None, mode="deploy"):
    """Logits, and the kept sets under a configuration."""
    with torch.no_grad():
        if config is None:
            return model(**inputs).logits
        with vispco.apply(model, config, mode=mode) as handle:
            return model(**inputs).logits, handle.kept()


def there(inputs, kept):
    """(B, S) bool: the tokens that are there at the end."""
    alive = inputs["attention_mask"].bool()
    for mask in kept.values():
        alive = alive & mask
    return alive


families = pytest.mark.parametrize("name", BUILDERS)
everything = pytest.mark.parametrize(
    "name, samples", [(n, "images") for n in BUILDERS] + [(n, "video") for n in sorted(VIDEOS)]
)


@families
def test_the_adapter_is_found_by_class_and_by_configuration(name):
    model = build(name)
    assert adapter_for(model) is adapter_for(model.config) is not vispco.Adapter
    assert vispco.count_flops(model.config, n_visual=16).total_with_vision > 0


@everything
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    "schedule, method",
    [("layer 0", "pdrop"), ("layer 1", "fastv"), ("middle", "sparsevlm"), ("several", "pdrop")],
)
def test_search_equals_deploy_and_counts_are_exact(name, samples, padding, schedule, method):
    model, (inputs, n_visual) = build(name), mixed(name, samples, padding)
    config = PruningConfig(method, SCHEDULES[schedule])
    before = run(model, inputs)
    (hard, kept), (soft, _) = (run(model, inputs, config, mode) for mode in ("deploy", "search"))
    alive = there(inputs, kept)
    assert error(hard[alive], soft[alive]) <= CLOSE < 0.05 < error(hard[alive], before[alive])
    assert torch.equal(run(model, inputs), before)

    visual = torch.isin(inputs["input_ids"], torch.tensor([IMAGE, VIDEO]))
    for layer, mask in kept.items():
        assert (mask & visual).sum(1).tolist() == [config.tokens(n)[layer] for n in n_visual]
        assert torch.equal(mask & ~visual, inputs["attention_mask"].bool() & ~visual)
    both = [token for token in (IMAGE, VIDEO) if (inputs["input_ids"] == token).any()]
    last = list(kept.values())[-1]
    assert all((~last[inputs["input_ids"] == token]).any() for token in both)


@everything
def test_keep_all_is_bit_identical(name, samples):
    model, (inputs, _) = build(name), mixed(name, samples)
    for mode in ("deploy", "search"):
        got, kept = run(model, inputs, PruningConfig("fastv", [1.0] * 6), mode)
        assert torch.equal(got, run(model, inputs)) and kept == {}


@everything
def test_search_equals_deploy_in_float64(name, samples):
    model, (inputs, _) = copy.deepcopy(build(name)).double(), mixed(name, samples)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    (hard, kept), (soft, _) = (
        run(model, inputs, PruningConfig("pdrop", SCHEDULES["several"]), mode)
        for mode in ("deploy", "search")
    )
    assert error(hard[there(inputs, kept)], soft[there(inputs, kept)]) <= 1e-10


@functools.cache
def recomputes(name, samples):
    """Whether transformers itself, unhooked, generates alike with a cache and without.

    Without a cache, older releases forget the image in PaliGemma (up to 5.16), Idefics3 and SmolVLM
    (5.0).
    """
    model, (inputs, _) = build(name), mixed(name, samples)
    (ids, logits), (again, recomputed) = (
        generate(model, inputs, use_cache=c) for c in (True, False)
    )
    return torch.equal(ids, again) and error(logits, recomputed) <= CLOSE


def generate(model, inputs, **options):
    """Greedy ids and raw logits.

    Ids that would end the text, or begin or stand for images, are not chosen.
    """
    out = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=4,
        suppress_tokens=[EOS, 3, IMAGE, VIDEO],
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences, torch.stack(out.logits, 1)


@everything
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("schedule, method", [("layer 0", "strided"), ("several", "random")])
def test_generation_with_cache_equals_recomputation(name, samples, padding, schedule, method):
    if not recomputes(name, samples):
        version = transformers.__version__
        pytest.skip(f"transformers {version} does not recompute {name} without hooks either")
    model, (inputs, _) = build(name), mixed(name, samples, padding)
    with vispco.apply(model, PruningConfig(method, SCHEDULES[schedule])):
        (cached, logits), (again, recomputed) = (
            generate(model, inputs, use_cache=c) for c in (True, False)
        )
    assert torch.equal(cached, again) and error(logits, recomputed) <= CLOSE
    assert error(logits[:, 0], run(model, inputs)[:, -1]) > 0.05


@families
@pytest.mark.parametrize("samples", [IMAGES, IMAGES[1:2]], ids=["padded", "one"])
def test_eager_equals_sdpa(name, samples):
    """To sdpa no mask means causal, to eager it means none: one sample without padding tells."""
    inputs, _ = prompts(build(name), samples)
    config = PruningConfig("fastv", SCHEDULES["layer 1"])
    (eager, kept), (sdpa, _) = (run(build(name, a), inputs, config) for a in ("eager", "sdpa"))
    (soft, _) = run(build(name, "eager"), inputs, config, "search")
    alive = there(inputs, kept)
    assert error(eager[alive], sdpa[alive]) <= CLOSE and error(eager[alive], soft[alive]) <= CLOSE


@pytest.mark.parametrize(
    "name, text",
    [(n, {}) for n in BUILDERS]
    + [("paligemma", {"text": "gemma2", "sliding_window": 9, "attn_logit_softcapping": 2.0})],
)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("layer", [1, 3])
def test_fastv_scores_are_the_eager_attention(name, text, padding, layer):
    """With windows, norms, and capped logits; of the last token that is not padding."""
    model = BUILDERS[name](attention="eager", **text) if text else build(name, "eager")
    (inputs, _), seen = mixed(name, "images", padding), []

    class Probe(FastV):
        def score(self, ctx):
            seen.append((ctx, super().score(ctx)))
            return seen[-1][1]

    with torch.no_grad():
        attention = (
            model(**inputs, output_attentions=True).attentions[layer - 1].mean(1)
        )  # (B, S, S)
        with pruned_with(model, Probe(), [1.0] * layer + [0.5] * (6 - layer)):
            model(**inputs)
    ((ctx, scores),) = seen
    places = torch.arange(inputs["input_ids"].shape[1])
    last = (inputs["attention_mask"] * places).argmax(1)
    expected = attention[torch.arange(len(last)), last][ctx.visual]
    assert ctx.valid.any() and torch.allclose(scores[ctx.valid], expected[ctx.valid], atol=2e-6)


@everything
def test_bfloat16_is_finite(name, samples):
    model, (inputs, _) = copy.deepcopy(build(name)).bfloat16(), mixed(name, samples)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    config = PruningConfig("pdrop", SCHEDULES["several"])
    for mode in ("deploy", "search"):
        logits, kept = run(model, inputs, config, mode)
        assert logits[there(inputs, kept)].isfinite().all()


# ---- costs ---------------------------------------------------------------------------------------
def image_sizes(name, samples):
    """What to tell `count_flops` about the images of a sample."""
    media = [p for p in samples if isinstance(p, tuple)]
    if name.startswith("qwen"):
        return [GRIDS[kind][shape] for kind, shape in media]
    # A video has 4 frames.
    if name == "llava_onevision" and any(kind == "video" for kind, _ in media):
        return sum(4 if kind == "video" else tile_count(SIZES[shape]) for kind, shape in media)
    if name == "llava_onevision" and len(media) > 1:
        return len(media)
    return [SIZES[shape] for _, shape in media] if name.startswith("llava") else None


@everything
def test_flops_equal_what_ran(name, samples):
    """Tower, projector and decoder, to the FLOP, for images of every shape."""
    model, config = build(name), PruningConfig("pdrop", SCHEDULES["several"])
    for sample in [s for s in (IMAGES if samples == "images" else VIDEO_SAMPLES[:2]) if len(s) > 1]:
        inputs, (n_visual,) = prompts(model, [sample])
        counter = FlopCounterMode(display=False)
        with vispco.apply(model, config), sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
            model(**inputs, logits_to_keep=1)
        report = vispco.count_flops(
            model,
            config,
            n_visual=n_visual,
            images=image_sizes(name, sample),
            n_text=inputs["input_ids"].shape[1] - n_visual,
        )
        assert counter.get_total_flops() == report.total_with_vision


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_grids_that_give_other_numbers_of_tokens_are_refused(name):
    with pytest.raises(ValueError, match="give 24 visual tokens, not n_visual=16"):
        vispco.count_flops(build(name), n_visual=16, images=[(1, 8, 12)])


def test_tiles_of_an_image_are_those_of_transformers():
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = build("llava_next").config
    for size in [(3, 50), (50, 3), (8, 8), (16, 15), (9, 40), (100, 101), (7, 9), *SIZES]:
        expected = image_size_to_num_patches(size, config.image_grid_pinpoints, 8)
        assert LlavaNext.tiles(config, size) == expected
    assert [LlavaNext.tiles(config, size) for size in SIZES] == [tile_count(size) for size in SIZES]


# ---- one family's own ----------------------------------------------------------------------------
def test_late_features_are_added_where_their_tokens_went():
    """Pruning inside the layers that deep-stack features enter.

    Without the features, the logits are others.
    """
    model, (inputs, _) = build("qwen3_vl"), mixed("qwen3_vl")
    config = PruningConfig("strided", [0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    (hard, kept), (soft, _) = (run(model, inputs, config, mode) for mode in ("deploy", "search"))
    alive = there(inputs, kept)
    strip = model.model.language_model.register_forward_pre_hook(
        lambda m, a, kw: (a, {**kw, "deepstack_visual_embeds": None}), with_kwargs=True
    )
    without, _ = run(model, inputs, config)
    strip.remove()
    assert error(hard[alive], soft[alive]) <= CLOSE < 0.05 < error(without[alive], hard[alive])


def test_late_features_may_be_added_after_the_last_layer_too():
    """Three features in a decoder of three layers; dropped tokens stay zero."""
    model = BUILDERS["qwen3_vl"](layers=3)
    inputs, _ = prompts(model, IMAGES)
    (hard, kept), (soft, _) = (
        run(model, inputs, PruningConfig("strided", [1, 1, 0.5]), mode)
        for mode in ("deploy", "search")
    )
    alive = there(inputs, kept)
    assert error(hard[alive], soft[alive]) <= CLOSE and not hard[~alive].any()


@pytest.mark.parametrize(
    "name, text, felt",
    [
        ("gemma3", {"window": 20}, True),
        ("gemma3", {"window": 100}, False),
        ("llava_next", {"text": "mistral", "sliding_window": 9}, True),
        # Only new tokens feel it.
        ("paligemma", {"text": "gemma2", "sliding_window": 9, "attention": "eager"}, False),
    ],
)
def test_sliding_windows_count_original_positions(name, text, felt):
    """Windows shorter and longer than the prompt.

    In the default cache, which would count kept tokens.
    """
    model = BUILDERS[name](**text)
    inputs, _ = prompts(model, IMAGES)
    config = PruningConfig("strided", SCHEDULES["middle"])
    if recomputes(name, "images"):
        with vispco.apply(model, config):
            (cached, logits), (again, recomputed) = (
                generate(model, inputs, use_cache=c) for c in (True, False)
            )
        assert torch.equal(cached, again) and error(logits, recomputed) <= CLOSE
    # The second needs no padding, so that the mask could be forgotten.
    for samples in (IMAGES, IMAGES[1:2]):
        inputs, _ = prompts(model, samples)
        (hard, kept), (soft, _) = (
            run(model, inputs, config, mode) for mode in ("deploy", "search")
        )
        assert error(hard[there(inputs, kept)], soft[there(inputs, kept)]) <= CLOSE
    full = run(
        BUILDERS[name](**{**text, "window" if "window" in text else "sliding_window": 999}), inputs
    )
    assert (error(full, run(model, inputs)) > 0.01) == felt


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_masks_that_see_ahead_are_gathered(name):
    """Without token types these models are causal.

    Pruned, types still matter. One sample: no padding.
    """
    model, config = build(name), PruningConfig("strided", SCHEDULES["layer 0"])
    inputs, _ = prompts(model, IMAGES[1:2])
    (hard, kept), (soft, _) = (run(model, inputs, config, mode) for mode in ("deploy", "search"))
    assert error(hard[there(inputs, kept)], soft[there(inputs, kept)]) <= CLOSE
    (typed, kept), (causal, _) = (
        run(model, {**inputs, "token_type_ids": types}, config)
        for types in (
            inputs["token_type_ids"],
            torch.full_like(inputs["token_type_ids"], 0 if name == "gemma3" else 1),
        )
    )
    assert error(typed[there(inputs, kept)], causal[there(inputs, kept)]) > 0.01
