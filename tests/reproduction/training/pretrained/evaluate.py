"""What testbed-smollm answers, and where its layers read the picture: the tables of its card.

    python -m tests.reproduction.training.pretrained.evaluate --output FILE
    python -m tests.reproduction.training.pretrained.evaluate --output FILE \
        --tasks digit --examples 1000 --rows "dropped at 0,dropped at 4"

Every row is written as soon as it is measured; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vispco import PruningConfig, evaluate
from vispco.calibration import prepare, run_teacher
from vispco.registry import build_method
from vispco.testbed import Example, collate, examples, load, smollm
from vispco.utils.digest import of_model
from vispco.utils.files import read_json, write_json

from ...command import told
from ..evaluate import by_task, majority

METHODS = ("fastv", "pdrop", "sparsevlm", "visionzip", "divprune", "random", "strided")


def configurations(layers: int) -> Iterator[tuple[str, PruningConfig | None]]:
    """The rows by name: all tokens, all dropped at each layer, half of them at every third."""
    yield "all tokens", None
    for at in range(layers - 1, -1, -1):
        # Any method may: nothing is ranked where nothing stays.
        yield f"dropped at {at}", _from("random", at, 0.0, layers)
    for method in METHODS:
        for at in range(0, layers, 3):
            if at >= build_method(method).first_layer:
                yield f"{method}, half at {at}", _from(method, at, 0.5, layers)


def _from(method: str, at: int, ratio: float, layers: int) -> PruningConfig:
    return PruningConfig(method, [1.0] * at + [ratio] * (layers - at))


def batches(items: Sequence[Example], size: int) -> tuple[list[Example], list[dict]]:
    """The examples in the order of their length, and in batches: little padding."""
    ordered = sorted(items, key=lambda item: len(item.question))
    parts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return ordered, [collate(part, model=smollm.NAME) for part in parts]


def measure(
    model: Any, items: Sequence[Example], path: Path, size: int = 40, only: Sequence[str] = ()
) -> dict[str, dict]:
    """Accuracy by task, mean and KL of each row; rows that the file has already are kept.

    only: names of rows; none: all. Raises ValueError if the file is of other weights, types or
    questions, or for a row that there is not.
    """
    named = dict(configurations(model.config.text_config.num_hidden_layers))
    if unknown := [name for name in only if name not in named]:
        raise ValueError(f"no row {unknown[0]!r}: there are {', '.join(named)}")
    ordered, made = batches(items, size)
    whose = {"model": of_model(model), "dtype": str(model.dtype), "examples": len(items)}
    whose["tasks"] = sorted({item.task for item in items})
    saved = read_json(path, dict) if path.exists() else {**whose, "rows": {}}
    if {name: saved.get(name) for name in whose} != whose:
        raise ValueError(f"{path}: expected the measurements of this model; give another --output")
    rows = saved["rows"]
    rows["majority"] = majority(ordered)
    prepared = run_teacher(model, prepare(model, made))
    for name, config in named.items():
        if name not in rows and (name in only or not only):
            record = evaluate(model, prepared, config)
            rows[name] = {**by_task(ordered, record.correct.numpy()), "kl": record.kl}
            shown = " ".join(f"{task} {value:.3f}" for task, value in rows[name].items())
            print(f"{name}: {shown}", flush=True)
            write_json(path, saved)
    return rows


def main() -> int:
    """The command line; returns the exit code: 0, or 2 with one line on stderr."""
    options = argparse.ArgumentParser(
        prog="python -m tests.reproduction.training.pretrained.evaluate",
        description=__doc__.split(":")[0] + ".",
    )
    options.add_argument("--output", required=True, help="a JSON file")
    options.add_argument("--examples", type=int, default=320)
    options.add_argument("--tasks", default="", help="some of the eight tasks; none: all")
    options.add_argument("--rows", default="", help="some of the rows; none: all")
    options.add_argument("--threads", type=int, default=2)
    chosen = options.parse_args()
    tasks, rows = (
        [name.strip() for name in given.split(",") if name.strip()]
        for given in (chosen.tasks, chosen.rows)
    )
    torch.set_num_threads(chosen.threads)

    def action() -> None:
        items = examples("test", chosen.examples, tasks=tasks or None)
        measure(load(smollm.NAME)[0], items, Path(chosen.output), only=rows)

    return told(action)


if __name__ == "__main__":
    sys.exit(main())
