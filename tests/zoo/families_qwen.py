"""Qwen-VL and its kin: pictures as lists of patches, and positions of three coordinates."""

import torch

from zoo.entry import IMAGE, Entry
from zoo.media_patches import films, grid

#: A patch of 2 x 2 pixels and two frames; 2 x 2 patches make one visual token.
TOWER = dict(patch_size=2, spatial_merge_size=2, temporal_patch_size=2)
DEEP = dict(TOWER, depth=4, deepstack_visual_indexes=[0, 1, 2])
MROPE = dict(rope_type="default", rope_theta=1000.0, mrope_section=[1, 1, 2])
POSITIONS = dict(rope_parameters=MROPE)
GLM = dict(TOWER, image_size=16)


def merges(kind):
    """How many patches of a side make a token, of each picture or film."""
    return lambda n, generator: {f"{kind}_merge_sizes": torch.tensor([2] * n)}


def seconds(n, generator):
    """Seconds between two steps in time, of each film."""
    return {"video_second_per_grid": torch.rand(n, generator=generator) + 0.5}


FAMILIES = {
    "qwen2_vl": Entry(
        "Qwen2VLForConditionalGeneration",
        grid(),
        text=POSITIONS,
        vision=dict(TOWER, embed_dim=16, hidden_size=32, mlp_ratio=2),
        video=films(apart=False),
    ),
    "qwen2_5_vl": Entry(
        "Qwen2_5_VLForConditionalGeneration",
        grid(),
        text=POSITIONS,
        vision=dict(TOWER, window_size=8, fullatt_block_indexes=[1]),
        video=films(apart=False),
    ),
    "qwen3_vl": Entry(
        "Qwen3VLForConditionalGeneration",
        grid(),
        text=POSITIONS,
        vision=DEEP,
        video=films(),
    ),
    "qwen3_vl_moe": Entry(
        "Qwen3VLMoeForConditionalGeneration",
        grid(),
        text=POSITIONS,
        vision=DEEP,
        video=films(),
    ),
    "qwen2_5_omni_thinker": Entry(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        grid(),
        text=POSITIONS,
        vision=dict(TOWER, window_size=8, fullatt_block_indexes=[1]),
        others=dict(
            audio_config=dict(
                d_model=16,
                encoder_layers=1,
                encoder_attention_heads=2,
                encoder_ffn_dim=16,
                output_dim=32,
            ),
        ),
        top=dict(
            vision_start_token_id=92,
            vision_end_token_id=93,
            audio_start_token_id=95,
            audio_end_token_id=96,
            user_token_id=97,
        ),
        video=films(apart=False, extra=seconds),
    ),
    "qwen3_omni_moe_thinker": Entry(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        grid(),
        text=POSITIONS,
        vision=DEEP,
        others=dict(
            audio_config=dict(
                d_model=16,
                encoder_layers=1,
                encoder_attention_heads=2,
                encoder_ffn_dim=16,
                output_dim=32,
                downsample_hidden_size=8,
            ),
        ),
        top=dict(
            vision_start_token_id=92,
            vision_end_token_id=93,
            audio_start_token_id=95,
            audio_end_token_id=96,
            user_token_id=97,
        ),
        video=films(apart=False, extra=seconds),
        video_since="5.1",
    ),
    "cohere_compass": Entry(
        "CohereCompassForConditionalGeneration",
        grid(),
        text=dict(
            layer_types=["sliding_attention", "full_attention"] * 3,
            sliding_window=8,
            rope_parameters={"sliding_attention": MROPE, "full_attention": None},
        ),
        vision=DEEP,
        video=films(),
    ),
    "exaone4_5": Entry(
        "Exaone4_5_ForConditionalGeneration",
        grid(),
        text=dict(
            layer_types=["sliding_attention", "full_attention"] * 3,
            sliding_window=8,
        ),
        vision=dict(TOWER, window_size=8, fullatt_block_indexes=[1]),
        video=films(apart=False),
    ),
    "hyperclovax_vision_v2": Entry(
        "HyperCLOVAXVisionV2ForConditionalGeneration",
        grid(),
        text=dict(attention_multiplier=0.35),
        vision=dict(TOWER, window_size=8, fullatt_block_indexes=[1]),
        video=films(apart=False),
    ),
    "cosmos3_omni": Entry(
        "Cosmos3OmniForConditionalGeneration",
        grid(),
        text=POSITIONS,
        vision=DEEP,
        video=films(),
    ),
    "cosmos3_edge": Entry(
        "Cosmos3EdgeForConditionalGeneration",
        grid(frames=1),
        text=POSITIONS,
        vision=dict(patch_size=2, spatial_merge_size=2, num_patches=64),
        top=dict(projector_hidden_size=64),
        video=films(frames=1),
    ),
    "ernie4_5_vl_moe": Entry(
        "Ernie4_5_VLMoeForConditionalGeneration",
        grid(frames=1),
        text=dict(
            moe_intermediate_size=[24, 16],
            mlp_layer_types=["dense"] + ["sparse"] * 5,
            rope_parameters=MROPE,
        ),
        vision=dict(patch_size=2, spatial_merge_size=2, temporal_merge_size=2),
        video=films(frames=1, pooled=2, apart=False),
    ),
    "glm4v": Entry(
        "Glm4vForConditionalGeneration",
        grid(),
        text=POSITIONS,
        vision=GLM,
        video=films(),
        video_token=IMAGE,
    ),
    "glm46v": Entry(
        "Glm46VForConditionalGeneration",
        grid(),
        text=POSITIONS,
        vision=GLM,
        video=films(),
        video_token=IMAGE,
    ),
    "glm_ocr": Entry(
        "GlmOcrForConditionalGeneration",
        grid(),
        text=POSITIONS,
        vision=GLM,
        video=films(),
        video_token=IMAGE,
    ),
    "glm4v_moe": Entry(
        "Glm4vMoeForConditionalGeneration",
        grid(),
        text=dict(
            rope_parameters=dict(MROPE, partial_rotary_factor=1.0),
            first_k_dense_replace=1,
        ),
        vision=GLM,
        video=films(),
        video_token=IMAGE,
    ),
    "hunyuan_vl": Entry(
        "HunYuanVLForConditionalGeneration",
        # A token more for each row of tokens, and one more at both ends.
        grid(frames=1, tokens=lambda height, width: height // 2 * (width // 2 + 1) + 2),
        text=dict(rope_parameters=dict(MROPE, mrope_section=[1, 1, 1, 1])),
        vision=dict(patch_size=2, spatial_merge_size=2, temporal_patch_size=1, max_image_size=64),
        top=dict(im_start_id=92, im_end_id=93, im_newline_id=94),
    ),
    "paddleocr_vl": Entry(
        "PaddleOCRVLForConditionalGeneration",
        grid(flat=False),
        text=POSITIONS,
        vision=dict(image_size=16, patch_size=2, spatial_merge_size=2),
    ),
    "video_llama_3": Entry(
        "VideoLlama3ForConditionalGeneration",
        grid(frames=1, extra=merges("image")),
        vision=dict(patch_size=2),
        video=films(frames=1, apart=False, extra=merges("video")),
    ),
}
