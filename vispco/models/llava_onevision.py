"""LLaVA-OneVision (`LlavaOnevisionForConditionalGeneration`): tiles, several images, video."""

from __future__ import annotations

from math import sqrt

import torch

from ..registry import register_adapter
from .llava_next import LlavaNext
from .towers import patches_a_side, rectangle


@register_adapter("llava_onevision")
class LlavaOneVision(LlavaNext):
    """LLaVA-OneVision: images are cut into tiles, large grids shrunk, video frames pooled to 1/4.

    For FLOPs, `images` may be the number of tiles: one for each video frame, and for each image
    that is not alone in its sample.
    """

    architectures = ("LlavaOnevisionForConditionalGeneration",)
    model_types = ("llava_onevision",)

    def tokens_from_patches(self, values, inputs, kind):
        """Images as in LLaVA-NeXT; the frames of a video are shrunk, and a newline ends them."""
        if kind == "image":
            return super().tokens_from_patches(values, inputs, kind)
        frames = self.backbone.apply_pooling(values)  # (videos * frames, tokens, C)
        tokens = frames.unflatten(0, inputs["pixel_values_videos"].shape[:2]).flatten(1, 2)
        return torch.nn.functional.pad(tokens, (0, 0, 0, 1)).flatten(0, 1)

    def places(self, n, inputs, kind):
        """Frame, row and column (n, 3); the newline of a video ends its last frame."""
        if kind == "image":
            return super().places(n, inputs, kind)
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        side = -(-patches_a_side(self.config.vision_config) // 2)
        end = torch.tensor([[frames - 1, side - 1, side]])
        video = torch.cat([*(rectangle(i, side, side) for i in range(frames)), end])
        return torch.cat([video + torch.tensor([i * frames, 0, 0]) for i in range(videos)])

    def joined_tiles(self, tiles, sizes):
        """The model's own way to join the tiles of each image, (n, C); it shrinks large grids."""
        newline = tiles[0].new_zeros(tiles[0].shape[-1])
        ratio = self.config.vision_aspect_ratio
        return self.backbone.pack_image_features(tiles, sizes, newline, ratio)[0]

    def tiles_of_images(self, inputs):
        """Number of tiles of each image; an image among several of a sample is not cut into any."""
        tiles, samples = super().tiles_of_images(inputs), inputs.get("batch_num_images")
        if samples is None:
            return tiles
        alone = [count == 1 for count in samples for _ in range(count)]
        return [n if single else 1 for n, single in zip(tiles, alone, strict=False)]

    @classmethod
    def most_tokens(cls, config, pinpoint):
        """Tokens of an image that fills a grid. Grids over N tiles' area are shrunk to it.

        N: of `vision_aspect_ratio`, "anyres_max_N".
        """
        patches = patches_a_side(config.vision_config)
        rows, columns, _ = cls.tile_grid(config, pinpoint)
        height, width = rows * patches, columns * patches
        area = int(config.vision_aspect_ratio.removeprefix("anyres_max_")) * patches**2
        ratio = sqrt(height * width / area)
        if ratio > 1.1:
            height, width = int(height // ratio), int(width // ratio)
        return cls.tokens_per_tile(config) + height * (width + 1)
