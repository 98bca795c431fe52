"""LLaVA-OneVision (`LlavaOnevisionForConditionalGeneration`): one image in tiles, several, or video."""

from __future__ import annotations

from math import sqrt

from ..registry import register_adapter
from .llava_next import LlavaNext
from .towers import side


@register_adapter("llava_onevision")
class LlavaOneVision(LlavaNext):
    """LLaVA-OneVision: as LLaVA-NeXT, but large grids are shrunk, and video frames are pooled to a quarter.

    For FLOPs, `images` may be the number of tiles: one for a video frame, and for an image that is not alone.
    """

    architectures = ("LlavaOnevisionForConditionalGeneration",)
    model_types = ("llava_onevision",)

    @classmethod
    def most_tokens(cls, config, pinpoint):
        """Grids of more than `anyres_max_N` tiles' area are shrunk to it."""
        v = config.vision_config
        patches = side(v.image_size) // side(v.patch_size)
        rows, columns, _ = cls.grid(config, pinpoint)
        height, width = rows * patches, columns * patches
        area = int(config.vision_aspect_ratio.removeprefix("anyres_max_")) * patches**2
        ratio = sqrt(height * width / area)
        if ratio > 1.1:
            height, width = int(height // ratio), int(width // ratio)
        return cls.tokens_per_tile(config) + height * (width + 1)
