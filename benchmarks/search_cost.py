"""What one step of the search costs, against one plain forward pass of the batch.

A step is the loss, and its gradient with respect to the keep ratios.

    python -m benchmarks.search_cost --model small --visual 576 2880 --output search_cost.json
    python -m benchmarks.search_cost --model tiny --visual 64 256 1024 4096 16384 --rounds 3
    python -m benchmarks.search_cost --model testbed-qwen --batch 8 32
    python -m benchmarks.search_cost --model qwen2.5-vl-3b --layers 9 --vision-layers 8 \\
        --pictures --dtype bfloat16

A search runs the vision tower once per batch, so a step does not run it. With pictures (of the
testbeds, or by --pictures) the plain passes run it, and "tower" is a step that runs it again.
Without pictures, all are given ready-made features.

Time: against a forward pass without gradients (target: at most 3.0x). Memory: against a forward
pass that keeps what a gradient with respect to the input embeddings needs, while the weights are
frozen (target: at most 1.5x).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from vispco import testbed
from vispco.calibration import PreparedBatch, answer_logits, frozen, prepare, run_teacher
from vispco.kernels import Monotone
from vispco.pruning import Masking
from vispco.registry import METHODS, adapter_for, build_method
from vispco.schedule import to_whole_tokens

from . import shapes
from .side_by_side import arguments, operators, peak_memory, run, side_by_side, turns


def settings(options):
    """Each model and batch in turn.

    A testbed model gets its own questions. Other models have random weights and random prompts.
    """
    if options.model in testbed.MODELS:
        model = testbed.load(options.model)[0].to(options.device, getattr(torch, options.dtype))
        for batch in options.batch:
            questions = testbed.batches(
                "calibration", batch, batch, options.seed, model=options.model
            )
            (prepared_batch,) = prepare(model, questions, keep_features=True)
            setting = {
                "model": options.model,
                "layers": len(adapter_for(model)(model).layers),
                "batch": batch,
                "n_visual": int(prepared_batch.n_visual.max()),
                "n_text": int(prepared_batch.n_text.max()),
            }
            yield model, prepared_batch, setting
        return
    for model, prompt, setting in shapes.settings(options):
        labels = torch.full_like(prompt.inputs["input_ids"], -100)
        # One answer token.
        labels[:, -1] = prompt.inputs["input_ids"][:, -1]
        inputs = _with_pictures(prompt) if options.pictures else prompt.inputs
        (prepared_batch,) = prepare(model, [{**inputs, "labels": labels}], keep_features=True)
        yield model, prepared_batch, setting


def _with_pictures(prompt: shapes.Prompt) -> dict:
    if prompt.pictures is None:
        raise ValueError(
            f"--pictures: no whole number of pictures has {prompt.n_visual} visual tokens "
            "(see --visual)"
        )
    inputs = {**prompt.inputs, **prompt.pictures}
    del inputs["mm_encoder_outputs"]
    return inputs


@torch.no_grad()
def plain(model: nn.Module, prepared_batch: PreparedBatch) -> None:
    """One forward pass of the model alone."""
    answer_logits(model, prepared_batch)


@torch.enable_grad()
def kept(model: nn.Module, prepared_batch: PreparedBatch) -> None:
    """One forward pass, with all that the gradient of the input embeddings needs."""

    def hook(module, args, output):
        return output.requires_grad_()

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        answer_logits(model, prepared_batch)
    finally:
        handle.remove()


@torch.enable_grad()
def step(prepared_batch: PreparedBatch, curve: Monotone, pruner: Masking) -> None:
    """One step of `vispco.search`: theta, keep ratios, the masked model, and back to theta."""
    ratios = to_whole_tokens(curve(), int(prepared_batch.n_visual.max()))
    losses = pruner.losses(prepared_batch, ratios)
    torch.autograd.grad(losses.mean(), curve.theta)


def search_step(
    model: nn.Module,
    adapter,
    scorer,
    curve: Monotone,
    batch: PreparedBatch,
    checkpoint: bool = False,
) -> None:
    """One step with all that a search sets up for it."""
    with frozen(model, checkpoint), Masking(adapter, scorer, curve()).install() as pruner:
        step(batch, curve, pruner)


def measure(options) -> list[dict]:
    """Ratios of a step's time and memory, for each batch.

    With and without checkpointing, and with the vision tower where there are pictures.
    """
    figures = []
    for model, prepared_batch, setting in settings(options):
        adapter, scorer = adapter_for(model)(model), build_method(options.method, {})
        curve = Monotone(len(adapter.layers), scorer.first_layer)
        searching = partial(search_step, model, adapter, scorer, curve)
        with frozen(model):
            run_teacher(model, [prepared_batch])
            anew = replace(prepared_batch, features=None)
            calls = {
                "plain": partial(plain, model, anew),
                "kept": partial(kept, model, anew),
                "step": partial(searching, prepared_batch),
            }
            if "pixel_values" in prepared_batch.inputs:
                calls["tower"] = partial(searching, anew)
            calls["checkpoint"] = partial(searching, prepared_batch, checkpoint=True)
            times = side_by_side(calls, baseline="plain", **turns(options))
            memory = {name: peak_memory(call, options.device) for name, call in calls.items()}
            counts = {name: operators(call) for name, call in calls.items()}
        for name in calls:
            row = {
                **setting,
                "method": options.method,
                "call": name,
                **times[name],
                "peak_bytes": memory[name],
                "memory_ratio": memory[name] / memory["kept"],
                "operators": counts[name],
            }
            figures.append(row)
            print(
                f"{row['n_visual']:>6} visual, {row['layers']} layers, batch {row['batch']}, "
                f"{name:<10} {row['ratio']:.2f}x the time "
                f"({row['low']:.2f} to {row['high']:.2f}), {row['memory_ratio']:.2f}x the memory "
                f"of a pass that keeps its activations ({memory[name] / 2**20:.1f} MiB), "
                f"{counts[name]:,} operators"
            )
    return figures


def main(argv=None) -> int:
    """Run the command; returns the exit code."""
    parser = arguments("benchmarks.search_cost", __doc__, "search_cost.json")
    shapes.add_arguments(parser, "small", [576], extra=testbed.MODELS)
    methods = METHODS.names()
    parser.add_argument("--method", default="fastv", choices=methods, help="that ranks the tokens")
    parser.add_argument(
        "--pictures",
        action="store_true",
        help="give pictures to the vision tower, not ready-made features",
    )
    return run(parser, measure, argv)


if __name__ == "__main__":
    raise SystemExit(main())
