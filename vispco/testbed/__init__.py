"""The embedded testbed: two small trained models, and eight tasks of visual question answering."""

from .data import SPLITS, TASKS, Example, batches, collate, enlarge, examples
from .model import MODELS, load

__all__ = [
    "MODELS",
    "SPLITS",
    "TASKS",
    "Example",
    "batches",
    "collate",
    "enlarge",
    "examples",
    "load",
]
