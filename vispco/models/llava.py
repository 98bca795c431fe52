"""LLaVA-1.5 (`LlavaForConditionalGeneration`): CLIP tower, two-layer projector, Llama decoder."""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate

from ..registry import register_adapter
from .squares import Squares
from .towers import patches, patches_a_side, side


@register_adapter("llava")
class Llava(Squares):
    """LLaVA-1.5: a fixed number of visual tokens per image."""

    architectures = ("LlavaForConditionalGeneration",)
    model_types = ("llava",)

    def smaller(self, inputs, scale):
        """Pictures smaller than the tower's own size: its position embeddings are interpolated.

        Not for families that cut their images into tiles.
        """
        pixels = inputs["pixel_values"]
        if pixels.ndim != 4:
            return super().smaller(inputs, scale)
        v = self.config.vision_config
        before = patches_a_side(v)
        after = max(1, round(before * scale))
        size = after * side(v.patch_size)
        pixels = interpolate(pixels, (size, size), mode="bilinear", antialias=True)
        tokens = self.tokens_per_tile(self.config)
        return {"pixel_values": pixels}, [(tokens, tokens - before**2 + after**2)] * len(pixels)

    def embedded(self, inputs):
        """Inputs with embeddings in place of ids and pixels, which may have any size."""
        rest = dict(inputs)
        ids, pixels = rest.pop("input_ids"), rest.pop("pixel_values")
        output = self.backbone.get_image_features(pixels, interpolate_pos_encoding=True)
        features = torch.cat(list(output.pooler_output))
        embeds = self.model.get_input_embeddings()(ids)
        visual = self.visual_mask(ids, None)[..., None]
        return {**rest, "inputs_embeds": embeds.masked_scatter(visual, features.to(embeds))}

    def tokens_from_patches(self, values, inputs, kind):
        """A token per patch; `vision_feature_select_strategy` leaves the first one out, or not."""
        return values[:, self.config.vision_feature_select_strategy == "default" :].flatten(0, 1)

    @classmethod
    def tokens_per_tile(cls, config):
        """Visual tokens of one tile: "default" leaves the class token out, "full" does not."""
        v = config.vision_config
        full = config.vision_feature_select_strategy == "full"
        return patches(v) + (full and v.model_type != "siglip_vision_model")
