"""Pictures and video frames, opened when they are needed: within one folder, within a number of pixels, in RGB."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

MAX_PIXELS = 50_000_000
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
    `max_pixels` pixels, which is looked up before any is decoded; FileNotFoundError if there is none.
    """
    Image, ImageOps = require_pillow()
    name = f"a picture of {len(source):,} bytes" if isinstance(source, bytes) else source
    if not isinstance(source, bytes):
        check_inside(source, folder)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ValueError(f"{name}: expected at most {max_pixels:,} pixels, got {width} x {height}; make it smaller "
                                 "or raise --max-pixels")
            return ImageOps.exif_transpose(image).convert("RGB") if decode else None
    except Image.DecompressionBombError:
        raise ValueError(f"{name}: expected at most {max_pixels:,} pixels, got more than PIL would ever open") from None
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, EOFError) as error:  # PIL's ways of saying that a file is broken
        raise ValueError(f"{name}: expected a picture, but {error}") from error


def check_inside(path: str, folder: str | None) -> None:
    """Raise ValueError unless `path`, symbolic links followed, lies in `folder`."""
    if folder is not None and not Path(path).resolve().is_relative_to(Path(folder).resolve()):
        raise ValueError(f"{path} is a link to a place outside of {folder}: give a folder that holds all pictures as "
                         "--images")


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
    try:
        with av.open(path) as video:
            stream = video.streams.video[0]
            if stream.width * stream.height > max_pixels:
                raise ValueError(f"{path}: expected at most {max_pixels:,} pixels a frame, got {stream.width} x "
                                 f"{stream.height}; raise --max-pixels")
            count = sum(1 for _ in video.decode(stream))  # containers may lie about it
        wanted = set(spread(count, frames))
        with av.open(path) as video:
            return [frame.to_image().convert("RGB") for i, frame in enumerate(video.decode(video=0)) if i in wanted]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path}: expected a video, but {error}") from error
