"""`vispco plot`: frontiers as pictures, and the tokens that are kept of a picture."""

from __future__ import annotations

import argparse

from .. import data
from ..config import PruningConfig
from ..utils.files import brief
from ..frontier import Frontier
from .asked import about, check_words, words
from .model import load_model
from .options import add_model, add_reading
from .output import check_file
from .questions import reading_options

SUMMARY = "draw frontiers and their schedules, or the tokens kept of a picture"
EXAMPLES = ("run/frontier.json -o frontier.svg -o frontier.png",
            '--tokens cat.jpg --question "What is on the sofa?" --config run/config-0.5.json \\\n'
            "      --model llava-hf/llava-1.5-7b-hf -o tokens.png")


def add_options(sub: argparse.ArgumentParser) -> None:
    """Of `vispco plot`."""
    sub.add_argument("frontiers", nargs="*", metavar="FRONTIER",
                     help="frontier.json files, drawn together; those that differ in their seeds alone as one, with error bars")
    sub.add_argument("--output", "-o", action="append", required=True, metavar="FILE",
                     help="picture to write, .svg or .png; may be given several times")
    sub.add_argument("--x", choices=("share", "flops"), default="share", help="(default: %(default)s)")
    sub.add_argument("--y", choices=("accuracy", "kl"), help="(default: accuracy if measured, else kl)")
    tokens = sub.add_argument_group("kept tokens")
    tokens.add_argument("--tokens", metavar="PATH", help="a picture: draw which of its patches enter each layer")
    tokens.add_argument("--question", metavar="TEXT", help="what is asked about it")
    tokens.add_argument("--config", metavar="FILE", help="a pruning configuration")
    add_reading(sub, tokens.add_argument)
    add_model(sub)


def run(options: argparse.Namespace) -> None:
    """Draw every file that was asked for."""
    from ..plot import picture_kind, plot_frontier, require_matplotlib

    given = [getattr(options, name) is not None for name in ("tokens", "question", "config")]
    if any(given) == bool(options.frontiers) or any(given) != all(given):
        raise ValueError("give frontier.json files to draw, or --tokens PICTURE with --question and --config")
    for path in options.output:
        picture_kind(path)
        check_file(path)
    require_matplotlib()
    if options.tokens:
        return _tokens(options)
    frontiers = {path: _checked(path) for path in options.frontiers}
    named = frontiers if len(frontiers) > 1 else [*frontiers.values()]
    for path in options.output:
        plot_frontier(named, path, x=options.x, y=options.y)
        print(path)


def _checked(path: str) -> Frontier:
    """What can be drawn; ValueError that names the file of several."""
    from ..plot.read import check

    frontier = Frontier.load(path)
    try:
        check(frontier)
    except ValueError as error:
        raise ValueError(f"{path}: {brief(error)}") from None
    return frontier


def _tokens(options: argparse.Namespace) -> None:
    from ..plot import plot_tokens

    config, reading = PruningConfig.load(options.config), reading_options(options)
    asked = about([options.tokens], "image", options.question, options.max_pixels)
    model, processor = load_model(options)
    inputs = data.prompt(processor, asked, **reading)
    check_words(options.model, processor, inputs, words(asked))
    picture = data.open_picture(asked.media[0], asked.folder, options.max_pixels)
    for path in options.output:
        plot_tokens(model, processor, inputs, picture, config, path, words(asked))
        print(path)
