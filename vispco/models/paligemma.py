"""PaliGemma and PaliGemma 2 (`PaliGemmaForConditionalGeneration`): a prompt sees all of itself."""

from __future__ import annotations

from ..registry import register_adapter
from .base import Adapter
from .towers import patches


@register_adapter("paligemma")
class PaliGemma(Adapter):
    """PaliGemma: a token per patch; attention within the prompt goes both ways."""

    architectures = ("PaliGemmaForConditionalGeneration",)
    model_types = ("paligemma",)
    causal = False

    @classmethod
    def projector_flops(cls, config):
        """FLOPs of the projector's one matrix, for one image."""
        v = config.vision_config
        return 2 * patches(v) * v.hidden_size * v.projection_dim
