"""Models of true shapes with random weights, made on the device itself, and their prompts.

The sizes are those of the published configurations. Nothing is downloaded, and no processor is
needed: prompts are tensors.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers as tf
from torch import nn

from .. import shapes

IMAGE, VIDEO, START, PAD = 5, 4, 3, 0
#: The decoder's hidden size, FFN width, heads, key-value heads, layers and vocabulary.
TEXT = {
    "llava-1.5-7b": shapes.TEXT["llava-1.5-7b"],
    "llava-1.5-13b": (5120, 13824, 40, 40, 40, 32064),
    "qwen2.5-vl-3b": shapes.TEXT["qwen2.5-vl-3b"],
    "qwen2.5-vl-7b": shapes.TEXT["qwen2.5-vl-7b"],
    "qwen2.5-vl-32b": (5120, 27648, 40, 8, 64, 152064),
    "qwen2.5-vl-72b": (8192, 29568, 64, 8, 80, 152064),
    "qwen3-vl-8b": (4096, 12288, 32, 8, 36, 151936),
}
TINY = (64, 96, 4, 2, 6, 100)
TIED = {"qwen2.5-vl-3b"}
#: The vision towers: CLIP-L/14 at 336 pixels, and those of Qwen.
CLIP: dict[str, Any] = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_attention_heads=16,
    num_hidden_layers=24,
    image_size=336,
    patch_size=14,
)
QWEN2_5 = dict(
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    depth=32,
    patch_size=14,
    window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31],
)
QWEN3 = dict(
    hidden_size=1152,
    intermediate_size=4304,
    num_heads=16,
    depth=27,
    patch_size=16,
    num_position_embeddings=2304,
    deepstack_visual_indexes=[8, 16, 24],
)
TINY_CLIP: dict[str, Any] = dict(
    hidden_size=24,
    intermediate_size=48,
    num_attention_heads=2,
    num_hidden_layers=2,
    image_size=16,
    patch_size=4,
)
TINY_QWEN: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=40, num_heads=2, depth=4, patch_size=2
)


def config(name: str, tiny: bool = False) -> Any:
    """The configuration of a model of `TEXT`, with sdpa.

    tiny: one of the same family with sizes that a CPU runs in milliseconds.
    """
    hidden, ffn, heads, kv_heads, layers, vocabulary = TINY if tiny else TEXT[name]
    text: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if name.startswith("llava"):
        made: Any = tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**(TINY_CLIP if tiny else CLIP)),
            text_config=tf.LlamaConfig(**text),
            image_token_id=IMAGE,
            vision_feature_layer=-2,
        )
    else:
        third = name.startswith("qwen3")
        sections = ([3, 3, 2] if third else [2, 3, 3]) if tiny else None
        sections = sections or ([24, 20, 20] if third else [16, 24, 24])
        rope = {"rope_type": "default", "rope_theta": 5e6 if third else 1e6}
        text["rope_parameters"] = {**rope, "mrope_section": sections}
        if third:
            text |= {"head_dim": 16 if tiny else 128}
            text["rope_parameters"]["mrope_interleaved"] = True
        vision: dict[str, Any] = QWEN3 if third else QWEN2_5
        if tiny:
            deep = {"deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 16}
            windows = {"window_size": 8, "fullatt_block_indexes": [1, 3]}
            vision = {**TINY_QWEN, **(deep if third else windows)}
        elif name in ("qwen2.5-vl-32b", "qwen2.5-vl-72b"):
            vision = {**vision, "intermediate_size": 3456}
        tied = name in TIED and not tiny
        made = (tf.Qwen3VLConfig if third else tf.Qwen2_5_VLConfig)(
            text_config={**text, "tie_word_embeddings": tied},
            vision_config={**vision, "out_hidden_size": hidden},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=START,
            vision_end_token_id=START,
            tie_word_embeddings=tied,
        )
    made._attn_implementation = "sdpa"
    return made


def build(
    name: str, tiny: bool, device: str, dtype: torch.dtype | None, seed: int = 0
) -> nn.Module:
    """The model in eval mode, with weights drawn on the device: no copy in main memory.

    It generates as many tokens as are asked for, for no token ends an answer.
    """
    kinds: dict[str, Any] = {
        "llava": tf.LlavaForConditionalGeneration,
        "qwen2_5_vl": tf.Qwen2_5_VLForConditionalGeneration,
        "qwen3_vl": tf.Qwen3VLForConditionalGeneration,
    }
    made, before = config(name, tiny), torch.get_default_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device(device):
            model = kinds[made.model_type](made).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False)


def prompt(model: Any, n_visual: int, n_text: int, batch: int, seed: int = 0) -> dict[str, Any]:
    """Inputs of a batch: half of the text, one run of visual tokens, the other half; no padding.

    LLaVA's visual tokens are those of as many pictures as are needed, Qwen's of one picture.
    Raises ValueError if no whole number of pictures has as many tokens.
    """
    where = {"device": model.device}
    g = torch.Generator(**where).manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(6, vocabulary, (batch, n_text), generator=g, **where)
    ids[:, n_text // 2 - 1] = START
    image = torch.full((batch, n_visual), IMAGE, **where)
    ids = torch.cat([ids[:, : n_text // 2], image, ids[:, n_text // 2 :]], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    vision = model.config.vision_config
    if model.config.model_type == "llava":
        tile = (vision.image_size // vision.patch_size) ** 2
        if n_visual % tile:
            raise ValueError(f"a picture has {tile} visual tokens: {n_visual} is no multiple")
        shape = [batch * n_visual // tile, 3, vision.image_size, vision.image_size]
    else:
        merge = vision.spatial_merge_size
        height = max(h for h in range(1, int(n_visual**0.5) + 1) if n_visual % h == 0)
        grid = [[1, merge * height, merge * (n_visual // height)]]
        inputs["image_grid_thw"] = torch.tensor(grid * batch, **where)
        # The first releases of transformers 5 have no such argument.
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
            inputs["mm_token_type_ids"] = (ids == IMAGE).int()
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        shape = [batch * merge**2 * n_visual, patch]
    pixels = torch.randn(shape, generator=g, dtype=model.dtype, **where)
    return {**inputs, "pixel_values": pixels}


@contextlib.contextmanager
def without_tower(model: Any, inputs: dict) -> Iterator[Callable[[], Any]]:
    """Inside, the model gets the features of these inputs ready-made, and its tower does not run.

    Gives a call that runs the tower alone.
    """
    backbone = model.model
    calls: list[tuple[Callable, Any]] = []
    true = backbone.get_image_features

    @functools.wraps(true)
    def once(*args, **kwargs):
        if not calls:
            made = true(*args, **kwargs)
            for on_the_way in ("last_hidden_state", "hidden_states", "attentions"):
                if getattr(made, on_the_way, None) is not None:
                    made[on_the_way] = None
            calls.append((partial(true, *args, **kwargs), made))
        return calls[0][1]

    backbone.get_image_features = once
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
        yield calls[0][0]
    finally:
        del backbone.get_image_features
