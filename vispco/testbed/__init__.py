"""The embedded testbed: two small trained models, LLaVA and Qwen2.5-VL, and eight visual question answering tasks."""

from .data import SPLITS, TASKS, Example, batches, collate, enlarge, examples
from .deep import deepen
from .model import MODELS, load

__all__ = ["MODELS", "SPLITS", "TASKS", "Example", "batches", "collate", "deepen", "enlarge", "examples", "load"]
