"""Train testbed-smollm: first its vision tower, then low-rank changes to the language model.

    python -m tests.reproduction.training.pretrained.train --output FOLDER --resume

It can be stopped at any time; with --resume the same command goes on.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vispco.testbed import language, smollm
from vispco.testbed.questions import FAMILIES
from vispco.testbed.vocab import COLOURS, NUMERALS, SHAPES
from vispco.utils.files import write_json

from ..curriculum import Curriculum
from ..objectives import CellHeads
from ..state import load_state, save_state
from ..train import keep_memory, rate
from .batches import EASY, Batch, Drawing, draw_windows, hits
from .decoder import forward, prepare, unchanged
from .english import english_loss, own_texts, paragraph_loss
from .export import export
from .tower import Eyes, train_tower
from .tree import NONE
from .words import Meanings, answer

#: The auxiliary heads read the visual tokens after so many layers, the hint the text.
AUX_LAYER, HINT_LAYER = 8, 10
#: What must be learned before other families. A pretrained model may begin with all others at once.
AFTER = {
    "count_at": ("count",),
    "exist_at": ("exist",),
    "relation_colour": ("find_shape",),
    "relation_shape": ("find_shape",),
    "compare": ("find_shape",),
}


class Training:
    """The model on its way: what is trained, and how well it answers."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, Path(args.output)
        model, tokenizer = language.load(torch.bfloat16)
        model.to(torch.get_default_device())
        self.decoder, self.tokenizer = model.model, tokenizer
        self.layers = len(self.decoder.layers)
        self.texts = own_texts(model, self.folder / "english.json", args.seed)
        self.eyes = self._eyes(model)
        torch.manual_seed(args.seed)
        self.changes = prepare(model, args.rank)
        self.heads = CellHeads(model.config.hidden_size)
        self.modules = {"lora": self.changes, "heads": self.heads}
        self.parameters = [p for module in self.modules.values() for p in module.parameters()]
        self.optim = torch.optim.AdamW(
            self.parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0
        )
        self.ladder = Curriculum(opens_at=0.3, width=len(FAMILIES), after=AFTER)
        self.easy_hit = 0.0
        self.english = torch.zeros(())
        self.answers = 0
        self.log: list[dict] = []
        self.drawing = Drawing(
            args.boards, args.easy, families=args.families, questions=args.questions
        )
        hints = [answer(w)[0] for w in (*COLOURS, *SHAPES, *NUMERALS)]
        self.hints = torch.tensor(hints).unique()

    def _eyes(self, model: Any) -> Eyes:
        """The vision tower; trained first if it is not yet in the folder."""
        torch.manual_seed(self.args.seed)
        eyes, path = Eyes(smollm.build_config(model.config)), self.folder / "tower.safetensors"
        if not path.exists():
            meanings = Meanings(model.get_input_embeddings().weight.detach())
            train_tower(eyes, meanings, self.args.seed, self.args.tower_steps)
            save_file({name: weight.cpu() for name, weight in eyes.state_dict().items()}, path)
        eyes.load_state_dict(load_file(path))
        return eyes.eval().requires_grad_(False)

    def resume(self) -> int:
        """Go on from what `save` wrote, if there is anything; returns the next step."""
        state = self.folder / "state"
        if not (state / "state.json").exists():
            return 0
        step, self.log = load_state(state, self.modules, [self.optim], self.ladder)
        if self.log:
            self.easy_hit, self.answers = self.log[-1]["tasks"]["easy_vqa"], self.log[-1]["answers"]
        return step

    def save(self, step: int) -> None:
        """Write down all that `resume` needs."""
        save_state(self.folder / "state", step, self.modules, [self.optim], self.ladder, self.log)

    def step(self, step: int) -> dict[str, Tensor]:
        """One optimiser step; returns its losses."""
        args = self.args
        rng = np.random.default_rng([args.seed, 2, step])
        batch = self.drawing.step(rng, self.ladder)
        windows = draw_windows(rng, len(batch.images), self.layers, args.early)
        with torch.no_grad():
            visual = self.eyes(batch.images)
        states, cells, half = forward(
            self.decoder, visual, batch.trees, windows, (AUX_LAYER, HINT_LAYER)
        )
        trees = batch.trees
        asked = trees.target != NONE
        logits = (states[asked] @ self.decoder.embed_tokens.weight.T).float()
        loss = F.cross_entropy(logits, trees.target[asked])
        aux = self.heads(cells[: len(batch.boards)].float(), batch.boards)
        hint = self._hint(half, batch, windows.closes == self.layers)
        # The auxiliary weight is constant, then falls to zero.
        weight = max(0.0, min(1.0, 2 - 2 * step / args.aux_steps))
        (loss + weight * (args.aux * aux + args.hint * hint)).backward()
        if step % args.english_every == 0:
            rows = torch.as_tensor(rng.integers(0, len(self.texts), size=4))
            self.english = english_loss(self.decoder, self.changes, self.texts[rows])
            (args.english * self.english).backward()
        self._update(step)
        self._count(logits.detach(), batch, windows.closes == self.layers)
        return {"loss": loss, "aux": aux, "hint": hint, "english": self.english}

    def _hint(self, half: Tensor, batch: Batch, sees: Tensor) -> Tensor:
        """Half-way, a question's last token should resemble the word that it refers to."""
        wanted = torch.where(sees[:, None], batch.trees.hint, NONE)
        told = wanted != NONE
        table = self.decoder.embed_tokens.weight[self.hints].float()
        logits = F.layer_norm(half[told].float(), half.shape[-1:]) @ table.T
        return F.cross_entropy(logits, torch.searchsorted(self.hints, wanted[told]))

    def _update(self, step: int) -> None:
        """Move the parameters."""
        nn.utils.clip_grad_norm_(self.changes.parameters(), 1.0)
        for group in self.optim.param_groups:
            group["lr"] = self.args.lr * rate(step, self.args.steps, self.args.decay)
        self.optim.step()
        self.optim.zero_grad(set_to_none=True)

    def _count(self, logits: Tensor, batch: Batch, sees: Tensor) -> None:
        """Take in how well each family was answered by rows that saw their picture."""
        rows = (batch.trees.target != NONE).nonzero()[:, 0]
        found = hits(logits, batch.trees, sees[rows])
        self.answers += int((batch.trees.family >= 0).sum())
        if EASY in found:
            self.easy_hit = 0.97 * self.easy_hit + 0.03 * found.pop(EASY)
        self.ladder.update(list(found), list(found.values()))

    def note(self, step: int, found: dict[str, Tensor], pace: float) -> None:
        """Log and print one step. pace: seconds a step.

        Raises RuntimeError if the loss is not finite.
        """
        values = {name: round(value.item(), 4) for name, value in found.items()}
        if not math.isfinite(values["loss"]):
            message = f"loss is {values['loss']} at step {step}: lower --lr and start again"
            raise RuntimeError(message)
        tasks = {"easy_vqa": self.easy_hit, **self.ladder.by_task()}
        ladder = self.ladder
        families = zip(ladder.names, ladder.accuracy, ladder.open, strict=True)
        self.log.append(
            {
                "step": step,
                "answers": self.answers,
                **values,
                "tasks": {name: round(float(value), 4) for name, value in tasks.items()},
                "families": {name: round(float(v), 3) for name, v, is_open in families if is_open},
            }
        )
        line = f"step {step}/{self.args.steps} {pace:.2f}s/step {self.answers} answers"
        line += "".join(f" {name} {value:.3f}" for name, value in values.items())
        line += f" easy_vqa {self.easy_hit:.2f}"
        line += "".join(f" {k} {v:.2f}" for k, v in self.log[-1]["families"].items())
        print(line, flush=True)


def train(args: argparse.Namespace) -> Training:
    """Run the recipe, on PyTorch's default device."""
    torch.set_num_threads(args.threads)
    keep_memory()
    Path(args.output).mkdir(parents=True, exist_ok=True)
    run = Training(args)
    begin = run.resume() if args.resume else 0
    clock = time.perf_counter()
    for step in range(begin, args.steps):
        found = run.step(step)
        done, last = step + 1, step + 1 == args.steps
        if done % args.every == 0 or last:
            run.note(done, found, (time.perf_counter() - clock) / (done - begin))
        if done % args.save_every == 0 or last:
            run.save(done)
    return run


def parser() -> argparse.ArgumentParser:
    """Command-line options; the defaults are the shipped model's."""
    out = argparse.ArgumentParser(
        prog="python -m tests.reproduction.training.pretrained.train",
        description=__doc__.split("\n")[0],
    )
    add = out.add_argument
    add("--output", required=True, help="folder for the weights, the log and the state")
    add("--resume", action="store_true", help="go on from OUTPUT if there is something in it")
    add("--seed", type=int, default=0)
    add("--tower-steps", type=int, default=1000)
    add("--steps", type=int, default=1800)
    add("--aux-steps", type=int, default=1440, help="steps until the auxiliary weights are zero")
    add("--decay", type=float, default=0.4, help="last part of the steps, with a falling rate")
    add("--lr", type=float, default=1.5e-3)
    add("--rank", type=int, default=16, help="of the changes to each matrix")
    add("--boards", type=int, default=7, help="boards a step")
    add("--easy", type=int, default=1, help="easy-VQA pictures a step")
    add("--families", type=int, default=5, help="families that are asked about a board")
    add("--questions", type=int, default=8, help="questions of each")
    add("--early", type=float, default=0.08, help="share of pictures that are lost early")
    add("--aux", type=float, default=1.0, help="first weight of the visual tokens' objective")
    add("--hint", type=float, default=0.2, help="first weight of the half-way objective")
    add("--english", type=float, default=2.0, help="weight of the loss on English")
    add("--english-every", type=int, default=8, help="steps between two losses on English")
    add("--device", default="cpu", help="where to train, such as cuda")
    add("--threads", type=int, default=2)
    add("--every", type=int, default=20, help="steps between log lines")
    add("--save-every", type=int, default=100, help="steps between resumable states")
    return out


def main() -> None:
    """Train, write what the testbed loads, and how it went."""
    args = parser().parse_args()
    output = Path(args.output)
    # What is made in here is made there.
    with torch.device(args.device):
        run = train(args)
        export(run.changes, run.eyes, output / "model.safetensors")
        with unchanged(run.changes):
            before = paragraph_loss(run.decoder, run.tokenizer)
        english = {"before": before, "after": paragraph_loss(run.decoder, run.tokenizer)}
    print(f"loss on English, before and after: {english}; saved to {output}", flush=True)
    log = {"arguments": vars(args), "english": english, "curves": run.log}
    write_json(output / "training_log.json", log)


if __name__ == "__main__":
    main()
