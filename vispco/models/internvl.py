"""InternVL (`InternVLForConditionalGeneration`): tiles of a fixed size, four patches a token."""

from __future__ import annotations

from ..registry import register_adapter
from .base import Adapter


@register_adapter("internvl")
class InternVL(Adapter):
    """InternVL: each tile, thumbnail and video frame gives `image_seq_length` visual tokens."""

    architectures = ("InternVLForConditionalGeneration",)
    model_types = ("internvl",)

    @classmethod
    def patches_per_token_side(cls, config):
        """Patches along the side of the square that makes a token."""
        return int(1 / config.downsample_ratio)
