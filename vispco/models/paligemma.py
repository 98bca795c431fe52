"""PaliGemma and PaliGemma 2 (`PaliGemmaForConditionalGeneration`): a prompt sees all of itself."""

from __future__ import annotations

from ..registry import register_adapter
from .base import Adapter


@register_adapter("paligemma")
class PaliGemma(Adapter):
    """PaliGemma: a token per patch; attention within the prompt goes both ways."""

    architectures = ("PaliGemmaForConditionalGeneration",)
    model_types = ("paligemma",)
    causal = False
