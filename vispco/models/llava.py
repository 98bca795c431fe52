"""LLaVA-1.5 (`LlavaForConditionalGeneration`): CLIP tower, two-layer projector, Llama decoder."""

from __future__ import annotations

from ..registry import register_adapter
from .base import Adapter
from .towers import patches, two_matrices, vit


@register_adapter("llava")
class Llava(Adapter):
    """LLaVA-1.5: a fixed number of visual tokens per image."""

    architectures = ("LlavaForConditionalGeneration",)
    model_types = ("llava",)

    @classmethod
    def vision_flops(cls, config, n_visual: int, images=None) -> tuple[int, int]:
        """The whole tower and the projector's two matrices, for as many images as `n_visual` tokens need."""
        tokens = cls.tokens_per_tile(config)
        return cls.tile_flops(config, -(-n_visual // tokens))

    @classmethod
    def tokens_per_tile(cls, config) -> int:
        """Tokens that the projector makes of one image of the tower's size."""
        v = config.vision_config
        whole = config.vision_feature_select_strategy == "full" and v.model_type != "siglip_vision_model"
        return patches(v) + whole  # "default" leaves the CLS token out

    @classmethod
    def tile_flops(cls, config, tiles: int) -> tuple[int, int]:
        """Tower and projector on `tiles` images of the tower's size."""
        v, text = config.vision_config, config.get_text_config(decoder=True)
        layers = config.vision_feature_layer
        width = v.hidden_size * (len(layers) if isinstance(layers, (list, tuple)) else 1)
        return tiles * vit(v), tiles * two_matrices(cls.tokens_per_tile(config), width, text.hidden_size)
