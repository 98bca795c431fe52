"""What `vispco.apply` itself costs.

Keeping everything is timed against the bare model, and decoding after pruning with and without it.

    python -m benchmarks.overhead --model small --output overhead.json
"""

from __future__ import annotations

import contextlib
from functools import partial

import vispco

from . import shapes
from .side_by_side import arguments, run, side_by_side, turns


@contextlib.contextmanager
def settled(model, config, cache, first):
    """`vispco.apply` for decoding, after the first step, which is not like the others."""
    with vispco.apply(model, config):
        shapes.decode(model, cache, 1, first)
        yield


def measure(options) -> list[dict]:
    """Ratios to the bare model doing the same work (target: at most 1.02), for each prompt."""
    figures = []
    for model, prompt, setting in shapes.settings(options):
        layers = len(model.get_decoder().layers)
        keep_all = vispco.PruningConfig("fastv", [1.0] * layers)
        half = vispco.PruningConfig("fastv", [1.0] * 2 + [0.5] * (layers - 2))
        first = prompt.inputs["input_ids"][:, -1:]
        full = shapes.prefill(model, prompt)
        with vispco.apply(model, half):
            short = shapes.prefill(model, prompt)

        prefill = partial(shapes.prefill, model, prompt)
        decode, pruned, bare = (
            partial(shapes.decode, model, cache, options.steps, first)
            for cache in (full, short, shapes.plain(short))
        )
        keeping = partial(vispco.apply, model, keep_all)
        keeping_settled = partial(settled, model, keep_all, full, first)
        pruned_settled = partial(settled, model, half, short, first)
        for work, bare_call, applied, within in [
            ("prefill", prefill, prefill, keeping),
            ("decode", decode, decode, keeping_settled),
            # Without padding, the bare model decodes a pruned cache as well.
            ("decode after pruning", bare, pruned, pruned_settled),
        ]:
            calls, within = {"bare": bare_call, "applied": applied}, {"applied": within}
            times = side_by_side(calls, baseline="bare", within=within, **turns(options))
            row = {**setting, "work": work, "bare_ms": times["bare"]["ms"], **times["applied"]}
            figures.append(row)
            print(
                f"{row['n_visual']:>6} visual, batch {row['batch']}, {work:<21} "
                f"{row['ratio']:.4f} ({row['low']:.4f} to {row['high']:.4f})"
            )
    return figures


def main(argv=None) -> int:
    """Run the command; returns the exit code."""
    parser = arguments("benchmarks.overhead", __doc__, "overhead.json")
    shapes.add_arguments(parser, "small", [576])
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded in one timed call")
    return run(parser, measure, argv)


if __name__ == "__main__":
    raise SystemExit(main())
