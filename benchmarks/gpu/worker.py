"""One process that has one model, and measures parts on it, one after the other.

It tells of each part on stdout, as a line of JSON: that it begins, and what came of it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from vispco.utils.files import brief

from . import models
from .parts import Part, Work, compiled, decode, emptied, first_token
from .profiling import profiled
from .searching import search

#: What measures each kind of part, and the seconds that it may take.
KINDS: dict[str, tuple[Callable[[Work], list[dict]], float]] = {
    "first-token": (first_token, 60),
    "search": (search, 45),
    "profile": (profiled, 40),
    "decode": (decode, 40),
    "compiled": (compiled, 150),
}
#: What lines of events begin with. Other lines are of libraries.
MARK = "@gpu "


def work(settings: Mapping[str, Any], model_name: str, parts: Sequence[Part]) -> Iterator[dict]:
    """Measure the parts on one model: {"begin": name}, then {"part": name, ...} of each.

    settings: device, dtype, tiny, seed and rounds. A part that fails says why, and the next one
    goes on: {"part", "failed"}. After an error that the device does not recover from it ends.
    """
    yield {"begin": "model"}
    dtype = getattr(torch, settings["dtype"])
    tiny, device, seed = settings["tiny"], settings["device"], settings["seed"]
    model: Any
    try:
        model = models.build(model_name, tiny, device, dtype, seed)
    except (RuntimeError, ValueError) as error:
        yield {"part": "model", "failed": brief(f"{type(error).__name__}: {error}")}
        return
    for part in parts:
        measure, seconds = KINDS[part.kind]
        yield {"begin": part.name}
        started = time.perf_counter()
        found: dict[str, Any] = {}
        try:
            found["figures"] = measure(Work(part, model, seconds, settings["rounds"]))
        except torch.OutOfMemoryError as error:
            found["failed"] = brief(f"out of memory: {error}")
        except Exception as error:
            found["failed"] = brief(f"{type(error).__name__}: {error}")
        emptied(model.device)
        yield {"part": part.name, "took": round(time.perf_counter() - started, 1), **found}
        if "failed" in found and model.device.type == "cuda":
            # Raises if the error has broken the process's use of the device.
            torch.cuda.synchronize()


def main() -> None:
    """stdin: the settings, the model's name and its parts, as JSON."""
    settings, name, parts = json.load(sys.stdin)
    if settings["device"] == "cpu":
        torch.set_num_threads(1)
    for event in work(settings, name, [Part(*part) for part in parts]):
        print(MARK + json.dumps(event, allow_nan=False), flush=True)


if __name__ == "__main__":
    main()
