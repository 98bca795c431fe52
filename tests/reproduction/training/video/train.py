"""Train testbed-qwen further on clips, mixed with its own pictures.

    python -m tests.reproduction.training.video.train --output FOLDER --resume

One step sees a batch of clips with many packed questions each; every few steps it sees boards and
easy-VQA images too. A dense objective at the visual tokens, annealed to nothing, makes it short:
what is in a cell, as which it came, where it went, what colour it came with.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vispco.testbed import load
from vispco.testbed.model import VIDEO, build_config
from vispco.testbed.questions import FAMILIES as PICTURE_FAMILIES
from vispco.testbed.vocab import GRID
from vispco.utils.files import write_text

from ..batches import board_batch, easy_arrays, easy_batch
from ..build import build_processor
from ..pack import forward, losses
from ..recipe import RECIPES
from ..state import load_state, save_state
from ..train import correct, optimisers, rate, train
from .batches import NAMES, SIZES, clip_batch, truths


def start_model(seed: int):
    """testbed-qwen with rows for the words about clips."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    weights = load("testbed-qwen")[0].state_dict()
    config = build_config(VIDEO)
    generator = torch.Generator().manual_seed(seed)
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        old = weights[name]
        new = torch.randn(
            config.text_config.vocab_size - len(old), old.shape[1], generator=generator
        )
        weights[name] = torch.cat([old, new * old.std()])
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.load_state_dict(weights)
    return model


class ClipHeads(nn.Module):
    """One linear head on the visual tokens for each of `truths`, thrown away after training."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.head = nn.Linear(hidden, sum(SIZES))

    def forward(self, states: torch.Tensor, known: list[np.ndarray]) -> torch.Tensor:
        """Sum of the heads' losses, of states (B, V, hidden); empty cells hardly weigh."""
        logits = self.head(F.layer_norm(states, states.shape[-1:])).float()
        loss = torch.zeros(())
        for part, truth in zip(
            logits.split(SIZES, dim=-1), map(torch.from_numpy, known), strict=True
        ):
            weight = torch.ones(part.shape[-1])
            weight[0] = 0.02
            loss = loss + F.cross_entropy(part.flatten(0, 1), truth.flatten(), weight)
        return loss / len(SIZES)


class Running:
    """Running accuracy of each family of questions."""

    def __init__(self, memory: float = 0.95):
        self.memory, self.accuracy = memory, dict.fromkeys(NAMES, 0.25)

    def update(self, families: list[str], correct: list[float]) -> None:
        """Take in the accuracy of each asked family."""
        for name, value in zip(families, correct, strict=True):
            self.accuracy[name] += (1 - self.memory) * (value - self.accuracy[name])

    def draw(self, rng: np.random.Generator, n: int) -> list[str]:
        """`n` families, the badly answered ones more often."""
        weight = np.array([1.2 - value for value in self.accuracy.values()])
        return [NAMES[i] for i in rng.choice(len(NAMES), size=n, p=weight / weight.sum())]

    def state(self) -> dict:
        """What `restore` needs."""
        return dict(self.accuracy)

    def restore(self, state: dict) -> None:
        """Go on from a `state`."""
        self.accuracy = {name: float(state[name]) for name in NAMES}


class Training:
    """The model on its way, and how well it answers."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.recipe = args, RECIPES["testbed-qwen"]
        torch.manual_seed(args.seed)
        self.model = start_model(args.seed)
        self.model.set_attn_implementation(args.attention)
        # A moment of a clip is a picture: the tower knows it.
        self.model.model.visual.requires_grad_(False)
        self.heads = ClipHeads(self.recipe.hidden)
        self.optims = optimisers(self.model, self.heads, args.lr)
        self.modules = {"model": self.model, "heads": self.heads}
        self.running, self.log = Running(), []
        self.folder = Path(args.output) / "state"
        self.easy = easy_arrays("train")
        self.pictures = {"easy_vqa": 0.9, "boards": 0.9}

    def resume(self) -> int:
        """Go on from what `save` wrote, if there is anything; returns the next step."""
        if not (self.folder / "state.json").exists():
            return 0
        step, self.log = load_state(self.folder, self.modules, self.optims, self.running)
        self.pictures = {name: self.log[-1]["tasks"][name] for name in self.pictures}
        return step

    def save(self, step: int) -> None:
        """Write down all that `resume` needs."""
        save_state(self.folder, step, self.modules, self.optims, self.running, self.log)

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns its losses."""
        args = self.args
        rng = np.random.default_rng([args.seed, 7, step])
        families = self.running.draw(rng, args.questions)
        window = self._window(rng)
        drawn, batch = clip_batch(rng, families, args.clips)
        weight = args.aux * max(0.0, min(1.0, 2 - 2 * step / args.aux_steps))
        with self._precision():
            logits, states, _ = forward(self.model, batch, window, args.aux_layer)
            loss, hit = losses(logits, batch)
            aux = self.heads(states, truths(drawn))
        (loss + weight * aux).backward()
        self.running.update(families, correct(hit, batch, int(batch.slot.max()) + 1))
        if step % args.pictures_every == 0:
            self._pictures(rng, window)
        self._update(step)
        return {"loss": loss.item(), "aux": aux.item()}

    def _precision(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16)

    def _window(self, rng: np.random.Generator) -> tuple[int, int]:
        opens = self.recipe.opens[rng.choice(3, p=[0.7, 0.2, 0.1])]
        closes = self.recipe.closes[rng.choice(3, p=[0.5, 0.1, 0.4])]
        return opens, closes

    def _pictures(self, rng: np.random.Generator, window: tuple[int, int]) -> None:
        """Gradients of a batch of boards, and of easy-VQA images."""
        families = list(rng.choice(len(PICTURE_FAMILIES), size=8, replace=False))
        batches = {
            "boards": board_batch(rng, families, self.args.boards, (GRID, GRID))[1],
            "easy_vqa": easy_batch(rng, self.easy, self.args.boards, 4),
        }
        for name, batch in batches.items():
            with self._precision():
                loss, hit = losses(forward(self.model, batch, window)[0], batch)
            (0.5 * loss).backward()
            found = float(hit[hit >= 0].float().mean())
            self.pictures[name] += 0.1 * (found - self.pictures[name])

    def _update(self, step: int) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        lr = self.args.lr * rate(step, self.args.steps, self.args.decay)
        for optim in self.optims:
            for group in optim.param_groups:
                group["lr"] = lr
            optim.step()
            optim.zero_grad(set_to_none=True)

    def note(self, step: int, found: dict[str, float], pace: float) -> None:
        """Log and print one step. pace: seconds a step. Raises RuntimeError for no finite loss."""
        if not math.isfinite(found["loss"]):
            raise RuntimeError(
                f"loss is {found['loss']} at step {step}: lower --lr and start again"
            )
        tasks = {**self.pictures, **self.running.accuracy}
        tasks = {name: round(value, 4) for name, value in tasks.items()}
        self.log.append({"step": step, **found, "tasks": tasks})
        line = f"step {step}/{self.args.steps} {pace:.2f}s/step"
        line += "".join(f" {name} {value:.3f}" for name, value in {**found, **tasks}.items())
        print(line, flush=True)


def parser() -> argparse.ArgumentParser:
    """Command-line options; the defaults reproduce the shipped checkpoint."""
    out = argparse.ArgumentParser(
        prog="python -m tests.reproduction.training.video.train",
        description=__doc__.split("\n")[0],
    )
    add = out.add_argument
    add("--output", required=True, help="folder for the checkpoint, the log and the state")
    add("--resume", action="store_true", help="go on from OUTPUT/state if there is one")
    add("--steps", type=int, default=750)
    add("--aux-steps", type=int, default=800, help="steps until the auxiliary weight is zero")
    add("--aux-layer", type=int, default=6, help="layers below the auxiliary heads")
    add("--decay", type=float, default=0.25, help="last part of the steps, with a falling rate")
    add("--seed", type=int, default=0)
    add("--lr", type=float, default=1.5e-3)
    add("--clips", type=int, default=16, help="clips a step")
    add("--questions", type=int, default=16, help="packed questions a clip")
    add("--pictures-every", type=int, default=4, help="steps between batches of pictures")
    add("--boards", type=int, default=8, help="boards, and easy-VQA images, in such a batch")
    add("--aux", type=float, default=3.0, help="first weight of the visual tokens' objective")
    add("--attention", choices=("eager", "sdpa"), default="eager")
    add("--threads", type=int, default=1)
    bfloat16 = argparse.BooleanOptionalAction
    add("--bf16", action=bfloat16, default=True, help="bfloat16 autocast")
    add("--every", type=int, default=20, help="steps between log lines")
    add("--save-every", type=int, default=50, help="steps between resumable states")
    return out


def main() -> None:
    """Train, then save the checkpoint in float16."""
    args = parser().parse_args()
    start = time.perf_counter()
    model = train(args, Training)
    weights = {key: weight.half() for key, weight in model.state_dict().items()}
    output = Path(args.output)
    model.save_pretrained(output, state_dict=weights)
    build_processor(VIDEO).save_pretrained(output)
    saved = json.loads((output / "state" / "state.json").read_text())
    minutes = round((time.perf_counter() - start) / 60, 1)
    print(f"trained in {minutes} minutes; saved to {output}", flush=True)
    log = {"arguments": vars(args), "minutes": minutes, "curves": saved["log"]}
    write_text(output / "training_log.json", json.dumps(log))


if __name__ == "__main__":
    main()
