"""Model families: one small adapter file each."""

from importlib import import_module
from pkgutil import iter_modules

from .base import Adapter as Adapter

# Every file of this folder registers its adapters when it is imported.
for module in iter_modules(__path__):
    import_module(f"{__name__}.{module.name}")
