"""LLaVA-1.5 (`LlavaForConditionalGeneration`): CLIP tower, two-layer projector, Llama decoder."""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate

from ..registry import register_adapter
from .base import Adapter
from .towers import patches, side, two_matrices, vit


@register_adapter("llava")
class Llava(Adapter):
    """LLaVA-1.5: a fixed number of visual tokens per image."""

    architectures = ("LlavaForConditionalGeneration",)
    model_types = ("llava",)

    def smaller(self, inputs, scale):
        """Smaller pictures for the tower, which `embedded` has to interpolate its position embeddings for."""
        if inputs["pixel_values"].ndim != 4:  # tiles
            return super().smaller(inputs, scale)
        v = self.config.vision_config
        patch, across = side(v.patch_size), side(v.image_size) // side(v.patch_size)
        now, tokens = max(1, round(across * scale)), self.tokens_per_tile(self.config)
        pixels = interpolate(
            inputs["pixel_values"], (now * patch, now * patch), mode="bilinear", antialias=True
        )
        return {"pixel_values": pixels}, [(tokens, tokens - across**2 + now**2)] * len(pixels)

    def embedded(self, inputs):
        """Embeddings in place of ids and pixels."""
        rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "pixel_values")}
        output = self.backbone.get_image_features(
            inputs["pixel_values"], interpolate_pos_encoding=True
        )
        features = torch.cat(list(output.pooler_output))
        embeds = self.model.get_input_embeddings()(inputs["input_ids"])
        visual = self.visual_mask(inputs["input_ids"], None)[..., None]
        return {**rest, "inputs_embeds": embeds.masked_scatter(visual, features.to(embeds))}

    @classmethod
    def vision_flops(cls, config, n_visual: int, images=None) -> tuple[int, int]:
        """The whole tower and the projector's two matrices, for as many images as `n_visual` tokens need."""
        return cls.tile_flops(config, cls.tile_count(config, n_visual))

    def tokens_from_patches(self, values, inputs, kind):
        """One each; `vision_feature_select_strategy` leaves the first out, or not."""
        return values[:, self.config.vision_feature_select_strategy == "default" :].flatten(0, 1)

    @classmethod
    def tokens_per_tile(cls, config):
        """Tokens that the projector makes of one image of the tower's size."""
        v = config.vision_config
        whole = (
            config.vision_feature_select_strategy == "full"
            and v.model_type != "siglip_vision_model"
        )
        return patches(v) + whole  # "default" leaves the CLS token out

    @classmethod
    def tile_flops(cls, config, tiles: int) -> tuple[int, int]:
        """Tower and projector on `tiles` images of the tower's size."""
        v, text = config.vision_config, config.get_text_config(decoder=True)
        layers = config.vision_feature_layer
        width = v.hidden_size * (len(layers) if isinstance(layers, (list, tuple)) else 1)
        return tiles * vit(v), tiles * two_matrices(
            cls.tokens_per_tile(config), width, text.hidden_size
        )
