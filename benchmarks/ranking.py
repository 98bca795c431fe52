"""What ranking costs: each method's time and memory on many tokens, beside one full prefill.

Each method ranks once, before the first layer that it can prune, and half of the tokens stay. Timed
is the ranking alone, with merging and with all that it asks of tower and layers. The prefill is of
the same prompt without pruning, in the same turns. Memory is the most that tensors of the ranking
hold at once, beside what was there before.

    python -m benchmarks.ranking --threads 2 --output ranking.json
    python -m benchmarks.ranking --visual 2304 --whole-order
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vispco.pruning import Dropping, Masking
from vispco.registry import METHODS, adapter_for, build_method
from vispco.relaxation import hard_mask

from . import shapes
from .side_by_side import arguments, peak_memory, run, side_by_side, turns


class Ranked(BaseException):
    """The ranking is done: the rest of the forward pass is not wanted."""


def ranking(
    model, inputs: dict, name: str, keep: float, whole: bool, look: Callable[[Callable], Any]
) -> Any:
    """What `look` finds of the first ranking of a method, in a forward pass that ends there.

    keep: share of the tokens that stay. whole: the order of all tokens, as in search.
    look: called with the ranking, a function of no arguments.
    """
    adapter, scorer, found = adapter_for(model)(model), build_method(name), []
    score, first = scorer.score, adapter.first_layer(scorer)

    def watched(ctx):
        def rank():
            scores = score(ctx)
            scorer.limit(ctx, scores)
            return scorer.merge(ctx, hard_mask(scores, ctx.keep, ctx.valid))

        found.append(look(rank))
        raise Ranked

    scorer.score = watched
    layers = len(adapter.layers)
    ratios = torch.tensor([1.0] * first + [keep] * (layers - first), dtype=torch.float64)
    kind = Masking if whole else Dropping
    with kind(adapter, scorer, ratios).install(), contextlib.suppress(Ranked):
        model(**inputs, logits_to_keep=1)
    return found[0]


def measure(options) -> list[dict]:
    """Time over a prefill's and bytes, of each method and number of tokens."""
    figures = []
    for model, prompt, setting in shapes.settings(options):
        if prompt.pictures is None:
            raise ValueError(
                f"no whole number of pictures has {prompt.n_visual} visual tokens (see --visual)"
            )
        inputs = {**prompt.inputs, **prompt.pictures}
        del inputs["mm_encoder_outputs"]
        names, given = options.methods or METHODS.names(), (options.keep, options.whole_order)
        rank = {name: partial(ranking, model, inputs, name, *given) for name in names}
        prefill = partial(shapes.prefill, model, prompt)
        calls = {"prefill": partial(options.timer, prefill)}
        calls |= {name: partial(call, options.timer) for name, call in rank.items()}
        # Each call times its own part.
        own = {**turns(options), "timer": lambda call: call()}
        times = side_by_side(calls, baseline="prefill", **own)
        for name, call in rank.items():
            memory = call(partial(peak_memory, device=options.device))
            row = {**setting, "method": name, "keep": options.keep, "whole": options.whole_order}
            figures.append({**row, **times[name], "peak_bytes": memory})
            print(
                f"{row['n_visual']:>6} visual, {name:<12} {times[name]['ratio']:.3f} of a prefill "
                f"({times[name]['low']:.3f} to {times[name]['high']:.3f}), "
                f"{memory / 2**20:.1f} MiB"
            )
    return figures


def main(argv=None) -> int:
    """Run the command; returns the exit code."""
    parser = arguments("benchmarks.ranking", __doc__, "ranking.json")
    shapes.add_arguments(parser, "tiny", [1024, 4096, 16384])
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", choices=METHODS.names(), help="default: all"
    )
    parser.add_argument("--keep", type=float, default=0.5, help="share of the tokens that stay")
    whole = "the order of all tokens, as a search needs it, not only which stay"
    parser.add_argument("--whole-order", action="store_true", help=whole)
    return run(parser, measure, argv)


if __name__ == "__main__":
    raise SystemExit(main())
