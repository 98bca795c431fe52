"""What pruning asks of the host: time and operators of a prefill with hardly any arithmetic.

A GPU computes a layer of a short prompt faster than the host can ask for the next. Then the host
decides, and what pruning adds to its work costs time, however many tokens are dropped. The model
here is so narrow that nearly all of the time is the host's.

    python -m benchmarks.host --layers 32 --cpu-time --output host.json
"""

from __future__ import annotations

from functools import partial

import vispco

from . import shapes
from .side_by_side import arguments, operators, run, side_by_side, turns


def measure(options) -> list[dict]:
    """Ratios of time and of operators to the bare model's, of each schedule."""
    figures = []
    for model, prompt, setting in shapes.settings(options):
        configs = shapes.schedules(len(model.get_decoder().layers))
        within = {name: partial(vispco.apply, model, config) for name, config in configs.items()}
        call = partial(shapes.prefill, model, prompt)
        calls = dict.fromkeys(["bare", *configs], call)
        times = side_by_side(calls, baseline="bare", within=within, **turns(options))
        bare = operators(call)
        for name in configs:
            with within[name]():
                count = operators(call)
            row = {**setting, "schedule": name, **times[name], "operators": count / bare}
            figures.append(row)
            print(
                f"{row['n_visual']:>6} visual, batch {row['batch']}, {name:<6}"
                f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}), "
                f"{row['operators']:.3f} times the operators"
            )
    return figures


def main(argv=None) -> int:
    """Run the command; returns the exit code."""
    parser = arguments("benchmarks.host", __doc__, "host.json")
    shapes.add_arguments(parser, "tiny", [64])
    return run(parser, measure, argv)


if __name__ == "__main__":
    raise SystemExit(main())
