"""Any picture as 8-bit RGB that looks as the file does in a viewer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .guards import Fault

#: Tags of TIFF: bits of a sample; what 0 means (0: white).
_BITS, _ZERO_IS = 258, 262


def check_depth(image: Any) -> None:
    """Raise Fault for numbers whose black and white are not known: floats, 32-bit integers."""
    # PNG and PPM hold 16 bits in this mode.
    if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
        got = "floats" if image.mode == "F" else "integers of 32 bits or with a sign"
        raise Fault(
            f"expected 8 or 16 bits for each colour, got {got}, whose black and white are not "
            "known: save it as an 8-bit PNG"
        )


def in_rgb(image: Any) -> Any:
    """A PIL picture of any mode in RGB, upright as its EXIF data say. The given one stays as it is.

    What is transparent shows white, as browsers and the processors of most models have it: the
    colours that a file hides there are never seen. 16 bits become the nearest 8, from black to
    white. Raises Fault for floats and for integers of 32 bits.
    """
    from PIL import Image, ImageOps

    check_depth(image)
    # The first frame of a GIF may leave a part of the canvas bare.
    bare = image.dispose_extent if image.format == "GIF" else None
    # Of the file, which a copy does not know.
    tags = getattr(image, "tag_v2", {})
    image = ImageOps.exif_transpose(image)
    whole = (0, 0, *image.size)
    drawn = bare or whole
    if image.mode.startswith("I"):
        image = _from_16_bits(image, tags)
    if drawn == whole and not _is_transparent(image):
        return image.convert("RGB")
    seen = image.convert("RGBA").crop(drawn)
    white = Image.new("RGB", image.size, "white")
    white.paste(seen, drawn, mask=seen.getchannel("A"))
    return white


def _is_transparent(image: Any) -> bool:
    colour = image.info.get("transparency")
    if colour is None:
        palette = getattr(image, "palette", None)
        in_palette = image.mode == "P" and palette is not None and palette.mode.endswith("A")
        return in_palette or image.mode in ("LA", "La", "PA", "RGBA", "RGBa")
    # PIL keeps 16 bits of this colour, and 8 of the picture's.
    if isinstance(colour, tuple) and max(colour) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    return True


def _from_16_bits(image: Any, tags: Mapping) -> Any:
    """Grey of 16 bits (or as many as a TIFF says) in 8, with its transparency."""
    from PIL import Image

    most = 2 ** tags.get(_BITS, (16,))[0] - 1
    values = np.asarray(image).astype(np.int64)
    grey = ((values.clip(0, most) * 255 + most // 2) // most).astype(np.uint8)
    if tags.get(_ZERO_IS) == 0:
        grey = 255 - grey
    hidden = image.info.get("transparency")
    if hidden is None:
        return Image.fromarray(grey)
    return Image.fromarray(np.dstack([grey, np.where(values == hidden, 0, 255).astype(np.uint8)]))
