"""LLaVA-1.5 (`LlavaForConditionalGeneration`): CLIP tower, two-layer projector, Llama decoder."""

from __future__ import annotations

from ..registry import register_adapter
from .base import Adapter


@register_adapter("llava")
class Llava(Adapter):
    """LLaVA-1.5: a fixed number of visual tokens per image."""

    architectures = ("LlavaForConditionalGeneration",)
    model_types = ("llava",)

    @classmethod
    def vision_flops(cls, config, n_visual: int) -> tuple[int, int]:
        """The whole CLIP tower (Hugging Face runs every layer) and the projector's two matrices."""
        v, text = config.vision_config, config.get_text_config(decoder=True)
        patches = (v.image_size // v.patch_size) ** 2
        strategy = getattr(config, "vision_feature_select_strategy", "default")
        images = -(-n_visual // (patches if strategy == "default" else patches + 1))
        d, n = v.hidden_size, patches + 1  # with the CLS token
        layer = 8 * n * d * d + 4 * n * n * d + 4 * n * d * v.intermediate_size
        tower = 2 * patches * v.num_channels * v.patch_size**2 * d + v.num_hidden_layers * layer
        feature_layers = config.vision_feature_layer
        width = d * (len(feature_layers) if isinstance(feature_layers, (list, tuple)) else 1)
        tokens = patches if strategy == "default" else n
        projector = 2 * tokens * (width * text.hidden_size + text.hidden_size**2)
        return images * tower, images * projector
