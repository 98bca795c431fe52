"""The questions that `--data` names, as batches for any model."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from .. import data, testbed
from ..data.collate import split as in_batches
from ..data.template import read_template
from ..registry import adapter_for
from ..testbed import smollm
from ..testbed.vocab import ID, IMAGE, QWEN_ID
from ..utils.distributed import as_gathered, rank, share
from ..utils.files import printable
from .conversations import from_testbed
from .model import is_testbed


@dataclass
class Questions:
    """What `--data` names, read and checked.

    split: of the data, if it has any. tasks: of each question, in the order of `Record.correct`.
    batches(model, processor): with labels.
    about_one_picture(n): up to n of the questions that are about one picture each.
    """

    split: str | None
    tasks: list[str]
    batches: Callable[[Any, Any], Sequence[Mapping]]
    about_one_picture: Callable[[int], list[data.Conversation]]


def load_questions(options: argparse.Namespace, split: str) -> Questions:
    """Read and check the data, before any model is loaded.

    split: of the testbed, unless `--split` names one.
    """
    if options.data == "testbed":
        return _of_testbed(options, options.split or split)
    if options.tasks:
        raise ValueError(f"--tasks are the testbed's: leave them out with --data {options.data}")
    reading = reading_options(options)
    source = {"images": options.images, "columns": options.columns, "split": options.split}
    limits = {"max_pixels": options.max_pixels}
    sample = data.draw(options.data, options.limit, options.seed, **source, **limits)
    size = options.batch_size or 4
    parts = in_batches(sample.conversations, size)

    def batches(model, processor) -> Sequence[Mapping]:
        made = data.batches(processor, sample.conversations, size, **reading)
        if not options.quiet and not rank():
            rows = chain.from_iterable(map(share, parts))
            adapter = adapter_for(model)(model)
            print(preview(sample, rows, made, adapter, processor, options), file=sys.stderr)
        return made

    def about_one_picture(n: int) -> list[data.Conversation]:
        found = [c for c in sample.conversations if c.kind == "image" and len(c.media) == 1]
        return found[:n]

    tasks = [c.task or "other" for c in as_gathered(parts)]
    return Questions(options.split, tasks, batches, about_one_picture)


def reading_options(options: argparse.Namespace) -> dict[str, Any]:
    """Options of `data.collate` and `data.prompt`."""
    template = read_template(options.chat_template) if options.chat_template else None
    reading = {name: getattr(options, name) for name in ("max_pixels", "frames", "fps")}
    return {"chat_template": template, **reading}


def preview(
    sample: data.Sample,
    conversations: Iterable[data.Conversation],
    batches: Sequence[Mapping],
    adapter,
    processor,
    options: argparse.Namespace,
) -> str:
    """What was drawn, in numbers; and three examples, with the words that are labelled.

    conversations: what the rows of `batches` are about.
    """
    visual: list[int] = []
    text: list[int] = []
    answers: list[int] = []
    for batch in batches:
        real = batch["attention_mask"].bool()
        seen = adapter.visual_mask(batch["input_ids"], None) & real
        answer = batch["labels"] != -100
        visual += seen.sum(1).tolist()
        answers += answer.sum(1).tolist()
        text += (real.sum(1) - seen.sum(1) - answer.sum(1)).tolist()
    skipped = f", {sample.skipped:,} without a picture left out" if sample.skipped else ""
    lines = [
        f"{options.data}: {sample.total:,} questions, {len(sample.conversations):,} drawn with "
        f"seed {options.seed}{skipped}; a question has {_span(visual)} visual tokens, "
        f"{_span(text)} of text, {_span(answers)} of answers"
    ]
    labels = chain.from_iterable(batch["labels"] for batch in batches)
    for conversation, row, _ in zip(conversations, labels, range(3), strict=False):
        (question, answer), *more = conversation.turns
        labelled = processor.tokenizer.decode(row[row != -100])
        turns = f" (and {len(more)} more turns)" if more else ""
        turn = f"{_clean(question)} -> {_clean(answer)}{turns}"
        lines.append(f"  {_clean(conversation.source)}  {turn}; labelled: {_clean(labelled)!r}")
    return "\n".join(lines)


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def _clean(text: str, longest: int = 70) -> str:
    """On one line, not too long, and nothing that a terminal would obey."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


# ---- the testbed ----------------------------------------------------------------------------
def _of_testbed(options: argparse.Namespace, split: str) -> Questions:
    for name in ("images", "columns", "chat_template"):
        if getattr(options, name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is for data of your own: give --data too")
    # Before anything is made: this refuses models that cannot read the questions.
    kind = testbed_kind(options.model)
    if not is_testbed(options.model) and not rank():
        print("the testbed's own questions are used, because no --data is given", file=sys.stderr)
    examples = testbed.examples(split, options.limit, options.seed, options.tasks)
    size = options.batch_size or 32
    parts = [examples[i : i + size] for i in range(0, len(examples), size)]

    def batches(model, processor) -> Sequence[Mapping]:
        return [testbed.collate(share(part), model=kind) for part in parts]

    def about_one_picture(n: int) -> list[data.Conversation]:
        return [from_testbed(e, f"question {i}") for i, e in enumerate(examples[:n])]

    tasks = [example.task for example in as_gathered(parts)]
    return Questions(split, tasks, batches, about_one_picture)


def testbed_kind(model: str) -> str:
    """The testbed model whose inputs `model` takes.

    It must know the testbed's words by the same numbers. Raises ValueError if it does not.
    """
    if is_testbed(model):
        return model
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        text = (Path(model) / "tokenizer.json").read_text(encoding="utf-8")
        words = json.loads(text)["model"]["vocab"]
        if words.get(IMAGE) == smollm.IMAGE_ID:
            return smollm.NAME
        known = len({word for word in words if words[word] == QWEN_ID[word]})
        return {len(ID): "testbed-llava", len(QWEN_ID): "testbed-qwen"}[known]
    advice = "give questions for it as --data"
    raise ValueError(f"{model} does not speak the testbed's vocabulary: {advice}")
