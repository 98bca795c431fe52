"""`vispco plot`: frontiers as pictures, and the tokens that are kept of a picture."""

from __future__ import annotations

import argparse

from .. import data
from ..frontier import Frontier
from ..plot import picture_kind, plot_frontier, plot_tokens, require_matplotlib
from ..plot.read import check
from ..registry import adapter_for
from ..utils.files import brief
from .answer import answer
from .configs import HELP, find_config, frontier_path
from .conversations import check_vocabulary, conversation_about, first_question
from .model import find_model
from .options import add_model, add_reading
from .output import check_file
from .questions import reading_options

SUMMARY = "draw frontiers and their schedules, or the tokens kept of a picture"
EXAMPLES = (
    "run/frontier.json -o frontier.svg -o frontier.png",
    '--tokens cat.jpg --question "What is on the sofa?" --config run/config-0.5.json \\\n'
    "      --model llava-hf/llava-1.5-7b-hf -o tokens.png",
)


def add_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of `vispco plot`."""
    add = sub.add_argument
    files = "frontier.json files, or folders of searches, to draw together; those that differ in "
    files += "their seeds alone get error bars"
    add("frontiers", nargs="*", metavar="FRONTIER", help=files)
    picture = "picture to write, .svg or .png; may be given several times"
    add("--output", "-o", action="append", required=True, metavar="FILE", help=picture)
    add("--x", choices=("share", "flops"), default="share", help="the cost")
    add("--y", choices=("accuracy", "kl"), help="the quality (default: accuracy, else kl)")
    add = sub.add_argument_group("kept tokens").add_argument
    add("--tokens", metavar="PATH", help="a picture: draw which of its patches enter each layer")
    add("--question", metavar="TEXT", help="what is asked about it")
    add("--config", metavar="FILE", help=HELP)
    add_reading(add)
    add_model(sub)


def run(options: argparse.Namespace) -> None:
    """Draw every file that was asked for."""
    given = [value is not None for value in (options.tokens, options.question, options.config)]
    if any(given) == bool(options.frontiers) or any(given) != all(given):
        what = "frontier.json files or folders of searches to draw, or --tokens PICTURE with "
        what += "--question and --config"
        raise ValueError(f"give {what}")
    for path in options.output:
        picture_kind(path)
        check_file(path)
    require_matplotlib()
    if options.tokens:
        _draw_tokens(options)
    else:
        _draw_frontiers(options)


def _draw_frontiers(options: argparse.Namespace) -> None:
    loaded = {path: load_frontier(frontier_path(path)) for path in options.frontiers}
    for path in options.output:
        frontiers = loaded if len(loaded) > 1 else [*loaded.values()]
        plot_frontier(frontiers, path, x=options.x, y=options.y)
        print(path)


def load_frontier(path: str) -> Frontier:
    """A frontier that can be drawn. Raises ValueError that names the file."""
    frontier = Frontier.load(path)
    try:
        check(frontier)
    except ValueError as error:
        raise ValueError(f"{path}: {brief(error)}") from None
    return frontier


def _draw_tokens(options: argparse.Namespace) -> None:
    find, reading = find_config(options.config), reading_options(options)
    load = find_model(options)
    pixels = options.max_pixels
    conversation = conversation_about([options.tokens], "image", options.question, pixels)
    question = first_question(conversation)
    model, processor = load()
    config = find(len(adapter_for(model)(model).layers))
    inputs = data.prompt(processor, conversation, **reading)
    check_vocabulary(options.model, processor, inputs, question)
    picture = data.open_picture(conversation.media[0], conversation.folder, pixels)
    answers = [
        answer(model, processor, inputs, pruning, 32)["answer"] for pruning in (None, config)
    ]
    title = f'"{question}" full model: {answers[0]}; pruned: {answers[1]}'
    for path in options.output:
        plot_tokens(model, processor, inputs, picture, config, path, title)
        print(path)
