"""Pictures and video frames, opened when they are needed: within one folder, within a number of pixels, in RGB."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from itertools import chain
from typing import Any

from ..utils.files import brief

MAX_PIXELS = 50_000_000
#: What is opened at all: PIL also knows formats that start other programs, or that hold addresses.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_CONTAINERS = "mov,matroska,avi,mpeg,mpegts,flv,asf,ogg,gif"
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def require_pillow():
    """PIL's modules (Image, ImageOps); ImportError that says how to install them."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError('pictures need pillow: pip install "vispco[data]"') from error
    return Image, ImageOps


def open_picture(source: str | bytes, folder: str | None = None, max_pixels: int = MAX_PIXELS, decode: bool = True):
    """The picture (PIL, RGB, upright as its EXIF data say) of a path, or of encoded bytes.

    folder: that the file must lie in, symbolic links followed; None: anywhere. decode: False reads the header only
    and returns None. Raises ValueError that names the file if it lies elsewhere, is no picture or has more than
    `max_pixels` pixels, which is looked up before any is decoded, or more bytes than so many pixels can need;
    FileNotFoundError if there is none. PNG, JPEG, WebP, BMP, GIF, TIFF and PPM are pictures; of several the first counts.
    """
    Image, ImageOps = require_pillow()
    from PIL import UnidentifiedImageError

    name = f"a picture of {len(source):,} bytes" if isinstance(source, bytes) else source
    size = len(source) if isinstance(source, bytes) else _size(source, folder)
    if size > (most := 8 * max_pixels + 2**24):  # 16 bits in each of four channels, and what else a file may hold
        raise ValueError(f"{name}: expected at most {most:,} bytes for {max_pixels:,} pixels, got {size:,}; make it smaller or "
                         "raise --max-pixels")
    with _reading(name, "a picture"):
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise _Told(f"expected at most {max_pixels:,} pixels, got {width} x {height}; make it smaller or raise "
                                "--max-pixels")
                return ImageOps.exif_transpose(image).convert("RGB") if decode else None
        except Image.DecompressionBombError:
            raise _Told(f"expected at most {max_pixels:,} pixels, got more than PIL would ever open; make it smaller") from None
        except UnidentifiedImageError:
            raise _Told(f"expected a picture, but it is none of {', '.join(_FORMATS)}") from None


class _Told(ValueError):
    """A fault in our own words."""


@contextlib.contextmanager
def _reading(name: str, what: str) -> Iterator[None]:
    """Every fault of a file, whatever its reader raises, as a ValueError that names it; and no warnings beside it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except FileNotFoundError:
        raise
    except _Told as error:
        raise ValueError(f"{name}: {error}") from None
    except Exception as error:  # readers of damaged files raise anything
        raise ValueError(f"{name}: expected {what}, but {brief(str(error) or type(error).__name__)}") from error


def check_inside(path: str, folder: str | None) -> None:
    """Raise ValueError unless `path`, symbolic links followed, lies in `folder`."""
    if folder is not None:
        real, within = os.path.realpath(path), os.path.realpath(folder)
        if os.path.commonpath([real, within]) != within:
            raise ValueError(f"{path} is a link to a place outside of {folder}: give a folder that holds all pictures as "
                             "--images")


def _size(path: str, folder: str | None) -> int:
    """Bytes of a file that lies in `folder`. Raises ValueError if it does not, or is no file: a pipe would never end."""
    check_inside(path, folder)
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: expected a picture, but it is no file")
    return found.st_size


def open_video(source: Any, folder: str | None = None, frames: int = 8, max_pixels: int = MAX_PIXELS) -> list:
    """`frames` frames (PIL, RGB), evenly spread: of a video file, of a folder of pictures in order of name, of a list.

    Fewer if it has fewer. Errors as of `open_picture`; ImportError if a video file needs the package that reads it.
    """
    if isinstance(source, str):
        check_inside(source, folder)
        if not os.path.exists(source):
            raise FileNotFoundError(2, "No such file or directory", source)
        if not os.path.isdir(source):
            return _decode(source, frames, max_pixels)
        names = sorted(name for name in os.listdir(source) if name.lower().endswith(_PICTURES))
        if not names:
            raise ValueError(f"{source}: expected a video, or a folder of frames ({', '.join(_PICTURES)}), got no picture "
                             "in it")
        source = [os.path.join(source, name) for name in names]
    return [open_picture(source[i], folder, max_pixels) for i in spread(len(source), frames)]


def spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` indices below `count`, evenly spread, the first and the last among them.

    >>> spread(9, 3), spread(2, 8)
    ([0, 4, 8], [0, 1])
    """
    wanted = min(count, wanted)
    return [round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)]


def _decode(path: str, frames: int, max_pixels: int) -> list:
    try:
        import av
    except ImportError as error:
        raise ImportError(f'{path}: video files need PyAV: pip install "vispco[video]"; or give the frames as pictures, '
                          "in a list or a folder") from error
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}  # none that lead to other files or addresses
    _size(path, None)
    with _reading(path, "a video"):
        with av.open(path, options=options) as video:
            coder = video.streams.video[0].codec_context if video.streams.video else None
            if coder is None:
                raise _Told("expected a video, but there is none in it that can be decoded")
            count = -1
            parts: Iterator[Any] = chain([coder], video.decode(video=0))
            for seen in parts:  # containers may lie about the number and the size of frames
                if seen.width * seen.height > max_pixels:
                    raise _Told(f"expected at most {max_pixels:,} pixels a frame, got {seen.width} x {seen.height}; raise "
                                "--max-pixels")
                count += 1
            if not count:
                raise _Told("expected a video, but it has no frames")
        wanted = set(spread(count, frames))
        with av.open(path, options=options) as video:
            return [frame.to_image().convert("RGB") for i, frame in enumerate(video.decode(video=0)) if i in wanted]
