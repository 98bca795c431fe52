"""Questions of your own: read from disk, drawn by seed, turned into batches by any model's processor."""

from .collate import batches, collate, prompt
from .conversation import Conversation, parse
from .draw import Sample, draw, reservoir
from .lines import rows
from .pictures import open_picture

__all__ = ["Conversation", "Sample", "batches", "collate", "draw", "open_picture", "parse", "prompt", "reservoir", "rows"]
