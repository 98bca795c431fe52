"""The commands of `vispco`, a file each: SUMMARY, EXAMPLES, add_options(parser), run(options)."""

from . import apply, convert, demo, evaluate, list, plot, search

COMMANDS = {"search": search, "evaluate": evaluate, "plot": plot, "apply": apply, "convert": convert, "list": list,
            "demo": demo}
