"""Frames of a video file, with the times at which they are shown."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

from .colours import in_rgb
from .guards import Fault, check_pixels, file_size, reading

#: Containers of videos that lead to no other files and to no addresses.
_AV_OPTIONS = {
    "format_whitelist": "mov,matroska,avi,mpeg,mpegts,flv,asf,ogg,gif",
    "protocol_whitelist": "file",
}


class Film(list):
    """Frames of a video (PIL, RGB), and when they are shown.

    fps: frames per second of the whole video; None: nobody knows.
    length: frames of the whole video.
    places: of each frame here, its number in the whole video. It is shown at `place / fps` seconds.
    (Of a video at a varying rate, these are milliseconds: see `clock`.)
    """

    def __init__(self, frames: Sequence, fps: float | None, length: int, places: Sequence[int]):
        super().__init__(frames)
        self.fps, self.length, self.places = fps, length, list(places)

    def metadata(self) -> dict[str, Any]:
        """What transformers' processors want to know of a video (`VideoMetadata`)."""
        return {
            "total_num_frames": self.length,
            "fps": self.fps,
            "duration": self.length / self.fps if self.fps else None,
            "frames_indices": list(self.places),
            "width": self[0].width,
            "height": self[0].height,
        }

    @property
    def sampled_fps(self) -> float | None:
        """Frames per second of the frames that were taken."""
        return self.fps and len(self) / self.length * self.fps

    def at_rate(self, fps: float) -> Film:
        """The same frames at a rate that is known from elsewhere."""
        return Film(self, fps, self.length, self.places)


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Up to `wanted` indices below `count`, evenly spaced, the first and the last among them.

    >>> evenly_spaced(9, 3), evenly_spaced(2, 8)
    ([0, 4, 8], [0, 1])
    """
    wanted = min(count, wanted)
    return [round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)]


def open_film(source: str | bytes, frames: int, max_pixels: int, fps: float | None) -> Film:
    """Evenly spaced frames of a video file (its path, or its bytes), upright as the file says.

    fps: counts if the file knows no times. Raises what `vispco.data.pictures.open_video` does.
    """
    name = source if isinstance(source, str) else f"a video of {len(source):,} bytes"
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f'{name}: video files need PyAV: pip install "vispco[video]"; or give the frames as '
            "pictures, in a list or a folder"
        ) from error
    if isinstance(source, str):
        file_size(source, None)
    stated: list[float | None] = [None]

    def decoded() -> Iterator[Any]:
        file: Any = source if isinstance(source, str) else io.BytesIO(source)
        with av.open(file, "r", options=_AV_OPTIONS) as video:
            stream = video.streams.video[0] if video.streams.video else None
            if stream is None or stream.codec_context is None:
                raise Fault("expected a video, but there is none in it that can be decoded")
            stated[0] = float(stream.average_rate) if stream.average_rate else None
            # Containers may lie about the size of frames.
            check_pixels(stream.codec_context, max_pixels, "pixels a frame")
            for frame in video.decode(video=0):
                check_pixels(frame, max_pixels, "pixels a frame")
                yield frame

    with reading(name, "a video"):
        # Containers may lie about the number of frames, too: count them.
        times = [frame.time for frame in decoded()]
        if not times:
            raise Fault("expected a video, but it has no frames")
        rate, length, places = clock(times, stated[0])
        chosen = evenly_spaced(len(times), frames)
        kept = [_picture(frame) for i, frame in enumerate(decoded()) if i in chosen]
        return Film(kept, rate or fps, length, [places[i] for i in chosen])


def clock(
    times: Sequence[float | None], stated: float | None
) -> tuple[float | None, int, Sequence[int]]:
    """(rate, length, places) of a video: frame i is shown at `places[i] / rate` of `length / rate`.

    times: seconds at which the frames are shown; None where a file does not say.
    stated: the rate by the file's header. If it agrees with the times, places are the numbers of
        the frames. Where it does not (phones record at a varying rate), they are milliseconds.

    >>> clock([0.0, 0.5, 1.0], 2.0), clock([3.0, 3.1, 3.2, 33.0], 30.0)
    ((2.0, 3, [0, 1, 2]), (1000, 40000, [0, 100, 200, 30000]))
    """
    numbers = list(range(len(times)))
    known = [t for t in times if t is not None]
    if len(known) < len(times):
        return stated, len(times), numbers
    since = [t - known[0] for t in known]
    if stated and all(round(t * stated) == i for i, t in zip(numbers, since, strict=True)):
        return stated, len(times), numbers
    if since[-1] <= 0 or since != sorted(since):
        return stated, len(times), numbers
    # The last frame is shown for as long as the others on average.
    length = since[-1] * len(since) / (len(since) - 1)
    return 1000, round(1000 * length), [round(1000 * t) for t in since]


def _picture(frame: Any) -> Any:
    from PIL import Image

    clear = any(component.is_alpha for component in frame.format.components)
    if clear or frame.format.has_palette:
        image = in_rgb(Image.fromarray(frame.to_ndarray(format="rgba")))
    else:
        image = frame.to_image().convert("RGB")
    # Degrees, counter-clockwise, from the display matrix that phones write.
    turn = getattr(frame, "rotation", 0)
    return image.rotate(turn, expand=True) if turn else image
