"""LLaVA and its kin: a vision tower, a projector, and an ordinary decoder."""

import torch

from zoo.entry import IMAGE, PAD, VOCAB, Entry
from zoo.media import cropped, frames, of_each_sample, ready, squares, tiles

CLIP = dict(image_size=16, patch_size=4)
FINE = dict(image_size=16, patch_size=2)
TILE = dict(image_size=8, patch_size=4)
SAM = dict(
    patch_size=4,
    output_channels=16,
    global_attn_indexes=[1],
    window_size=2,
    mlp_dim=32,
)
PINPOINTS = [[16, 8], [8, 16], [16, 16]]
SLIDING = dict(
    sliding_window=8,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
)

#: Films for classes that take the frames as pictures.
FRAMES = frames(n=2, tokens=32, runs=2, listed=True, key="pixel_values")


def high_res(n, generator):
    """The pictures again, larger."""
    return {"high_res_pixel_values": torch.randn(n, 3, 32, 32, generator=generator)}


FAMILIES = {
    "llava": Entry(
        "LlavaForConditionalGeneration",
        squares(),
        vision=CLIP,
        top=dict(vision_feature_layer=-1),
    ),
    "llava_next": Entry(
        "LlavaNextForConditionalGeneration",
        tiles(),
        vision=TILE,
        top=dict(vision_feature_layer=-1, image_grid_pinpoints=PINPOINTS),
    ),
    "llava_next_video": Entry(
        "LlavaNextVideoForConditionalGeneration",
        tiles(),
        vision=TILE,
        top=dict(vision_feature_layer=-1, image_grid_pinpoints=PINPOINTS),
        video=frames(size=8, n=8, tokens=8),
    ),
    "llava_onevision": Entry(
        "LlavaOnevisionForConditionalGeneration",
        tiles(),
        vision=TILE,
        top=dict(image_grid_pinpoints=PINPOINTS),
        video=frames(size=8, n=8, tokens=9),
    ),
    "video_llava": Entry(
        "VideoLlavaForConditionalGeneration",
        squares(),
        vision=CLIP,
        top=dict(vision_feature_layer=-1),
        video=frames(n=2, tokens=34),
    ),
    "vipllava": Entry(
        "VipLlavaForConditionalGeneration",
        squares(),
        vision=CLIP,
        top=dict(vision_feature_layers=[-1, -2]),
    ),
    "internvl": Entry(
        "InternVLForConditionalGeneration",
        squares(),
        vision=dict(image_size=[16, 16], patch_size=[2, 2]),
        top=dict(image_seq_length=16),
        video=FRAMES,
        video_token=IMAGE,
    ),
    "qianfan_ocr": Entry(
        "QianfanOCRForConditionalGeneration",
        squares(),
        vision=dict(image_size=[16, 16], patch_size=[2, 2]),
        top=dict(image_seq_length=16),
        video=FRAMES,
        video_token=IMAGE,
    ),
    "idefics2": Entry(
        "Idefics2ForConditionalGeneration",
        of_each_sample(tokens=8),
        vision=CLIP,
        others=dict(
            perceiver_config=dict(
                hidden_size=32,
                resampler_n_latents=8,
                resampler_depth=1,
                resampler_n_heads=2,
                resampler_head_dim=16,
                num_key_value_heads=2,
            ),
        ),
        top=dict(pad_token_id=PAD),
    ),
    "idefics3": Entry(
        "Idefics3ForConditionalGeneration",
        of_each_sample(),
        vision=FINE,
        top=dict(scale_factor=2, pad_token_id=PAD),
    ),
    "smolvlm": Entry(
        "SmolVLMForConditionalGeneration",
        of_each_sample(),
        vision=FINE,
        top=dict(scale_factor=2, pad_token_id=PAD),
        video=of_each_sample(frames=2),
        video_token=IMAGE,
    ),
    "granite_docling": Entry(
        "GraniteDoclingForConditionalGeneration",
        of_each_sample(masked=True),
        text=dict(attention_multiplier=0.35),
        vision=dict(FINE, scale_factor=2, deepstack_visual_indexes=[0, 1]),
        top=dict(pad_token_id=PAD, density_router_hidden_size=8),
    ),
    "mistral3": Entry(
        "Mistral3ForConditionalGeneration",
        cropped(),
        vision=FINE,
        top=dict(vision_feature_layer=-1),
    ),
    "lighton_ocr": Entry("LightOnOcrForConditionalGeneration", cropped(), vision=FINE),
    "got_ocr2": Entry(
        "GotOcr2ForConditionalGeneration",
        squares(size=64),
        vision=dict(SAM, image_size=64),
    ),
    "aria": Entry(
        "AriaForConditionalGeneration",
        squares(tokens=8),
        vision=CLIP,
        top=dict(projector_patch_to_query_dict={16: 8}),
    ),
    "aya_vision": Entry(
        "AyaVisionForConditionalGeneration",
        squares(),
        text=SLIDING,
        vision=FINE,
        top=dict(downsample_factor=2),
    ),
    "cohere2_vision": Entry(
        "Cohere2VisionForConditionalGeneration",
        squares(),
        text=SLIDING,
        vision=FINE,
        top=dict(downsample_factor=2, alignment_intermediate_size=64),
    ),
    "deepseek_vl": Entry("DeepseekVLForConditionalGeneration", squares(), vision=CLIP),
    "deepseek_vl_hybrid": Entry(
        "DeepseekVLHybridForConditionalGeneration",
        squares(extra=high_res),
        vision=CLIP,
        others=dict(high_res_vision_config=dict(SAM, image_size=32)),
    ),
    "fast_vlm": Entry(
        "FastVlmForConditionalGeneration",
        ready(),
        vision=dict(hidden_size=32),
        ready="its tower comes from the package timm",
    ),
    "perception_lm": Entry(
        "PerceptionLMForConditionalGeneration",
        ready(),
        vision=dict(model_args=dict(embed_dim=32)),
        video=ready(kind="video"),
        ready="its tower comes from the package timm",
    ),
    "janus": Entry(
        "JanusForConditionalGeneration",
        squares(),
        vision=dict(
            image_size=16,
            patch_size=4,
            num_image_tokens=16,
            projection_dim=32,
            mlp_ratio=2.0,
        ),
        others=dict(
            vq_config=dict(
                embed_dim=8,
                num_embeddings=16,
                latent_channels=16,
                base_channels=32,
                channel_multiplier=[1, 1],
                num_res_blocks=1,
                num_patches=4,
                projection_dim=32,
                image_token_embed_dim=32,
            ),
        ),
    ),
    "ovis2": Entry(
        "Ovis2ForConditionalGeneration",
        squares(),
        vision=dict(image_size=16, patch_size=4, vocab_size=20),
        top=dict(
            visual_indicator_token_ids=[94, 95, 96, 97, 98],
            vocab_size=VOCAB,
            hidden_size=32,
        ),
    ),
}
