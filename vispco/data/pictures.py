"""Pictures and video frames, opened when needed: from one folder, of limited size, in RGB."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from typing import Any

from ..utils.files import brief

MAX_PIXELS = 50_000_000
#: What is opened at all. PIL also knows formats that start other programs, or that hold addresses.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
#: Containers of videos that lead to no other files and to no addresses.
_AV_OPTIONS = {
    "format_whitelist": "mov,matroska,avi,mpeg,mpegts,flv,asf,ogg,gif",
    "protocol_whitelist": "file",
}


def require_pillow():
    """PIL's modules (Image, ImageOps); ImportError that says how to install them."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError('pictures need pillow: pip install "vispco[data]"') from error
    return Image, ImageOps


def open_picture(
    source: str | bytes,
    folder: str | None = None,
    max_pixels: int = MAX_PIXELS,
    decode: bool = True,
):
    """The picture of a path or of encoded bytes: PIL, RGB, upright as its EXIF data say.

    PNG, JPEG, WebP, BMP, GIF, TIFF and PPM are pictures; of several in a file the first counts.

    folder: the folder that the file must lie in, symbolic links followed; None: anywhere.
    max_pixels: the most pixels of a picture. They are looked up before any is decoded.
    decode: False reads the header only and returns None.
    Raises ValueError that names the file if it lies elsewhere, is no picture, has more pixels, or
    more bytes than so many pixels can need; FileNotFoundError if there is no such file.
    """
    Image, ImageOps = require_pillow()
    from PIL import UnidentifiedImageError

    file: Any = source
    if isinstance(source, bytes):
        name, size = f"a picture of {len(source):,} bytes", len(source)
        file = io.BytesIO(source)
    else:
        name, size = source, _file_size(source, folder)
    # 16 bits in each of four channels, and what else a file may hold.
    most = 8 * max_pixels + 2**24
    if size > most:
        raise ValueError(
            f"{name}: expected at most {most:,} bytes for {max_pixels:,} pixels, got {size:,}; "
            "make it smaller or raise --max-pixels"
        )
    with _reading(name, "a picture"):
        try:
            with Image.open(file, formats=_FORMATS) as image:
                _check_pixels(image, max_pixels, "pixels")
                return ImageOps.exif_transpose(image).convert("RGB") if decode else None
        except Image.DecompressionBombError:
            raise _Fault(
                f"expected at most {max_pixels:,} pixels, got more than PIL would ever open; "
                "make it smaller"
            ) from None
        except UnidentifiedImageError:
            formats = ", ".join(_FORMATS)
            raise _Fault(f"expected a picture, but it is none of {formats}") from None


class _Fault(ValueError):
    """A fault in our own words, which lack the name of the file."""


@contextlib.contextmanager
def _reading(name: str, what: str) -> Iterator[None]:
    """Turn every fault of a file into a ValueError that names it. No warnings are shown."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except FileNotFoundError:
        raise
    except _Fault as error:
        raise ValueError(f"{name}: {error}") from None
    except Exception as error:
        # Readers of damaged files raise anything.
        reason = brief(str(error) or type(error).__name__)
        raise ValueError(f"{name}: expected {what}, but {reason}") from error


def _check_pixels(seen: Any, most: int, what: str) -> None:
    if seen.width * seen.height > most:
        got = f"{seen.width} x {seen.height}"
        raise _Fault(
            f"expected at most {most:,} {what}, got {got}; make it smaller or raise --max-pixels"
        )


def check_inside(path: str, folder: str | None) -> None:
    """Raise ValueError unless `path`, symbolic links followed, lies in `folder`."""
    if folder is None:
        return
    real, real_folder = os.path.realpath(path), os.path.realpath(folder)
    if os.path.commonpath([real, real_folder]) != real_folder:
        raise ValueError(
            f"{path} is a link to a place outside of {folder}: give a folder that holds all "
            "pictures as --images"
        )


def _file_size(path: str, folder: str | None) -> int:
    """Bytes of a file. Raises ValueError if it lies outside of `folder`, or is no file."""
    check_inside(path, folder)
    found = os.stat(path)
    # A pipe would never end.
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: expected a picture, but it is no file")
    return found.st_size


def open_video(
    source: Any, folder: str | None = None, frames: int = 8, max_pixels: int = MAX_PIXELS
) -> list:
    """`frames` frames of a video, evenly spaced (PIL, RGB); fewer if it has fewer.

    source: a video file, a folder of pictures, taken in order of name, or a list of pictures.
    folder, max_pixels: see `open_picture`, which also says what is raised; ImportError if a video
    file needs the package that reads it.
    """
    if isinstance(source, str):
        check_inside(source, folder)
        if not os.path.exists(source):
            raise FileNotFoundError(2, "No such file or directory", source)
        if not os.path.isdir(source):
            return _open_video_file(source, frames, max_pixels)
        names = sorted(name for name in os.listdir(source) if name.lower().endswith(_SUFFIXES))
        if not names:
            raise ValueError(
                f"{source}: expected a video, or a folder of frames ({', '.join(_SUFFIXES)}), "
                "got no picture in it"
            )
        source = [os.path.join(source, name) for name in names]
    chosen = evenly_spaced(len(source), frames)
    return [open_picture(source[i], folder, max_pixels) for i in chosen]


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Up to `wanted` indices below `count`, evenly spaced, the first and the last among them.

    >>> evenly_spaced(9, 3), evenly_spaced(2, 8)
    ([0, 4, 8], [0, 1])
    """
    wanted = min(count, wanted)
    return [round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)]


def _open_video_file(path: str, frames: int, max_pixels: int) -> list:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f'{path}: video files need PyAV: pip install "vispco[video]"; or give the frames as '
            "pictures, in a list or a folder"
        ) from error
    _file_size(path, None)

    def decoded() -> Iterator[Any]:
        with av.open(path, options=_AV_OPTIONS) as video:
            coder = video.streams.video[0].codec_context if video.streams.video else None
            if coder is None:
                raise _Fault("expected a video, but there is none in it that can be decoded")
            # Containers may lie about the size of frames.
            _check_pixels(coder, max_pixels, "pixels a frame")
            for frame in video.decode(video=0):
                _check_pixels(frame, max_pixels, "pixels a frame")
                yield frame

    with _reading(path, "a video"):
        # Containers may lie about the number of frames, too: count them.
        count = sum(1 for _ in decoded())
        if not count:
            raise _Fault("expected a video, but it has no frames")
        chosen = evenly_spaced(count, frames)
        return [frame.to_image().convert("RGB") for i, frame in enumerate(decoded()) if i in chosen]
