"""`vispco search`: one configuration per budget, written down."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from .. import data
from ..utils.console import Progress, budget_text, flops, output_folder, percent, table, tokens
from ..latency.table import LatencyTable, spread
from ..utils.distributed import launched, rank, total
from ..frontier import Frontier, FrontierPoint
from ..plot import plot_tokens
from ..registry import KERNELS, METHODS
from ..plot import Overlay, write_report
from ..solvers.descent import search
from ..utils.journal import Journal
from ..ste import ESTIMATORS, build_estimator
from ..calibration import OBJECTIVES, prepare, shapes
from .asked import words
from .model import load_model
from .options import add_data, add_json, add_model, budgets, positive, whole
from .output import StepLog, print_json, slug
from .questions import Questions, questions, reading_options

SUMMARY = "find one configuration per budget by gradient"
EXAMPLES = ("--model testbed --budgets 0.2,0.5,0.8 --output run",
            "--model llava-hf/llava-1.5-7b-hf --data questions.jsonl --images pictures \\\n"
            "      --method fastv --kernel multi_step --budgets 0.2:0.9:8 --dtype bfloat16 --output run")
_DEFAULTS = {name: p.default for name, p in inspect.signature(search).parameters.items()}


def add_options(sub: argparse.ArgumentParser) -> None:
    """Of `vispco search`."""
    add = sub.add_argument
    add("--method", default=_DEFAULTS["method"], help="who ranks the tokens (default: %(default)s)")
    add("--kernel", default=_DEFAULTS["kernel"], help="the family of schedules (default: %(default)s)")
    add("--budgets", type=budgets, default=list(_DEFAULTS["budgets"]), metavar="LIST",
        help="shares of the prunable compute (0.2,0.5 or 50%%), a range start:stop:count (0.1:0.9:9), absolute "
             "(1.8TFLOPs), or several limits at once (flops=0.5+kv_cache=40%%+latency=20ms); default: "
             + ",".join(map(str, _DEFAULTS["budgets"])))
    add("--objective", choices=OBJECTIVES, default=_DEFAULTS["objective"],
        help="kl: stay close to the full model; task: answer right (default: %(default)s)")
    add("--estimator", metavar="NAME", help=f"of the gradient through hard masks: {', '.join(ESTIMATORS)}")
    add("--steps", type=whole(0), default=_DEFAULTS["steps"], metavar="N",
        help="gradient steps per budget; 0: none, refinement alone, in the memory of inference (default: %(default)s)")
    add("--learning-rate", type=positive, default=_DEFAULTS["learning_rate"], metavar="RATE",
        help="of Adam, on the kernel's parameters (default: %(default)s)")
    add("--refinement", type=whole(0), default=_DEFAULTS["refinement"], metavar="N",
        help="schedules per budget that are measured after the gradient (default: %(default)s)")
    add("--checkpoint", action="store_true",
        help="keep the inputs of the layers only, and run them again in the backward pass: less memory, more time")
    add("--output", "-o", default="vispco-run", metavar="FOLDER",
        help="for frontier.json, config-<budget>.json, log.jsonl, report.html and journal.jsonl (default: %(default)s)")
    again = sub.add_mutually_exclusive_group().add_argument
    again("--overwrite", action="store_true", help="replace an earlier search in that folder, finished or not")
    again("--resume", action="store_true",
          help="go on with the search that was interrupted in that folder, with the same options; start one if there is none")
    add_json(sub)
    add_model(sub)
    add_data(sub, limit=256, what="calibration questions", split="calibration")


def run(options: argparse.Namespace) -> None:
    """Search, write, print; with the processes of `torchrun`, of which the first writes and prints."""
    with launched():
        if not rank():
            return _run(options)
        with tempfile.TemporaryDirectory() as nowhere, contextlib.redirect_stdout(io.StringIO()):
            options.output, options.quiet = nowhere, True
            _run(options)


def _run(options: argparse.Namespace) -> None:
    METHODS.get(options.method), KERNELS.get(options.kernel), build_estimator(options.estimator)
    with output_folder(options.output) as folder, Journal(folder / "journal.jsonl", options.overwrite) as journal:
        begun = journal.search
        _check_folder(folder, options, begun)
        asked = questions(options, "calibration")
        model, processor = load_model(options)
        batches = asked.batches(model, processor)
        timed = any("latency" in b for b in options.budgets if isinstance(b, Mapping))
        latency, steps = _latency(model, batches, begun) if timed else None, []
        with _resumable(folder, options, journal):
            with Progress(len(options.budgets) * (options.steps + options.refinement), "search", options.quiet) as bar, \
                    StepLog(folder / "log.jsonl") as log:
                def on_step(record: dict) -> None:
                    bar(record)
                    log(record)
                    steps.append(record)

                frontier = search(model, batches, options.method, options.kernel, options.budgets,
                                  seed=options.seed, steps=options.steps, learning_rate=options.learning_rate,
                                  objective=options.objective, estimator=options.estimator, latency=latency,
                                  refinement=options.refinement, checkpoint=options.checkpoint, journal=journal,
                                  callback=on_step)
            frontier.meta |= {"model": options.model, "data": options.data}
            files = [f"config-{slug(p.budget)}.json" for p in frontier.points]
            for point, name in zip(frontier.points, files):
                point.config.save(folder / name)
            if latency:
                latency.save(folder / "latency.json")
            frontier.save(folder / "frontier.json")
            overlays, note = _overlays(options, frontier, asked, model, processor)
            write_report(folder / "report.html", frontier, steps, options.command, overlays, note)
    rows = [{**_summary(p, options.objective), "file": str(folder / name)} for p, name in zip(frontier.points, files)]
    if options.json:
        return print_json({"frontier": str(folder / "frontier.json"), "log": str(folder / "log.jsonl"),
                           "report": str(folder / "report.html"),
                           "configurations": rows, "meta": frontier.meta})
    print(table(["budget", "FLOPs", "share", "visual tokens entering each layer",
                 {"kl": "KL", "task": "task loss"}[options.objective], "file"],
                [[budget_text(r["budget"]), flops(r["flops"]), percent(r["share"]), tokens(r["tokens"]),
                  f"{r[options.objective]:.4f}", r["file"]] for r in rows]))
    print(f"\nshare: of the prunable compute. All of it is in {folder / 'frontier.json'}, "
          f"with pictures in {folder / 'report.html'}")


def _check_folder(folder: Path, options: argparse.Namespace, begun: dict | None) -> None:
    """Raise ValueError if the folder holds a search that nobody said what to do with."""
    if options.overwrite or options.resume and begun:
        return
    done = (folder / "frontier.json").exists()
    if done or begun:
        raise ValueError(f"{folder} holds {'a frontier.json' if done else 'a search that was interrupted'}: choose another --output, "
                         f"{'--resume it, ' if begun else ''}or --overwrite it")


@contextlib.contextmanager
def _resumable(folder: Path, options: argparse.Namespace, journal: Journal) -> Iterator[None]:
    """Whoever stops the search, or the disk when it is full, is told how to go on; who has gone on, how far it was."""
    command = [word for word in shlex.split(options.command) if word not in ("--overwrite", "--resume")]
    how = f"`{shlex.join([*command, '--resume'])}` goes on where it was"
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {how}") from None
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; {how}", error.filename) from None
    if options.resume and not options.quiet and journal.recalled:
        done = "had finished" if not journal.computed else f"went on after {journal.recalled} results, with {journal.computed} more"
        print(f"{folder}: the search {done}", file=sys.stderr)


def _latency(model, batches: list[dict], begun: dict | None) -> LatencyTable:
    """The decoder's times up to the longest prompt; of a search that has begun, those that it began with."""
    if begun and begun.get("latency"):
        return LatencyTable.from_dict(begun["latency"])
    n_visual, n_text = shapes(prepare(model, batches))
    table = LatencyTable.measure(model, spread(int((n_visual + n_text).max())))
    seconds = torch.tensor(table.seconds, dtype=torch.float64) * (not rank())  # the first process's, for all
    return replace(table, seconds=tuple(total(seconds).tolist()))


def _overlays(options: argparse.Namespace, frontier: Frontier, asked: Questions, model, processor,
              count: int = 3) -> tuple[list[Overlay], str]:
    """How the configuration in the middle of the frontier treats some calibration questions; or why none can be shown."""
    point, reading = frontier.points[(len(frontier) - 1) // 2], reading_options(options)
    if min(point.config.keep_ratios) == 1:
        return [], "Nothing is dropped."

    def overlay(conversation: data.Conversation) -> Overlay:
        def draw(path) -> None:
            picture = data.open_picture(conversation.media[0], conversation.folder, options.max_pixels)
            plot_tokens(model, processor, data.prompt(processor, conversation, **reading), picture, point.config, path)

        return Overlay(f"{words(conversation)} (budget {budget_text(point.budget)})", draw)

    try:
        found = [overlay(conversation) for conversation in asked.some(count)]
    except ImportError as error:
        return [], str(error)
    return found, "None of the questions is about one picture."


def _summary(point: FrontierPoint, objective: str) -> dict:
    config = point.config
    return {"budget": point.budget, "flops": point.flops, "share": point.share, objective: point.loss,
            "keep_ratios": list(config.keep_ratios), "tokens": config.tokens(config.n_visual or 0)}
