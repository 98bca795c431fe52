"""Where pruning saves no time, and from how many visual tokens on it would."""

from __future__ import annotations

from typing import Any

import torch

from ..config import PruningConfig
from ..latency.table import LatencyTable
from ..registry import adapter_for

#: Less is no saving that one notices.
_WORTH = 0.98
#: How many times longer the longest prompt is that is looked at, and how much it grows at a time.
_LONGEST, _GROWTH = 32, 2**0.25


def slow_note(model: Any, config: PruningConfig, n_visual: int, n_text: int, ratio: float) -> str:
    """Why pruning saves no time on a prompt, and from which size on it does; "" if it saves some.

    ratio: measured time to the first token over the full model's.
    The decoder is timed at lengths up to 32 times the prompt's. What ranking and dropping take is
    the time that is missing from the saving at this prompt (`docs/how-much-time-it-saves.md`).
    """
    if ratio <= _WORTH:
        return ""
    size = adapter_for(model)(model).dimensions(model.config)
    lengths = [(n_visual + n_text) * 2**i for i in range(6)]
    times = LatencyTable.measure(model, lengths, repeats=3)
    least = pays_from(times, config, n_visual, n_text, ratio)
    here = f"{n_visual} visual tokens in {size.layers} layers of width {size.hidden}"
    found = (
        f"by the decoder's times at other lengths it begins to save at about {least:,} of them"
        if least
        else f"it would not with {_LONGEST} times as many tokens either; larger models save"
    )
    return (
        f"note: this saves no time here ({ratio:.2f} of the full model's): {here} are too few for "
        f"it to pay, as ranking and dropping take longer than is saved; {found}"
    )


def pays_from(
    times: LatencyTable, config: PruningConfig, n_visual: int, n_text: int, ratio: float
) -> int | None:
    """Visual tokens from which on the saving is larger than what ranking and dropping took here.

    times: of the decoder. ratio: measured, at `n_visual` and `n_text` tokens, over the full time.
    None: not up to 32 times as many.

    >>> from vispco.flops import Dimensions
    >>> table = LatencyTable(Dimensions(2, 8, 2, 2, 4, 16, 10), (10, 320), (1e-3, 32e-3))
    >>> pays_from(table, PruningConfig("fastv", [1, 0.5]), 10, 0, ratio=1.1)
    14
    """

    def saved(n: int) -> float:
        counts = torch.tensor(config.tokens(n))
        return float(times.full(n, n_text) - times(counts, n, n_text))

    overhead = saved(n_visual) + (ratio - 1) * float(times.full(n_visual, n_text))
    tokens = float(n_visual)
    while tokens <= _LONGEST * n_visual:
        if saved(int(tokens)) > overhead:
            return int(tokens)
        tokens *= _GROWTH
    return None
