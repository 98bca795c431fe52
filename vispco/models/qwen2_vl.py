"""Qwen2-VL and Qwen3-VL (`Qwen2VLForConditionalGeneration`, ...): any resolution, video."""

from __future__ import annotations

from math import isqrt
from typing import ClassVar

import torch
from torch.nn.functional import interpolate

from ..registry import register_adapter
from .base import Adapter
from .towers import rectangle, side


@register_adapter("qwen2_vl")
class Qwen2VL(Adapter):
    """Qwen2-VL, Qwen3-VL: t x h x w patches, of image or video, give t h w / merge^2 tokens."""

    architectures: ClassVar[tuple[str, ...]] = (
        "Qwen2VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
    )
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen3_vl", "qwen3_vl_moe")

    # ---- vision tower ----------------------------------------------------------------------------
    def tokens_from_patches(self, values, inputs, kind):
        """Mean over the patches of each token, which stand together."""
        return (
            values.flatten(0, -2)
            .unflatten(0, (-1, self.patches_per_token_side(self.config) ** 2))
            .mean(1)
        )

    def places(self, n, inputs, kind):
        """Frame, row and column (n, 3) of the tokens, which stand frame after frame."""
        merge = self.patches_per_token_side(self.config)
        frames: list[torch.Tensor] = []
        for t, h, w in inputs[f"{kind}_grid_thw"].tolist():
            frames += [rectangle(len(frames) + i, h // merge, w // merge) for i in range(t)]
        return torch.cat(frames)

    @classmethod
    def patches_per_token_side(cls, config):
        """Patches along the side of the square that makes a token."""
        return config.vision_config.spatial_merge_size

    # ---- input downsampling ----------------------------------------------------------------------
    def smaller(self, inputs, scale):
        """The pictures made smaller: from patches to pictures, and to patches again."""
        if inputs.get("pixel_values_videos") is not None:
            raise ValueError(
                "videos cannot be made smaller here: give the processor smaller frames"
            )
        v, grids = self.config.vision_config, inputs["image_grid_thw"].tolist()
        merge, size = self.patches_per_token_side(self.config), v.patch_size
        pieces, new_grids, tokens = [], [], []
        patches = inputs["pixel_values"].split([t * h * w for t, h, w in grids])
        for x, (t, h, w) in zip(patches, grids, strict=True):
            # Patches stand token by token, each token being merge x merge of them.
            x = x.view(t, h // merge, w // merge, merge, merge, v.in_channels, -1, size, size)
            x = x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).flatten(0, 1)
            x = x.reshape(-1, v.in_channels, h * size, w * size)
            rows, columns = (max(1, round(n // merge * scale)) for n in (h, w))
            shape = (rows * merge * size, columns * merge * size)
            x = interpolate(x, shape, mode="bilinear", antialias=True)
            x = x.view(t, -1, v.in_channels, rows, merge, size, columns, merge, size)
            x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
            new_grids.append([t, rows * merge, columns * merge])
            pieces.append(x.flatten(5).flatten(0, 4))
            tokens.append((t * h * w // merge**2, t * rows * columns))
        grid = torch.tensor(new_grids).to(inputs["image_grid_thw"])
        return {"pixel_values": torch.cat(pieces), "image_grid_thw": grid}, tokens

    # ---- costs -----------------------------------------------------------------------------------
    @classmethod
    def grids(cls, config, n_visual: int, images=None) -> list[tuple[int, int, int]]:
        """Patches (time, height, width) of each image.

        images: rows of `image_grid_thw` or `video_grid_thw`; None: one image, as square as
        `n_visual` allows. Raises ValueError if they give another number of tokens.
        """
        merge = config.vision_config.spatial_merge_size
        if images is None:
            height = max((h for h in range(1, isqrt(n_visual) + 1) if n_visual % h == 0), default=0)
            images = [(1, height * merge, n_visual // height * merge)] if height else []
        grids = [(int(t), int(h), int(w)) for t, h, w in images]
        tokens = sum(t * h * w for t, h, w in grids) // merge**2
        if tokens != n_visual:
            raise ValueError(
                f"images of {grids} patches (time, height, width) give {tokens} visual tokens, "
                f"not n_visual={n_visual}: a token is {merge} x {merge} patches"
            )
        return grids

    @classmethod
    def pixels(cls, config, n_visual, images=None):
        """Patches and grids of the images. images: see `grids`."""
        v, grids = config.vision_config, torch.tensor(cls.grids(config, n_visual, images))
        numbers = v.in_channels * v.temporal_patch_size * side(v.patch_size) ** 2
        patches = torch.empty(int(grids.prod(1).sum()), numbers, device="meta")
        return {"pixel_values": patches, "image_grid_thw": grids}
