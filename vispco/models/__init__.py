"""Model families: one small adapter file each."""

from . import llava as llava
from .base import Adapter as Adapter
