"""Towers and projectors, counted on blank models: against formulas written down by hand."""

import pytest
import torch
import transformers as tf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vispco
from formulas import qwen, tiles
from test_families import IMAGES, VIDEO_SAMPLES, build, everything, image_sizes
from test_flops import llava_7b
from tiny import batch, make, without_labels
from tiny_families import QWEN_ROPE, prompts
from vispco import PruningConfig, count_flops
from vispco.models.llava import Llava
from vispco.registry import adapter_for

SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}

QWEN = {"rope_parameters": QWEN_ROPE}

#: Configurations of true size, n_visual and `images`, and the number of tiles of these.
TILES = {
    "LLaVA-1.5 7B": (llava_7b(), 576, None, 1),
    "LLaVA-1.5 7B, three images": (llava_7b(), 3 * 576, None, 3),
    "LLaVA-1.5 7B, a part of an image": (llava_7b(), 577, None, 2),
    "LLaVA, SigLIP's pooling head": (
        tf.LlavaConfig(
            vision_config={**SIGLIP, "vision_use_head": True},
            vision_feature_select_strategy="full",
        ),
        729,
        None,
        1,
    ),
    "LLaVA-NeXT": (tf.LlavaNextConfig(), 2880, [(672, 672)], 5),
    "LLaVA-NeXT, two images": (tf.LlavaNextConfig(), 4000, [(336, 672), (90, 1000)], 7),
    "LLaVA-NeXT, tokens alone": (tf.LlavaNextConfig(), 2000, None, 4),
    "LLaVA-NeXT, tiles": (tf.LlavaNextConfig(), 2000, 6, 6),
    "LLaVA-OneVision": (tf.LlavaOnevisionConfig(vision_config=SIGLIP), 3000, [(384, 768)], 3),
    "LLaVA-OneVision, frames": (tf.LlavaOnevisionConfig(vision_config=SIGLIP), 3000, 8, 8),
    "InternVL3": (tf.InternVLConfig(), 256 * 7, None, 7),
    "Idefics3": (
        tf.Idefics3Config(vision_config={"image_size": 364, "patch_size": 14}, pad_token_id=0),
        169 * 5,
        None,
        5,
    ),
    "SmolVLM": (
        tf.SmolVLMConfig(
            vision_config={"image_size": 512, "patch_size": 16}, scale_factor=4, pad_token_id=0
        ),
        64 * 13,
        None,
        13,
    ),
    "Gemma 3": (tf.Gemma3Config(vision_config={**SIGLIP, "image_size": 896}), 512, None, 2),
    "PaliGemma": (tf.PaliGemmaConfig(), 256, None, 1),
}
GRIDS = {
    "Qwen2-VL": (tf.Qwen2VLConfig(text_config=QWEN), [(1, 36, 54), (4, 20, 20)]),
    "Qwen2.5-VL": (tf.Qwen2_5_VLConfig(text_config=QWEN), [(1, 36, 54), (2, 20, 20)]),
    "Qwen2.5-VL, a page": (tf.Qwen2_5_VLConfig(text_config=QWEN), [(1, 120, 90)]),
    "Qwen3-VL": (tf.Qwen3VLConfig(), [(1, 64, 64), (3, 16, 30)]),
}


@pytest.mark.parametrize("name", TILES)
def test_families_of_tiles(name):
    config, n_visual, images, count = TILES[name]
    found = adapter_for(config).vision_flops(config, n_visual, images)
    assert found[:2] == tiles(config, count) and min(found[:2]) > 0


@pytest.mark.parametrize("name", GRIDS)
def test_families_of_grids(name):
    config, grids = GRIDS[name]
    n_visual = sum(t * h * w for t, h, w in grids) // config.vision_config.spatial_merge_size**2
    found = adapter_for(config).vision_flops(config, n_visual, torch.tensor(grids))
    assert found[:2] == qwen(config, grids) and min(found[:2]) > 0


# ---- a processor's output ------------------------------------------------------------------------
@everything
def test_inputs_cost_what_ran(name, samples):
    """Images of every shape, several of them and video: numbers of tokens and FLOPs."""
    model, config = build(name), PruningConfig("fastv", [1, 0.4, 0.4, 0.2, 0.2, 0.2])
    for sample in [s for s in (IMAGES if samples == "images" else VIDEO_SAMPLES[:2]) if len(s) > 1]:
        inputs, (n_visual,) = prompts(model, [sample])
        counter = FlopCounterMode(display=False)
        with vispco.apply(model, config), sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
            model(**inputs, logits_to_keep=1)
        report = count_flops(model.config, config, inputs={**inputs, "labels": inputs["input_ids"]})
        assert report.tokens == config.tokens(n_visual)
        assert counter.get_total_flops() == report.total_with_vision
        n_text, images = inputs["input_ids"].shape[1] - n_visual, image_sizes(name, sample)
        assert report == count_flops(model, config, n_visual, n_text, images=images)
        reads = PruningConfig("visionzip", config.keep_ratios)
        report = count_flops(model, reads, inputs=inputs)
        assert report == count_flops(model, reads, n_visual, n_text, images=images)


def test_padding_is_not_counted():
    model = make("llava")
    longer = without_labels(batch(images=(1, 2), text=(5, 5), before=(1, 1)))
    one = {name: x[:1] for name, x in longer.items()}
    assert not bool(one["attention_mask"].all())
    report = count_flops(model, inputs=one)
    assert report == count_flops(model, n_visual=16, n_text=6)


def test_a_prompt_without_pictures():
    model = make("llava")
    inputs = without_labels(batch(images=(0,), text=(5,), before=(1,)))
    report = count_flops(model, inputs=inputs)
    assert report == count_flops(model, n_visual=0, n_text=6)
    assert report.vision == report.projector == 0


def test_inputs_are_refused():
    model, inputs = make("llava"), without_labels(batch())
    with pytest.raises(ValueError, match=r"for one sample.*got input_ids \(2, 26\)"):
        count_flops(model, inputs=inputs)
    with pytest.raises(ValueError, match="for one sample.*got input_ids None"):
        count_flops(model, inputs={"pixel_values": inputs["pixel_values"]})
    for more in ({"n_visual": 16}, {"n_text": 9}, {"images": 1}):
        with pytest.raises(ValueError, match="leave these out"):
            count_flops(model, inputs=without_labels(batch((1,), (9,), (2,))), **more)
    less = without_labels(batch((2,), (9,), (2,)))
    less["pixel_values"] = less["pixel_values"][:1]
    with pytest.raises(
        ValueError, match="costs of LlavaForConditionalGeneration cannot be counted"
    ):
        count_flops(model, inputs=less)


# ---- what is not known ---------------------------------------------------------------------------
def test_vision_that_is_not_known(monkeypatch):
    """The decoder is counted all the same, and the table says what to do."""
    model, inputs = make("llava"), without_labels(batch((1,), (9,), (2,)))
    known = count_flops(model, n_visual=16, n_text=10)
    monkeypatch.setattr(Llava, "pixels", classmethod(lambda *args: None))
    config = PruningConfig("visionzip", [1] + [0.5] * 5)
    for each in (None, config):
        report = count_flops(model, each, n_visual=16, n_text=10)
        assert report.vision is report.projector is report.total_with_vision is None
        assert report.full == known.total and report.total <= known.total
    lines = report.table().splitlines()
    assert [line.split()[-1] for line in lines[-5:-2]] == ["unknown"] * 3
    assert lines[-2] == "unknown: give count_flops(..., inputs=) a processor's output"
    assert count_flops(model, inputs=inputs) == known


@pytest.mark.parametrize(
    "change",
    [{"image_size": None}, {"image_size": [16, 32]}, {"image_size": 18}, {"image_size": 16}],
)
def test_pictures_of_the_towers_own_size(change):
    """Known only where pictures are squares and give tokens that the decoder takes."""
    config = make("llava").config.to_dict()
    config["vision_config"] = {**config["vision_config"], **change}
    found = adapter_for(make("llava").config).pixels(tf.LlavaConfig(**config), 20)
    if change["image_size"] == 16:
        assert found["pixel_values"].shape == (2, 3, 16, 16)
    elif change["image_size"] == 18:
        assert found["pixel_values"].shape == (2, 3, 18, 18)
    else:
        assert found is None
