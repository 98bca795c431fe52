"""Train a testbed model from nothing.

    python -m tests.reproduction.training.train --model testbed-qwen --output FOLDER

One optimiser step sees a batch of boards with many packed questions each, and a few easy-VQA
images. Three things make it short: a dense auxiliary objective at the visual tokens, annealed to
nothing; questions that open in the order in which they build on each other; and visual tokens that
are often taken away in the last layers, so that the model has finished reading the image by then.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from vispco.testbed.model import EMBEDDED
from vispco.testbed.vocab import GRID
from vispco.utils.files import write_text

from .batches import board_batch, easy_arrays, easy_batch, picture_size
from .build import build_model, build_processor
from .curriculum import Curriculum
from .evaluate import report
from .objectives import CellHeads, hint_loss
from .pack import Packed, forward, losses
from .recipe import RECIPES
from .state import load_state, save_state


def optimisers(model: nn.Module, heads: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices of the layers, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    rest = list(heads.parameters())
    for name, weight in model.named_parameters():
        in_layer = ".layers." in name or ".blocks." in name
        (matrices if weight.ndim == 2 and in_layer else rest).append(weight)
    muon = torch.optim.Muon(
        matrices, lr=lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]


def rate(step: int, steps: int, decay: float) -> float:
    """Learning-rate factor: a short warm-up, constant, then to zero over the last part `decay`."""
    return min((step + 1) / 50, 1.0) * min(1.0, (steps - step) / (steps * decay))


def keep_memory() -> None:
    """Tell glibc to keep freed memory; half the time goes into page faults otherwise.

    Elsewhere it does nothing.
    """
    mmap_threshold, trim_threshold = -3, -1
    try:
        libc = ctypes.CDLL(None)
        for option in (mmap_threshold, trim_threshold):
            libc.mallopt(option, 2**30)
    except (OSError, AttributeError, TypeError):
        pass


class Training:
    """A model on its way: what is trained, and how well it answers."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.recipe = RECIPES[args.model]
        self.model = build_model(args.seed, args.model)
        # On CPU its backward pass is faster than that of sdpa with a mask.
        self.model.set_attn_implementation("eager")
        torch.manual_seed(args.seed)
        self.heads = CellHeads(self.recipe.hidden)
        self.ladder = Curriculum()
        self.optims = optimisers(self.model, self.heads, args.lr)
        self.modules = {"model": self.model, "heads": self.heads}
        self.log: list[dict] = []
        self.folder = Path(args.output) / "state"
        self.easy_data = easy_arrays("train")
        self.easy_hit = 0.0
        self.easy_loss = torch.zeros(())

    def resume(self) -> int:
        """Go on from what `save` wrote, if there is anything; returns the next step."""
        if not (self.folder / "state.json").exists():
            return 0
        step, self.log = load_state(self.folder, self.modules, self.optims, self.ladder)
        if self.log:
            self.easy_hit = self.log[-1]["tasks"]["easy_vqa"]
        return step

    def save(self, step: int) -> None:
        """Write down all that `resume` needs."""
        save_state(self.folder, step, self.modules, self.optims, self.ladder, self.log)

    def step(self, step: int) -> dict[str, torch.Tensor]:
        """One optimiser step; returns its losses."""
        args, recipe = self.args, self.recipe
        rng = np.random.default_rng([args.seed, step])
        families = self.ladder.draw(rng, args.questions)
        opens = recipe.opens[rng.choice(3, p=[0.35, 0.3, 0.35])]
        closes = recipe.closes[rng.choice(3, p=[0.5, 0.1, 0.4])]
        size = picture_size(rng, recipe) if recipe.margins else (GRID, GRID)
        boards, batch = board_batch(rng, families, args.images, size)
        # The auxiliary weight is constant, then falls to zero.
        weight = max(0.0, min(1.0, 2 - 2 * step / args.aux_steps))
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits, states, half = forward(self.model, batch, (opens, closes))
            loss, hit = losses(logits, batch)
            cells = states.unflatten(1, size)[:, :GRID, :GRID].flatten(1, 2)
            aux, hint = self.heads(cells, boards), hint_loss(self.model, half, batch)
        (loss + weight * (args.aux * aux + args.hint * hint)).backward()
        if step % 2 == 0:
            self._easy(rng, (opens, closes))
        self._update(step)
        self.ladder.update(families, correct(hit, batch, len(families)))
        return {"loss": loss, "aux": aux, "hint": hint, "easy_loss": self.easy_loss}

    def _easy(self, rng: np.random.Generator, window: tuple[int, int]) -> None:
        """Gradients of a batch of easy-VQA images."""
        args = self.args
        easy = easy_batch(rng, self.easy_data, args.easy_images, 8)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss, right = losses(forward(self.model, easy, window)[0], easy)
        (2 * args.easy * loss).backward()
        self.easy_loss = loss.detach()
        accuracy = float(right[right >= 0].float().mean())
        self.easy_hit = 0.94 * self.easy_hit + 0.06 * accuracy

    def _update(self, step: int) -> None:
        """Move the parameters."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        lr = self.args.lr * rate(step, self.args.steps, self.args.decay)
        for optim in self.optims:
            for group in optim.param_groups:
                group["lr"] = lr
            optim.step()
            optim.zero_grad(set_to_none=True)

    def note(self, step: int, found: dict[str, torch.Tensor], pace: float) -> None:
        """Log and print one step. pace: seconds a step.

        Raises RuntimeError if the loss is not finite.
        """
        values = {name: value.item() for name, value in found.items()}
        if not math.isfinite(values["loss"]):
            message = f"loss is {values['loss']} at step {step}: lower --lr and start again"
            raise RuntimeError(message)
        tasks = {"easy_vqa": self.easy_hit, **self.ladder.by_task()}
        ladder = self.ladder
        families = zip(ladder.names, ladder.accuracy, ladder.open, strict=True)
        self.log.append(
            {
                "step": step,
                **values,
                "tasks": {name: round(value, 4) for name, value in tasks.items()},
                "families": {name: round(float(v), 3) for name, v, is_open in families if is_open},
            }
        )
        line = f"step {step}/{self.args.steps} {pace:.2f}s/step"
        line += "".join(f" {name} {values[name]:.3f}" for name in ("loss", "aux", "hint"))
        line += "".join(f" {name} {value:.2f}" for name, value in tasks.items())
        print(line, flush=True)


def correct(hit: torch.Tensor, batch: Packed, slots: int) -> list[float]:
    """Share of right answers in each slot; the end token does not count."""
    correct = []
    for number in range(slots):
        mine = hit[:, batch.slot == number]
        first = mine[torch.arange(len(mine)), (mine >= 0).int().argmax(1)]
        correct.append(float((first == 1).sum() / max(1, int((first >= 0).sum()))))
    return correct


def train(args: argparse.Namespace, recipe: Callable[..., Any] | None = None) -> PreTrainedModel:
    """Run a recipe, None: `Training`, and return the model."""
    torch.set_num_threads(args.threads)
    keep_memory()
    run = (recipe or Training)(args)
    begin = run.resume() if args.resume else 0
    run.model.train()
    clock = time.perf_counter()
    for step in range(begin, args.steps):
        found = run.step(step)
        done, last = step + 1, step + 1 == args.steps
        if done % args.every == 0 or last:
            run.note(done, found, (time.perf_counter() - clock) / (done - begin))
        if done % args.save_every == 0 or last:
            run.save(done)
    run.model.set_attn_implementation("sdpa")
    return run.model.eval()


def parser() -> argparse.ArgumentParser:
    """Command-line options; the defaults reproduce the shipped checkpoint."""
    out = argparse.ArgumentParser(
        prog="python -m tests.reproduction.training.train", description=__doc__.split("\n")[0]
    )
    add = out.add_argument
    own = "default: the shipped model's"
    add("--output", required=True, help="folder for the checkpoint, the log and the state")
    add("--resume", action="store_true", help="go on from OUTPUT/state if there is one")
    add("--model", choices=EMBEDDED, default="testbed-llava")
    add("--steps", type=int, help=own)
    add("--aux-steps", type=int, help=f"steps until the auxiliary weights are zero ({own})")
    add("--decay", type=float, help=f"last part of the steps, with a falling rate ({own})")
    add("--seed", type=int, default=0)
    add("--lr", type=float, default=1.5e-3)
    add("--images", type=int, default=32, help="boards a step")
    add("--questions", type=int, default=16, help="packed questions a board")
    add("--easy-images", type=int, default=8, help="easy-VQA images a step")
    add("--easy", type=float, default=0.4, help="weight of the easy-VQA loss")
    add("--aux", type=float, default=2.0, help="first weight of the visual tokens' objective")
    add("--hint", type=float, default=0.3, help="first weight of the half-way objective")
    add("--threads", type=int, default=2)
    bfloat16 = argparse.BooleanOptionalAction
    add("--bf16", action=bfloat16, default=True, help="bfloat16 autocast")
    add("--every", type=int, default=50, help="steps between log lines")
    add("--save-every", type=int, default=100, help="steps between resumable states")
    return out


def main() -> None:
    """Train, save the checkpoint, then print the evaluation."""
    args = parser().parse_args()
    recipe = RECIPES[args.model]
    for name in ("steps", "aux_steps", "decay"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(recipe, name))
    start = time.perf_counter()
    model = train(args)
    output = Path(args.output)
    weights = None
    if recipe.half:
        weights = {key: weight.half() for key, weight in model.state_dict().items()}
        # What is measured is what is saved.
        model.load_state_dict(weights)
    model.save_pretrained(output, state_dict=weights)
    build_processor(args.model).save_pretrained(output)
    saved = json.loads((output / "state" / "state.json").read_text())
    minutes = round((time.perf_counter() - start) / 60, 1)
    print(f"trained in {minutes} minutes; saved to {output}", flush=True)
    log = {"arguments": vars(args), "minutes": minutes, "curves": saved["log"]}
    write_text(output / "training_log.json", json.dumps({**log, "test": report(model)}))


if __name__ == "__main__":
    main()
