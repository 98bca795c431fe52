"""Idefics3 and SmolVLM (`Idefics3ForConditionalGeneration`, `SmolVLMForConditionalGeneration`)."""

from __future__ import annotations

import torch

from ..registry import register_adapter
from .base import Adapter
from .towers import side


@register_adapter("idefics3")
class Idefics3(Adapter):
    """Idefics3: tiles of a fixed size, `scale_factor`^2 patches a token."""

    architectures = ("Idefics3ForConditionalGeneration",)
    model_types = ("idefics3",)

    tower = "vision_model"

    @classmethod
    def patches_per_token_side(cls, config):
        """Patches along the side of the square that makes a token."""
        return config.scale_factor

    @classmethod
    def pixels(cls, config, n_visual, images=None):
        """The tiles of one sample."""
        tiles, size = (
            -(-n_visual // cls.tokens_per_tile(config)),
            side(config.vision_config.image_size),
        )
        return {"pixel_values": torch.empty(1, tiles, 3, size, size, device="meta")}


@register_adapter("smolvlm")
class SmolVLM(Idefics3):
    """SmolVLM: built like Idefics3; video frames are images to it."""

    architectures = ("SmolVLMForConditionalGeneration",)
    model_types = ("smolvlm",)
