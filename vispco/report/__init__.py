"""One page about a search that a person can open: `write_report`."""

from .page import Overlay, write_report

__all__ = ["Overlay", "write_report"]
