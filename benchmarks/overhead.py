"""What `vispco.apply` itself costs: keep-all against the bare model, and decoding after pruning with and without it.

    python -m benchmarks.overhead --model small --output overhead.json
"""

from __future__ import annotations

import contextlib
from functools import partial

import vispco

from . import shapes
from .side_by_side import arguments, run, side_by_side


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

        @contextlib.contextmanager
        def settled(config, cache):  # decoding: the first step is not like the others
            with vispco.apply(model, config):
                shapes.decode(model, cache, 1, first)
                yield

        prefill = partial(shapes.prefill, model, prompt)
        decode, pruned, bare = (partial(shapes.decode, model, cache, options.steps, first)
                                for cache in (full, short, shapes.plain(short)))
        for work, calls, within in [
                ("prefill", (prefill, prefill), lambda: vispco.apply(model, keep_all)),
                ("decode", (decode, decode), lambda: settled(keep_all, full)),
                # Without padding the bare model decodes a pruned cache as well: the same keys in each layer.
                ("decode after pruning", (bare, pruned), lambda: settled(half, short))]:
            times = side_by_side(dict(zip(("bare", "applied"), calls)), baseline="bare", rounds=options.rounds,
                                 warmup=options.warmup, device=options.device, timer=options.timer, within={"applied": within})
            figures.append({**setting, "work": work, "bare_ms": times["bare"]["ms"], **times["applied"]})
            print(f"{setting['n_visual']:>6} visual, batch {setting['batch']}, {work:<21} {times['applied']['ratio']:.4f} "
                  f"({times['applied']['low']:.4f} to {times['applied']['high']:.4f})")
    return figures


def main(argv=None) -> int:
    """Run the command; returns the exit code."""
    parser = arguments("benchmarks.overhead", __doc__, "overhead.json")
    shapes.add_arguments(parser, "small", [576])
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded in one timed call")
    return run(parser, measure, argv)


if __name__ == "__main__":
    raise SystemExit(main())
