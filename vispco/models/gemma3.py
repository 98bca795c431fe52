"""Gemma 3 (`Gemma3ForConditionalGeneration`): images see all of themselves, sliding windows."""

from __future__ import annotations

from ..registry import register_adapter
from .base import Adapter
from .towers import vit


@register_adapter("gemma3")
class Gemma3(Adapter):
    """Gemma 3: a fixed number of visual tokens per image; masks are more than causal, so always gathered."""

    architectures = ("Gemma3ForConditionalGeneration",)
    model_types = ("gemma3",)
    causal = False

    @classmethod
    def vision_flops(cls, config, n_visual, images=None):
        """The whole tower; patches are pooled before the one matrix of the projector."""
        v, text = config.vision_config, config.get_text_config(decoder=True)
        count = -(-n_visual // config.mm_tokens_per_image)
        return count * vit(v), count * 2 * config.mm_tokens_per_image * v.hidden_size * text.hidden_size
