"""`vispco apply`: one question about a picture, answered in full and pruned."""

from __future__ import annotations

import argparse

from .. import data, testbed
from ..config import PruningConfig
from .answer import answer, side_by_side, speeds
from .asked import about, check_words, of_testbed, words
from .model import load_model
from .options import add_json, add_model, add_reading, whole
from .output import print_json
from .questions import reading_options

SUMMARY = "answer one question in full and pruned, side by side"
EXAMPLES = ("--model testbed --config run/config-0.5.json --index 3",
            "--model llava-hf/llava-1.5-7b-hf --config run/config-0.5.json \\\n"
            '      --image cat.jpg --question "What is on the sofa?"')


def add_options(sub: argparse.ArgumentParser) -> None:
    """Of `vispco apply`."""
    sub.add_argument("--config", required=True, metavar="FILE", help="a pruning configuration")
    sub.add_argument("--image", action="append", metavar="PATH", help="a picture; may be given several times")
    sub.add_argument("--video", metavar="PATH", help="a video file, or a folder of frames")
    sub.add_argument("--question", metavar="TEXT", help="what to ask about it")
    sub.add_argument("--max-new-tokens", type=whole(1), default=32, metavar="N", help="of the answer (default: %(default)s)")
    sub.add_argument("--repeats", type=whole(0), default=3, metavar="N",
                     help="of the time to the first token and of the rate after it, the median counts; 0: none (default: %(default)s)")
    sub.add_argument("--index", type=whole(0, 9999), default=0,
                     help="without a picture: which question of the testbed (default: the first, 0)")
    sub.add_argument("--split", default="test", help="of which split (default: %(default)s)")
    sub.add_argument("--seed", type=whole(0), default=0, help="of the testbed's questions (default: %(default)s)")
    add_reading(sub)
    add_json(sub)
    add_model(sub)


def run(options: argparse.Namespace) -> None:
    """Answer twice, print both."""
    if bool(options.image or options.video) != (options.question is not None) or options.image and options.video:
        raise ValueError("--image (or --video) and --question belong together: give both, or --index for a test "
                         "question")
    config = PruningConfig.load(options.config)
    reading = reading_options(options)
    if options.question:
        kind, expected = "image" if options.image else "video", None
        asked = about(options.image or [options.video], kind, options.question, options.max_pixels)
    else:
        asked, expected = _of_testbed(options)
    model, processor = load_model(options)
    inputs = data.prompt(processor, asked, **reading)
    question = words(asked)
    check_words(options.model, processor, inputs, question)
    full, pruned = (answer(model, processor, inputs, c, options.max_new_tokens) for c in (None, config))
    measured = speeds(model, inputs, config, options.repeats) if options.repeats else None
    if options.json:
        return print_json({"question": question, "expected": expected, "full": full, "pruned": pruned, "speeds": measured})
    print(side_by_side(full, pruned, question, expected, measured))


def _of_testbed(options: argparse.Namespace) -> tuple[data.Conversation, str]:
    example = testbed.examples(options.split, options.index + 1, options.seed)[options.index]
    return of_testbed(example, f"question {options.index}"), example.answer
