"""Pruning methods: one small file each. A method is one `score()` function."""

from . import cdpruner as cdpruner
from . import dart as dart
from . import divprune as divprune
from . import fastv as fastv
from . import fitprune as fitprune
from . import pdrop as pdrop
from . import pool as pool
from . import random as random
from . import sparsevlm as sparsevlm
from . import strided as strided
from . import visionzip as visionzip
from . import vispruner as vispruner
from . import vtw as vtw
from .base import Method as Method
