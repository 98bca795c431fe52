"""LLaVA-OneVision (`LlavaOnevisionForConditionalGeneration`): one image in tiles, several, or video."""

from __future__ import annotations

from math import sqrt

import torch

from ..registry import register_adapter
from .llava_next import LlavaNext
from .towers import patches_a_side, rectangle


@register_adapter("llava_onevision")
class LlavaOneVision(LlavaNext):
    """LLaVA-OneVision: as LLaVA-NeXT, but large grids are shrunk, and video frames are pooled to a quarter.

    For FLOPs, `images` may be the number of tiles: one for a video frame, and for an image that is not alone.
    """

    architectures = ("LlavaOnevisionForConditionalGeneration",)
    model_types = ("llava_onevision",)

    def tokens_from_patches(self, values, inputs, kind):
        """Of videos, the frames are shrunk, and one newline token ends them."""
        if kind == "image":
            return super().tokens_from_patches(values, inputs, kind)
        frames = self.backbone.apply_pooling(values)  # (videos * frames, tokens, C)
        tokens = frames.unflatten(0, inputs["pixel_values_videos"].shape[:2]).flatten(1, 2)
        return torch.nn.functional.pad(tokens, (0, 0, 0, 1)).flatten(0, 1)

    def places(self, n, inputs, kind):
        """The newline stands at the end of the last frame."""
        if kind == "image":
            return super().places(n, inputs, kind)
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        side = -(-patches_a_side(self.config.vision_config) // 2)
        end = torch.tensor([[frames - 1, side - 1, side]])
        video = torch.cat([*(rectangle(i, side, side) for i in range(frames)), end])
        return torch.cat([video + torch.tensor([i * frames, 0, 0]) for i in range(videos)])

    def pack(self, tiles, sizes):
        """The model's own way, with its own shrinking of large grids."""
        newline = tiles[0].new_zeros(tiles[0].shape[-1])
        return self.backbone.pack_image_features(
            tiles, sizes, newline, self.config.vision_aspect_ratio
        )[0]

    def tiles_of_images(self, inputs):
        """An image among several is not cut into tiles."""
        tiles, images = super().tiles_of_images(inputs), inputs.get("batch_num_images")
        if images is None:
            return tiles
        return [
            n if alone else 1 for n, alone in zip(tiles, (c == 1 for c in images for _ in range(c)))
        ]

    @classmethod
    def most_tokens(cls, config, pinpoint):
        """Grids of more than `anyres_max_N` tiles' area are shrunk to it."""
        patches = patches_a_side(config.vision_config)
        rows, columns, _ = cls.tile_grid(config, pinpoint)
        height, width = rows * patches, columns * patches
        area = int(config.vision_aspect_ratio.removeprefix("anyres_max_")) * patches**2
        ratio = sqrt(height * width / area)
        if ratio > 1.1:
            height, width = int(height // ratio), int(width // ratio)
        return cls.tokens_per_tile(config) + height * (width + 1)
