"""`vispco search`: one configuration per budget, written down."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from .. import data
from ..calibration import prepare, shapes
from ..frontier import Frontier
from ..latency.table import LatencyTable, default_lengths
from ..plot import Overlay, plot_tokens, write_report
from ..profiling import Profile, named_methods
from ..pruning.forward import OBJECTIVES
from ..search import STARTS, ProfiledFrontier, SearchOptions, default_start, search
from ..ste import ESTIMATORS
from ..utils.console import budget_text, output_folder, table
from ..utils.distributed import rank, total
from ..utils.journal import Journal
from .answer import answer
from .conversations import first_question
from .held_out import measured, notes, split, verdict_of
from .model import find_model
from .options import (
    add_data,
    add_folder,
    add_json,
    add_model,
    budgets,
    methods,
    non_negative_int,
    positive_float,
)
from .output import check_folder, first_process, print_json, resumable, save_configs
from .progress import say
from .questions import Questions, load_questions, reading_options

SUMMARY = "find one configuration per budget"
EXAMPLES = (
    "--model testbed --budgets 0.2,0.5,0.8 --output run",
    "--model llava-hf/llava-1.5-7b-hf --data questions.jsonl --images pictures \\\n"
    "      --method fastv --kernel multi_step --budgets 0.2:0.9:8 --dtype bfloat16 --output run",
)
# Options that not every start takes. None: the start's own default.
_OF_STARTS = ("steps", "learning_rate", "estimator", "checkpoint", "profile")


def add_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of `vispco search`."""
    add = sub.add_argument
    several = (
        "who ranks the tokens; vispruner+fastv@6: one after the other; fastv,pdrop or auto, with "
        "--start profile: at each layer the best of several; with --before-llm the best of "
        "several; auto: nine methods, of films those for video among them (default: fastv; with "
        "--before-llm auto, all that can)"
    )
    add("--method", type=methods, help=several)
    add("--kernel", default="monotone", help="the family of schedules")
    add(
        "--budgets",
        type=budgets,
        default=[0.2, 0.35, 0.5, 0.7, 0.9],
        help="shares of the prunable compute (0.2,0.5 or 50%%), a range start:stop:count "
        "(0.1:0.9:9), absolute (1.8TFLOPs), visual tokens on average over the layers, as papers "
        "count (192tokens), or several limits at once "
        "(flops=0.5+kv_cache=40%%+latency=20ms) (default: 0.2,0.35,0.5,0.7,0.9)",
    )
    objective = "kl: stay close to the full model; task: answer right"
    add("--objective", choices=OBJECTIVES, default="kl", help=objective)
    start = (
        "where the refinement starts. profile: what each drop costs is measured once, and every "
        "budget is planned from it; gradient: a descent for each budget, the paper's way; shared: "
        "one descent for all budgets together; ramp: a rule (default: profile; gradient with one "
        "of its options, or a --kernel that forms no staircases)"
    )
    where = sub.add_mutually_exclusive_group().add_argument
    where("--start", choices=STARTS, help=start)
    before = (
        "--start before_llm: one drop, before the language model, which is all that most serving "
        "engines can do (`vispco convert --to vllm`)"
    )
    where("--before-llm", dest="start", action="store_const", const="before_llm", help=before)
    steps = (
        "gradient steps: per budget, or in all with --start shared. 0 (of gradient): none, in the "
        "memory of inference (default: 20 of gradient, 200 of shared)"
    )
    add("--steps", type=non_negative_int, help=steps)
    rate = "of Adam (default: 0.2 of gradient, 0.1 of shared)"
    add("--learning-rate", type=positive_float, help=rate)
    estimator = "how the gradient passes hard masks (default: default)"
    add("--estimator", choices=ESTIMATORS, help=estimator)
    checkpoint = "less memory, more time: run each layer again in the backward pass"
    add("--checkpoint", action="store_const", const=True, help=checkpoint)
    profile = "of --start profile: what `vispco profile` wrote, so that it is not measured again"
    add("--profile", metavar="FILE", help=profile)
    refinement = "schedules per budget that are measured after the start"
    add("--refinement", type=non_negative_int, help=f"{refinement} (default: 6)")
    files = "frontier.json, config-<budget>.json, log.jsonl, report.html and journal.jsonl"
    add_folder(sub, "search", "vispco-run", files)
    add_json(sub)
    add_model(sub)
    add_data(sub, limit=256, split="calibration")


def run(options: argparse.Namespace) -> None:
    """Search, write, print, with the processes of `torchrun`: the first one writes and prints."""
    if options.method is None:
        options.method = "auto" if options.start == "before_llm" else "fastv"
    named_methods(options.method)
    if options.start is None:
        of_gradient = {field.name for field in fields(STARTS["gradient"])} & {*_OF_STARTS}
        asked = any(getattr(options, name) is not None for name in of_gradient)
        options.start = "gradient" if asked else default_start(options.kernel)
    start_options(options)
    with first_process(options) as first, tempfile.TemporaryDirectory() as nowhere:
        if not first:
            options.output = nowhere
        load = find_model(options)
        with output_folder(options.output) as folder:
            path = folder / "journal.jsonl"
            with Journal(path, options.overwrite) as journal:
                _search(options, folder, journal, load)


def start_options(options: argparse.Namespace) -> Any:
    """The start that was asked for, with its options. Raises ValueError for another start's."""
    takes = {name: {field.name for field in fields(start)} for name, start in STARTS.items()}
    given = {name: getattr(options, name) for name in _OF_STARTS}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in takes[options.start]:
            others = " or ".join(start for start in takes if name in takes[start])
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} goes with --start {others}, not with {options.start}")
    if "profile" in given:
        given["profile"] = Profile.load(given["profile"])
    return STARTS[options.start](**given)


def _search(
    options: argparse.Namespace,
    folder: Path,
    journal: Journal,
    load: Callable[[], tuple[Any, Any]],
) -> None:
    """load: gives model and processor, once it is known that there is something to search."""
    start = start_options(options)
    begun = journal.search
    check_folder(folder, "frontier.json", "search", options, begun)
    questions = load_questions(options, "calibration")
    say(f"loading {options.model}", options.quiet)
    model, processor = load()
    say(f"reading {len(questions.tasks):,} questions and their pictures", options.quiet)
    batches, aside = split(questions.batches(model, processor))
    latency = None
    if any("latency" in budget for budget in options.budgets if isinstance(budget, Mapping)):
        latency = _measure_latency(model, batches, begun)
    log = folder / "log.jsonl"
    steps: list[dict] = []
    refinement = start.refinement if options.refinement is None else options.refinement

    def on_step(record: dict) -> None:
        # The profile's measurements come first.
        if "layer" not in record:
            with open(log, "a" if steps else "w", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            steps.append(record)

    with resumable(folder, "search", options, journal):
        frontier = search(
            model,
            batches,
            options.method,
            options.budgets,
            start=start,
            kernel=options.kernel,
            refinement=refinement,
            seed=options.seed,
            options=SearchOptions(options.objective, latency=latency, journal=journal),
            callback=on_step,
            progress=False if options.quiet else None,
        )
        # An earlier search's log does not belong to one that made no step, nor does its profile.
        if not steps:
            log.unlink(missing_ok=True)
        (folder / "profile.json").unlink(missing_ok=True)
        frontier.meta |= {"model": options.model, "data": options.data}
        frontier = measured(model, frontier, batches, aside, options.quiet)
        files = save_configs(frontier, folder, "config")
        if latency:
            latency.save(folder / "latency.json")
        frontier.save(folder / "frontier.json")
        profile = frontier.profile if isinstance(frontier, ProfiledFrontier) else None
        if profile:
            profile.save(folder / "profile.json")
        overlays, note = _overlays(options, frontier, questions, model, processor)
        report = folder / "report.html"
        said = [verdict_of(frontier), *notes(frontier)]
        write_report(report, frontier, steps, options.command, overlays, note, profile, said)
    _print(options, folder, frontier, files)


def _print(options: argparse.Namespace, folder: Path, found: Frontier, files: list[Path]) -> None:
    """The result as a table, or as JSON."""
    pairs = list(zip(found.points, files, strict=True))
    meta, said = found.meta, notes(found)
    if options.json:
        rows = []
        for point, file in pairs:
            config = point.config
            row = {"budget": point.budget, "flops": point.flops, "share": point.share}
            row |= {options.objective: point.loss, **point.metrics}
            row |= {"keep_ratios": list(config.keep_ratios)}
            row |= {"tokens": config.tokens(config.n_visual or 0), "file": str(file)}
            rows.append(row)
        names = {"frontier": "frontier.json", "log": "log.jsonl", "report": "report.html"}
        if isinstance(found, ProfiledFrontier):
            names["profile"] = "profile.json"
        paths = {key: str(folder / name) for key, name in names.items()}
        print_json({**paths, "configurations": rows, "notes": said, "meta": meta})
        return
    *header, entering = found.header()
    cells = found.rows()
    print(table(header, [row[:-1] for row in cells]))
    entered = [[file, row[-1]] for (_, file), row in zip(pairs, cells, strict=True)]
    print(f"\n{table(['file', entering], entered)}")
    print(f"\n{verdict_of(found)}")
    for note in said:
        print(f"note: {note}")
    aside = f"{meta['held_out']:,} kept aside" if meta["held_out"] else "none kept aside"
    full = f"{1000 * meta['full_prefill_seconds']:.3g} ms"
    print(
        f"\n{meta['samples']:,} calibration questions, {aside}; share: of the prunable compute\n"
        f"agreement: answers as the full model's; saved: of a prefill of {full} here, predicted "
        "from the\ndecoder's times alone (`vispco evaluate --latency` measures)\n"
        f"all of it is in {folder / 'frontier.json'}, with pictures in {folder / 'report.html'}"
    )


def _measure_latency(model, batches: Sequence[Mapping], begun: dict | None) -> LatencyTable:
    """The decoder's times up to the longest prompt; of a search that has begun, its own times."""
    if begun and begun.get("latency"):
        return LatencyTable.from_dict(begun["latency"])
    n_visual, n_text = shapes(prepare(model, batches))
    times = LatencyTable.measure(model, default_lengths(int((n_visual + n_text).max())))
    # The first process's times, for all.
    seconds = torch.tensor(times.seconds, dtype=torch.float64) * (not rank())
    return replace(times, seconds=tuple(total(seconds).tolist()))


def _overlays(
    options: argparse.Namespace, frontier: Frontier, questions: Questions, model, processor
) -> tuple[list[Overlay], str]:
    """How the recommended configuration treats three questions; or why none can be shown.

    Where none is recommended, the one in the middle.
    """
    best = frontier.meta["recommended_budget"]
    middle = frontier.points[(len(frontier) - 1) // 2]
    point = next((p for p in frontier.points if p.budget == best), middle)
    if min(point.config.keep_ratios) == 1:
        point = middle
    config, reading = point.config, reading_options(options)
    if min(config.keep_ratios) == 1:
        return [], "Nothing is dropped."

    def overlay(conversation: data.Conversation) -> Overlay:
        inputs = data.prompt(processor, conversation, **reading)
        answers = {"right answer": conversation.turns[0][1]}
        for name, pruning in (("full model", None), ("pruned", config)):
            answers[name] = answer(model, processor, inputs, pruning)["answer"]

        def draw(path: Path) -> None:
            media, folder = conversation.media[0], conversation.folder
            picture = data.open_picture(media, folder, options.max_pixels)
            plot_tokens(model, processor, inputs, picture, config, path)

        title = f"{first_question(conversation)} (budget {budget_text(point.budget)})"
        return Overlay(title, draw, answers)

    try:
        found = [overlay(conversation) for conversation in questions.about_one_picture(3)]
    except ImportError as error:
        return [], str(error)
    return found, "None of the questions is about one picture."
