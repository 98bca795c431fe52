"""Models with random weights and the layer shapes of known models.

Also prompts of any number of visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers as tf
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vispco import PruningConfig

IMAGE, PAD = 5, 0
#: The decoder's hidden size, FFN width, heads, key-value heads, layers and vocabulary.
#: The last three are the true shapes of LLaVA-1.5-7B, Qwen2.5-VL-3B and Qwen2.5-VL-7B.
TEXT = {
    "tiny": (32, 56, 4, 2, 6, 60),
    "small": (512, 1408, 8, 8, 8, 1000),
    "llava-1.5-7b": (4096, 11008, 32, 32, 32, 32064),
    "qwen2.5-vl-3b": (2048, 11008, 16, 2, 36, 151936),
    "qwen2.5-vl-7b": (3584, 18944, 28, 4, 28, 152064),
}
#: The tower's hidden size, FFN width, heads, layers, and the sides of image and patch in pixels.
#: LLaVA's is CLIP-L/14 at 336 pixels.
CLIP = {
    "tiny": (24, 48, 2, 2, 16, 4),
    "small": (128, 512, 4, 4, 336, 14),
    "llava-1.5-7b": (1024, 4096, 16, 24, 336, 14),
}
#: Whether the input and output embeddings are tied.
QWEN = {"qwen2.5-vl-3b": True, "qwen2.5-vl-7b": False}


def build(
    name: str,
    layers: int | None = None,
    vision_layers: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A random model of that shape in eval mode, with sdpa.

    layers, vision_layers: how many to build, if fewer than the known model has.

    Raises ValueError for an unknown name or a number of layers that is not positive.
    """
    if name not in TEXT:
        raise ValueError(f"unknown model {name!r}: choose from {', '.join(TEXT)}")
    if min(layers or 1, vision_layers or 1) < 1 or layers == 0 or vision_layers == 0:
        raise ValueError(
            f"layers must be at least 1, got {layers} and {vision_layers} in the vision tower"
        )
    hidden, ffn, heads, kv_heads, depth, vocabulary = TEXT[name]
    text = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers or depth,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if name in QWEN:
        vision_depth = vision_layers or 32
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        text |= {"tie_word_embeddings": QWEN[name], "rope_parameters": rope}
        vision = {
            "depth": vision_depth,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [i for i in (7, 15, 23, 31) if i < vision_depth],
        }
        config = tf.Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=4,
            vision_start_token_id=3,
            vision_end_token_id=3,
            tie_word_embeddings=QWEN[name],
        )
        kind = tf.Qwen2_5_VLForConditionalGeneration
    else:
        width, inner, vision_heads, vision_depth, image, patch = CLIP[name]
        vision = {
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": vision_layers or vision_depth,
            "num_attention_heads": vision_heads,
            "image_size": image,
            "patch_size": patch,
        }
        config = tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**vision),
            text_config=tf.LlamaConfig(**text),
            image_token_id=IMAGE,
            vision_feature_layer=-1,
        )
        kind = tf.LlavaForConditionalGeneration
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = kind(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.pad_token_id = PAD
    return model.requires_grad_(False)


@dataclass
class Prompt:
    """A batch of alike prompts.

    inputs: of the model, with ready-made visual features.
    pictures: inputs of the vision tower that give as many tokens; None if no pictures do.
    """

    inputs: dict
    pictures: dict | None
    n_visual: int
    n_text: int


def prompt(
    model: nn.Module, n_visual: int, n_text: int = 64, batch: int = 1, seed: int = 0
) -> Prompt:
    """Half of the text, one run of visual tokens, the other half; no padding.

    Raises ValueError unless there is a visual token, and two of text.
    """
    if n_visual < 1 or n_text < 2 or batch < 1:
        raise ValueError(
            "need visual tokens >= 1, text >= 2 and batch >= 1, "
            f"got {n_visual}, {n_text} and {batch}"
        )
    g, where = torch.Generator().manual_seed(seed), {"device": model.device, "dtype": model.dtype}
    text = model.config.get_text_config()
    ids = torch.randint(6, text.vocab_size, (batch, n_text), generator=g)
    image = torch.full((batch, n_visual), IMAGE)
    ids = torch.cat([ids[:, : n_text // 2], image, ids[:, n_text // 2 :]], 1).to(model.device)
    features = (0.02 * torch.randn(batch, n_visual, text.hidden_size, generator=g)).to(**where)
    encoded = BaseModelOutputWithPooling(pooler_output=tuple(features))
    inputs = {"input_ids": ids, "mm_encoder_outputs": {"image": encoded}}
    vision = model.config.vision_config
    if model.config.model_type == "llava":
        tile = (vision.image_size // vision.patch_size) ** 2
        shape = (batch * (n_visual // tile), 3, vision.image_size, vision.image_size)
        tiles = torch.randn(shape, generator=g)
        pictures = {"pixel_values": tiles.to(**where)} if n_visual % tile == 0 else None
    else:
        height = max(h for h in range(1, int(n_visual**0.5) + 1) if n_visual % h == 0)
        grid = torch.tensor(
            [[1, 2 * height, 2 * (n_visual // height)]] * batch, device=model.device
        )
        inputs |= {"image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).int()}
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pictures = {
            "pixel_values": torch.randn(batch * 4 * n_visual, patch, generator=g).to(**where),
            "image_grid_thw": grid,
        }
    return Prompt(inputs, pictures, n_visual, n_text)


def prefill(model: nn.Module, prompt: Prompt) -> tf.Cache:
    """The work before the first token, the vision tower apart; returns the KV cache."""
    return model(**prompt.inputs, use_cache=True, logits_to_keep=1).past_key_values


def decode(model: nn.Module, cache: tf.Cache, steps: int, first: Tensor) -> None:
    """Decode `steps` tokens, one at a time, each fed `first` (B, 1). The cache ends as it began."""
    for _ in range(steps):
        model(input_ids=first, past_key_values=cache, use_cache=True)
    cache.crop(-steps)


def plain(cache: tf.Cache) -> tf.Cache:
    """The same keys and values in a cache that does not remember being pruned."""
    copy = tf.DynamicCache()
    for i, layer in enumerate(cache.layers):
        copy.update(layer.keys, layer.values, i)
    return copy


def kv_bytes(cache: tf.Cache) -> int:
    """Bytes of all keys and values in the cache."""
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def schedules(layers: int, method: str = "fastv") -> dict[str, PruningConfig]:
    """50 %, 25 % and 10 % kept from layer 2, and three steps down to 10 %.

    Raises ValueError for fewer than 5 layers, which three steps from layer 2 do not fit in.

    >>> schedules(8)["steps"].keep_ratios
    [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.1, 0.1]
    """
    if layers < 5:
        raise ValueError(
            f"the schedules need at least 5 layers, got {layers}: three steps from layer 2"
        )
    second, third = max(3, layers // 2), max(4, 3 * layers // 4)
    ratios = {f"{keep:.0%}": [1.0] * 2 + [keep] * (layers - 2) for keep in (0.5, 0.25, 0.1)}
    ratios["steps"] = (
        [1.0] * 2 + [0.5] * (second - 2) + [0.25] * (third - second) + [0.1] * (layers - third)
    )
    return {name: PruningConfig(method, kept) for name, kept in ratios.items()}


def add_arguments(parser, model: str, visual: list[int], extra: tuple[str, ...] = ()) -> None:
    """The options that name a model and its prompts. extra: further models to choose from."""
    parser.add_argument(
        "--model", default=model, choices=[*TEXT, *extra], help="whose layer shapes"
    )
    parser.add_argument("--layers", type=int, help="fewer decoder layers than it has")
    parser.add_argument("--vision-layers", type=int, help="fewer layers of the vision tower")
    parser.add_argument(
        "--visual", type=int, nargs="+", default=visual, help="numbers of visual tokens"
    )
    parser.add_argument("--text", type=int, default=64, help="text tokens")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes")


def settings(options):
    """The model that the options ask for, and each prompt in turn with what to call it."""
    dtype = getattr(torch, options.dtype)
    model = build(options.model, options.layers, options.vision_layers, options.device, dtype)
    for batch in options.batch:
        for n_visual in options.visual:
            sample = prompt(model, n_visual, options.text, batch, options.seed)
            setting = {
                "model": options.model,
                "layers": len(model.get_decoder().layers),
                "batch": batch,
                "n_visual": n_visual,
                "n_text": options.text,
            }
            yield model, sample, setting
