"""Tiny models of every family with random weights, and what their processors do.

Every tiny model gives 16 visual tokens for a 16 x 16 image, and wears its processor. That is a hook
on its backbone: it turns the plain batches of `tiny.batch` (`pixel_values` of (images, 3, 16, 16))
into the family's own inputs. `processed` does the same outside the model, for `generate`.
"""

import inspect
from itertools import chain

import torch
import transformers as tf

IMAGE, VIDEO, PAD, BOS, EOS, VOCAB = 5, 4, 0, 1, 2, 60
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "initializer_range": 0.3,
}
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 3,
    "vision_end_token_id": 3,
    "tie_word_embeddings": False,
}


def finish(model_class, config, processor=None, attention="sdpa"):
    """The model in eval mode with random weights, wearing its processor."""
    torch.manual_seed(0)
    config._attn_implementation = attention
    model = model_class(config).eval()
    model.generation_config.pad_token_id = PAD
    if processor is not None:

        def wear(module, args, kwargs):
            kwargs = {"input_ids": args[0], **kwargs} if args else kwargs
            return args[1:], processor(config, kwargs)

        model.model.register_forward_pre_hook(wear, with_kwargs=True)
    PROCESSORS[type(model)] = processor
    return model


PROCESSORS = {}


def processed(model, inputs):
    """The family's own inputs from plain ones; inputs that are its own already are left alone."""
    processor = PROCESSORS[type(model)]
    return inputs if processor is None else processor(model.config, inputs)


# ---- Qwen ----------------------------------------------------------------------------------------
#: The first releases of transformers 5 find images and videos by the ids themselves.
TYPED = (
    "mm_token_type_ids" in inspect.signature(tf.Qwen2VLForConditionalGeneration.forward).parameters
)


def grid_inputs(config, inputs):
    """Patches, grids and token types: what Qwen's processors add to the ids.

    Qwen tells images apart by the text between them. Neighbours in a plain batch are one wide
    image.
    """
    ids, pixels = inputs.get("input_ids"), inputs.get("pixel_values")
    if (
        ids is None
        or inputs.get("mm_token_type_ids") is not None
        or inputs.get("past_key_values")
        and (inputs["past_key_values"].get_seq_length())
    ):
        return inputs
    types = {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}
    inputs = {**inputs, **(types if TYPED else {})}
    if pixels is not None and pixels.ndim == 4:
        inputs["pixel_values"] = patches(pixels[:, :, None].expand(-1, -1, 2, -1, -1))
        inputs["image_grid_thw"] = torch.tensor([[1, 8, n // 2] for n in runs(ids) if n])
    return inputs


def runs(ids):
    """Number of image tokens of each sample (which stand together)."""
    return (ids == IMAGE).sum(1).tolist()


def patches(pixels, size=2):
    """(images, 3, frames, H, W) to (patches, 3 * 2 * size * size), any order."""
    n, channels, frames, height, width = pixels.shape
    x = pixels.reshape(n, channels, frames // 2, 2, height // size, size, width // size, size)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(-1, channels * 2 * size * size)


#: Of Qwen's text models. The first releases of transformers 5 have no default.
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_heads": 2,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": 0.2,
}


def tiny_qwen2_vl(layers=6, attention="sdpa", **text):
    """Three-part rotary embeddings, grouped-query attention."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1000.0}
    vision = {**QWEN_VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    text = {**TEXT, "num_hidden_layers": layers, "rope_parameters": rope, **text}
    config = tf.Qwen2VLConfig(text_config=text, vision_config=vision, **IDS)
    return finish(tf.Qwen2VLForConditionalGeneration, config, grid_inputs, attention)


def tiny_qwen2_5_vl(layers=6, attention="sdpa", **text):
    """Windows of 2 x 2 tokens in the first vision layer, whole frames in the second."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1000.0}
    vision = {**QWEN_VISION, "out_hidden_size": 32, "window_size": 8, "fullatt_block_indexes": [1]}
    text = {**TEXT, "num_hidden_layers": layers, "rope_parameters": rope, **text}
    config = tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **IDS)
    return finish(tf.Qwen2_5_VLForConditionalGeneration, config, grid_inputs, attention)


def tiny_qwen3_vl(layers=6, attention="sdpa", **text):
    """Deep-stack features after decoder layers 0, 1 and 2.

    Heads of 16, more than hidden / heads.
    """
    rope = {"rope_type": "default", "mrope_section": [3, 3, 2], "rope_theta": 1000.0}
    vision = {
        **QWEN_VISION,
        "depth": 4,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0, 1, 2],
        "num_position_embeddings": 16,
    }
    text = {**TEXT, "head_dim": 16, "num_hidden_layers": layers, "rope_parameters": rope, **text}
    config = tf.Qwen3VLConfig(text_config=text, vision_config=vision, **IDS)
    return finish(tf.Qwen3VLForConditionalGeneration, config, grid_inputs, attention)


# ---- tiles ---------------------------------------------------------------------------------------
VIT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
PINPOINTS = [[16, 8], [8, 16], [16, 16], [8, 24]]


def tiled(pixels, sizes):
    """Any pictures (images, 3, 16, 16) as tiles of 8 x 8.

    sizes: of the images that the tiles stand for. Unused tiles are zero.
    """
    most = max(tile_count(s) for s in sizes)
    flat = (
        pixels.flatten(1).repeat(1, 2)[:, : most * 192].reshape(len(pixels), most, 3, 8, 8).clone()
    )
    for row, size in zip(flat, sizes, strict=True):
        row[tile_count(size) :] = 0
    return flat


def tile_count(size):
    """How many tiles an image has, the whole image among them.

    Of the pinpoint that just holds the image, which is true of the sizes used here.
    """
    height, width = size
    return 1 + -(-height // 8) * -(-width // 8)


def tile_inputs(config, inputs):
    """LLaVA-NeXT, LLaVA-OneVision: a plain image is 16 x 8, two tiles and the whole."""
    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.ndim == 5:
        return inputs
    return {
        **inputs,
        "pixel_values": tiled(pixels, [(16, 8)] * len(pixels)),
        "image_sizes": torch.tensor([[16, 8]] * len(pixels)),
    }


def tiny_llava_next(layers=6, attention="sdpa", text="llama", **options):
    """CLIP on tiles of 2 x 2 patches, image-newline tokens."""
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(image_size=8, patch_size=4, **VIT),
        vision_feature_layer=-1,
        text_config={"model_type": text, **TEXT, "num_hidden_layers": layers, **options},
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )
    return finish(tf.LlavaNextForConditionalGeneration, config, tile_inputs, attention)


def tiny_llava_onevision(layers=6, attention="sdpa", **text):
    """SigLIP on tiles of 2 x 2 patches; one token a video frame."""
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(
            image_size=8, patch_size=4, vision_use_head=False, **VIT
        ),
        text_config={"model_type": "qwen2", **TEXT, "num_hidden_layers": layers, **text},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
    )
    return finish(tf.LlavaOnevisionForConditionalGeneration, config, tile_inputs, attention)


def tiny_internvl(layers=6, attention="sdpa", **text):
    """InternViT of 8 x 8 patches, 4 patches a token."""
    config = tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(image_size=[16, 16], patch_size=[2, 2], **VIT),
        text_config={"model_type": "qwen2", **TEXT, "num_hidden_layers": layers, **text},
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return finish(tf.InternVLForConditionalGeneration, config, attention=attention)


def grouped_inputs(config, inputs):
    """Idefics3, SmolVLM: images by sample, with empty ones where a sample has fewer."""
    ids, pixels = inputs.get("input_ids"), inputs.get("pixel_values")
    if pixels is None or pixels.ndim == 5:
        return inputs
    counts = [n // 16 for n in runs(ids)]
    full = pixels.new_zeros(len(ids), max(counts), *pixels.shape[1:])
    for b, own in enumerate(pixels.split(counts)):
        full[b, : len(own)] = own
    return {**inputs, "pixel_values": full}


def tiny_idefics3(layers=6, attention="sdpa", prefix="Idefics3", **text):
    """SigLIP-like tower of 8 x 8 patches, 4 patches a token, one matrix as projector."""
    vision = getattr(tf, f"{prefix}VisionConfig")(image_size=16, patch_size=2, **VIT)
    config = getattr(tf, f"{prefix}Config")(
        vision_config=vision,
        text_config={"model_type": "llama", **TEXT, "num_hidden_layers": layers, **text},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    return finish(
        getattr(tf, f"{prefix}ForConditionalGeneration"), config, grouped_inputs, attention
    )


def tiny_smolvlm(layers=6, attention="sdpa", **text):
    """As Idefics3."""
    return tiny_idefics3(layers, attention, "SmolVLM", **text)


# ---- Gemma ---------------------------------------------------------------------------------------
def typed_inputs(config, inputs):
    """Gemma 3: which tokens belong to an image."""
    ids = inputs.get("input_ids")
    if (
        ids is None
        or inputs.get("token_type_ids") is not None
        or inputs.get("past_key_values")
        and (inputs["past_key_values"].get_seq_length())
    ):
        return inputs
    return {**inputs, "token_type_ids": (ids == IMAGE).long()}


def tiny_gemma3(layers=6, attention="sdpa", window=8, **text):
    """Two layers in three see 8 tokens back. The tokens of an image see each other.

    4 patches make a token.
    """
    kinds = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(layers)]
    config = tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(
            image_size=16, patch_size=2, vision_use_head=False, **VIT
        ),
        text_config={
            **TEXT,
            "head_dim": 16,
            "query_pre_attn_scalar": 10,
            "num_hidden_layers": layers,
            "sliding_window": window,
            "layer_types": kinds,
            **text,
        },
        image_token_index=IMAGE,
        mm_tokens_per_image=16,
        boi_token_index=3,
        eoi_token_index=3,
        initializer_range=0.2,
    )
    model = finish(tf.Gemma3ForConditionalGeneration, config, typed_inputs, attention)
    # Zero by default.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model


def prefix_inputs(config, inputs):
    """PaliGemma: 0 for the prompt, which sees all of itself."""
    ids = inputs.get("input_ids")
    if (
        ids is None
        or inputs.get("token_type_ids") is not None
        or inputs.get("past_key_values")
        and (inputs["past_key_values"].get_seq_length())
    ):
        return inputs
    return {**inputs, "token_type_ids": torch.zeros_like(ids)}


def tiny_paligemma(layers=6, attention="sdpa", text="gemma", **options):
    """One token a patch.

    The text model may be Gemma 2, with sliding windows and capped attention logits.
    """
    config = tf.PaliGemmaConfig(
        vision_config=tf.SiglipVisionConfig(
            image_size=16, patch_size=4, vision_use_head=False, projection_dim=32, **VIT
        ),
        text_config={
            "model_type": text,
            **TEXT,
            "head_dim": 16,
            "num_hidden_layers": layers,
            **options,
        },
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    return finish(tf.PaliGemmaForConditionalGeneration, config, prefix_inputs, attention)


BUILDERS = {
    "qwen2_vl": tiny_qwen2_vl,
    "qwen2_5_vl": tiny_qwen2_5_vl,
    "qwen3_vl": tiny_qwen3_vl,
    "llava_next": tiny_llava_next,
    "llava_onevision": tiny_llava_onevision,
    "internvl": tiny_internvl,
    "idefics3": tiny_idefics3,
    "smolvlm": tiny_smolvlm,
    "gemma3": tiny_gemma3,
    "paligemma": tiny_paligemma,
}


# ---- prompts with images of different sizes, several images, video -------------------------------
GRIDS = {"image": [(1, 8, 8), (1, 4, 12), (1, 6, 10)], "video": [(2, 4, 8), (4, 4, 4)]}
# The last is padded to 16 x 16, and the padding's tokens are cut off.
SIZES = [(16, 8), (8, 16), (14, 16)]
VIDEOS = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"}


def grid_media(model, kind, shapes, g):
    """Qwen: patches and grids. Qwen3-VL writes the time between the frames of a video."""
    grids = [GRIDS[kind][s] for s in chain(*shapes)]
    pixels, grid = {
        "image": ("pixel_values", "image_grid_thw"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }[kind]
    apart = kind == "video" and model.config.model_type == "qwen3_vl"
    values = torch.randn(sum(t * h * w for t, h, w in grids), 24, generator=g)
    tensors = {pixels: values, grid: torch.tensor(grids)}
    return tensors, [[h * w // 4] * t if apart else [t * h * w // 4] for t, h, w in grids]


def tile_media(model, kind, shapes, g):
    """LLaVA-NeXT and OneVision: tiles and sizes.

    OneVision leaves several images whole, and video.
    """
    count = sum(map(len, shapes))
    if kind == "video":
        tensors = {"pixel_values_videos": torch.randn(count, 4, 3, 8, 8, generator=g)}
        # Frames, and a newline.
        return tensors, [[4 + 1]] * count
    sizes = [SIZES[s] for s in chain(*shapes)]
    tensors = {
        "pixel_values": tiled(torch.randn(count, 3, 16, 16, generator=g), sizes),
        "image_sizes": torch.tensor(sizes),
    }
    if model.config.model_type == "llava_onevision":
        tensors["batch_num_images"] = torch.tensor([len(s) for s in shapes])
    return tensors, [[n] for n in map(len, model.get_image_features(**tensors).pooler_output)]


def square_media(model, kind, shapes, g):
    """The others: tiles of 16 x 16 with 16 tokens.

    Shape k has k + 1 of them, but not in the Gemmas.
    """
    one = model.config.model_type in ("gemma3", "paligemma")
    tiles = [[1] * (1 if one else s + 1) for s in chain(*shapes)]
    pixels = torch.randn(sum(map(sum, tiles)), 3, 16, 16, generator=g)
    return {"pixel_values": pixels}, [[16 * len(t)] for t in tiles]


MEDIA = {
    "qwen2_vl": grid_media,
    "qwen2_5_vl": grid_media,
    "qwen3_vl": grid_media,
    "llava_next": tile_media,
    "llava_onevision": tile_media,
}


@torch.no_grad()
def prompts(model, samples, padding="left", seed=0):
    """Inputs as the family's processor gives them, and the number of visual tokens of each sample.

    samples: one list per sample, of numbers of text tokens and ("image" or "video", shape).
    """
    g = torch.Generator().manual_seed(seed)
    inputs, media = {}, {}
    for kind in ("image", "video"):
        shapes = [
            [p[1] for p in pieces if isinstance(p, tuple) and p[0] == kind] for pieces in samples
        ]
        if any(shapes):
            tensors, lengths = MEDIA.get(model.config.model_type, square_media)(
                model, kind, shapes, g
            )
            inputs.update(tensors)
            media[kind] = iter(lengths)
    rows, n_visual = [], []
    for pieces in samples:
        row = [BOS]
        for piece in pieces:
            if isinstance(piece, int):
                row += torch.randint(6, VOCAB, (piece,), generator=g).tolist()
            else:
                token = IMAGE if piece[0] == "image" else VIDEO
                row += [3] + list(chain(*([token] * n + [3] for n in next(media[piece[0]]))))
        rows.append(row)
        n_visual.append(row.count(IMAGE) + row.count(VIDEO))
    width = max(map(len, rows))
    for name, fill, values in (
        ("input_ids", PAD, rows),
        ("attention_mask", 0, [[1] * len(r) for r in rows]),
    ):
        space = [[fill] * (width - len(r)) for r in values]
        pairs = zip(values, space, strict=True)
        inputs[name] = torch.tensor([s + r if padding == "left" else r + s for r, s in pairs])
    return processed(model, inputs), n_visual
