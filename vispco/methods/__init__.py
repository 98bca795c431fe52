"""Pruning methods: one small file each. A method is one `score()` function."""

from importlib import import_module
from pkgutil import iter_modules

from .base import Method as Method

# Every file of this folder registers its method when it is imported.
for module in iter_modules(__path__):
    import_module(f"{__name__}.{module.name}")
