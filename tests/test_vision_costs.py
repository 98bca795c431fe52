"""Towers and projectors, counted on blank models: against formulas written down by hand."""

import pytest
import torch
import transformers as tf

from formulas import qwen, tiles
from test_flops import llava_7b
from tiny import make
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

#: Configurations of true size, n_visual and `images`, and the number of tiles of these.
TILES = {
    "LLaVA-1.5 7B": (llava_7b(), 576, None, 1),
    "LLaVA-1.5 7B, three images": (llava_7b(), 3 * 576, None, 3),
    "LLaVA-1.5 7B, a part of an image": (llava_7b(), 577, None, 2),
    "LLaVA-NeXT": (tf.LlavaNextConfig(), 2880, [(672, 672)], 5),
    "LLaVA-NeXT, two images": (tf.LlavaNextConfig(), 4000, [(336, 672), (90, 1000)], 7),
    "LLaVA-NeXT, tokens alone": (tf.LlavaNextConfig(), 2000, None, 4),
    "LLaVA-NeXT, tiles": (tf.LlavaNextConfig(), 2000, 6, 6),
    "LLaVA-OneVision": (tf.LlavaOnevisionConfig(vision_config=SIGLIP), 3000, [(384, 768)], 3),
    "LLaVA-OneVision, frames": (tf.LlavaOnevisionConfig(vision_config=SIGLIP), 3000, 8, 8),
    "InternVL3": (tf.InternVLConfig(), 256 * 7, None, 7),
    "Idefics3": (
        tf.Idefics3Config(vision_config={"image_size": 364, "patch_size": 14}),
        169 * 5,
        None,
        5,
    ),
    "SmolVLM": (
        tf.SmolVLMConfig(vision_config={"image_size": 512, "patch_size": 16}, scale_factor=4),
        64 * 13,
        None,
        13,
    ),
    "Gemma 3": (tf.Gemma3Config(vision_config={**SIGLIP, "image_size": 896}), 512, None, 2),
    "PaliGemma": (tf.PaliGemmaConfig(), 256, None, 1),
}
GRIDS = {
    "Qwen2-VL": (tf.Qwen2VLConfig(), [(1, 36, 54), (4, 20, 20)]),
    "Qwen2.5-VL": (tf.Qwen2_5_VLConfig(), [(1, 36, 54), (2, 20, 20)]),
    "Qwen2.5-VL, a page": (tf.Qwen2_5_VLConfig(), [(1, 120, 90)]),
    "Qwen3-VL": (tf.Qwen3VLConfig(), [(1, 64, 64), (3, 16, 30)]),
}


@pytest.mark.parametrize("name", TILES)
def test_families_of_tiles(name):
    config, n_visual, images, count = TILES[name]
    found = adapter_for(config).vision_flops(config, n_visual, images)
    assert found == tiles(config, count) and min(found) > 0


@pytest.mark.parametrize("name", GRIDS)
def test_families_of_grids(name):
    config, grids = GRIDS[name]
    n_visual = sum(t * h * w for t, h, w in grids) // config.vision_config.spatial_merge_size**2
    found = adapter_for(config).vision_flops(config, n_visual, torch.tensor(grids))
    assert found == qwen(config, grids) and min(found) > 0
