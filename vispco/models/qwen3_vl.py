"""Qwen3-VL (`Qwen3VLForConditionalGeneration`): deep-stack features, normed queries and keys."""

from __future__ import annotations

from ..registry import register_adapter
from .qwen2_vl import Qwen2VL
from .towers import encoder_layer


@register_adapter("qwen3_vl")
class Qwen3VL(Qwen2VL):
    """Qwen3-VL: features of several vision layers join the visual tokens in early decoder layers.

    The decoder adds them at original places. Here the pruner adds them, where the tokens are now.
    """

    architectures = ("Qwen3VLForConditionalGeneration",)
    model_types = ("qwen3_vl",)

    def take_late(self, kwargs):
        """Second result: the visual mask (B, S), and for each early layer its features.

        The features of a layer are (visual tokens of the batch, D).
        """
        features = kwargs.get("deepstack_visual_embeds")
        if features is None:
            return kwargs, None
        if len(features) >= len(self.layers):
            raise ValueError(
                f"{len(features)} deep-stack features in a decoder of {len(self.layers)} "
                "layers: those added after the last layer cannot be pruned"
            )
        rest = {
            k: v
            for k, v in kwargs.items()
            if k not in ("visual_pos_masks", "deepstack_visual_embeds")
        }
        return rest, (kwargs["visual_pos_masks"], features)

    def late(self, features, layer, hidden):
        """What the decoder adds to the output of the layer before."""
        mask, features = features
        if not 0 < layer <= len(features):
            return None
        values = features[layer - 1].to(hidden.device, hidden.dtype)
        full = values.new_zeros(*mask.shape, values.shape[-1])
        return full.masked_scatter(mask[..., None].to(hidden.device), values)

    @classmethod
    def block(cls, v, layer, patches, grids):
        """FLOPs of one layer of the tower; attention stays within frames."""
        return encoder_layer(patches, v.hidden_size, v.intermediate_size, spans=cls.frames(grids))
