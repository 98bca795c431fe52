"""Files that others wrote: they lie in one folder, have limits, and their faults name them."""

from __future__ import annotations

import contextlib
import os
import stat
import warnings
from collections.abc import Iterator
from typing import Any

from ..utils.files import brief


class Fault(ValueError):
    """A fault in our own words, which lack the name of the file."""


@contextlib.contextmanager
def reading(name: str, what: str) -> Iterator[None]:
    """Turn every fault of a file into a ValueError that names it. No warnings are shown."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except FileNotFoundError:
        raise
    except Fault as error:
        raise ValueError(f"{name}: {error}") from None
    except Exception as error:
        # Readers of damaged files raise anything.
        reason = brief(str(error) or type(error).__name__)
        raise ValueError(f"{name}: expected {what}, but {reason}") from error


def check_pixels(seen: Any, most: int, what: str) -> None:
    """Raise Fault if a picture or a frame has more pixels than `most`."""
    if seen.width * seen.height > most:
        got = f"{seen.width} x {seen.height}"
        raise Fault(
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


def file_size(path: str, folder: str | None) -> int:
    """Bytes of a file. Raises ValueError if it lies outside of `folder`, or is no file."""
    check_inside(path, folder)
    found = os.stat(path)
    # A pipe would never end.
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: expected a picture, but it is no file")
    return found.st_size
