"""Pruning methods on the video task, and fewer frames at equal FLOPs.

    python -m tests.reproduction.video --output docs/results/video/testbed-qwen-video.json

Two comparisons on the same held-out questions. `equal`: every method drops once, as early as it
can, and keeps as many tokens as give it the prefill FLOPs of a clip with a half, a quarter or an
eighth of its moments; the clip with fewer moments is the rival. `same`: every method keeps that
share of the tokens before one layer, the same for all. The file is written, tables are printed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch

from vispco.calibration import prepare, run_teacher, shapes
from vispco.config import PruningConfig
from vispco.evaluate import evaluate
from vispco.flops import CostModel
from vispco.registry import adapter_for, build_method
from vispco.testbed import load, video
from vispco.testbed.clip_questions import WAYS
from vispco.testbed.clips import MOMENTS
from vispco.testbed.model import VIDEO
from vispco.testbed.vocab import COLOURS, SHAPES

from . import command
from .markdown import markdown

METHODS = ("evs", "vidcom2", "framefusion", "fastv", "pdrop", "sparsevlm", "visionzip")
METHODS += ("vispruner", "divprune", "random", "strided", "pool")
SHARES = (1 / 2, 1 / 4, 1 / 8)
FEWER = "fewer frames"
READER = "fewer frames, a faultless reader"
#: What the others are compared with, question by question.
BEST = "evs"


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
        counts = [int(tokens * share)] * size
        rows.append(_row(FEWER, "equal", share, counts, record, tasks, full))
        legible = [readable(item, int(moments * share)) for item in items]
        rows.append({**rows[-1], "method": READER, "accuracy": _by_task(legible, tasks)})
        del rows[-1]["right"]
        for method in methods:
            first = build_method(method).first_layer
            keep = affordable(model, prepared, method, first, most)
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


def affordable(
    model, prepared, method: str, layer: int, most: float, options: Mapping | None = None
) -> int:
    """Most tokens kept from `layer` on so that a sample costs `most` FLOPs or less, ranking too."""
    adapter = adapter_for(model)(model)
    cost = CostModel(adapter.dimensions(adapter.config), build_method(method, options or {}))
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
    right = record.correct.tolist()
    relative = record.flops / (record if full is None else full).flops
    return {
        "method": name,
        "kind": kind,
        "share": share,
        "tokens": counts,
        "flops": round(relative, 4),
        "accuracy": _by_task(right, tasks),
        "right": "".join("01"[int(value)] for value in right),
    }


def _by_task(right: Sequence[float], tasks: Sequence[str]) -> dict[str, float]:
    """Means of each task, and of all questions."""
    out = {}
    for task in video.TASKS:
        own = [float(value) for value, name in zip(right, tasks, strict=True) if name == task]
        out[task] = sum(own) / len(own)
    return {**out, "mean": sum(map(float, right)) / len(right)}


def readable(item: video.Clip, moments: int) -> float:
    """How likely a reader of `moments` moments is right who sees everything in them.

    It answers by what it sees, and guesses evenly among the answers that this leaves open.
    """
    kept = video.spread(MOMENTS, moments)
    cell, colour = item.scene.cell[0, kept], item.scene.colour[0, kept]
    there = cell >= 0
    words = item.question.split()
    if item.task == "number":
        return float(there.any(0).sum() == int(item.answer))
    if item.task == "order":
        came = [
            (int(row.argmax()), name)
            for row, name in zip(there.T, SHAPES, strict=True)
            if row.any()
        ]
        if not came:
            return 1 / len(SHAPES)
        extreme = (min if words[-1] == "first" else max)(came)[0]
        open_ = [name for moment, name in came if moment == extreme]
        return (item.answer in open_) / len(open_)
    shape = SHAPES.index(words[-1])
    seen = there[:, shape]
    if item.task == "motion":
        return 1.0 if len(set(cell[seen, shape].tolist())) > 1 else 1 / len(WAYS)
    if not seen.any():
        return 1 / len(COLOURS)
    return float(COLOURS[colour[seen, shape][0 if words[1] == "first" else -1]] == item.answer)


def _majority(items: Sequence[video.Clip], task: str | None = None) -> float:
    """Share of the commonest answer: of a task; None: of all questions, by the task's own."""
    if task is None:
        return sum(_majority(items, name) for name in video.TASKS) / len(video.TASKS)
    answers = [item.answer for item in items if item.task == task]
    return max(map(answers.count, answers)) / len(answers)


def tables(result: Mapping) -> str:
    """Markdown: means at equal FLOPs, those by task at a quarter, and means at the same place."""
    rows = result["rows"]
    error = 100 * (0.25 / result["questions"]) ** 0.5
    equal = [_of(rows, FEWER, "equal", share)["flops"] for share in SHARES]
    middle = [row for row in rows if row["kind"] == "equal" and row["share"] == SHARES[1]]
    by_task = [("majority", result["majority"]), ("all tokens", rows[0]["accuracy"])]
    best = sorted(middle, key=lambda row: -row["accuracy"]["mean"])
    by_task += [(row["method"], row["accuracy"]) for row in best]
    lines = [
        [name, *(f"{100 * accuracy[task]:.1f}" for task in video.TASKS)]
        for name, accuracy in by_task
    ]
    return "\n\n".join(
        [
            f"{result['questions']} held-out questions about clips of {result['tokens']} visual "
            f"tokens; accuracy, %. A standard error is {error:.1f} points at most for the mean, "
            f"{2 * error:.1f} for a task. All tokens: {100 * rows[0]['accuracy']['mean']:.1f}; the "
            f"commonest answer: {100 * result['majority']['mean']:.1f}.",
            "Equal FLOPs. Every method drops as early as it can, and keeps what the FLOPs of the "
            "clip with fewer frames allow:",
            _means(rows, "equal", [f"{100 * flops:.1f} % of the FLOPs" for flops in equal]),
            f"Points below {BEST} at equal FLOPs, on the same questions, and their standard error:",
            _below(rows, [f"{100 * flops:.1f} % of the FLOPs" for flops in equal[:2]]),
            f"Accuracy by task, at {100 * equal[1]:.1f} % of the FLOPs:",
            markdown(["", *video.TASKS], lines),
            f"The same place: the share of the tokens that is kept from layer {result['layer']} "
            "on:",
            _means(rows, "same", [f"{100 * share:g} % of the tokens" for share in SHARES]),
        ]
    )


def _of(rows: Sequence[Mapping], method: str, kind: str, share: float) -> Mapping:
    """The row of a method; an empty one if it could not be had."""
    return next(
        (r for r in rows if (r["method"], r["kind"], r["share"]) == (method, kind, share)), {}
    )


def _means(rows: Sequence[Mapping], kind: str, columns: Sequence[str]) -> str:
    """Markdown: mean accuracy and tokens kept, the best at a quarter first."""
    names = {row["method"] for row in rows if row["kind"] == kind}
    mean = {name: _of(rows, name, kind, SHARES[1])["accuracy"]["mean"] for name in names}
    lines = []
    for name in sorted(names, key=lambda name: -mean[name]):
        own = [_of(rows, name, kind, share) for share in SHARES]
        lines.append(
            [name, *(f"{100 * r['accuracy']['mean']:.1f} ({r['tokens'][-1]:.0f})" for r in own)]
        )
    return markdown(["accuracy (tokens kept)", *columns], lines)


def _below(rows: Sequence[Mapping], columns: Sequence[str]) -> str:
    """Markdown: how much less than `BEST` the others answer at each share, paired."""
    names = [name for name in (*METHODS, FEWER) if _of(rows, name, "equal", SHARES[0])]
    lines = []
    for name in (name for name in names if name != BEST):
        line = [name]
        for share, _ in zip(SHARES, columns, strict=False):
            own, best = (_of(rows, who, "equal", share)["right"] for who in (name, BEST))
            less = torch.tensor([int(b) - int(o) for b, o in zip(best, own, strict=True)]).double()
            error = less.std(correction=0) / len(less) ** 0.5
            line.append(f"{100 * less.mean():.1f} ± {100 * error:.1f}")
        lines.append(line)
    return markdown(["", *columns], lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 with one line on stderr."""
    parser = command.parser("video", __doc__)
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--layer", type=int, default=4, help="where `same` drops (default 4)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    return command.tabled(options, lambda: measure(options.questions, options.layer), tables)


if __name__ == "__main__":
    sys.exit(main())
