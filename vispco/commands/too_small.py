"""Where pruning saves no time, and from how many visual tokens on it would."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

from ..calibration import frozen
from ..config import PruningConfig
from ..latency.table import LatencyTable, prefills
from ..latency.timing import Timer, in_turns, timed
from ..pruning import apply
from ..registry import adapter_for
from .answer import first_token

#: Less is no saving that one notices.
_WORTH = 0.98
#: How many times longer the prompts are whose prefill is timed: first these, then also those.
_NEAR, _FAR = (1, 2, 4, 8), (1, 4, 16, 32)
#: How much a prompt grows at a time when the first one that saves is looked for.
_GROWTH = 2**0.125
#: Turns that are timed, after one that is not: the median of fewer differs from run to run.
_ROUNDS = 11
#: How often the full and the pruned model run in each of them: their difference is small.
_PAIRS = 4


def slow_note(
    model: Any, inputs: dict, config: PruningConfig, ratio: float, timer: Timer | None = None
) -> str:
    """Why pruning saves no time on a prompt, and from which size on it does; "" if it saves some.

    inputs: the prompt. ratio: measured time to the first token over the full model's.
    timer: gives the seconds of one call; default, a clock.
    The full and the pruned model are timed in turns with the decoder alone at several lengths. What
    ranking and dropping take is the time that is missing from the saving at this prompt
    (`docs/how-much-time-it-saves.md`). It is known to a factor of two, and said so.
    """
    if ratio <= _WORTH:
        return ""
    if not config.steps:
        return "note: this configuration drops nothing, so it saves no time"
    adapter = adapter_for(model)(model)
    size = adapter.dimensions(adapter.config)
    ids = inputs["input_ids"]
    n_visual = int(adapter.visual_mask(ids, None).sum())
    shape = n_visual, ids.shape[1] - n_visual
    here = f"{n_visual} visual tokens in {size.layers} layers of width {size.hidden}"
    for factors in (_NEAR, _FAR):
        times, missing = _measured(model, inputs, config, shape, factors, timer)
        if least := pays_from(times, config, *shape, missing, factors[-1]):
            break
    found = f"it would not with {_FAR[-1]} times as many tokens either; larger models save"
    if least:
        about = f"at about {_rounded(least):,} of them, give or take a factor of two"
        about = about if _rounded(least) > n_visual else "with hardly more of them"
        found = f"by the decoder's times at other lengths it begins to save {about}"
    return (
        f"note: this saves no time here ({ratio:.2f} of the full model's): {here} are too few for "
        f"it to pay, as ranking and dropping take longer than is saved; {found}"
    )


def _measured(
    model: Any,
    inputs: dict,
    config: PruningConfig,
    shape: tuple[int, int],
    factors: tuple[int, ...],
    timer: Timer | None,
) -> tuple[LatencyTable, float]:
    """The decoder's times, and the seconds that are missing from the saving at this prompt.

    shape: visual and text tokens. factors: of its length.
    """
    lengths = [sum(shape) * factor for factor in factors]
    call = first_token(model, inputs)
    pairs = [((i, "full"), (i, "pruned")) for i in range(_PAIRS)]
    calls: dict[Any, Any] = {name: call for pair in pairs for name in pair}
    calls |= prefills(model, lengths)
    within = {pruned: partial(apply, model, config) for _, pruned in pairs}
    how: dict[str, Any] = {"rounds": _ROUNDS, "warmup": 1, "timer": timer or timed(model.device)}
    with frozen(model), torch.no_grad():
        seconds = in_turns(calls, within=within, **how)
    adapter = adapter_for(model)(model)
    size = adapter.dimensions(adapter.config)
    layer = tuple(statistics.median(seconds[n]) / size.layers for n in lengths)
    times = LatencyTable(size, tuple(lengths), layer)
    # One right after the other, so that a slow moment strikes both.
    longer = [
        after - before
        for full, pruned in pairs
        for before, after in zip(seconds[full], seconds[pruned], strict=True)
    ]
    return times, statistics.median(longer) + _saved(times, config, *shape)


def _saved(times: LatencyTable, config: PruningConfig, n_visual: int, n_text: int) -> float:
    """Seconds that the decoder's layers save."""
    counts = torch.tensor(config.tokens(n_visual))
    return float(times.full(n_visual, n_text) - times(counts, n_visual, n_text))


def pays_from(
    times: LatencyTable,
    config: PruningConfig,
    n_visual: int,
    n_text: int,
    missing: float,
    longest: int = _FAR[-1],
) -> int | None:
    """Visual tokens from which on the decoder's layers save more than `missing` seconds.

    times: of the decoder. None: not up to `longest` times as many as `n_visual`.

    >>> from vispco.flops import Dimensions
    >>> table = LatencyTable(Dimensions(2, 8, 2, 2, 4, 16, 10), (1, 320), (1e-4, 32e-3))
    >>> pays_from(table, PruningConfig("fastv", [1, 0.5]), 10, 0, missing=0.65e-3)
    14
    """
    tokens = float(n_visual)
    while tokens <= longest * n_visual:
        if _saved(times, config, int(tokens), n_text) > missing:
            return int(tokens)
        tokens *= _GROWTH
    return None


def _rounded(number: int) -> int:
    """The nearest of 1, 2, 5, 10, 20, 50, ..., by ratio.

    >>> _rounded(181), _rounded(255), _rounded(362), _rounded(1100)
    (200, 200, 500, 1000)
    """
    power = 10 ** (len(str(number)) - 1)
    steps = (power, 2 * power, 5 * power, 10 * power)
    return min(steps, key=lambda step: max(step / number, number / step))
