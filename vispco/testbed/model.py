"""The testbed's architecture and its loader: a small, real `LlavaForConditionalGeneration`."""

from __future__ import annotations

from pathlib import Path

import torch

from .vocab import CELLS, EOS, ID, IMAGE, PAD, WORDS, build_tokenizer

IMAGE_SIZE, PATCH = 64, 8
LAYERS, HIDDEN, HEADS, FEED_FORWARD = 8, 128, 4, 352
VISION_LAYERS, VISION_HIDDEN = 2, 64
MEAN, STD = 0.5, 0.5  # pixel normalisation
MODELS = ("testbed-llava",)
_ALIASES = {"testbed": "testbed-llava"}
FOLDER = Path(__file__).resolve().parent / "checkpoints"


def build_config():
    """The `LlavaConfig`: two CLIP layers (64 patches of 8x8 pixels) and a Llama decoder of eight layers."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=VISION_HIDDEN, intermediate_size=4 * VISION_HIDDEN, num_hidden_layers=VISION_LAYERS,
        num_attention_heads=4, image_size=IMAGE_SIZE, patch_size=PATCH, projection_dim=VISION_HIDDEN,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=HIDDEN, intermediate_size=FEED_FORWARD, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=256,
        pad_token_id=ID[PAD], eos_token_id=ID[EOS], bos_token_id=None, tie_word_embeddings=False,
        initializer_range=0.08,  # scaled to the small width; 0.02 makes training start far more slowly
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=ID[IMAGE], image_token_id=ID[IMAGE],
        image_seq_length=CELLS, vision_feature_layer=-1, vision_feature_select_strategy="default",
        projector_hidden_act="gelu", tie_word_embeddings=False,
    )  # fmt: skip


def build_model(seed: int):
    """A fresh, untrained model with seeded weights (the global generator is left as it was)."""
    from transformers import LlavaForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(build_config())


def build_processor():
    """The matching `LlavaProcessor`: a PIL image processor that only rescales and normalises, and the words."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(
        size=square, crop_size=square, resample=2, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    return LlavaProcessor(
        image_processor=images, tokenizer=build_tokenizer(), patch_size=PATCH, image_token=IMAGE,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def load(name: str = "testbed-llava"):
    """Load a shipped model by name: (model in eval mode and float32, processor). Touches no network."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    key = _ALIASES.get(name, name)
    if key not in MODELS:
        known = (*MODELS, *_ALIASES)
        raise ValueError(f"unknown testbed model {name!r}: expected one of {known}; see testbed.MODELS")
    folder = FOLDER / key
    if not (folder / "model.safetensors").exists():
        raise FileNotFoundError(f"no checkpoint in {folder}: make it with `python -m vispco.testbed.train`")
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, attn_implementation="sdpa"
    )
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)
