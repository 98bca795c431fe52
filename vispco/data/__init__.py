"""Questions of your own: read from disk, drawn by seed, turned into batches by any model's processor."""

from .collate import batches, collate, prompt
from .conversation import Conversation, parse
from .draw import Sample, draw, reservoir
from .lines import rows

__all__ = ["Conversation", "Sample", "batches", "collate", "draw", "parse", "prompt", "reservoir", "rows"]
