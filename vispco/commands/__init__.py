"""The commands of `vispco`, a file each: SUMMARY, EXAMPLES, add_options(parser), run(options)."""

from . import apply, convert, demo, evaluate, list, plot, profile, search

_MODULES = (search, profile, evaluate, plot, apply, convert, list, demo)
COMMANDS = {module.__name__.split(".")[-1]: module for module in _MODULES}
