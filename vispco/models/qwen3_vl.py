"""Qwen3-VL (`Qwen3VLForConditionalGeneration`): deep-stack features, normed queries and keys."""

from __future__ import annotations

from ..registry import register_adapter
from .qwen2_vl import Qwen2VL
from .towers import encoder_layer


@register_adapter("qwen3_vl")
class Qwen3VL(Qwen2VL):
    """Qwen3-VL: features of several vision layers join the visual tokens in early layers."""

    architectures = ("Qwen3VLForConditionalGeneration",)
    model_types = ("qwen3_vl",)

    @classmethod
    def block(cls, v, layer, patches, grids):
        """FLOPs of one layer of the tower; attention stays within frames."""
        return encoder_layer(patches, v.hidden_size, v.intermediate_size, spans=cls.frames(grids))
