"""PaliGemma and PaliGemma 2 (`PaliGemmaForConditionalGeneration`): the whole prompt sees all of itself."""

from __future__ import annotations

from ..registry import register_adapter
from .base import Adapter
from .towers import patches, vit


@register_adapter("paligemma")
class PaliGemma(Adapter):
    """PaliGemma: a token per patch, one matrix as projector; attention within the prompt goes both ways."""

    architectures = ("PaliGemmaForConditionalGeneration",)
    model_types = ("paligemma",)
    causal = False

    def cap(self, layer, logits):
        """Gemma 2 caps them smoothly, in every attention implementation it allows."""
        limit = getattr(self.attention_module(layer), "attn_logit_softcapping", None)
        return logits if limit is None else limit * (logits / limit).tanh()

    @classmethod
    def vision_flops(cls, config, n_visual, images=None):
        """Tower and projector on as many images as `n_visual` tokens need."""
        v, count = config.vision_config, cls.tile_count(config, n_visual)
        return count * vit(v), count * 2 * patches(v) * v.hidden_size * v.projection_dim
