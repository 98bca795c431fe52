"""Pictures as a fixed number of queries, as entries of a code book, or as bare patches."""

import torch

from zoo.entry import IMAGE, Entry, Media
from zoo.families_llava import CLIP
from zoo.media import squares

QFORMER = dict(qformer_config=dict(encoder_hidden_size=32))
KOSMOS = dict(embed_dim=32, layers=6, attention_heads=4, ffn_dim=48)


def question(n, generator):
    """The question, as the querying transformer reads it beside each picture."""
    return {
        "qformer_input_ids": torch.randint(3, 90, (n, 4), generator=generator),
        "qformer_attention_mask": torch.ones(n, 4, dtype=torch.long),
    }


def clips(counts, generator):
    """(films, 4 frames, 3, 16, 16), 4 visual tokens a frame."""
    n = sum(counts)
    pixels = torch.randn(n, 4, 3, 16, 16, generator=generator)
    return Media({"pixel_values": pixels, **question(n, generator)}, [16] * n)


def sized(n, generator):
    """The height and width of each picture."""
    return {"image_sizes": torch.tensor([(16, 16)] * n)}


def flattened(counts, generator):
    """(pictures, 16, row + column + 27): 4 x 4 patches, each behind its place."""
    n = sum(counts)
    places = 1 + torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    patches = torch.randn(n, 16, 27, generator=generator)
    pixels = torch.cat([places.expand(n, 16, 2), patches], -1)
    return Media({"flattened_patches": pixels}, [16] * n)


def patches(counts, generator):
    """(pictures, 16, 12): patches of 2 x 2 pixels."""
    n = sum(counts)
    return Media({"pixel_values": torch.randn(n, 16, 12, generator=generator)}, [16] * n)


def places(visual):
    """Kosmos takes its own mask of visual tokens."""
    return {"image_embeds_position_mask": visual.long()}


FAMILIES = {
    "blip-2": Entry(
        "Blip2ForConditionalGeneration",
        squares(tokens=8),
        vision=CLIP,
        others=QFORMER,
        top=dict(num_query_tokens=8),
    ),
    "instructblip": Entry(
        "InstructBlipForConditionalGeneration",
        squares(tokens=8, extra=question),
        vision=CLIP,
        others=QFORMER,
        top=dict(num_query_tokens=8),
    ),
    "instructblipvideo": Entry(
        "InstructBlipVideoForConditionalGeneration",
        clips,
        vision=CLIP,
        others=QFORMER,
        # It takes films alone: they stand where other classes have pictures.
        top=dict(num_query_tokens=4, video_token_index=IMAGE),
        counts=(1, 1),
    ),
    "kosmos-2": Entry(
        "Kosmos2ForConditionalGeneration",
        squares(),
        text=KOSMOS,
        vision=CLIP,
        top=dict(latent_query_num=16),
        counts=(1, 1),
        extra=places,
    ),
    "kosmos-2.5": Entry(
        "Kosmos2_5ForConditionalGeneration",
        flattened,
        text=KOSMOS,
        vision=dict(patch_embed_hidden_size=27, max_num_patches=16, hidden_size=32),
        top=dict(latent_query_num=16),
        counts=(1, 1),
        extra=places,
    ),
    "chameleon": Entry(
        "ChameleonForConditionalGeneration",
        squares(tokens=64),
        others=dict(
            vq_config=dict(
                embed_dim=16,
                num_embeddings=8,
                latent_channels=16,
                resolution=16,
                base_channels=32,
                channel_multiplier=[1, 2],
                num_res_blocks=1,
            ),
        ),
        top=dict(
            vocabulary_map={
                "<image>": IMAGE,
                **{f"IMGIMG{c}Z": 10 + i for i, c in enumerate("ABCDEFGH")},
            },
        ),
        counts=(1, 1),
    ),
    "emu3": Entry(
        "Emu3ForConditionalGeneration",
        squares(tokens=72, extra=sized),
        others=dict(
            vq_config=dict(
                embed_dim=4,
                codebook_size=20,
                latent_channels=4,
                base_channels=32,
                channel_multiplier=[1, 1],
                num_res_blocks=1,
                attn_resolutions=[],
                hidden_size=32,
                num_attention_heads=1,
            ),
        ),
        top=dict(
            vocabulary_map={
                "<image>": IMAGE,
                "<|extra_200|>": 94,
                **{f"<|visual token {i:06d}|>": 10 + i for i in range(20)},
            },
        ),
        counts=(1, 1),
        since="5.16",
    ),
    "fuyu": Entry(
        "FuyuForCausalLM",
        patches,
        text=dict(num_key_value_heads=4),
        top=dict(patch_size=2, hidden_size=32),
    ),
}
