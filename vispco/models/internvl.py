"""InternVL (`InternVLForConditionalGeneration`): tiles of a fixed size, four patches a token."""

from __future__ import annotations

from ..registry import register_adapter
from .base import Adapter
from .towers import two_matrices, vit


@register_adapter("internvl")
class InternVL(Adapter):
    """InternVL: each tile, thumbnail and video frame gives `image_seq_length` visual tokens."""

    architectures = ("InternVLForConditionalGeneration",)
    model_types = ("internvl",)

    @classmethod
    def merge(cls, config):
        """Patches along the side of a token."""
        return int(1 / config.downsample_ratio)

    @classmethod
    def vision_flops(cls, config, n_visual, images=None):
        """Tower and projector on as many tiles as `n_visual` tokens need."""
        v, text = config.vision_config, config.get_text_config(decoder=True)
        tiles = cls.tile_count(config, n_visual)
        width = cls.merge(config) ** 2 * v.hidden_size
        return tiles * vit(v), tiles * two_matrices(
            cls.tokens_per_tile(config), width, text.hidden_size
        )
