"""Gemma 3 (`Gemma3ForConditionalGeneration`): images see all of themselves, sliding windows."""

from __future__ import annotations

from math import isqrt

from ..registry import register_adapter
from .base import Adapter
from .towers import patches_a_side, vit


@register_adapter("gemma3")
class Gemma3(Adapter):
    """Gemma 3: a fixed number of visual tokens per image; masks are more than causal, so always gathered."""

    architectures = ("Gemma3ForConditionalGeneration",)
    model_types = ("gemma3",)
    causal = False

    @classmethod
    def merge(cls, config):
        """Patches are pooled down to a fixed number of tokens."""
        return patches_a_side(config.vision_config) // isqrt(config.mm_tokens_per_image)

    @classmethod
    def vision_flops(cls, config, n_visual, images=None):
        """The whole tower; patches are pooled before the one matrix of the projector."""
        v, text = config.vision_config, config.get_text_config(decoder=True)
        count = cls.tile_count(config, n_visual)
        return count * vit(
            v
        ), count * 2 * config.mm_tokens_per_image * v.hidden_size * text.hidden_size
