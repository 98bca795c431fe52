"""`vispco.profile`: measure a model's profile, layer by layer."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..calibration import PreparedBatch, frozen, prepare, run_teacher
from ..pruning import unwrapped
from ..pruning.forward import check_objective
from ..registry import adapter_for, build_method, is_composite, named_options
from ..utils.distributed import total
from ..utils.journal import Journal, opened
from ..utils.version import versions
from .drops import Drops
from .race import Race, levels_of, mean
from .record import FREE, Profile

#: The methods of method="auto": rankings by attention, by the tower, by differences; no ranking.
AUTO = ["fastv", "pdrop", "sparsevlm", "visionzip", "vispruner", "cdpruner", "divprune"]
AUTO += ["strided", "pool"]
#: The same for films: the three that know of frames, in place of the three that did least there
#: (`python -m tests.reproduction.video`).
AUTO_FILMS = ["fastv", "pdrop", "sparsevlm", "vispruner", "divprune"]
AUTO_FILMS += ["evs", "vidcom2", "framefusion"]


def profile(
    model: nn.Module,
    batches: Sequence[Mapping],
    method: str | Mapping | Sequence = "fastv",
    *,
    objective: str = "kl",
    measurements: int = 6,
    journal: Journal | str | os.PathLike | None = None,
    callback: Callable[[dict], Any] | None = None,
) -> Profile:
    """Measure what it costs to keep n visual tokens from layer k on, for every layer.

    model: any vision-language model whose decoder holds visual tokens. Its weights are not changed.
    batches: dicts of model inputs with `labels`, as of `vispco.search`. 32 questions are enough to
        plan by.
    method: a registered pruning method, a name or a mapping {"name": ..., **options}; or several of
        them, a list or "auto" (`AUTO`; if the batches hold video tokens, `AUTO_FILMS`), of which
        the profile has each layer's best.
    objective: "kl", the divergence from the full model's answers, or "task".
    measurements: most numbers of tokens that are measured at one layer. The first is 0. The next
        ones are where the loss changes most. A layer is left as soon as it is known: where the
        loss of no token at all is that of the full model, one measurement is enough.
    journal: a file that holds every measurement; the same profile goes on after the last one.
    callback: called with a dict after every measurement (layer, tokens, method, loss).
    Raises ValueError for bad input, FloatingPointError for numbers that are not finite.

    All measurements of one layer share the layers before it, which run once. Without any token,
    all methods are the same: that is measured once. Several methods race at each layer on the first
    batch, with few tokens kept and with many; the winners are measured on all batches, and the
    profile has the better one of each measurement. One that this model does not serve is left out,
    with a warning.

    >>> from vispco import testbed
    >>> model, _ = testbed.load("testbed-llava")
    >>> found = profile(model, testbed.batches("calibration", n=32, batch_size=32))
    >>> found.loss(1, 0) > found.loss(7, 0), found.exit()
    (True, 6)
    """
    check_objective(objective)
    named_methods(method)
    model = unwrapped(model)
    prepared = prepare(model, batches, keep_features=True)
    methods = named_methods(method, has_films(model, prepared))
    asked = {"methods": methods, "objective": objective, "measurements": measurements}
    with opened(journal) as kept, frozen(model):
        kept.begin("vispco.profile", model, prepared, asked)
        run_teacher(model, prepared)
        return measured(model, prepared, methods, objective, measurements, kept, callback)


def has_films(model: nn.Module, prepared: Sequence[PreparedBatch]) -> bool:
    """Whether some prompt, of any process, holds video tokens.

    False for a family whose processor makes a film's frames into pictures (InternVL, SmolVLM).
    """
    ids = adapter_for(model)(model).token_ids()
    if ids.get("video") in (None, ids.get("image")):
        return False
    found = (bool((batch.inputs["input_ids"] == ids["video"]).any()) for batch in prepared)
    return total(int(any(found))) > 0


def named_methods(
    method: str | Mapping | Sequence, films: bool = False
) -> dict[str, dict[str, Any]]:
    """{name: options} of one method or several: a name, a mapping, a list of these, or "auto".

    films: whether "auto" is for films.
    Raises ValueError for an unknown method or option, or for one method twice.

    >>> named_methods(["fastv", {"name": "visionzip", "contextual": 0.2}])
    {'fastv': {}, 'visionzip': {'contextual': 0.2}}
    """
    given: Any = (AUTO_FILMS if films else AUTO) if method == "auto" else method
    several = given if isinstance(given, (list, tuple)) else [given]
    found = dict(named_options("method", each) for each in several)
    composite = len(found) > 1 and any(map(is_composite, found))
    if not found or len(found) < len(several) or composite:
        expected = "several methods must be different ones, at least one, and no composites"
        raise ValueError(f"{expected}, got {method!r}")
    for name, options in found.items():
        build_method(name, options)
    return found


def measured(
    model: nn.Module,
    prepared: Sequence[PreparedBatch],
    methods: Mapping[str, Mapping[str, Any]],
    objective: str = "kl",
    measurements: int = 6,
    journal: Journal | None = None,
    callback: Callable[[dict], Any] | None = None,
) -> Profile:
    """The profile of prepared batches, whose teacher has run, on a frozen model."""
    adapter = adapter_for(model)(model)
    built = {name: build_method(name, options) for name, options in methods.items()}
    runs = Drops(adapter, built, prepared, objective, journal or Journal(), callback)
    rows: dict[int, dict[int, list[float]]] = {}
    ranks: dict[int, dict[int, str]] = {}
    race = Race(runs)
    for layer in range(min(runs.first_layers.values()), runs.layers):
        found = race.nothing(layer)
        if found is None:
            continue
        name, losses = found
        row, who = {0: losses}, {0: name}
        few, many, levels = name, name, []
        if len(race.able(layer)) > 1 and _next(row, runs, 2) is not None:
            few, many = race.best(layer)
            levels = race.levels
        least, most = race.levels
        while (tokens := levels.pop() if levels else _next(row, runs, measurements)) is not None:
            # Between the two levels of the race, either winner may be the better one.
            names = {few} if tokens <= least else {many} if tokens >= most else {few, many}
            both = {name: runs.losses(layer, tokens, name) for name in sorted(names)}
            who[tokens] = min(both, key=lambda name: mean(both[name]))
            row[tokens] = both[who[tokens]]
        rows[layer], ranks[layer] = row, who
    own = (dict(methods), adapter.config.model_type, runs.layers, runs.tokens, objective)
    passes = round(runs.passes + runs.samples, 3)
    return Profile(*own, runs.full, rows, ranks, passes, versions())


def _next(row: Mapping[int, Sequence[float]], runs: Drops, most: int) -> int | None:
    """How many tokens to measure next at a layer: in the middle of the steepest part; None: done.

    Steep is what changes the logarithm of (loss + 0.01) by more than 1.
    """
    if len(row) >= most:
        return None
    known, places = {**row, runs.tokens: runs.full}, levels_of(runs.tokens)
    found = [i for i, level in enumerate(places) if level in known]
    heights = [math.log(mean(known[places[i]]) + FREE) for i in found]
    best, chosen = 1.0, None
    for (i, high), (j, low) in itertools.pairwise(zip(found, heights, strict=True)):
        if j - i > 1 and high - low > best:
            best, chosen = high - low, places[(i + j) // 2]
    return chosen
