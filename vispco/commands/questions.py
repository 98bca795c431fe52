"""The questions that `--data` names, as batches for any model."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from .. import data, testbed
from ..data.collate import split as in_batches
from ..data.template import read_template
from ..utils.distributed import as_gathered, rank, share
from ..utils.files import printable
from ..registry import adapter_for
from ..testbed.vocab import ID, QWEN_ID
from .asked import of_testbed
from .model import check_name, is_testbed


@dataclass
class Questions:
    """split: that they are of, if their data has any. tasks: of each question, in the order of `Record.correct`.
    batches(model, processor): with labels. some(n): up to n of them about one picture each, as conversations."""

    split: str | None
    tasks: list[str]
    batches: Callable[[Any, Any], list[dict]]
    some: Callable[[int], list[data.Conversation]]


def questions(options: argparse.Namespace, split: str) -> Questions:
    """Read and check the data, before any model is loaded. split: of the testbed, unless `--split` names one."""
    if options.data == "testbed":
        return _of_testbed(options, options.split or split)
    if options.tasks:
        raise ValueError(f"--tasks are the testbed's: leave them out with --data {options.data}")
    if not is_testbed(options.model):
        check_name(options.model)
    reading = reading_options(options)
    sample = data.draw(options.data, options.limit, options.seed, images=options.images, columns=options.columns,
                       split=options.split, max_pixels=options.max_pixels)
    size = options.batch_size or 4
    parts = in_batches(sample.conversations, size)

    def batches(model, processor) -> list[dict]:
        made = data.batches(processor, sample.conversations, size, **reading)
        if not options.quiet and not rank():
            own = chain.from_iterable(map(share, parts))
            print(preview(sample, own, made, adapter_for(model)(model), processor, options), file=sys.stderr)
        return made

    return Questions(options.split, [c.task or "other" for c in as_gathered(parts)], batches,
                     lambda n: [c for c in sample.conversations if c.kind == "image" and len(c.media) == 1][:n])


def reading_options(options: argparse.Namespace) -> dict[str, Any]:
    """Options of `data.collate` and `data.prompt`."""
    template = read_template(options.chat_template) if options.chat_template else None
    return {"chat_template": template, "max_pixels": options.max_pixels, "frames": options.frames}


def preview(sample: data.Sample, own: Iterable[data.Conversation], batches: list[dict], adapter, processor,
            options: argparse.Namespace, examples: int = 3) -> str:
    """What was drawn, in numbers; and some examples, with the words that are labelled. own: what the rows of the batches are of."""
    rows = [(ids, labels, visual) for b in batches for ids, labels, visual in
            zip(b["input_ids"], b["labels"], adapter.visual_mask(b["input_ids"], None) & b["attention_mask"].bool())]
    real = [int(m.sum()) for b in batches for m in b["attention_mask"]]
    visual, answers = [int(v.sum()) for _, _, v in rows], [int((label != -100).sum()) for _, label, _ in rows]
    texts = [n - v - a for n, v, a in zip(real, visual, answers)]
    count = len(sample.conversations)
    lines = [f"{options.data}: {sample.total:,} questions, {count:,} drawn with seed {options.seed}"
             + (f", {sample.skipped:,} without a picture left out" if sample.skipped else "")
             + f"; a question has {_span(visual)} visual tokens, {_span(texts)} of text, {_span(answers)} of answers"]
    for conversation, (_, labels, _) in list(zip(own, rows))[:examples]:
        (question, answer), *more = conversation.turns
        learned = processor.tokenizer.decode(labels[labels != -100])
        turns = f" (and {len(more)} more turns)" if more else ""
        lines.append(f"  {_clean(conversation.source)}  {_clean(question)} -> {_clean(answer)}{turns}; "
                     f"labelled: {_clean(learned)!r}")
    return "\n".join(lines)


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def _clean(text: str, longest: int = 70) -> str:
    """On one line, not too long, and nothing that a terminal would obey."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= longest else f"{text[:longest - 3]}..."


# ---- the testbed ----------------------------------------------------------------------------------------
def _of_testbed(options: argparse.Namespace, split: str) -> Questions:
    if given := [f"--{name}" for name in ("images", "columns", "chat_template") if getattr(options, name)]:
        raise ValueError(f"{given[0].replace('_', '-')} is for data of your own: give --data too")
    kind = _testbed_kind(options.model)  # refuses models that these questions are not for, before anything is made
    examples, size = testbed.examples(split, options.limit, options.seed, options.tasks), options.batch_size or 32
    parts = [examples[i:i + size] for i in range(0, len(examples), size)]
    return Questions(split, [e.task for e in as_gathered(parts)],
                     lambda model, processor: [testbed.collate(share(part), model=kind) for part in parts],
                     lambda n: [of_testbed(e, f"question {i}") for i, e in enumerate(examples[:n])])


def _testbed_kind(model: str) -> str:
    """The testbed model whose inputs `model` takes: it must know the testbed's few words by the same numbers."""
    if is_testbed(model):
        return model
    check_name(model)
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        words = json.loads((Path(model) / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        known = len({word for word in words if words[word] == QWEN_ID[word]})
        return {len(ID): "testbed-llava", len(QWEN_ID): "testbed-qwen"}[known]
    raise ValueError(f"{model} does not speak the testbed's vocabulary: give questions for it as --data")
