"""Pruning methods on the video task, and fewer frames at equal FLOPs.

    python -m tests.reproduction.video --output docs/results/video/testbed-qwen-video.json

Two comparisons on the same held-out questions. `equal`: every method drops once, as early as it
can, and keeps as many tokens as give it the prefill FLOPs of a clip with a half, a quarter or an
eighth of its moments; the clip with fewer moments is the rival. `same`: every method keeps that
share of the tokens before one layer, the same for all. The file and a table beside it (.md) are
written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from vispco.calibration import prepare, run_teacher, shapes
from vispco.config import PruningConfig
from vispco.evaluate import evaluate
from vispco.flops import CostModel
from vispco.registry import adapter_for, build_method
from vispco.testbed import load, video
from vispco.testbed.model import VIDEO
from vispco.utils.files import read_json, write_text

from .markdown import markdown

METHODS = ("evs", "vidcom2", "framefusion", "fastv", "divprune", "random", "strided")
SHARES = (1 / 2, 1 / 4, 1 / 8)
FEWER = "fewer frames"


def measure(questions: int, layer: int, methods: Sequence[str] = METHODS) -> dict:
    """All rows, JSON-ready. layer: where `same` drops."""
    model, _ = load(VIDEO)
    items = video.examples("test", questions)
    tasks = [item.task for item in items]
    prepared = _prepared(model, items)
    full = evaluate(model, prepared)
    rows = [_row("all tokens", "", 1.0, [], full, tasks)]
    size = model.config.text_config.num_hidden_layers
    moments = len(items[0].frames) // 2
    tokens = int(shapes(prepared)[0][0])
    for share in SHARES:
        short = [video.fewer_frames(item, int(moments * share)) for item in items]
        record = evaluate(model, _prepared(model, short))
        most = record.flops
        rows.append(_row(FEWER, "equal", share, [int(tokens * share)] * size, record, tasks, full))
        for method in methods:
            first = build_method(method).first_layer
            keep = _affordable(model, prepared, method, first, most)
            for kind, at, kept in (("equal", first, keep), ("same", layer, int(tokens * share))):
                if kept:
                    config = PruningConfig(method, [1.0] * at + [kept / tokens] * (size - at))
                    found = evaluate(model, prepared, config)
                    counts = config.tokens(tokens)
                    rows.append(_row(method, kind, share, counts, found, tasks, full))
                    print(kind, method, share, rows[-1]["accuracy"]["mean"], file=sys.stderr)
    majority = {task: _majority(items, task) for task in video.TASKS}
    return {
        "model": VIDEO,
        "questions": questions,
        "tokens": tokens,
        "layer": layer,
        "majority": {**majority, "mean": _majority(items)},
        "rows": rows,
    }


def _prepared(model, items: Sequence[video.Clip], batch: int = 32):
    batches = [video.collate(items[i : i + batch]) for i in range(0, len(items), batch)]
    return run_teacher(model, prepare(model, batches, keep_features=True))


def _affordable(model, prepared, method: str, layer: int, most: float) -> int:
    """Most tokens kept from `layer` on so that a sample costs `most` FLOPs or less, ranking too."""
    adapter = adapter_for(model)(model)
    cost = CostModel(adapter.dimensions(adapter.config), build_method(method))
    n_visual, n_text = shapes(prepared)
    size = adapter.dimensions(adapter.config).layers
    best, tokens = 0, int(n_visual[0])
    for keep in range(1, tokens + 1):
        counts = torch.tensor([tokens] * layer + [keep] * (size - layer))
        if float(cost(counts.expand(len(n_visual), -1), n_visual, n_text).double().mean()) <= most:
            best = keep
    return best


def _row(name, kind, share, counts, record, tasks, full=None) -> dict:
    """One line. share: of the moments, or of the tokens. counts: tokens that enter each layer."""
    right = record.correct
    by_task = {
        task: float(right[torch.tensor([t == task for t in tasks])].float().mean())
        for task in video.TASKS
    }
    relative = record.flops / (record if full is None else full).flops
    return {
        "method": name,
        "kind": kind,
        "share": share,
        "tokens": counts,
        "flops": round(relative, 4),
        "accuracy": {**by_task, "mean": float(right.float().mean())},
        "right": "".join("01"[int(value)] for value in right.tolist()),
    }


def _majority(items: Sequence[video.Clip], task: str | None = None) -> float:
    """Share of the commonest answer: of a task; None: of all questions, by the task's own."""
    if task is None:
        return sum(_majority(items, name) for name in video.TASKS) / len(video.TASKS)
    answers = [item.answer for item in items if item.task == task]
    return max(map(answers.count, answers)) / len(answers)


def tables(result: Mapping) -> str:
    """Markdown: one table for each comparison."""
    columns = [*video.TASKS, "mean"]
    n, whole = result["questions"], result["rows"][0]
    error = 100 * (0.25 / n) ** 0.5
    parts = [
        f"{result['model']}, {n} held-out questions about clips of {result['tokens']} visual "
        f"tokens. Accuracy, %. A standard error of the mean is {error:.1f} points at most."
    ]
    for kind, title in (
        ("equal", "Equal prefill FLOPs of the language model. Methods drop as early as they can."),
        (
            "same",
            f"The same place: the share of tokens that is kept before layer {result['layer']}.",
        ),
    ):
        lines = [["majority", "", "", "", *_percent(result["majority"], columns)]]
        lines.append(["all tokens", "", "", "100", *_percent(whole["accuracy"], columns)])
        for row in sorted(
            (row for row in result["rows"] if row["kind"] == kind),
            key=lambda row: (-row["share"], -row["accuracy"]["mean"]),
        ):
            flops = f"{100 * row['flops']:.1f}"
            start = [row["method"], f"{100 * row['share']:g}", row["tokens"][-1], flops]
            lines.append([*start, *_percent(row["accuracy"], columns)])
        header = ["method", "share, %", "tokens", "FLOPs, %", *columns]
        parts.append(f"{title}\n\n{markdown(header, lines)}")
    return "\n\n".join(parts) + "\n"


def _percent(accuracy: Mapping[str, float], columns: Sequence[str]) -> list[str]:
    return [f"{100 * accuracy[name]:.1f}" for name in columns]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.reproduction.video", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--layer", type=int, default=4, help="where `same` drops (default 4)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="write the file's table, run nothing")
    options = parser.parse_args(argv)
    try:
        torch.set_num_threads(options.threads)
        if options.table:
            result = read_json(options.output, dict)
        else:
            result = measure(options.questions, options.layer)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            write_text(options.output, json.dumps(result) + "\n")
        write_text(options.output.with_suffix(".md"), tables(result))
        print(tables(result))
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
