"""Where the tokens that are kept of a picture stand: the positions that vLLM asks a model for.

They go along with the features as columns, for these are kept by picture, and a picture may come in
any prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...registry import adapter_for

#: Half precision holds whole numbers up to this one, so larger ones take two columns.
DIGIT = 256
#: Columns that go along with the features: two for each of four numbers.
COLUMNS = 8


def to_columns(numbers: Tensor) -> Tensor:
    """Whole numbers (n, 4) below 2^16 as columns (n, 8) that any precision holds."""
    return torch.stack([numbers // DIGIT, numbers % DIGIT], -1).flatten(1)


def from_columns(columns: Tensor) -> Tensor:
    """The inverse of `to_columns`, (n, 4) long."""
    high, low = columns.long().unflatten(1, (-1, 2)).unbind(-1)
    return high * DIGIT + low


def family(config: Any) -> Any:
    """The adapter of a model's configuration: of its methods, those that look at no more."""
    adapter = object.__new__(adapter_for(config))
    adapter.config = config
    return adapter


def text(position: int, length: int) -> Tensor:
    """Positions (3, length) of text that begins at `position`."""
    return (position + torch.arange(length)).expand(3, -1)


class Positions:
    """What a model answers vLLM. Subclasses say how the tokens of a picture stand.

    family: see `family`. config: the model's, of transformers.
    """

    family: Any
    config: Any
    made_from: Callable[..., dict[str, Tensor]]
    data: Callable[..., dict[str, Tensor]]
    standing: Callable[..., Tensor]
    begins: Callable[..., Tensor]

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list
    ) -> tuple[Tensor, int]:
        """Positions (3, S) of a prompt, and what is added to the number of a token after it.

        Those of its text are right. Those of pictures wait for `recompute_mrope_positions`.
        """
        rows, at, position = [], 0, 0
        for item in sorted(mm_features, key=lambda each: each.mm_position.offset):
            start, length = item.mm_position.offset, item.mm_position.length
            rows.append(text(position, start - at))
            position += start - at
            stood = self.standing(item.modality, None, self.data(item))
            rows.append(position + stood[:, :length])
            at, position = start + length, position + int(stood.max()) + 1
        rows.append(text(position, len(input_tokens) - at))
        return torch.cat(rows, 1), position - at

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        """The features without their columns, and the positions (3, S) that these columns say.

        multimodal_embeddings: of the pictures in the part of the prompt that comes now, of which
            `num_computed_tokens` came before. A picture may be cut.
        The third result is as in `get_mrope_input_positions`.
        """
        positions = mrope_positions.clone()
        features = [x[:, :-COLUMNS] for x in multimodal_embeddings]
        if features:
            columns = torch.cat([x[:, -COLUMNS:] for x in multimodal_embeddings])
            *stood, number = from_columns(columns.to(positions.device)).T
            ids = torch.as_tensor(input_ids, device=positions.device)
            visual = torch.isin(ids, torch.tensor(self.family.image_token_ids()).to(ids))
            visual[:num_computed_tokens] = False
            at = visual.nonzero()[: len(number), 0]
            positions[:, at] = torch.stack(stood).to(positions) + self.begins(positions, at, number)
        return features, positions, int(positions.max()) + 1 - positions.shape[1]


class Qwen(Positions):
    """Qwen's positions: time, height and width. Text comes before and after every picture."""

    def made_from(self, kind: str, given: Any) -> dict[str, Tensor]:
        """What the adapter is told of pictures, a row for each."""
        names = f"{kind}_grid_thw", "second_per_grid_ts"
        found = {name: given.get(name) for name in names}
        return {name: torch.as_tensor(x).cpu() for name, x in found.items() if x is not None}

    def data(self, item: Any) -> dict[str, Tensor]:
        """The same, of one picture of a request."""
        names = f"{item.modality}_grid_thw", "second_per_grid_ts"
        return {name: item.data[name].data[None].cpu() for name in names if name in item.data}

    def standing(self, kind: str, n: int | None, inputs: dict) -> Tensor:
        """Positions (3, n) of the tokens of one picture, if nothing were before it."""
        places = self.family.places(n, inputs, kind).T
        seconds = inputs.get("second_per_grid_ts")
        if kind == "video" and seconds is not None:
            rate = float(seconds) * self.config.vision_config.tokens_per_second
            places[0] = (places[0] * rate).long()
        return places

    def begins(self, positions: Tensor, at: Tensor, number: Tensor) -> Tensor:
        """Where the pictures begin, to which the tokens `number` at the places `at` belong."""
        before = at - number - 1
        return (positions[0, before.clamp(min=0)] + 1).masked_fill(before < 0, 0)


class OneRow(Positions):
    """LLaVA's positions: numbers, in the first of three rows.

    The others hold where the picture begins and ends, so that pictures may follow one another.
    """

    def made_from(self, kind: str, given: Any) -> dict[str, Tensor]:
        """What the adapter is told of pictures: nothing, for they have one size."""
        return {}

    def data(self, item: Any) -> dict[str, Tensor]:
        """The same, of one picture of a request."""
        return {}

    def standing(self, kind: str, n: int | None, inputs: dict) -> Tensor:
        """Positions (3, n) of one picture: of the tokens, of its first, and of its last."""
        row = torch.arange(self.family.tokens_per_tile(self.config))
        return torch.stack([row, 0 * row, 0 * row + len(row) - 1])

    def begins(self, positions: Tensor, at: Tensor, number: Tensor) -> Tensor:
        """Where the pictures begin, to which the tokens at the places `at` belong."""
        return positions[1, at]
