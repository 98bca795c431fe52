"""Train a testbed model from nothing: `python -m vispco.testbed.train --model testbed-qwen --output FOLDER`.

One optimiser step sees a batch of boards with many packed questions each, and a few easy-VQA images. Three things
make it short: a dense auxiliary objective at the visual tokens (annealed to nothing), questions that open in the
order in which they build on each other, and visual tokens that are often taken away in the last layers, so that
the model has finished reading the image by then.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import re
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..utils.files import brief, read_json, write_json, write_text
from . import easyvqa, scenes
from .curriculum import Curriculum
from .evaluate import report
from .model import MODELS, PATCH, SPECS, Spec, build_model, build_processor
from .pack import Packed, forward, losses, pack
from .questions import FAMILIES, NEIGHBOUR
from .vocab import CELLS, COLOURS, GRID


#: What each optimiser keeps for a parameter.
KEPT = {torch.optim.Muon: {"momentum_buffer"}, torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}


class CellHeads(nn.Module):
    """Throw-away linear heads on the visual tokens: the cell's place and kind (colour with shape), and colour,
    shape and digit of the cell itself and of the cells north and west of it."""

    KINDS = len(COLOURS) * (scenes.DIGIT + 1) + 1
    PARTS = (len(COLOURS) + 1, scenes.DIGIT + 2, 11)  # 0 stands for an empty cell

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.sizes = (CELLS, self.KINDS, *self.PARTS * (1 + len(NEIGHBOUR)))
        self.head = nn.Linear(hidden, sum(self.sizes))

    def forward(self, states: torch.Tensor, boards: scenes.Scenes) -> torch.Tensor:
        """states (B, 64, hidden) -> mean loss over the heads."""
        parts = [boards.colour + 1, boards.shape + 1, boards.digit + 1]
        kind = np.where(boards.colour >= 0, boards.colour * (scenes.DIGIT + 1) + boards.shape + 1, 0)
        truths = [np.broadcast_to(np.arange(CELLS), kind.shape), kind, *parts]
        truths += [np.where(beside >= 0, part[:, beside], 0) for beside in NEIGHBOUR for part in parts]
        logits = self.head(F.layer_norm(states, states.shape[-1:])).float().split(self.sizes, dim=-1)
        loss = [F.cross_entropy(logit.flatten(0, 1), torch.from_numpy(np.ascontiguousarray(truth)).flatten())
                for logit, truth in zip(logits, truths, strict=True)]  # fmt: skip
        return torch.stack(loss).mean()


def hint_loss(model: Any, states: torch.Tensor, batch: Packed) -> torch.Tensor:
    """States (B, T, hidden) of the questions' last tokens should resemble the embedding of what they refer to."""
    logits = F.layer_norm(states, states.shape[-1:]) @ model.get_input_embeddings().weight.T
    return F.cross_entropy(logits.float().flatten(0, 1), batch.hint.flatten(), ignore_index=-100)


def picture_size(rng: np.random.Generator, spec: Spec) -> tuple[int, int]:
    """Rows and columns of visual tokens in a step's pictures: the board's, or up to two more."""
    if rng.random() >= spec.margins:
        return GRID, GRID
    return GRID + int(rng.integers(3)), GRID + int(rng.integers(3))


def board_batch(rng: np.random.Generator, families: list[int], n: int, size: tuple[int, int]) -> tuple[scenes.Scenes, Packed]:
    """`n` boards with one packed question of every family in `families`, on pictures of `size` visual tokens."""
    boards = scenes.sample(rng, n, "train")
    names, slots = list(FAMILIES), []
    for index in families:
        asked = FAMILIES[names[index]].ask(boards, rng)
        slots.append((asked.tokens, np.full(n, asked.tokens.shape[1]), asked.answer, asked.valid, asked.hint))
    images = scenes.extend(rng, scenes.render(rng, boards), size[0] * PATCH, size[1] * PATCH)
    return boards, pack(images, slots, eos_slots=2)


def easy_batch(rng: np.random.Generator, data: tuple, n: int, slots: int) -> Packed:
    """`n` easy-VQA images, flipped and transposed at random, with `slots` of their questions each."""
    images, rows, tokens, length, answer = data
    chosen = rng.integers(0, len(images), size=n)
    asked = np.stack([rng.choice(rows[i], size=slots, replace=len(rows[i]) < slots) for i in chosen], axis=1)
    batch = images[chosen]
    if rng.random() < 0.5:
        batch = batch[:, ::-1]
    if rng.random() < 0.5:
        batch = batch[:, :, ::-1]
    if rng.random() < 0.5:
        batch = batch.swapaxes(1, 2)
    valid, no_hint = np.ones(n, dtype=bool), np.full(n, -100)
    return pack(np.ascontiguousarray(batch), [(tokens[q], length[q], answer[q], valid, no_hint) for q in asked], eos_slots=2)


def optimisers(model: nn.Module, heads: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices of the layers, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    rest = list(heads.parameters())
    for name, weight in model.named_parameters():
        (matrices if weight.ndim == 2 and (".layers." in name or ".blocks." in name) else rest).append(weight)
    muon = torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]


def rate(step: int, steps: int, decay: float) -> float:
    """Learning-rate factor: short warm-up, constant, then down to zero over the last part `decay` of the steps."""
    return min((step + 1) / 50, 1.0) * min(1.0, (steps - step) / (steps * decay))


def keep_memory() -> None:
    """Tell glibc to keep freed memory; half the time goes into page faults otherwise. A no-op elsewhere."""
    try:
        libc = ctypes.CDLL(None)
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, 2**30)
    except (OSError, AttributeError, TypeError):
        pass


def save_state(folder: Path, step: int, modules: dict, optims: list, ladder: Curriculum, log: list) -> None:
    """Everything `--resume` needs, as safetensors and as JSON, which names them: killed in between, the last pair is whole."""
    tensors = {f"{key}/{name}": value for key, module in modules.items() for name, value in module.state_dict().items()}
    for number, optim in enumerate(optims):
        for index, state in optim.state_dict()["state"].items():
            tensors |= {f"optimiser{number}/{index}/{key}": torch.as_tensor(value) for key, value in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    data = save({key: value.contiguous() for key, value in tensors.items()})
    check = f"{zlib.crc32(data):08x}"
    write_text(folder / f"{check}.safetensors", data)
    write_json(folder / "state.json", {"step": step, "tensors": check, "curriculum": ladder.state(), "log": log})
    for path in folder.glob("*.safetensors"):
        if path.stem != check:
            path.unlink()


def load_state(folder: Path, modules: dict, optims: list, ladder: Curriculum) -> tuple[int, list]:
    """The inverse of `save_state`: returns the next step and the log. Raises ValueError that names a damaged folder."""
    try:
        return _restored(folder, modules, optims, ladder)
    except Exception as error:  # of safetensors, of JSON, of tensors that do not fit
        raise ValueError(f"{folder}: expected the state of this training, but {brief(error)}; train without --resume") from error


def _restored(folder: Path, modules: dict, optims: list, ladder: Curriculum) -> tuple[int, list]:
    saved = read_json(folder / "state.json", _checked)
    data = (folder / f"{saved['tensors']}.safetensors").read_bytes()
    if f"{zlib.crc32(data):08x}" != saved["tensors"]:
        raise ValueError(f"{saved['tensors']}.safetensors is damaged")
    tensors = load(data)
    for key, module in modules.items():
        module.load_state_dict({n.split("/", 1)[1]: v for n, v in tensors.items() if n.startswith(f"{key}/")})
    for number, optim in enumerate(optims):
        full, sizes = optim.state_dict(), [p.shape for group in optim.param_groups for p in group["params"]]
        for name, value in tensors.items():
            if name.startswith(f"optimiser{number}/"):
                _, index, key = name.split("/")
                if key != "step" and value.shape != sizes[int(index)]:
                    raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(sizes[int(index)])}")
                full["state"].setdefault(int(index), {})[key] = value
        if lacking := [i for i, state in full["state"].items() if set(state) != KEPT[type(optim)]]:
            raise ValueError(f"optimiser{number}/{lacking[0]} has not {', '.join(sorted(KEPT[type(optim)]))}")
        optim.load_state_dict(full)
    ladder.restore(saved["curriculum"])
    return saved["step"], saved["log"]


def _checked(saved: dict) -> dict:
    """What `save_state` wrote as JSON, or ValueError."""
    if not isinstance(saved, dict) or type(saved.get("step")) is not int or saved["step"] < 0:
        raise ValueError("expected a step, a curriculum and a log")
    if not isinstance(saved.get("tensors"), str) or not re.fullmatch("[0-9a-f]{8}", saved["tensors"]):
        raise ValueError("expected the checksum of the tensors")
    if not isinstance(saved.get("log"), list) or not all(isinstance(e, dict) and "easy_vqa" in e.get("tasks", ()) for e in saved["log"]):
        raise ValueError("expected a log of entries with the accuracy of each task")
    return saved


def train(args: argparse.Namespace) -> PreTrainedModel:
    """Run the recipe and return the model."""
    torch.set_num_threads(args.threads)
    keep_memory()
    spec = SPECS[args.model]
    model = build_model(args.seed, args.model)
    model.set_attn_implementation("eager")  # on CPU its backward pass is faster than that of sdpa with a mask
    torch.manual_seed(args.seed)
    heads, ladder = CellHeads(spec.hidden), Curriculum()
    optims, modules = optimisers(model, heads, args.lr), {"model": model, "heads": heads}
    log: list[dict] = []
    state, begin, easy_hit = Path(args.output) / "state", 0, 0.0
    if args.resume and (state / "state.json").exists():
        begin, log = load_state(state, modules, optims, ladder)
        easy_hit = log[-1]["tasks"]["easy_vqa"] if log else 0.0
    easy_data = easyvqa.as_arrays("train")
    model.train()
    clock = time.perf_counter()
    for step in range(begin, args.steps):
        rng = np.random.default_rng([args.seed, step])
        families = ladder.draw(rng, args.questions)
        window = spec.opens[rng.choice(3, p=[0.35, 0.3, 0.35])], spec.closes[rng.choice(3, p=[0.5, 0.1, 0.4])]
        weight = max(0.0, min(1.0, 2 - 2 * step / args.aux_steps))  # constant, then down to zero
        size = picture_size(rng, spec) if spec.margins else (GRID, GRID)
        boards, batch = board_batch(rng, families, args.images, size)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits, states, half = forward(model, batch, window)
            loss, hit = losses(logits, batch)
            cells = states.unflatten(1, size)[:, :GRID, :GRID].flatten(1, 2)
            extra, hint = heads(cells, boards), hint_loss(model, half, batch)
        (loss + weight * (args.aux * extra + args.hint * hint)).backward()
        if step % 2 == 0:
            easy = easy_batch(rng, easy_data, args.easy_images, 8)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                easy_loss, right = losses(forward(model, easy, window)[0], easy)
            (2 * args.easy * easy_loss).backward()
            easy_hit = 0.94 * easy_hit + 0.06 * float(right[right >= 0].float().mean())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = args.lr * rate(step, args.steps, args.decay)
            optim.step()
            optim.zero_grad(set_to_none=True)
        correct = []
        for number in range(len(families)):
            mine = hit[:, batch.slot == number]
            first = mine[torch.arange(len(mine)), (mine >= 0).int().argmax(1)]  # the answer, not the end token
            correct.append(float((first == 1).sum() / max(1, int((first >= 0).sum()))))
        ladder.update(families, correct)
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            tasks = {"easy_vqa": easy_hit, **ladder.by_task()}
            entry = {"step": step + 1, "loss": loss.item(), "aux": extra.item(), "hint": hint.item(), "easy_loss": easy_loss.item(),
                     "tasks": {k: round(v, 4) for k, v in tasks.items()},
                     "families": {n: round(float(v), 3) for n, v, o in
                                  zip(ladder.names, ladder.accuracy, ladder.open, strict=True) if o}}  # fmt: skip
            if not math.isfinite(entry["loss"]):
                raise RuntimeError(f"loss is {entry['loss']} at step {step + 1}: lower --lr and start again")
            log.append(entry)
            pace = (time.perf_counter() - clock) / (step + 1 - begin)
            line = " ".join(f"{name} {value:.2f}" for name, value in tasks.items())
            print(f"step {step + 1}/{args.steps} {pace:.2f}s/step loss {entry['loss']:.3f} "
                  f"aux {entry['aux']:.3f} hint {entry['hint']:.3f} {line}", flush=True)  # fmt: skip
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_state(state, step + 1, modules, optims, ladder, log)
    model.set_attn_implementation("sdpa")
    return model.eval()


def parser() -> argparse.ArgumentParser:
    """Command-line options; the defaults reproduce the shipped checkpoint."""
    out = argparse.ArgumentParser(prog="python -m vispco.testbed.train", description=__doc__.split("\n")[0])
    out.add_argument("--output", required=True, help="folder for the checkpoint, the log and the resumable state")
    out.add_argument("--resume", action="store_true", help="go on from OUTPUT/state if there is one")
    out.add_argument("--model", choices=MODELS, default="testbed-llava")
    out.add_argument("--steps", type=int, help="default, as for the next two: the shipped model's")
    out.add_argument("--aux-steps", type=int, help="steps until the auxiliary weights are zero")
    out.add_argument("--decay", type=float, help="last part of the steps, in which the learning rate goes to zero")
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--lr", type=float, default=1.5e-3)
    out.add_argument("--images", type=int, default=32, help="boards a step")
    out.add_argument("--questions", type=int, default=16, help="packed questions a board")
    out.add_argument("--easy-images", type=int, default=8, help="easy-VQA images a step")
    out.add_argument("--easy", type=float, default=0.4, help="weight of the easy-VQA loss")
    out.add_argument("--aux", type=float, default=2.0, help="initial weight of the objective at the visual tokens")
    out.add_argument("--hint", type=float, default=0.3, help="initial weight of the half-way objective")
    out.add_argument("--threads", type=int, default=2)
    out.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    out.add_argument("--every", type=int, default=50, help="steps between log lines")
    out.add_argument("--save-every", type=int, default=100, help="steps between resumable states")
    return out


def main() -> None:
    """Train, save the checkpoint, then print the evaluation."""
    args = parser().parse_args()
    for name in ("steps", "aux_steps", "decay"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(SPECS[args.model], name))
    start = time.perf_counter()
    model = train(args)
    output = Path(args.output)
    weights = None
    if SPECS[args.model].half:
        weights = {key: weight.half() for key, weight in model.state_dict().items()}
        model.load_state_dict(weights)  # so that what is measured is what is saved
    model.save_pretrained(output, state_dict=weights)
    build_processor(args.model).save_pretrained(output)
    saved = json.loads((output / "state" / "state.json").read_text())
    minutes = round((time.perf_counter() - start) / 60, 1)
    print(f"trained in {minutes} minutes; saved to {output}", flush=True)
    log = {"arguments": vars(args), "minutes": minutes, "curves": saved["log"], "test": report(model)}
    write_text(output / "training_log.json", json.dumps(log))


if __name__ == "__main__":
    main()
