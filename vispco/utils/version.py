"""The version of vispco, and of the packages that decide a result."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"

#: The oldest supported releases: those of constraints-oldest.txt and pyproject.toml.
OLDEST = {"torch": "2.6", "transformers": "5.0"}


def versions() -> dict[str, str]:
    """The versions that are recorded in every frontier."""
    return {"vispco": __version__} | {package: version(package) for package in OLDEST}


def require(oldest: Mapping[str, str] = OLDEST) -> None:
    """Raise ImportError, with the command that helps, unless these packages are new enough.

    >>> require({"torch": "2.0"})
    """
    for package, least in oldest.items():
        try:
            found = version(package)
            have = f"{found} is installed"
        except PackageNotFoundError:
            found, have = "0", "it is not installed"
        if _numbers(found) < _numbers(least):
            upgrade = f'pip install --upgrade "{package}>={least}"'
            raise ImportError(f"vispco needs {package} >= {least}, but {have}: {upgrade}")


def _numbers(text: str) -> tuple[int, ...]:
    """The major and minor part of a version: (5, 23) of 5.23.0.dev0."""
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


# While vispco is imported: better than failing somewhere inside.
require()
