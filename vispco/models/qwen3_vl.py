"""Qwen3-VL (`Qwen3VLForConditionalGeneration`): deep-stack features, normed queries and keys."""

from __future__ import annotations

from ..registry import register_adapter
from .qwen2_vl import Qwen2VL


@register_adapter("qwen3_vl")
class Qwen3VL(Qwen2VL):
    """Qwen3-VL: features of several vision layers join the visual tokens in early layers."""

    architectures = ("Qwen3VLForConditionalGeneration",)
    model_types = ("qwen3_vl",)
