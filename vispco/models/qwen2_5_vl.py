"""Qwen2.5-VL (`Qwen2_5_VLForConditionalGeneration`): Qwen2-VL with windows in the vision tower."""

from __future__ import annotations

import torch

from ..registry import register_adapter
from .qwen2_vl import Qwen2VL
from .towers import side


@register_adapter("qwen2_5_vl")
class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL: most vision layers attend within windows, which the edges of the image cut."""

    architectures = ("Qwen2_5_VLForConditionalGeneration",)
    model_types = ("qwen2_5_vl",)

    def token_layer(self, depth):
        """Number of the tower's last layer that attends to whole frames."""
        return max(self.config.vision_config.fullatt_block_indexes)

    def layer_at(self, depth, layers):
        """Number of the layer nearest to that depth among those that attend to whole frames."""
        wanted = super().layer_at(depth, layers)
        return min(
            self.config.vision_config.fullatt_block_indexes, key=lambda i: (abs(i - wanted), i)
        )

    def tokens_from_patches(self, values, inputs, kind):
        """Mean over the patches of each token; within the tower, tokens stand window by window."""
        size = self.window(self.config.vision_config)
        frame, row, column = self.places(values.shape[-2], inputs, kind).T
        windows = torch.stack([frame, row // size, column // size])
        order = torch.unique(windows, dim=1, return_inverse=True)[1].argsort(stable=True)
        back = order.argsort(stable=True).to(values.device)
        return super().tokens_from_patches(values, inputs, kind)[back]

    @staticmethod
    def window(v) -> int:
        """Tokens along the side of a window that no edge cuts."""
        return v.window_size // v.spatial_merge_size // side(v.patch_size)
