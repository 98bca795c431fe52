"""Idefics3 and SmolVLM (`Idefics3ForConditionalGeneration`, `SmolVLMForConditionalGeneration`)."""

from __future__ import annotations

from ..registry import register_adapter
from .base import Adapter
from .towers import patches


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
    def projector_flops(cls, config):
        """FLOPs of the projector's one matrix, for one tile."""
        v, text = config.vision_config, config.get_text_config(decoder=True)
        return 2 * patches(v) * v.hidden_size * text.hidden_size


@register_adapter("smolvlm")
class SmolVLM(Idefics3):
    """SmolVLM: built like Idefics3; video frames are images to it."""

    architectures = ("SmolVLMForConditionalGeneration",)
    model_types = ("smolvlm",)
