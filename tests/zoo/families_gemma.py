"""Gemma and Llama 4: sliding or chunked attention, keys shared between layers, wide heads."""

from zoo.entry import PAD, VOCAB, Entry
from zoo.media import ready, squares
from zoo.media_patches import placed

SLIDING, FULL = "sliding_attention", "full_attention"
ALTERNATING = dict(sliding_window=8, layer_types=[SLIDING, SLIDING, FULL] * 2)
#: Seven layers, so that the last two can take their keys from one of each kind.
SEVEN = dict(
    num_hidden_layers=7,
    sliding_window=8,
    layer_types=[SLIDING, SLIDING, FULL, SLIDING, FULL, SLIDING, FULL],
)
#: Embeddings that enter at each layer.
BY_LAYER = dict(vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8)
GEMMA4 = dict(SEVEN, **BY_LAYER, per_layer_config={}, num_kv_shared_layers=0)

FAMILIES = {
    "gemma3": Entry(
        "Gemma3ForConditionalGeneration",
        squares(),
        text=dict(ALTERNATING, query_pre_attn_scalar=8),
        vision=dict(image_size=16, patch_size=2),
        top=dict(mm_tokens_per_image=16),
    ),
    "paligemma": Entry(
        "PaliGemmaForConditionalGeneration",
        squares(),
        vision=dict(image_size=16, patch_size=4, projection_dim=32),
        top=dict(projection_dim=32, hidden_size=32),
        types_mark_images=False,
    ),
    "gemma3n": Entry(
        "Gemma3nForConditionalGeneration",
        ready(),
        text=dict(
            SEVEN,
            **BY_LAYER,
            num_kv_shared_layers=2,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 7,
            intermediate_size=[48] * 7,
        ),
        vision=dict(vocab_offset=96, vocab_size=2, hidden_size=32),
        others=dict(
            audio_config=dict(
                vocab_offset=98,
                vocab_size=2,
                hidden_size=32,
                conf_num_attention_heads=2,
                conf_num_hidden_layers=1,
                sscp_conv_channel_size=[8, 4],
            ),
        ),
        ready="its tower comes from the package timm",
    ),
    "gemma4": Entry(
        "Gemma4ForConditionalGeneration",
        placed(),
        text=GEMMA4,
        vision=dict(patch_size=2, pooling_kernel_size=2, position_embedding_size=16),
        top=dict(audio_config=None),
        video=placed(frames=2),
        video_since="5.23",
    ),
    "gemma4_unified": Entry(
        "Gemma4UnifiedForConditionalGeneration",
        placed(patch=4, merge=1),
        text=dict(SEVEN, per_layer_config={}),
        vision=dict(
            patch_size=2,
            pooling_kernel_size=2,
            mm_embed_dim=32,
            mm_posemb_size=16,
            output_proj_dims=32,
        ),
        top=dict(audio_config=None),
        video=placed(patch=4, merge=1, frames=2),
        video_since="5.23",
    ),
    "llama4": Entry(
        "Llama4ForConditionalGeneration",
        squares(),
        text=dict(
            attention_chunk_size=8,
            layer_types=["chunked_attention", "chunked_attention", FULL] * 2,
            no_rope_layers=[1, 1, 0] * 2,
            intermediate_size_mlp=48,
            interleave_moe_layer_step=2,
            moe_layers=[1, 3, 5],
        ),
        vision=dict(
            image_size=16,
            patch_size=2,
            # 2 x 2 patches are shuffled into one.
            intermediate_size=4 * 32,
            vision_output_dim=32,
            projector_input_dim=32,
            projector_output_dim=32,
        ),
        top=dict(pad_token_id=PAD),
        since="5.2",
    ),
}
