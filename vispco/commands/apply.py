"""`vispco apply`: one question about a picture, answered in full and pruned."""

from __future__ import annotations

import argparse

from .. import data, testbed
from ..registry import adapter_for
from .answer import answer, side_by_side, speeds
from .configs import HELP, find_config, moved
from .conversations import check_vocabulary, conversation_about, first_question, from_testbed
from .model import find_model, is_testbed
from .options import Integer, add_json, add_model, add_reading, non_negative_int, positive_int
from .output import print_json
from .questions import reading_options, testbed_kind
from .too_small import slow_note

SUMMARY = "answer one question in full and pruned, side by side"
EXAMPLES = (
    "--model testbed --config run/config-0.5.json --index 3",
    "--model llava-hf/llava-1.5-7b-hf --config run/config-0.5.json \\\n"
    '      --image cat.jpg --question "What is on the sofa?"',
)


def add_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of `vispco apply`."""
    add = sub.add_argument
    add("--config", required=True, metavar="FILE", help=HELP)
    add("--image", action="append", metavar="PATH", help="a picture; may be repeated")
    add("--video", metavar="PATH", help="a video file, or a folder of frames")
    add("--question", metavar="TEXT", help="what to ask about it")
    add("--max-new-tokens", type=positive_int, default=32, help="at most in an answer")
    repeats = "how often the speed is measured, for a median; 0: not at all"
    add("--repeats", type=non_negative_int, default=3, help=repeats)
    index = "without a picture: which question of the testbed"
    add("--index", type=Integer(0, 9999), default=0, help=index)
    add("--split", default="test", help="the split of the testbed's questions")
    add("--seed", type=non_negative_int, default=0, help="draws the testbed's questions")
    add_reading(add)
    add_json(sub)
    add_model(sub)


def run(options: argparse.Namespace) -> None:
    """Answer twice, print both."""
    media = options.image or options.video
    if options.question is not None and not options.question.strip():
        raise ValueError("--question is empty: say what to ask, such as --question 'What is it?'")
    if bool(media) != (options.question is not None) or (options.image and options.video):
        together = "give both, or --index for a test question"
        raise ValueError(f"--image (or --video) and --question belong together: {together}")
    find = find_config(options.config)
    load = find_model(options)
    if options.question is None and not is_testbed(options.model):
        _check_testbed_question(options.model)
    reading = reading_options(options)
    expected = None
    if options.question:
        kind, paths = ("image", options.image) if options.image else ("video", [options.video])
        conversation = conversation_about(paths, kind, options.question, options.max_pixels)
    else:
        examples = testbed.examples(options.split, options.index + 1, options.seed)
        expected = examples[-1].answer
        conversation = from_testbed(examples[-1], f"question {options.index}")
    model, processor = load()
    layers = len(adapter_for(model)(model).layers)
    config = find(layers)
    inputs = data.prompt(processor, conversation, **reading)
    question = first_question(conversation)
    check_vocabulary(options.model, processor, inputs, question)
    full = answer(model, processor, inputs, None, options.max_new_tokens)
    pruned = answer(model, processor, inputs, config, options.max_new_tokens)
    times = speeds(model, inputs, config, options.repeats) if options.repeats else None
    if options.json:
        asked = {"question": question, "expected": expected}
        print_json({**asked, "full": full, "pruned": pruned, "speeds": times})
    else:
        if expected is not None and not is_testbed(options.model):
            print(f"question {options.index} of the testbed's own, because no --image is given")
        if note := moved(options.config, layers):
            print(f"{note}\n")
        print(side_by_side(full, pruned, question, expected, times))
        if times:
            taken = times["seconds_to_first_token"]
            note = slow_note(model, inputs, config, taken["pruned"] / taken["full"])
            print(f"\n{note}" if note else "")


def _check_testbed_question(model: str) -> None:
    """Raise ValueError unless a model of the user's own can be asked what the testbed asks."""
    try:
        testbed_kind(model)
    except ValueError:
        raise ValueError(
            f"{model} needs a question of its own: give --image and --question"
        ) from None
