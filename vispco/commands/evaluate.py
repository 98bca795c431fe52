"""`vispco evaluate`: accuracy, KL, FLOPs and time of configurations on labelled questions."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial

from .. import data
from ..baselines.grids import published
from ..calibration import prepare, run_teacher
from ..config import PruningConfig
from ..evaluate import Record, evaluate
from ..frontier import Frontier
from ..registry import adapter_for
from ..utils.console import budget_text, flops, percent, table
from .answer import first_token, latency
from .configs import HELP, ForLayers, always, find_configs, frontier_path, moved
from .conversations import first_question
from .model import find_model
from .options import add_data, add_json, add_model, positive_int
from .output import check_file, first_process, metrics, print_json
from .progress import say, track
from .questions import load_questions, reading_options
from .too_small import slow_note

SUMMARY = "measure configurations on labelled questions"
EXAMPLES = (
    "--model testbed --frontier run/frontier.json --per-task",
    "--model llava-hf/llava-1.5-7b-hf --data test.jsonl --config run/config-0.5.json \\\n"
    "      preset:fastv/k2-r50",
)


def add_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of `vispco evaluate`."""
    add = sub.add_argument
    what = sub.add_mutually_exclusive_group(required=True).add_argument
    what("--config", nargs="+", metavar="FILE", help=f"{HELP}; several may be given")
    folder = "a frontier, or the folder of a search: all of its configurations"
    what("--frontier", metavar="FILE", help=folder)
    add("--published", action="store_true", help="also its method's published configurations")
    add("--per-task", action="store_true", help="a column of accuracy for every task")
    add(
        "--latency",
        type=positive_int,
        nargs="?",
        const=9,
        metavar="ROUNDS",
        help="also the time to the first token of one question, over the full model's: predicted "
        "from the decoder's times at several lengths, and measured in ROUNDS turns (default: 9)",
    )
    add("--output", "-o", metavar="FILE", help="for the frontier with what was measured")
    add_json(sub)
    add_model(sub)
    add_data(sub, limit=512, split="test")


def run(options: argparse.Namespace) -> None:
    """Measure the full model and every configuration, with the processes of `torchrun`."""
    with first_process(options) as first:
        if not first:
            options.output = options.latency = None
        _run(options)


def _run(options: argparse.Namespace) -> None:
    frontier = Frontier.load(frontier_path(options.frontier)) if options.frontier else None
    if options.output:
        if frontier is None:
            together = "give it together with --frontier"
            raise ValueError(f"--output writes a frontier with its metrics: {together}")
        check_file(options.output)
    wanted = _configs(options, frontier)
    load = find_model(options)
    questions = load_questions(options, "test")
    timed = questions.about_one_picture(1) if options.latency else []
    if options.latency and not timed:
        missing = "there is none among those drawn"
        raise ValueError(f"--latency times a question about one picture, and {missing}")
    say(f"loading {options.model}", options.quiet)
    model, processor = load()
    layers = len(adapter_for(model)(model).layers)
    named = [(name, build(layers)) for name, build in wanted]
    say(f"reading {len(questions.tasks):,} questions and their pictures", options.quiet)
    batches = questions.batches(model, processor)
    say("the full model answers them", options.quiet)
    prepared = run_teacher(model, prepare(model, batches))
    rows = []
    for name, config in track([("full", None), *named], "evaluate", options.quiet):
        record = evaluate(model, prepared, config)
        tasks = task_accuracy(record, questions.tasks)
        rows.append({"name": name, **metrics(record), "tasks": tasks})
    times, inputs = None, {}
    if timed:
        inputs = data.prompt(processor, timed[0], **reading_options(options))
        times = {"question": first_question(timed[0]), "rounds": options.latency}
        times |= _latency(model, inputs, [config for _, config in named], options.latency)
    if frontier is not None and options.output:
        with_metrics(frontier, rows).save(options.output)
    if options.json:
        about = {"data": options.data, "split": questions.split, "seed": options.seed}
        results = {"full": rows[0], "configurations": rows[1:], "latency": times}
        print_json({**about, "n": rows[0]["n"], **results})
        return
    print(_rows_text(rows, sorted(set(questions.tasks)) if options.per_task else []))
    split = f", split {questions.split!r}" if questions.split else ""
    print(
        f"\n{rows[0]['n']} questions of {options.data}{split}; share: of the prunable compute\n"
        "accuracy: the whole answer is right, token by token, as greedy decoding would write it"
    )
    for note in filter(None, (moved(name, layers) for name, _ in named)):
        print(note)
    if times:
        print(latency_text(times, [name for name, _ in named]))
        pairs = zip(named, times["configurations"], strict=True)
        ratios = {name: (row["measured"], config) for (name, config), row in pairs}
        fastest = min(ratios, key=lambda name: ratios[name][0])
        ratio, config = ratios[fastest]
        # If the fastest saves nothing, none does.
        if note := slow_note(model, inputs, config, ratio):
            print(f"\n{fastest}: {note}")


def _configs(options: argparse.Namespace, frontier: Frontier | None) -> list[tuple[str, ForLayers]]:
    """What to measure, with names, for a model of so many layers."""
    if options.published and (frontier is None or not len(frontier)):
        which = "it has the method whose configurations are meant"
        raise ValueError(f"--published goes together with --frontier: {which}")
    if frontier is None:
        found = [find_configs(text) for text in options.config]
        return [(name, build) for each in found for name, build in each.items()]
    named = [(budget_text(p.budget), p.config) for p in frontier.points]
    if options.published:
        first = frontier.points[0].config
        others = published(first.method, first.num_layers)
        named += [(f"{first.method} {name}", config) for name, config in others.items()]
    return [(name, partial(always, config)) for name, config in named]


def task_accuracy(record: Record, tasks: list[str]) -> dict[str, float]:
    """Accuracy by task. tasks: of each question."""
    right: dict[str, list[bool]] = {}
    for task, correct in zip(tasks, record.correct.tolist(), strict=False):
        right.setdefault(task, []).append(correct)
    return {task: sum(answers) / len(answers) for task, answers in right.items()}


def with_metrics(frontier: Frontier, rows: list[dict]) -> Frontier:
    """The frontier with what was measured.

    rows: of the full model, of the frontier's points, then of published configurations.
    """
    full, *found = [{k: v for k, v in row.items() if k != "name"} for row in rows]
    points = [replace(p, metrics=m) for p, m in zip(frontier.points, found, strict=False)]
    meta = {**frontier.meta, "full_accuracy": full["accuracy"]}
    competitors = []
    for row in rows[1 + len(frontier) :]:
        measured = {name: row[name] for name in ("share", "flops", "accuracy", "kl")}
        competitors.append({"kind": "published", "label": row["name"], **measured})
    if competitors:
        known = [c for c in meta.get("competitors", []) if c.get("kind") != "published"]
        meta["competitors"] = known + competitors
    return Frontier(points, meta)


def _rows_text(rows: list[dict], tasks: list[str]) -> str:
    """A table of what was measured, with a column for each of `tasks`."""
    cells = []
    for row in rows:
        interval = " – ".join(map(percent, row["interval"]))
        cost = [f"{row['kl']:.4f}", flops(row["flops"]), percent(row["share"])]
        by_task = [percent(row["tasks"][task], 0) for task in tasks]
        cells.append([row["name"], percent(row["accuracy"]), interval, *cost, *by_task])
    header = ["configuration", "accuracy", "95 % interval", "KL", "FLOPs", "share", *tasks]
    return table(header, cells)


def _latency(model, inputs: dict, configs: list[PruningConfig], rounds: int) -> dict:
    """`latency` of one prompt, from the picture to the first token."""
    ids = inputs["input_ids"]
    visual = int(adapter_for(model)(model).visual_mask(ids, None).sum())
    text = ids.shape[1] - visual
    return latency(model, first_token(model, inputs), configs, visual, text, rounds=rounds)


def latency_text(times: dict, names: list[str]) -> str:
    """A table of ratios to the full model's time, and of milliseconds where there are any."""
    header = ["configuration", "predicted", "measured", "10 % – 90 %"]
    rows = []
    for name, row in zip(names, times["configurations"], strict=True):
        ratios = [f"{row[key]:.3f}" for key in ("predicted", "measured")]
        rows.append([name, *ratios, f"{row['low']:.3f} – {row['high']:.3f}"])
        if times["full_ms"]:
            rows[-1] += [f"{row[key]:.1f}" for key in ("predicted_ms", "measured_ms")]
    if times["full_ms"]:
        header += ["predicted ms", "measured ms"]
    of = f", {times['full_ms']:.1f} ms" if times["full_ms"] else ""
    return (
        f"\n{table(header, rows)}\n\n"
        f"time to the first token, over the full model's{of}: {times['question']!r},\n"
        f"{times['n_visual']} visual tokens, {times['n_text']} of text; "
        f"medians of {times['rounds']} rounds in turns\n"
        f"{percent(times['fixed'])} of the full model's time is not in the decoder's layers: "
        "pruning cannot save it"
    )
