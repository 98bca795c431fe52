"""Keep the language model's English: it goes on predicting what it predicted before.

The texts are its own. For each, the loss is KL(before || now), which knows no wrong words to learn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vispco.utils.files import read_json, write_json

from .decoder import read, unchanged

#: Paragraphs whose loss is written down before and after training.
PARAGRAPHS = (
    "The kitchen was quiet in the morning. Maria put the kettle on the stove, opened the window, "
    "and listened to the birds in the garden. Her brother would arrive at noon, and there was "
    "still bread to bake and a table to set for six people.",
    "Water expands when it freezes, which is why ice floats. In winter a lake freezes from the "
    "top, and the ice keeps the water below it from losing its heat. Fish live through the cold "
    "months in that deeper water.",
    "To sort a list, compare each element with the next one and swap the two if they are in the "
    "wrong order. Repeat this until no swap is made. The method is simple, but for long lists it "
    "takes far more steps than necessary.",
    "The company said on Tuesday that its profit rose in the third quarter, because more customers "
    "bought its cheaper products. The shares gained four percent. Analysts had expected a smaller "
    "increase after a weak spring.",
)


@torch.no_grad()
def paragraph_loss(decoder: Any, tokenizer: Any) -> float:
    """Mean cross-entropy, in nats a token, of the fixed paragraphs."""
    losses = []
    for text in PARAGRAPHS:
        tokens = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        logits = _logits(decoder, read(decoder, tokens)[:, :-1])
        losses.append(F.cross_entropy(logits[0], tokens[0, 1:], reduction="none"))
    return float(torch.cat(losses).mean())


def own_texts(model: Any, path: Path, seed: int, n: int = 256, length: int = 64) -> Tensor:
    """`n` texts (n, length) that the untrained model writes by itself; kept in the file `path`.

    Half of them begin as documents do, half as what a user asks in a chat.
    """
    if not path.exists():
        write_json(path, _written(model, seed, n, length).tolist())
    return torch.tensor(read_json(path, lambda rows: rows))


@torch.inference_mode()
def _written(model: Any, seed: int, n: int, length: int) -> Tensor:
    document, turn = [0], [1, 4093, 198]  # "<|endoftext|>", "<|im_start|>user\n"
    parts = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for begin in (document, turn):
            for start in range(0, n // 2, 64):
                rows = min(64, n // 2 - start)
                prompt = torch.tensor([begin]).expand(rows, -1)
                size = length + 4 - len(begin)
                written = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=True,
                    top_k=0,
                    max_new_tokens=size,
                    min_new_tokens=size,
                )
                parts.append(written[:, :length])
    return torch.cat(parts)


def english_loss(decoder: Any, changes: nn.ModuleDict, tokens: Tensor) -> Tensor:
    """Mean of KL(pretrained || now) over the tokens (B, N) of texts, in nats."""
    with torch.no_grad(), unchanged(changes):
        before = _logits(decoder, read(decoder, tokens)).log_softmax(-1)
    now = _logits(decoder, read(decoder, tokens)).log_softmax(-1)
    return F.kl_div(now.flatten(0, 1), before.flatten(0, 1), log_target=True, reduction="batchmean")


def _logits(decoder: Any, states: Tensor) -> Tensor:
    """Scores of every word: the embedding is the head, too."""
    return (states @ decoder.embed_tokens.weight.T).float()
