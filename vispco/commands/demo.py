"""`vispco demo`: everything on the embedded testbed."""

from __future__ import annotations

import argparse

from .options import whole

SUMMARY = "run everything on the embedded testbed, in minutes on a CPU"
EXAMPLES = ("--output vispco-demo",)


def add_options(sub: argparse.ArgumentParser) -> None:
    """Of `vispco demo`."""
    sub.add_argument("--output", "-o", default="vispco-demo", metavar="FOLDER", help="(default: %(default)s)")
    sub.add_argument("--model", default="testbed-llava", help="testbed-llava or testbed-qwen (default: %(default)s)")
    sub.add_argument("--seed", type=whole(0), default=0, help="(default: %(default)s)")
    sub.add_argument("--fast", action="store_true", help="a smoke test with tiny sizes")
    sub.add_argument("--quiet", "-q", action="store_true", help="no progress on stderr")


def run(options: argparse.Namespace) -> None:
    """Hand over to `demonstration`."""
    from . import demonstration

    demonstration.run(options.output, options.seed, options.quiet, model_name=options.model, **(demonstration.FAST if options.fast else {}))
