"""Many questions about one image in one sequence, so that the image is encoded once for all of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from .model import MEAN, STD
from .vocab import CELLS, EOS, ID


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) float32, normalised as the processor does it."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255.0 - MEAN) / STD


@dataclass
class Packed:
    """B images with T text tokens each; T is cut into slots, one question a slot."""

    pixels: torch.Tensor  # (B, 3, 64, 64)
    tokens: torch.Tensor  # (B, T)
    target: torch.Tensor  # (B, T), -100 where nothing is predicted
    hint: torch.Tensor  # (B, T), what a question's last token should hold half-way, -100 elsewhere
    slot: torch.Tensor  # (T,)
    position: torch.Tensor  # (64 + T,): every slot goes on right after the image


def pack(images: np.ndarray, slots: list[tuple], eos_slots: int) -> Packed:
    """Join slots of (tokens (B, L), length (B,), answer (B,), valid (B,), hint (B,)).

    The answer is the target at the question's last token. The first `eos_slots` slots also read the answer and
    predict the end of the sequence; that is learned at once, so the others save the token.
    """
    columns, targets, hints, owners, positions = [], [], [], [], []
    rows = np.arange(len(images))
    for number, (tokens, length, answer, valid, hint) in enumerate(slots):
        with_end = number < eos_slots
        tokens = np.concatenate([tokens, np.zeros_like(tokens[:, :1])], axis=1) if with_end else tokens
        target = np.full(tokens.shape, -100)
        target[rows, length - 1] = np.where(valid, answer, -100)
        hints.append(np.full(tokens.shape, -100))
        hints[-1][rows, length - 1] = np.where(valid, hint, -100)
        if with_end:
            tokens = tokens.copy()
            tokens[rows, length] = answer
            target[rows, length] = np.where(valid, ID[EOS], -100)
        columns.append(tokens)
        targets.append(target)
        owners.append(np.full(tokens.shape[1], number))
        positions.append(CELLS + np.arange(tokens.shape[1]))
    return Packed(
        to_pixels(images),
        torch.from_numpy(np.concatenate(columns, axis=1)),
        torch.from_numpy(np.concatenate(targets, axis=1)),
        torch.from_numpy(np.concatenate(hints, axis=1)),
        torch.from_numpy(np.concatenate(owners)),
        torch.from_numpy(np.concatenate([np.arange(CELLS), *positions])),
    )


def forward(model, batch: Packed, window: tuple[int, int], aux_layer: int, hint_layer: int) -> tuple[torch.Tensor, ...]:
    """Logits of the text (B, T, vocabulary), visual states (B, 64, hidden) after `aux_layer` layers, and text
    states (B, T, hidden) after `hint_layer` layers.

    The text sees the visual tokens in layers window[0] to window[1] - 1 only; after that they are taken out.
    """
    inner = model.model
    visual = torch.stack(list(inner.get_image_features(batch.pixels, return_dict=True).pooler_output))
    hidden = torch.cat([visual, inner.get_input_embeddings()(batch.tokens).to(visual.dtype)], dim=1)
    size = hidden.shape[1]
    owner = torch.cat([torch.full((CELLS,), -1), batch.slot])
    seen = (owner[None, :] == -1) | (owner[None, :] == owner[:, None])
    mask = (seen & torch.ones(size, size, dtype=torch.bool).tril())[None, None]
    mask = torch.zeros(mask.shape).masked_fill(~mask, -1e4)  # additive, for eager and sdpa attention alike
    blind = mask.clone()
    blind[..., CELLS:, :CELLS] = -1e4
    decoder, (opens, drop_at) = inner.language_model, window
    cos, sin = decoder.rotary_emb(hidden, batch.position[None])
    aux, half = hidden[:, :CELLS], hidden[:, CELLS:]
    for index, layer in enumerate(decoder.layers):
        if index == drop_at:
            hidden, mask, cos, sin = hidden[:, CELLS:], mask[..., CELLS:, CELLS:], cos[:, CELLS:], sin[:, CELLS:]
        hidden = layer(hidden, attention_mask=blind if index < opens else mask, position_embeddings=(cos, sin))
        if index + 1 == aux_layer:
            aux = hidden[:, :CELLS]
        if index + 1 == hint_layer:
            half = hidden[:, -batch.tokens.shape[1] :]
    text = hidden if drop_at < len(decoder.layers) else hidden[:, CELLS:]
    return model.lm_head(decoder.norm(text)), aux, half


def losses(logits: torch.Tensor, batch: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over the targets, and hits (B, T): 1 right, 0 wrong, -1 no target."""
    loss = F.cross_entropy(logits.float().flatten(0, 1), batch.target.flatten(), ignore_index=-100)
    hit = (logits.argmax(-1) == batch.target).long()
    return loss, torch.where(batch.target == -100, -1, hit)
