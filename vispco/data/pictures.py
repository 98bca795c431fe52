"""Pictures and video frames, opened when needed: from one folder, of limited size, in RGB."""

from __future__ import annotations

import io
import os
import re
from typing import Any

from .colours import check_depth, in_rgb
from .film import Film, evenly_spaced, open_film
from .guards import Fault, check_inside, check_pixels, file_size, reading

MAX_PIXELS = 50_000_000
#: What is opened at all. PIL also knows formats that start other programs, or that hold addresses.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def require_pillow():
    """PIL's module Image; ImportError that says how to install it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('pictures need pillow: pip install "vispco[data]"') from error
    return Image


def open_picture(
    source: str | bytes,
    folder: str | None = None,
    max_pixels: int = MAX_PIXELS,
    decode: bool = True,
):
    """The picture of a path or of encoded bytes: PIL, RGB, upright as its EXIF data say.

    PNG, JPEG, WebP, BMP, GIF, TIFF and PPM are pictures; of several in a file the first counts.
    What is transparent shows white; 16 bits become 8 (see `vispco.data.colours.in_rgb`).

    folder: the folder that the file must lie in, symbolic links followed; None: anywhere.
    max_pixels: the most pixels of a picture. They are looked up before any is decoded.
    decode: False reads the header only and returns None.
    Raises ValueError that names the file if it lies elsewhere, is no picture, has more pixels, has
    more bytes than so many pixels can need, or holds floats; FileNotFoundError if there is no such
    file.
    """
    Image = require_pillow()
    from PIL import UnidentifiedImageError

    file: Any = source
    if isinstance(source, bytes):
        name, size = f"a picture of {len(source):,} bytes", len(source)
        file = io.BytesIO(source)
    else:
        name, size = source, file_size(source, folder)
    # 16 bits in each of four channels, and what else a file may hold.
    most = 8 * max_pixels + 2**24
    if size > most:
        raise ValueError(
            f"{name}: expected at most {most:,} bytes for {max_pixels:,} pixels, got {size:,}; "
            "make it smaller or raise --max-pixels"
        )
    with reading(name, "a picture"):
        try:
            with Image.open(file, formats=_FORMATS) as image:
                check_pixels(image, max_pixels, "pixels")
                check_depth(image)
                if not decode:
                    return None
                return in_rgb(image)
        except Image.DecompressionBombError:
            raise Fault(
                f"expected at most {max_pixels:,} pixels, got more than PIL would ever open; "
                "make it smaller"
            ) from None
        except UnidentifiedImageError:
            formats = ", ".join(_FORMATS)
            raise Fault(f"expected a picture, but it is none of {formats}") from None


def open_video(
    source: Any,
    folder: str | None = None,
    frames: int = 8,
    max_pixels: int = MAX_PIXELS,
    fps: float | None = None,
) -> Film:
    """`frames` frames of a video (all, if it has fewer), evenly spaced, with their times: PIL, RGB.

    source: a video file, or its bytes; a folder of pictures, taken in order of name, 2 before 10;
        or a list of pictures.
    folder, max_pixels: see `open_picture`, which also says what is raised; ImportError if a video
        file needs the package that reads it.
    fps: of a folder or a list, how many pictures are a second. A video file knows that itself.
    """
    if isinstance(source, bytes):
        return open_film(source, frames, max_pixels, fps)
    if isinstance(source, str):
        check_inside(source, folder)
        if not os.path.exists(source):
            raise FileNotFoundError(2, "No such file or directory", source)
        if not os.path.isdir(source):
            return open_film(source, frames, max_pixels, fps)
        found = (name for name in os.listdir(source) if name.lower().endswith(_SUFFIXES))
        names = sorted(found, key=_in_order)
        if not names:
            raise ValueError(
                f"{source}: expected a video, or a folder of frames ({', '.join(_SUFFIXES)}), "
                "got no picture in it"
            )
        source = [os.path.join(source, name) for name in names]
    chosen = evenly_spaced(len(source), frames)
    opened = [open_picture(source[i], folder, max_pixels) for i in chosen]
    return Film(opened, fps, len(source), chosen)


def _in_order(name: str) -> tuple[list, str]:
    """Sorts names with numbers by these: frame2 before frame10."""
    pieces = re.split("([0-9]+)", name)
    return [int(x) if i % 2 else x for i, x in enumerate(pieces)], name
