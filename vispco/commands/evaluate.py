"""`vispco evaluate`: accuracy, divergence, FLOPs and time of configurations on labelled questions."""

from __future__ import annotations

import argparse
import contextlib
import io
from dataclasses import replace

from .. import data
from ..baselines.grids import published
from ..config import PruningConfig
from ..utils.console import Progress, budget_text, flops, percent, standard_error, table, wilson
from ..utils.distributed import launched, rank
from ..evaluate import Record, evaluate
from ..frontier import Frontier
from ..registry import adapter_for
from ..calibration import prepare, run_teacher
from .answer import first_token, latency
from .asked import words
from .model import load_model
from .options import add_data, add_json, add_model, whole
from .output import check_file, print_json
from .questions import questions, reading_options

SUMMARY = "measure configurations on labelled questions"
EXAMPLES = ("--model testbed --frontier run/frontier.json --per-task",
            "--model llava-hf/llava-1.5-7b-hf --data test.jsonl --config pruning_config.json")


def add_options(sub: argparse.ArgumentParser) -> None:
    """Of `vispco evaluate`."""
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", nargs="+", metavar="FILE", help="pruning configurations")
    what.add_argument("--frontier", metavar="FILE", help="a frontier: all of its configurations")
    sub.add_argument("--published", action="store_true",
                     help="with --frontier: also the published configurations of its method, moved to this model's depth")
    sub.add_argument("--per-task", action="store_true", help="a column of accuracy for every task")
    sub.add_argument("--latency", type=whole(1), nargs="?", const=9, metavar="ROUNDS",
                     help="also the time to the first token of one question, over the full model's: predicted from the "
                          "decoder's times at several lengths, and measured in so many rounds (default: %(const)s)")
    sub.add_argument("--output", "-o", metavar="FILE",
                     help="write the frontier with what was measured, ready to plot")
    add_json(sub)
    add_model(sub)
    add_data(sub, limit=512, what="questions", split="test")


def run(options: argparse.Namespace) -> None:
    """Measure the full model and every configuration; with the processes of `torchrun`, of which the first writes and prints."""
    with launched():
        if not rank():
            return _run(options)
        with contextlib.redirect_stdout(io.StringIO()):
            options.output, options.latency, options.quiet = None, None, True
            _run(options)


def _run(options: argparse.Namespace) -> None:
    frontier = Frontier.load(options.frontier) if options.frontier else None
    if options.output:
        if frontier is None:
            raise ValueError("--output writes a frontier with its metrics: give it together with --frontier")
        check_file(options.output)
    named = [(budget_text(p.budget), p.config) for p in frontier.points] if frontier else \
        [(path, PruningConfig.load(path)) for path in options.config]
    if options.published:
        if frontier is None or not len(frontier):
            raise ValueError("--published goes together with --frontier: it has the method whose configurations are meant")
        config = frontier.points[0].config
        named += [(f"{config.method} {name}", c) for name, c in published(config.method, config.num_layers).items()]
    asked = questions(options, "test")
    timed = asked.some(1) if options.latency else []
    if options.latency and not timed:
        raise ValueError("--latency times a question about one picture, and there is none among those drawn")
    model, processor = load_model(options)
    batches = asked.batches(model, processor)
    with Progress(len(named) + 1, "evaluate", options.quiet) as bar:
        prepared = run_teacher(model, prepare(model, batches))
        rows = []
        for name, config in [("full", None), *named]:
            rows.append({"name": name, **_measured(evaluate(model, prepared, config), asked.tasks)})
            bar.update()
    times = _times(options, timed[0], model, processor, [c for _, c in named]) if timed else None
    if frontier is not None and options.output:
        _with_metrics(frontier, rows).save(options.output)
    if options.json:
        return print_json({"data": options.data, "split": asked.split, "seed": options.seed, "n": rows[0]["n"],
                           "full": rows[0], "configurations": rows[1:], "latency": times})
    columns = sorted(set(asked.tasks)) if options.per_task else []
    print(table(["configuration", "accuracy", "95 % interval", "KL", "FLOPs", "share", *columns],
                [[r["name"], percent(r["accuracy"]), " – ".join(percent(v) for v in r["interval"]),
                  f"{r['kl']:.4f}", flops(r["flops"]), percent(r["share"]),
                  *(percent(r["tasks"][t], 0) for t in columns)] for r in rows]))
    split = f", split {asked.split!r}" if asked.split else ""
    print(f"\n{rows[0]['n']} questions of {options.data}{split}; share: of the prunable compute\n"
          "accuracy: the whole answer is right, token by token, as greedy decoding would write it")
    if times:
        print(_times_text(times, [name for name, _ in named]))


def _times(options: argparse.Namespace, asked: data.Conversation, model, processor, configs: list[PruningConfig]) -> dict:
    """`latency` of one question, from the picture to the first token."""
    inputs = data.prompt(processor, asked, **reading_options(options))
    visual = int(adapter_for(model)(model).visual_mask(inputs["input_ids"], None).sum())
    found = latency(model, first_token(model, inputs), configs, visual, inputs["input_ids"].shape[1] - visual,
                    rounds=options.latency)
    return {"question": words(asked), "rounds": options.latency, **found}


def _times_text(times: dict, names: list[str]) -> str:
    """A table of ratios to the full model's time; with milliseconds where there are any, on a GPU."""
    header, rows = ["configuration", "predicted", "measured", "10 % – 90 %"], []
    for name, row in zip(names, times["configurations"]):
        rows.append([name, *(f"{row[key]:.3f}" for key in ("predicted", "measured")), f"{row['low']:.3f} – {row['high']:.3f}"])
        if times["full_ms"]:
            rows[-1] += [f"{row[key]:.1f}" for key in ("predicted_ms", "measured_ms")]
    of = f", {times['full_ms']:.1f} ms" if times["full_ms"] else ""
    return (f"\n{table(header + ['predicted ms', 'measured ms'] * bool(of), rows)}\n\n"
            f"time to the first token, over the full model's{of}: {times['question']!r},\n{times['n_visual']} visual tokens, "
            f"{times['n_text']} of text; medians of {times['rounds']} rounds in turns\n"
            f"{percent(times['fixed'])} of the full model's time is not in the decoder's layers: pruning cannot save it")


def _measured(record: Record, tasks: list[str]) -> dict:
    """A record with its interval and its accuracy by task; `share` is of the prunable compute."""
    right: dict[str, list[bool]] = {task: [] for task in tasks}
    for task, correct in zip(tasks, record.correct.tolist()):
        right[task].append(correct)
    return {"accuracy": record.accuracy, "standard_error": standard_error(record.accuracy, record.n),
            "interval": list(wilson(int(record.correct.sum()), record.n)), "kl": record.kl,
            "flops": record.flops, "share": record.prunable_share, "n": record.n,
            "tasks": {task: sum(c) / len(c) for task, c in right.items()}}


def _with_metrics(frontier: Frontier, rows: list[dict]) -> Frontier:
    full, *rest = [{k: v for k, v in row.items() if k != "name"} for row in rows]
    others = [{"kind": "published", "label": row["name"], **{k: row[k] for k in ("share", "flops", "accuracy", "kl")}}
              for row in rows[1 + len(frontier):]]
    points = [replace(p, metrics=m) for p, m in zip(frontier.points, rest)]
    known = [c for c in frontier.meta.get("competitors", []) if c.get("kind") != "published"] if others else []
    return Frontier(points, {**frontier.meta, "full_accuracy": full["accuracy"],
                             **({"competitors": known + others} if others else {})})
