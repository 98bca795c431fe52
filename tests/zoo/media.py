"""Pictures and films, in the shapes that the families take them.

Each function returns a maker: `maker(counts, generator)` makes `counts[b]` pictures for sample b,
and says how many visual tokens each becomes.
"""

from __future__ import annotations

import math

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from zoo.entry import Media

#: Height and width of pictures in patches, in turn: of several sizes, all even.
GRIDS = ((8, 8), (4, 12), (8, 4))
#: Height and width of films in patches, in turn.
SCREENS = ((4, 8), (4, 4), (8, 4))


def squares(size=16, tokens=16, key="pixel_values", extra=None):
    """One square picture after the other: (pictures, 3, size, size).

    `extra(n, generator)` makes further inputs for n pictures.
    """

    def make(counts, generator):
        n = sum(counts)
        inputs = {key: torch.randn(n, 3, size, size, generator=generator)}
        if extra is not None:
            inputs |= extra(n, generator)
        return Media(inputs, [tokens] * n)

    return make


def of_each_sample(size=16, tokens=16, frames=1, masked=False):
    """(B, most pictures of a sample, 3, size, size): zeros where a sample has fewer.

    With `frames`, films of so many pictures. `masked` adds the (B, most pictures) mask of those
    that there are.
    """

    def make(counts, generator):
        most = frames * max(counts)
        pixels = torch.zeros(len(counts), most, 3, size, size)
        for row, n in zip(pixels, counts, strict=True):
            row[: n * frames] = torch.randn(n * frames, 3, size, size, generator=generator)
        inputs = {"pixel_values": pixels}
        if masked:
            there = torch.arange(most) < frames * torch.tensor(counts)[:, None]
            inputs["pixel_attention_mask"] = there
        return Media(inputs, [frames * tokens] * sum(counts), frames)

    return make


def tiles(size=8, tiles=3, tokens=16, shape=(16, 8)):
    """(pictures, tiles, 3, size, size): the whole picture small, then its tiles.

    `shape` is the height and width of the picture before it was cut, in pixels.
    """

    def make(counts, generator):
        n = sum(counts)
        inputs = {
            "pixel_values": torch.randn(n, tiles, 3, size, size, generator=generator),
            "image_sizes": torch.tensor([shape] * n),
        }
        return Media(inputs, [tokens] * n)

    return make


def cropped(size=16, patch=4, shapes=((16, 16), (16, 8), (8, 16))):
    """(pictures, 3, size, size) of which only `shapes` (height, width) are filled."""

    def make(counts, generator):
        sizes = in_turn(shapes, sum(counts))
        inputs = {
            "pixel_values": torch.randn(len(sizes), 3, size, size, generator=generator),
            "image_sizes": torch.tensor(sizes),
        }
        return Media(inputs, [h * w // patch**2 for h, w in sizes])

    return make


def frames(size=16, n=4, tokens=16, end=0, apart=False, key="pixel_values_videos"):
    """Films of n frames of `tokens` visual tokens each, and `end` more after the last.

    They are (films, n, 3, size, size), or (films * n, 3, size, size) for classes that take the
    frames as pictures (key "pixel_values"). `apart`: other tokens stand between the frames.
    """

    def make(counts, generator):
        films = sum(counts)
        shape = (films * n,) if key == "pixel_values" else (films, n)
        pixels = torch.randn(*shape, 3, size, size, generator=generator)
        return Media({key: pixels}, [n * tokens + end] * films, n if apart else 1)

    return make


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


def in_turn(shapes, n):
    """n of the shapes, from the first on, again and again."""
    return [shapes[i % len(shapes)] for i in range(n)]


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


def ready(*tokens, width=32, key="pooler_output", joined=None):
    """Features as the tower would give them (`mm_encoder_outputs`), in place of pictures.

    The pictures have `tokens` features each, in turn. `joined` makes one tensor of the list of
    (tokens, width): torch.stack or torch.cat.
    """

    def make(counts, generator):
        lengths = in_turn(tokens, sum(counts))
        features = [torch.randn(k, width, generator=generator) for k in lengths]
        output = BaseModelOutputWithPooling(**{key: joined(features) if joined else features})
        return Media({"mm_encoder_outputs": {"image": output}}, lengths)

    return make
