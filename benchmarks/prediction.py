"""How much time a configuration saves, and whether a simple model predicts it.

    python -m benchmarks.prediction --visual 64 576 --tokens 1 32 --output prediction.json

What is timed is a whole call: the vision tower (not with `--no-tower`), the prefill, and the
decoding of all tokens but the first. Prompts and answers may be short or long. The model is
time = fixed + sum over layers of t(text + visual tokens that enter the layer), see
`vispco.commands.answer.latency`.
"""

from __future__ import annotations

from functools import partial

from vispco.commands.answer import latency

from . import shapes
from .side_by_side import arguments, run


def answer(model, prompt: shapes.Prompt, tokens: int, tower: bool) -> None:
    """One whole call: the vision tower if `tower`, the prefill, `tokens` - 1 decoded tokens."""
    if tower:
        model.model.get_image_features(**prompt.pictures)
    cache = shapes.prefill(model, prompt)
    if tokens > 1:
        shapes.decode(model, cache, tokens - 1, prompt.inputs["input_ids"][:, -1:])


def measure(options) -> list[dict]:
    """Predicted and measured ratios to the full model's time.

    One row for each prompt, length of the answer and schedule.
    """
    if min(options.tokens) < 1:
        raise ValueError(f"--tokens must be at least 1, got {min(options.tokens)}")
    figures = []
    for model, prompt, setting in shapes.settings(options):
        configs = shapes.schedules(setting["layers"], options.method)
        tower = prompt.pictures is not None and not options.no_tower
        for tokens in options.tokens:
            found = latency(
                model,
                partial(answer, model, prompt, tokens, tower),
                list(configs.values()),
                prompt.n_visual,
                prompt.n_text,
                batch_size=setting["batch"],
                rounds=options.rounds,
                warmup=options.warmup,
                timer=options.timer,
            )
            for name, row in zip(configs, found["configurations"], strict=True):
                figure = {
                    **setting,
                    "tower": tower,
                    "new_tokens": tokens,
                    "schedule": name,
                    "method": options.method,
                    "fixed": found["fixed"],
                    "full_ms": found["full_ms"],
                    **row,
                }
                figures.append(figure)
                print(
                    f"{prompt.n_visual:>6} visual, {prompt.n_text} text, "
                    f"batch {setting['batch']}, {tokens:>3} new, {name:<5} "
                    f"fixed {found['fixed']:.3f}, "
                    f"predicted {row['predicted']:.3f}, measured {row['measured']:.3f} "
                    f"({row['low']:.3f} to {row['high']:.3f})"
                    + (f", {row['measured_ms']:.1f} ms" if row["measured_ms"] else "")
                )
    return figures


def main(argv=None) -> int:
    """Run the command; returns the exit code."""
    parser = arguments("benchmarks.prediction", __doc__, "prediction.json")
    shapes.add_arguments(parser, "small", [64, 576])
    parser.add_argument("--method", default="fastv", help="that ranks the tokens")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 32], help="lengths of the answer"
    )
    parser.add_argument("--no-tower", action="store_true", help="leave the vision tower out")
    return run(parser, measure, argv)


if __name__ == "__main__":
    raise SystemExit(main())
