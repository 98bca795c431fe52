"""Decoders with layers of linear attention, convolution or Mamba between those that attend."""

from zoo.entry import END, IMAGE, START, VOCAB, Entry
from zoo.families_qwen import GLM, MROPE, TOWER
from zoo.media_patches import blocks, by_height, films, grid, packed, padded

LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
QWEN35 = dict(
    layer_types=[LINEAR, FULL] * 3,
    rope_parameters=dict(MROPE, partial_rotary_factor=1.0),
)
INKLING = dict(
    layer_types=["hybrid_sliding", "hybrid"] * 3,
    sliding_window_size=8,
    swa_num_attention_heads=4,
    swa_num_key_value_heads=2,
    swa_head_dim=8,
    d_rel=4,
    rel_extent=16,
    conv_kernel_size=4,
    unpadded_vocab_size=VOCAB,
)

FAMILIES = {
    "qwen3_5": Entry(
        "Qwen3_5ForConditionalGeneration",
        grid(),
        text=QWEN35,
        vision=TOWER,
        video=films(),
    ),
    "qwen3_5_moe": Entry(
        "Qwen3_5MoeForConditionalGeneration",
        grid(),
        text=QWEN35,
        vision=TOWER,
        video=films(),
    ),
    "qwen4_exp": Entry(
        "Qwen4ExpForConditionalGeneration",
        grid(),
        text=dict(
            layer_types=[LINEAR, "indexed_attention"] * 3,
            rope_parameters=MROPE,
            hc_count=2,
            hc_lowrank=8,
            indexer_n_heads=2,
            indexer_kv_heads=1,
            indexer_head_dim=8,
            indexer_budget=16,
            indexer_compress_ratio=2,
            ple_layer_ids=[],
        ),
        vision=TOWER,
        video=films(),
        since="5.20",
    ),
    "glm5_next": Entry(
        "Glm5NextForConditionalGeneration",
        grid(),
        text=dict(
            num_key_value_heads=4,
            qk_rope_head_dim=0,
            head_dim=0,
            layer_types=[LINEAR, "indexed_attention"] * 3,
            mlp_layer_types=["dense"] + ["sparse"] * 5,
            indexer_types=["full"] * 6,
            linear_head_dim=8,
            linear_num_heads=4,
            hc_mult=2,
            index_kpool=2,
        ),
        vision=dict(GLM, projection_intermediate_size=32),
        video=films(),
        video_token=IMAGE,
    ),
    "minicpm_ocr": Entry(
        "MiniCPMOcrForConditionalGeneration",
        packed(),
        text=QWEN35,
        top=dict(insert_layer_id=0, downsample_mode="4x"),
        video=packed(frames=2),
    ),
    "minicpmv4_6": Entry(
        "MiniCPMV4_6ForConditionalGeneration",
        packed(merge=4),
        text=QWEN35,
        top=dict(insert_layer_id=0),
        video=packed(merge=4, frames=2),
        since="5.20",
    ),
    "minicpmv4_7": Entry(
        "MiniCPMV4_7ForConditionalGeneration",
        packed(merge=4),
        text=QWEN35,
        top=dict(
            insert_layer_id=0,
            image_start_id=START,
            image_end_id=END,
            slice_start_id=95,
            slice_end_id=96,
            newline_id=97,
        ),
        video=packed(merge=4, frames=2),
    ),
    "lfm2_vl": Entry(
        "Lfm2VlForConditionalGeneration",
        padded(),
        text=dict(layer_types=["conv", FULL] * 3, full_attn_idxs=[1, 3, 5]),
        vision=dict(patch_size=2, num_patches=64),
        top=dict(projector_hidden_size=32),
    ),
    "lfm3_vl": Entry(
        "Lfm3VlForConditionalGeneration",
        grid(),
        text=dict(
            layer_types=["conv", FULL, SLIDING] * 2,
            sliding_window=8,
            conv_L_cache=3,
        ),
        vision=dict(TOWER, layer_types=["conv", FULL]),
        top=dict(projector_hidden_size=32),
        video=films(apart=False),
    ),
    "nemotron_h_omni": Entry(
        "NemotronH_Omni_Reasoning_V3",
        by_height(patch=4),
        text=dict(
            layers_block_type=[LINEAR, FULL, "mlp", LINEAR, FULL, "moe"],
            ssm_state_size=8,
            mamba_num_heads=4,
            mamba_head_dim=16,
            n_groups=2,
            chunk_size=8,
            moe_shared_expert_intermediate_size=24,
        ),
        vision=dict(
            patch_size=4,
            image_size=16,
            max_img_size=32,
            mlp_ratio=1.5,
            video_temporal_patch_size=2,
        ),
        top=dict(projector_hidden_size=32, vision_hidden_size=32),
        # No films: transformers 5.23 fails on any (it joins a tensor as if it were a list).
    ),
    "inkling2": Entry(
        "Inkling2ForConditionalGeneration",
        blocks((4, 4, 3)),
        text=dict(INKLING, n_layers_per_attn_res_block=2),
        vision=dict(
            patch_size=2,
            spatial_merge_size=2,
            posemb_grid_size=8,
            projection_hidden_dim=32,
        ),
    ),
    "inkling_mm_model": Entry(
        "InklingForConditionalGeneration",
        blocks((2, 4, 4, 3), grids=False),
        text=dict(INKLING, mlp_layer_types=["dense"] + ["sparse"] * 5),
        vision=dict(temporal_patch_size=2, num_hidden_layers=4),
        top=dict(image_bos_token_id=92, audio_bos_token_id=95),
    ),
}
