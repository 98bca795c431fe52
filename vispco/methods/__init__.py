"""Pruning methods: one small file each. A method is one `score()` function."""

from . import fastv as fastv
from . import pdrop as pdrop
from . import random as random
from . import sparsevlm as sparsevlm
from . import strided as strided
from .base import Method as Method
