"""The embedded testbed: a small trained LLaVA model and eight visual question answering tasks for it."""

from .data import SPLITS, TASKS, Example, batches, collate, examples
from .model import MODELS, load

__all__ = ["MODELS", "SPLITS", "TASKS", "Example", "batches", "collate", "examples", "load"]
