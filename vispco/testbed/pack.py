"""Many questions about one image in one sequence, so that the image is encoded once for all of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from .model import FRAMES, MEAN, MERGE, PATCH, QWEN_PATCH, SPECS, STD, Spec, name_of
from .vocab import EOS, ID


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """(B, height, width, 3) uint8 -> (B, 3, height, width) float32, normalised as the processors do it."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255.0 - MEAN) / STD


def image_inputs(name: str, images: list[np.ndarray] | np.ndarray) -> dict[str, torch.Tensor]:
    """What the model `name` is given of pictures (height, width, 3): pixel_values, for Qwen cut to patches and with
    the grid (frames, rows, columns) of each picture's patches."""
    if name == "testbed-llava":
        return {"pixel_values": to_pixels(np.stack(list(images)))}
    patches, grids = [], []
    for image in images:
        pixels = to_pixels(np.stack([image]))[0]
        rows, columns = image.shape[0] // PATCH, image.shape[1] // PATCH
        cut = pixels.view(3, rows, MERGE, QWEN_PATCH, columns, MERGE, QWEN_PATCH).permute(1, 4, 2, 5, 0, 3, 6)
        cut = cut.unsqueeze(5).expand(-1, -1, -1, -1, -1, FRAMES, -1, -1)  # a still picture: the same frame again
        patches.append(cut.reshape(rows * columns * MERGE**2, -1))
        grids.append([1, rows * MERGE, columns * MERGE])
    return {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}


@dataclass
class Packed:
    """B images with T text tokens each; T is cut into slots, one question a slot."""

    images: np.ndarray  # (B, height, width, 3) uint8
    tokens: torch.Tensor  # (B, T)
    target: torch.Tensor  # (B, T), -100 where nothing is predicted
    hint: torch.Tensor  # (B, T), what a question's last token should hold half-way, -100 elsewhere
    slot: torch.Tensor  # (T,)
    place: torch.Tensor  # (T,): place within the slot; every slot goes on right after the image


def pack(images: np.ndarray, slots: list[tuple], eos_slots: int) -> Packed:
    """Join slots of (tokens (B, L), length (B,), answer (B,), valid (B,), hint (B,)).

    The answer is the target at the question's last token. The first `eos_slots` slots also read the answer and
    predict the end of the sequence; that is learned at once, so the others save the token.
    """
    columns, targets, hints, owners, places = [], [], [], [], []
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
        places.append(np.arange(tokens.shape[1]))
    joined = (torch.from_numpy(np.concatenate(part, axis=1)) for part in (columns, targets, hints))
    return Packed(images, *joined, *(torch.from_numpy(np.concatenate(part)) for part in (owners, places)))


def positions(spec: Spec, rows: int, columns: int, place: torch.Tensor) -> torch.Tensor:
    """Rotary positions (1 or 3, N) of the opening tokens, the image, the closing tokens and text at `place`: counted
    in LLaVA; in Qwen (time, row, column) for the image, and the text goes on after the larger side."""
    before, after = len(spec.before), len(spec.after)
    if not before:
        image, size = torch.arange(rows * columns)[None], rows * columns
    else:
        row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
        image, size = torch.stack([torch.zeros_like(row), row, column]) + before, max(rows, columns)
    opening = torch.arange(before).expand(len(image), -1)
    text = before + size + torch.cat([torch.arange(after), after + place])
    return torch.cat([opening, image, text.expand(len(image), -1)], dim=1)


def forward(model, batch: Packed, window: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Logits of the text (B, T, vocabulary), visual states (B, V, hidden) after `aux_layer` layers, and text
    states (B, T, hidden) after `hint_layer` layers.

    All other tokens see the visual tokens in layers window[0] to window[1] - 1 only; then these are taken out.
    """
    inner, name = model.model, name_of(model)
    spec, embed = SPECS[name], inner.get_input_embeddings()
    visual = inner.get_image_features(**image_inputs(name, batch.images), return_dict=True).pooler_output
    visual = torch.stack(list(visual))
    b, v, lead, n_text = len(visual), visual.shape[1], len(spec.before), batch.tokens.shape[1]
    fixed = [embed(torch.tensor(ids, dtype=torch.long)).expand(b, -1, -1) for ids in (spec.before, spec.after)]
    parts = [fixed[0], visual, fixed[1], embed(batch.tokens)]
    hidden = torch.cat([part.to(visual.dtype) for part in parts], dim=1)
    size = hidden.shape[1]
    owner = torch.cat([torch.full((size - n_text,), -1), batch.slot])
    seen = (owner[None, :] == -1) | (owner[None, :] == owner[:, None])
    mask = (seen & torch.ones(size, size, dtype=torch.bool).tril())[None, None]
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype  # that of the scores
    mask = torch.zeros(mask.shape, dtype=kind).masked_fill(~mask, -1e4)  # additive, for eager and sdpa alike
    blind = mask.clone()
    blind[..., lead + v :, lead : lead + v] = -1e4
    decoder, (opens, drop_at) = inner.language_model, window
    height, width = batch.images.shape[1:3]
    position = positions(spec, height // PATCH, width // PATCH, batch.place)
    cos, sin = decoder.rotary_emb(hidden, position[:, None] if len(position) > 1 else position)
    rest = torch.cat([torch.arange(lead), torch.arange(lead + v, size)])  # all but the visual tokens
    aux, half = visual, hidden[:, -n_text:]
    for index, layer in enumerate(decoder.layers):
        if index == drop_at:
            hidden, cos, sin, mask = hidden[:, rest], cos[:, rest], sin[:, rest], mask[:, :, rest][..., rest]
        hidden = layer(hidden, attention_mask=blind if index < opens else mask, position_embeddings=(cos, sin))
        if index + 1 == spec.aux_layer:
            aux = hidden[:, lead : lead + v]
        if index + 1 == spec.hint_layer:
            half = hidden[:, -n_text:]
    return model.lm_head(decoder.norm(hidden[:, -n_text:])), aux, half


def losses(logits: torch.Tensor, batch: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over the targets, and hits (B, T): 1 right, 0 wrong, -1 no target."""
    loss = F.cross_entropy(logits.float().flatten(0, 1), batch.target.flatten(), ignore_index=-100)
    hit = (logits.argmax(-1) == batch.target).long()
    return loss, torch.where(batch.target == -100, -1, hit)
