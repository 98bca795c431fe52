"""LLaVA-NeXT (`LlavaNextForConditionalGeneration`): images are cut into tiles; newline tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import register_adapter
from .llava import Llava
from .towers import patches_a_side, rectangle, side


@register_adapter("llava_next")
class LlavaNext(Llava):
    """LLaVA-NeXT: any resolution. Newline tokens stand under the image's id and are pruned like others."""

    architectures = ("LlavaNextForConditionalGeneration",)
    model_types = ("llava_next",)

    # ---- vision tower -----------------------------------------------------------------------------------
    def tokens_from_patches(self, values, inputs, kind):
        """A token per patch, less the padding that is cut off; newline tokens get 0."""
        tiles = values[:, self.class_token(self.config) :].split(self.tiles_of_images(inputs))
        return torch.cat(self.pack(tiles, inputs["image_sizes"]))

    def places(self, n, inputs, kind):
        """The whole image is one frame, its tiles side by side the next; newlines end rows."""
        side, counts = patches_a_side(self.config.vision_config), self.tiles_of_images(inputs)
        ones = torch.ones(sum(counts), side**2, 1).split(counts)
        packed = self.pack(ones, inputs["image_sizes"])
        return torch.cat(
            [self.places_of_image(i, image[:, 0] == 0, side) for i, image in enumerate(packed)]
        )

    @staticmethod
    def places_of_image(image: int, newline: Tensor, side: int) -> Tensor:
        """Frame, row and column (n, 3) of an image's tokens; newline: (n,) bool."""
        rest, width = len(newline) - side**2, int(newline.nonzero()[0]) - side**2 + 1
        tiles = rectangle(2 * image + 1, rest // width, width)
        end = torch.tensor([[2 * image, side - 1, side]])  # of an image that is not cut into tiles
        return torch.cat([rectangle(2 * image, side, side), tiles if width > 1 else end])

    def pack(self, tiles, sizes) -> list[Tensor]:
        """The model's own way to put the tiles (tiles, patches, C) of each image together: (n, C) each."""
        newline, strategy = (
            tiles[0].new_zeros(tiles[0].shape[-1]),
            self.config.vision_feature_select_strategy,
        )
        backbone: Any = self.backbone
        return backbone.pack_image_features(tiles, sizes, strategy, newline)[0]

    def tiles_of_images(self, inputs) -> list[int]:
        """Number of tiles of each image, the whole included."""
        return [self.tiles(self.config, size) for size in inputs["image_sizes"]]

    # ---- costs ------------------------------------------------------------------------------------------
    @classmethod
    def vision_flops(cls, config, n_visual, images=None):
        """The tower sees each tile, and the whole image once more, with the padding that is cut off later."""
        return cls.tile_flops(config, cls.tile_count(config, n_visual, images))

    @classmethod
    def tile_count(cls, config, n_visual, images=None):
        """images: rows of `image_sizes`, or just the number of tiles.

        By default as few images as can give `n_visual` tokens, of one size, each in the smallest grid that
        holds it.
        """
        if images is None:
            return cls.fewest_tiles(config, n_visual)
        return (
            images if isinstance(images, int) else sum(cls.tiles(config, size) for size in images)
        )

    @classmethod
    def tiles(cls, config, size) -> int:
        """Tiles of an image of `size` (height, width): of the grid that keeps most of it and wastes least."""
        height, width = (int(x) for x in size)

        def fit(grid):
            scale = min(grid[0] / height, grid[1] / width)
            kept = min(int(height * scale) * int(width * scale), height * width)
            return kept, kept - grid[0] * grid[1]

        return cls.tile_grid(config, max(config.image_grid_pinpoints, key=fit))[2]

    @classmethod
    def tile_grid(cls, config, pinpoint) -> tuple[int, int, int]:
        """Rows and columns of tiles, and tiles in all (with the whole image), of a grid given in pixels."""
        tile = side(config.vision_config.image_size)
        rows, columns = pinpoint[0] // tile, pinpoint[1] // tile
        return rows, columns, rows * columns + 1

    @classmethod
    def most_tokens(cls, config, pinpoint) -> int:
        """Tokens of an image that fills a grid: the whole, the tiles, and a newline a row."""
        patches = patches_a_side(config.vision_config)
        rows, columns, _ = cls.tile_grid(config, pinpoint)
        return cls.tokens_per_tile(config) + rows * patches * (columns * patches + 1)

    @classmethod
    def fewest_tiles(cls, config, n_visual: int) -> int:
        """Tiles in all, if nothing but the number of tokens is known."""
        pinpoints = config.image_grid_pinpoints
        grids = [(cls.tile_grid(config, p)[2], cls.most_tokens(config, p)) for p in pinpoints]
        count = -(-n_visual // max(tokens for _, tokens in grids))
        return count and count * min(tiles for tiles, tokens in grids if tokens * count >= n_visual)
