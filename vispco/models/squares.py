"""Families whose tiles are squares of one size, and whose tokens are squares of patches."""

from __future__ import annotations

from math import isqrt
from typing import ClassVar

import torch

from ..registry import register_adapter
from .base import Adapter
from .towers import squares


@register_adapter("squares")
class Squares(Adapter):
    """InternVL, Idefics3, SmolVLM: a tile gives a square of tokens, row by row.

    A token is made of a square of patches. To SmolVLM and InternVL, video frames are tiles.
    """

    architectures: ClassVar[tuple[str, ...]] = (
        "Idefics3ForConditionalGeneration",
        "InternVLForConditionalGeneration",
        "SmolVLMForConditionalGeneration",
    )
    model_types: ClassVar[tuple[str, ...]] = ("idefics3", "internvl", "smolvlm")

    def tokens_from_patches(self, values, inputs, kind):
        """The mean of a square of patches, without the class token."""
        patches = values[:, self.class_token(self.config) :]
        tokens = self.tokens_per_tile(self.config)
        return squares(patches, isqrt(patches.shape[1] // tokens)).flatten(0, 1)

    def places(self, n, inputs, kind):
        """Frame, row and column (n, 3): each tile is a frame, and a square."""
        size = self.tokens_per_tile(self.config)
        token, across = torch.arange(n), isqrt(size)
        # A class token stands where the first patch does.
        place = (token % size - size % across).clamp(min=0)
        return torch.stack([token // size, place // across, place % across], -1)


@register_adapter("gemma")
class Gemma(Squares):
    """Gemma 3 and PaliGemma: images, or whole prompts, see all of themselves."""

    architectures = ("Gemma3ForConditionalGeneration", "PaliGemmaForConditionalGeneration")
    model_types = ("gemma3", "paligemma")
    causal = False
