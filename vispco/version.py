"""The version of vispco, and of what decides a result."""

from importlib.metadata import version

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Recorded in every frontier."""
    return {"vispco": __version__, "torch": version("torch"), "transformers": version("transformers")}
