"""Pictures and films of several sizes, as lists of patches: see `zoo.media` for what a maker is."""

from __future__ import annotations

import math

import torch

from zoo.entry import Media
from zoo.media import in_turn

#: Height and width of pictures in patches, in turn: of several sizes, all even.
GRIDS = ((8, 8), (4, 12), (8, 4))
#: Height and width of films in patches, in turn.
SCREENS = ((4, 8), (4, 4), (8, 4))


def grid(frames=2, patch=2, merge=2, flat=True, tokens=None, extra=None):
    """Patches of all pictures in one list, and the grid (1, height, width) of each, in patches.

    A patch is flat, (3 * frames * patch * patch), or a small picture (3, patch, patch). A picture
    becomes one visual token for `merge` x `merge` patches, or `tokens(height, width)`.
    `extra(n, generator)` makes further inputs for n pictures.
    """
    shape = (3 * frames * patch * patch,) if flat else (3, patch, patch)
    count = tokens or (lambda height, width: height * width // merge**2)

    def make(counts, generator):
        grids = in_turn(GRIDS, sum(counts))
        inputs = {
            "pixel_values": patches(grids, shape, generator),
            "image_grid_thw": torch.tensor([(1, *sides) for sides in grids]),
        }
        if extra is not None:
            inputs |= extra(len(grids), generator)
        return Media(inputs, [count(*sides) for sides in grids])

    return make


def films(frames=2, patch=2, merge=2, flat=True, steps=2, pooled=1, apart=True, extra=None):
    """As `grid`, films of grids (steps in time, height, width).

    `pooled` steps in time make one. `apart`: other tokens stand between the steps in time.
    """
    shape = (3 * frames * patch * patch,) if flat else (3, patch, patch)

    def make(counts, generator):
        grids = [(steps, *sides) for sides in in_turn(SCREENS, sum(counts))]
        inputs = {
            "pixel_values_videos": patches(grids, shape, generator),
            "video_grid_thw": torch.tensor(grids),
        }
        if extra is not None:
            inputs |= extra(len(grids), generator)
        tokens = [math.prod(sides) // merge**2 // pooled for sides in grids]
        return Media(inputs, tokens, steps if apart else 1)

    return make


def patches(grids, shape, generator):
    """(patches of all grids, *shape)."""
    return torch.randn(sum(map(math.prod, grids)), *shape, generator=generator)


def packed(patch=4, merge=2, frames=1):
    """The patches of all pictures side by side, as one picture: (1, 3, patch, patch * patches).

    A picture becomes one visual token for `merge` x `merge` patches. With `frames`, films of so
    many pictures, under the names that films have.
    """
    names = ("pixel_values", "target_sizes")
    if frames > 1:
        names = [f"{name}_videos" for name in names]

    def make(counts, generator):
        sizes = [(h * merge // 2, w * merge // 2) for h, w in in_turn(GRIDS, sum(counts))]
        each = [size for size in sizes for _ in range(frames)]
        width = patch * sum(map(math.prod, each))
        pixels = torch.randn(1, 3, patch, width, generator=generator)
        inputs = dict(zip(names, (pixels, torch.tensor(each, dtype=torch.int32)), strict=True))
        return Media(inputs, [frames * h * w // merge**2 for h, w in sizes], frames)

    return make


def by_height(patch=2, merge=2):
    """As `grid`, flat patches of one frame; the grids are (height, width)."""

    def make(counts, generator):
        grids = in_turn(GRIDS, sum(counts))
        inputs = {
            "pixel_values": patches(grids, (3 * patch * patch,), generator),
            "image_grid_hw": torch.tensor(grids),
        }
        return Media(inputs, [h * w // merge**2 for h, w in grids])

    return make


def padded(patch=2, merge=2):
    """(pictures, most patches, 3 * patch * patch), filled up with zeros at the end."""

    def make(counts, generator):
        grids = in_turn(GRIDS, sum(counts))
        pixels, there = rows(grids, 3 * patch * patch, generator)
        inputs = {
            "pixel_values": pixels,
            "pixel_attention_mask": there.long(),
            "spatial_shapes": torch.tensor(grids),
        }
        return Media(inputs, [h * w // merge**2 for h, w in grids])

    return make


def placed(patch=2, merge=2, frames=1):
    """As `padded`, and the place (column, row) of each patch: (-1, -1) where there is none.

    With `frames`, films of so many pictures, under the names that films have.
    """
    kind, ending = ("image", "") if frames == 1 else ("video", "_videos")

    def make(counts, generator):
        grids = in_turn(GRIDS if frames == 1 else SCREENS, sum(counts))
        each = [sides for sides in grids for _ in range(frames)]
        pixels, there = rows(each, 3 * patch * patch, generator)
        places = torch.full((*there.shape, 2), -1)
        for row, (h, w) in zip(places, each, strict=True):
            row[: h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w)).flip(-1)
        # Gemma takes values from 0 to 1.
        inputs = {f"pixel_values{ending}": pixels.sigmoid(), f"{kind}_position_ids": places}
        if frames > 1:
            inputs["num_frames_per_video"] = torch.tensor([frames] * len(grids))
        return Media(inputs, [frames * h * w // merge**2 for h, w in grids], frames)

    return make


def blocks(shape, grids=True):
    """One small picture of a given shape for each visual token; `grids` adds those of tokens."""

    def make(counts, generator):
        sides = [(h // 2, w // 2) for h, w in in_turn(GRIDS, sum(counts))]
        inputs = {"pixel_values": patches(sides, shape, generator)}
        if grids:
            inputs["image_grid_thw"] = torch.tensor([(1, *each) for each in sides])
        return Media(inputs, [h * w for h, w in sides])

    return make


def pooled(side=8, patch=2, frames=1):
    """(pictures, side * side, 3 * patch * patch), and the 2 x 2 patches that make each token.

    With `frames`, films of so many pictures, under the names that films have.
    """
    kind, ending = ("image", "") if frames == 1 else ("video", "_videos")
    half = side // 2

    def make(counts, generator):
        n = sum(counts)
        pixels = torch.randn(n * frames, side * side, 3 * patch * patch, generator=generator)
        numbers = torch.arange(n * frames * side * side)
        pools = numbers.view(-1, half, 2, half, 2).transpose(2, 3).reshape(-1, 4)
        # Rows and columns of the whole picture, and of its tiles: here are none.
        grid = (half, half, 0, 0) if frames == 1 else (frames, half, half)
        inputs = {
            f"pixel_values{ending}": pixels,
            f"{kind}_token_pooling": pools,
            f"{kind}_grids": torch.tensor([grid] * n),
        }
        return Media(inputs, [frames * half * half] * n, frames)

    return make


def rows(grids, width, generator):
    """(pictures, most patches, width) of patches, zeros after the last, and the mask of patches."""
    lengths = torch.tensor([h * w for h, w in grids])
    there = torch.arange(int(lengths.max())) < lengths[:, None]
    pixels = torch.randn(*there.shape, width, generator=generator)
    return pixels * there[..., None], there
