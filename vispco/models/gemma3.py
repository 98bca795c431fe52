"""Gemma 3 (`Gemma3ForConditionalGeneration`): images see all of themselves, sliding windows."""

from __future__ import annotations

from math import isqrt

from ..registry import register_adapter
from .base import Adapter
from .towers import patches_a_side


@register_adapter("gemma3")
class Gemma3(Adapter):
    """Gemma 3: a fixed number of visual tokens per image.

    Its masks are more than causal, so pruning always gathers them.
    """

    architectures = ("Gemma3ForConditionalGeneration",)
    model_types = ("gemma3",)
    causal = False

    @classmethod
    def patches_per_token_side(cls, config):
        """Patches along the side of a token: they are pooled to `mm_tokens_per_image` tokens."""
        return patches_a_side(config.vision_config) // isqrt(config.mm_tokens_per_image)
