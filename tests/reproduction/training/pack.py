"""Many questions about one image in one sequence, so that the image is encoded once for all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from vispco.testbed.images import image_inputs, video_inputs
from vispco.testbed.model import FRAMES, IMAGE_TOKENS, PATCH, ImageTokens
from vispco.testbed.vocab import EOS, ID

from .recipe import RECIPES, name_of

#: An additive mask's value where a token sees nothing.
_UNSEEN = -1e4


@dataclass
class Packed:
    """B images with T text tokens each; T is cut into slots, one question a slot.

    images: (B, height, width, 3) uint8, or clips (B, frames, height, width, 3). tokens: (B, T).
    target: (B, T), -100 where nothing is predicted. hint: (B, T), what a question's last token
    should hold half-way, -100 elsewhere. slot: (T,), which slot. place: (T,), the place in it;
    every slot goes on right after the image.
    """

    images: np.ndarray
    tokens: torch.Tensor
    target: torch.Tensor
    hint: torch.Tensor
    slot: torch.Tensor
    place: torch.Tensor


def pack(images: np.ndarray, slots: list[tuple], eos_slots: int) -> Packed:
    """Join slots of (tokens (B, L), length (B,), answer (B,), valid (B,), hint (B,)).

    The answer is the target at the question's last token. The first `eos_slots` slots also read the
    answer and predict the end of the sequence. That is learned at once, so the others save the
    token.
    """
    columns, targets, hints, owners, places = [], [], [], [], []
    rows = np.arange(len(images))
    for number, (tokens, length, answer, valid, hint) in enumerate(slots):
        if number < eos_slots:
            tokens = np.concatenate([tokens, np.zeros_like(tokens[:, :1])], axis=1)
        target = np.full(tokens.shape, -100)
        target[rows, length - 1] = np.where(valid, answer, -100)
        hinted = np.full(tokens.shape, -100)
        hinted[rows, length - 1] = np.where(valid, hint, -100)
        if number < eos_slots:
            tokens[rows, length] = answer
            target[rows, length] = np.where(valid, ID[EOS], -100)
        columns.append(tokens)
        targets.append(target)
        hints.append(hinted)
        owners.append(np.full(tokens.shape[1], number))
        places.append(np.arange(tokens.shape[1]))
    return Packed(
        images,
        tokens=torch.from_numpy(np.concatenate(columns, axis=1)),
        target=torch.from_numpy(np.concatenate(targets, axis=1)),
        hint=torch.from_numpy(np.concatenate(hints, axis=1)),
        slot=torch.from_numpy(np.concatenate(owners)),
        place=torch.from_numpy(np.concatenate(places)),
    )


def positions(
    ids: ImageTokens, rows: int, columns: int, place: torch.Tensor, moments: int = 1
) -> torch.Tensor:
    """Rotary positions (1 or 3, N) of the opening tokens, the image, the closing ones and the text.

    LLaVA counts the tokens. Qwen gives the image (time, row, column), and the text goes on after
    the larger side. rows, columns: of visual tokens. place: (T,) of the text. moments: of a clip,
    one step of time each.
    """
    before, after = len(ids.before), len(ids.after)
    if before:
        axes = [torch.arange(size) for size in (moments, rows, columns)]
        image = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1) + before
        size = max(rows, columns)
    else:
        image = torch.arange(rows * columns)[None]
        size = rows * columns
    opening = torch.arange(before).expand(len(image), -1)
    text = before + size + torch.cat([torch.arange(after), after + place])
    return torch.cat([opening, image, text.expand(len(image), -1)], dim=1)


def forward(
    model, batch: Packed, window: tuple[int, int], aux_layer: int | None = None
) -> tuple[torch.Tensor, ...]:
    """One forward pass over packed questions.

    window: all other tokens see the visual tokens in layers window[0] to window[1] - 1 only; then
    the visual tokens are taken out.
    aux_layer: None: the recipe's.
    Returns logits of the text (B, T, vocabulary), visual states (B, V, hidden) after `aux_layer`
    layers, and text states (B, T, hidden) after `hint_layer` layers.
    """
    recipe = RECIPES[name_of(model)]
    decoder, (opens, drop_at) = model.model.language_model, window
    hidden, lead, v = _embedded(model, batch)
    size, n_text = hidden.shape[1], batch.tokens.shape[1]
    mask = _mask(size, batch.slot, hidden.dtype)
    blind = mask.clone()
    blind[..., lead + v :, lead : lead + v] = _UNSEEN
    height, width = batch.images.shape[-3:-1]
    moments = batch.images.shape[1] // FRAMES if batch.images.ndim == 5 else 1
    ids = IMAGE_TOKENS[recipe.name]
    position = positions(ids, height // PATCH, width // PATCH, batch.place, moments)
    cos, sin = decoder.rotary_emb(hidden, position[:, None] if len(position) > 1 else position)
    rest = torch.cat([torch.arange(lead), torch.arange(lead + v, size)])  # all but the image
    visual, half = hidden[:, lead : lead + v], hidden[:, -n_text:]
    for index, layer in enumerate(decoder.layers):
        if index == drop_at:
            hidden, cos, sin = hidden[:, rest], cos[:, rest], sin[:, rest]
            mask = mask[:, :, rest][..., rest]
        seen = blind if index < opens else mask
        hidden = layer(hidden, attention_mask=seen, position_embeddings=(cos, sin))
        if index + 1 == (aux_layer or recipe.aux_layer):
            visual = hidden[:, lead : lead + v]
        if index + 1 == recipe.hint_layer:
            half = hidden[:, -n_text:]
    return model.lm_head(decoder.norm(hidden[:, -n_text:])), visual, half


def _embedded(model, batch: Packed) -> tuple[torch.Tensor, int, int]:
    """Input of layer 0 (B, N, hidden), where the visual tokens begin, and how many there are."""
    inner, name = model.model, name_of(model)
    ids, embed = IMAGE_TOKENS[name], inner.get_input_embeddings()
    if batch.images.ndim == 5:
        found = inner.get_video_features(**video_inputs(batch.images), return_dict=True)
    else:
        found = inner.get_image_features(**image_inputs(name, batch.images), return_dict=True)
    features = found.pooler_output
    visual = torch.stack(list(features))
    before, after = (
        embed(torch.tensor(fixed, dtype=torch.long)).expand(len(visual), -1, -1)
        for fixed in (ids.before, ids.after)
    )
    parts = [before, visual, after, embed(batch.tokens)]
    hidden = torch.cat([part.to(visual.dtype) for part in parts], dim=1)
    return hidden, len(ids.before), visual.shape[1]


def _mask(size: int, slot: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask (1, 1, N, N): causal, and a slot sees the image and itself alone."""
    owner = torch.cat([torch.full((size - len(slot),), -1), slot])
    seen = (owner[None, :] == -1) | (owner[None, :] == owner[:, None])
    seen = (seen & torch.ones(size, size, dtype=torch.bool).tril())[None, None]
    # Of the scores' type; additive, for eager and sdpa alike.
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, _UNSEEN)


def losses(logits: torch.Tensor, batch: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over the targets, and hits (B, T): 1 right, 0 wrong, -1 no target."""
    target = batch.target
    loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), ignore_index=-100)
    hit = (logits.argmax(-1) == target).long()
    return loss, torch.where(target == -100, -1, hit)
