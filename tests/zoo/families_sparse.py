"""Mixtures of experts, latent attention (MLA), and attention to what an indexer chooses."""

from torch import nn

from zoo.entry import IMAGE, Entry
from zoo.families_llava import SAM
from zoo.families_qwen import TOWER
from zoo.media import cropped, squares, tiles
from zoo.media_patches import films, grid, pooled

SLIDING, FULL = "sliding_attention", "full_attention"
#: The first layer has no experts.
EXPERTS = dict(mlp_layer_types=["dense"] + ["sparse"] * 5)
PLAIN = dict(rope_type="default", rope_theta=1000.0)


def fewer_queries(model):
    """DeepSeek-OCR 2 has 144 queries for a small picture: 16 will do."""
    tower = model.model.vision_tower
    tower.query_768_resolution = nn.Embedding(16, tower.query_768_resolution.embedding_dim)


FAMILIES = {
    "kimi_k25": Entry(
        "Kimi_K25ForConditionalGeneration",
        grid(flat=False),
        text=dict(num_key_value_heads=4, first_k_dense_replace=1),
        vision=dict(patch_size=2, merge_kernel_size=[2, 2], pos_emb_height=8, pos_emb_width=8),
        top=dict(projection_hidden_size=32),
        # In transformers 5.23, films of more steps in time than one fail.
        video=films(flat=False, steps=1),
    ),
    "minimax_m3_vl": Entry(
        "MiniMaxM3SparseForConditionalGeneration",
        grid(),
        text=dict(
            EXPERTS,
            layer_types=[FULL] * 6,
            rotary_dim=8,
            dense_intermediate_size=48,
            shared_intermediate_size=24,
            index_block_size=4,
            index_topk_blocks=2,
        ),
        vision=TOWER,
        top=dict(projector_hidden_size=32, merged_hidden_size=128),
        video=films(),
    ),
    "mistral_large4": Entry(
        "MistralLarge4ForConditionalGeneration",
        cropped(),
        text=dict(
            EXPERTS,
            num_key_value_heads=4,
            first_k_dense_replace=1,
            layer_types=["indexed_attention"] * 6,
            indexer_types=["full"] * 6,
            no_rope_layers=[1, 1, 0] * 2,
            kv_source_layers=[0, 1, 2, 3, 4, 5],
            rope_parameters=PLAIN,
        ),
        vision=dict(image_size=16, patch_size=2),
    ),
    "dots3_note": Entry(
        "Dots3NoteForConditionalGeneration",
        grid(frames=1),
        text=dict(
            EXPERTS,
            num_key_value_heads=4,
            head_dim=16,
            layer_types=["indexed_attention", SLIDING] * 3,
            sliding_window=8,
            per_layer_config={},
            shared_experts_intermediate_size=24,
        ),
        vision=dict(
            patch_size=2,
            adapter_in_dim=32,
            adapter_out_dim=32,
            mlp_layer_types=["dense"] * 2,
            per_layer_config={},
            num_local_experts=2,
            moe_intermediate_size=16,
        ),
        others=dict(
            audio_config=dict(
                adapter_out_dim=32,
                adapter_input_size=32,
                hidden_size=32,
                num_attention_heads=2,
                num_hidden_layers=1,
                conv_output_size=3840,
            ),
        ),
        video=films(frames=1),
    ),
    "deepseek_ocr2": Entry(
        "DeepseekOcr2ForConditionalGeneration",
        # 16 queries, and a token that ends the picture.
        squares(size=32, tokens=17),
        text=dict(EXPERTS, num_key_value_heads=4, first_k_dense_replace=1),
        vision=dict(sam_config=dict(SAM, image_size=32, downsample_channels=[16, 32])),
        shrink=fewer_queries,
    ),
    "unlimited_ocr": Entry(
        "UnlimitedOcrForConditionalGeneration",
        # A token more for each of four rows, and one that ends the picture.
        squares(size=32, tokens=21),
        text=dict(
            EXPERTS,
            num_key_value_heads=4,
            layer_types=["reference_sliding_attention"] * 6,
            sliding_window=8,
        ),
        vision=dict(
            sam_config=dict(SAM, image_size=32, patch_size=2, downsample_channels=[16, 32])
        ),
    ),
    "step3p7": Entry(
        "Step3p7ForConditionalGeneration",
        squares(size=32),
        text=dict(
            EXPERTS,
            layer_types=[SLIDING, FULL] * 3,
            sliding_window=8,
            share_expert_dim=24,
            num_sliding_attention_heads=4,
            query_pre_attn_scalar=8,
            rope_parameters={FULL: PLAIN, SLIDING: PLAIN},
        ),
        vision=dict(image_size=32, patch_size=2, mlp_ratio=1.5),
    ),
    "molmo2": Entry(
        "Molmo2ForConditionalGeneration",
        pooled(),
        text=dict(additional_vocab_size=4, rope_scaling_layers=[0, 2, 4]),
        vision=dict(image_size=[16, 16], patch_size=2),
        others=dict(
            adapter_config=dict(
                hidden_size=32,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
                intermediate_size=48,
                text_hidden_size=32,
                vision_feature_layer=[1, 0],
            ),
        ),
        top=dict(
            low_res_image_start_token_id=94,
            frame_start_token_id=95,
            frame_end_token_id=96,
        ),
        video=pooled(frames=2),
        video_token=IMAGE,
        video_type=1,
    ),
    "muse_glimmer": Entry(
        "MuseGlimmerForConditionalGeneration",
        grid(),
        text=dict(
            layer_types=[SLIDING, FULL] * 3,
            layer_rope_theta=[1000.0, 0] * 3,
            sliding_window=8,
        ),
        vision=dict(
            patch_size=2,
            layer_types=[FULL] * 2,
            pos_emb_height=8,
            pos_emb_width=8,
        ),
        top=dict(out_hidden_size=128, projector_hidden_size=32),
        video=films(),
    ),
    "muse_spark": Entry(
        "MuseSparkForConditionalGeneration",
        grid(),
        text=dict(
            EXPERTS,
            layer_types=[SLIDING, FULL] * 3,
            layer_rope_theta=[1000.0, 0] * 3,
            sliding_window=8,
            moe_hidden_size=16,
        ),
        vision=dict(
            patch_size=2,
            layer_types=["window_attention", FULL],
            pos_emb_height=4,
            pos_emb_width=4,
        ),
        others=dict(
            audio_config=dict(
                patch_sizes=[4, 2],
                hidden_sizes=[8, 16],
                depths=[1, 1],
                num_hidden_layers=2,
            ),
        ),
        top=dict(out_hidden_size=128, projector_hidden_size=32),
        video=films(),
    ),
    "granite4_vision": Entry(
        "Granite4VisionForConditionalGeneration",
        # 16 tokens of the whole picture; four rows of four and an end of its only tile.
        tiles(size=16, tiles=2, tokens=36, shape=(16, 16)),
        text=dict(attention_multiplier=0.35, hidden_size=64),
        vision=dict(image_size=16, patch_size=2, hidden_size=64),
        others=dict(
            qformer_config=dict(
                encoder_hidden_size=64,
                hidden_size=64,
                cross_attention_frequency=1,
            ),
        ),
        top=dict(
            deepstack_layer_map=[[-1, 0], [-2, 2]],
            spatial_target_layers=[1, 3, 4, 5],
            downsample_rate="1/2",
            image_grid_pinpoints=[[16, 16]],
        ),
        since="5.20",
    ),
}
