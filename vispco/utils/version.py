"""The version of vispco, and of what decides a result."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"

#: Oldest releases that the contract passes with (constraints-oldest.txt), the same as in pyproject.toml.
OLDEST = {"torch": "2.6", "transformers": "5.0"}


def versions() -> dict[str, str]:
    """Recorded in every frontier."""
    return {"vispco": __version__, "torch": version("torch"), "transformers": version("transformers")}


def require(oldest: Mapping[str, str] = OLDEST) -> None:
    """Raise ImportError, with the command that helps, unless these packages are installed and new enough.

    >>> require({"torch": "2.0"})
    """
    for package, least in oldest.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            found = None
        if found is None or _numbers(found) < _numbers(least):
            have = "it is not installed" if found is None else f"{found} is installed"
            raise ImportError(f'vispco needs {package} >= {least}, but {have}: '
                              f'pip install --upgrade "{package}>={least}"')


def _numbers(text: str) -> tuple[int, ...]:
    """The major and minor part of a version: (5, 23) of 5.23.0.dev0."""
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


require()  # while vispco is imported: better than failing somewhere inside
