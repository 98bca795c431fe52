"""`vispco plot`: frontiers as pictures."""

from __future__ import annotations

import argparse

from ..frontier import Frontier
from .output import check_file

SUMMARY = "draw frontiers and their schedules"
EXAMPLES = ("run/frontier.json -o frontier.svg -o frontier.png",)


def add_options(sub: argparse.ArgumentParser) -> None:
    """Of `vispco plot`."""
    sub.add_argument("frontiers", nargs="+", metavar="FRONTIER", help="frontier.json files, drawn together")
    sub.add_argument("--output", "-o", action="append", required=True, metavar="FILE",
                     help="picture to write, .svg or .png; may be given several times")
    sub.add_argument("--x", choices=("share", "flops"), default="share", help="(default: %(default)s)")
    sub.add_argument("--y", choices=("accuracy", "kl"), help="(default: accuracy if measured, else kl)")


def run(options: argparse.Namespace) -> None:
    """Draw every file that was asked for."""
    from ..plot import picture_kind, plot_frontier

    for path in options.output:
        picture_kind(path)
        check_file(path)
    frontiers = {path: Frontier.load(path) for path in options.frontiers}
    named = frontiers if len(frontiers) > 1 else [*frontiers.values()]
    for path in options.output:
        plot_frontier(named, path, x=options.x, y=options.y)
        print(path)
