"""`vispco profile`: what a model does with its image, layer by layer."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..plot import plot_profile, require_matplotlib
from ..plot.profile import SHARES, findings, losses_table, share_losses
from ..profiling import Profile, named_methods, profile
from ..pruning.forward import OBJECTIVES
from ..registry import adapter_for
from ..utils.console import output_folder, table
from ..utils.journal import Journal
from .model import find_model
from .options import add_data, add_folder, add_json, add_model, methods, positive_int
from .output import check_folder, first_process, print_json, resumable
from .progress import Progress
from .questions import load_questions

SUMMARY = "measure what a model does with its image, layer by layer"
EXAMPLES = (
    "--model testbed --output profile",
    "--model llava-hf/llava-1.5-7b-hf --data questions.jsonl --images pictures \\\n"
    "      --method fastv --dtype bfloat16 --output profile",
)


def add_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of `vispco profile`."""
    add = sub.add_argument
    several = (
        "who ranks the tokens; of several (fastv,pdrop or auto), each layer's best; auto: eight "
        "methods, of films those for video among them"
    )
    add("--method", type=methods, default="fastv", help=several)
    objective = "kl: how far from the full model; task: how wrong"
    add("--objective", choices=OBJECTIVES, default="kl", help=objective)
    most = "numbers of tokens that are measured at one layer, at most"
    add("--measurements", type=positive_int, default=6, help=most)
    add_folder(sub, "profile", "vispco-profile", "profile.json, profile.png and journal.jsonl")
    add_json(sub)
    add_model(sub)
    add_data(sub, limit=32, split="calibration")


def run(options: argparse.Namespace) -> None:
    """Measure, write, print, with the processes of `torchrun`: the first one writes and prints."""
    named_methods(options.method)
    with first_process(options) as first, tempfile.TemporaryDirectory() as nowhere:
        if not first:
            options.output = nowhere
        load = find_model(options)
        with (
            output_folder(options.output) as folder,
            Journal(folder / "journal.jsonl", options.overwrite) as journal,
        ):
            _profile(options, folder, journal, load)


def _profile(
    options: argparse.Namespace,
    folder: Path,
    journal: Journal,
    load: Callable[[], tuple[Any, Any]],
) -> None:
    """load: gives model and processor, once it is known that there is something to measure."""
    check_folder(folder, "profile.json", "profile", options, journal.search)
    questions = load_questions(options, "calibration")
    model, processor = load()
    batches = questions.batches(model, processor)
    layers = len(adapter_for(model)(model).layers)
    asked = {"objective": options.objective, "measurements": options.measurements}
    with resumable(folder, "profile", options, journal):
        with Progress(layers, "profile", options.quiet) as bar:

            def on_measurement(record: dict) -> None:
                # How many measurements a layer needs is not known before.
                bar.reach(record["layer"], f"loss {record['loss']:.4f}")

            how: dict[str, Any] = {**asked, "journal": journal, "callback": on_measurement}
            found = profile(model, batches, options.method, **how)
        found.save(folder / "profile.json")
        picture, why = _draw(found, folder / "profile.png")
    _print(options, folder, found, picture, why)


def _draw(found: Profile, path: Path) -> tuple[Path | None, str]:
    """The picture, or None and the reason why there is none."""
    # One of an earlier profile.
    path.unlink(missing_ok=True)
    try:
        require_matplotlib()
    except ImportError as error:
        return None, str(error)
    plot_profile(found, path)
    return path, ""


def _print(
    options: argparse.Namespace, folder: Path, found: Profile, picture: Path | None, why: str
) -> None:
    """The result as a table and in words, or as JSON."""
    file = folder / "profile.json"
    if options.json:
        losses = {
            str(layer): dict(zip(map(str, SHARES), row, strict=True))
            for layer, row in share_losses(found).items()
        }
        words: dict[str, Any] = {"exit": found.exit(), "traps": found.traps()}
        words |= {"forward_passes": found.forward_passes, "findings": findings(found)}
        paths = {"profile": str(file), "picture": picture and str(picture)}
        print_json({**paths, "tokens": found.tokens, "losses": losses, **words})
        return
    what = {"kl": "KL from the full model", "task": "loss of the answers"}[found.objective]
    print(f"{what} in nats, if a share of the visual tokens is kept from a layer on:\n")
    print(table(*losses_table(found)))
    print("\n" + "\n".join(findings(found)))
    drawn = f"a picture in {picture}" if picture else f"no picture: {why}"
    print(f"\nAll of it is in {file}; {drawn}")
