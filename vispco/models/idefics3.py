"""Idefics3 and SmolVLM (`Idefics3ForConditionalGeneration`, `SmolVLMForConditionalGeneration`)."""

from __future__ import annotations

from ..registry import register_adapter
from .base import Adapter
from .towers import patches, vit


@register_adapter("idefics3")
class Idefics3(Adapter):
    """Idefics3: tiles of a fixed size, `scale_factor`^2 patches a token, one matrix as projector."""

    architectures = ("Idefics3ForConditionalGeneration",)
    model_types = ("idefics3",)

    tower = "vision_model"

    @classmethod
    def merge(cls, config):
        """Patches along the side of a token."""
        return config.scale_factor

    @classmethod
    def vision_flops(cls, config, n_visual, images=None):
        """Tower and projector on as many tiles as `n_visual` tokens need."""
        v, text = config.vision_config, config.get_text_config(decoder=True)
        tiles = cls.tile_count(config, n_visual)
        return tiles * vit(v), tiles * 2 * patches(v) * v.hidden_size * text.hidden_size


@register_adapter("smolvlm")
class SmolVLM(Idefics3):
    """SmolVLM: built like Idefics3; video frames are images to it."""

    architectures = ("SmolVLMForConditionalGeneration",)
    model_types = ("smolvlm",)
