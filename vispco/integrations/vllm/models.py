"""vLLM's models, with some of each picture's tokens.

vLLM asks a model for the positions of the tokens that are left where it prunes videos itself. Here
it always asks:

    prompt:  floor(r n) places for the n tokens of a picture, counted before the tower runs
    tower:   features, of which the method keeps as many; where they stood goes along as columns
    prefill: the columns come off, and become positions

Tokens have the positions that they would have if none had been dropped, as under `vispco.apply`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention
from vllm.model_executor.models import llava, qwen2_5_vl, qwen3_vl, qwen3_vl_moe
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModalPruning
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems
from vllm.platforms import current_platform

from ...pruning._tower import of_patches
from ...reading.structure import find_tower, first
from ...registry import adapter_for
from . import configured

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


def _ask_on_cpu() -> None:
    """vLLM's runner for CPUs never looks whether positions are asked for: tell it (vLLM 0.32)."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    always = property(lambda runner: True, lambda runner, value: None)
    CPUModelRunner.is_multimodal_pruning_enabled = always


class Counting:
    """A processor that leaves as many places in a prompt as tokens will be kept."""

    @cached_property
    def drop(self) -> Any:
        return configured()[1]

    def _get_prompt_updates(self, mm_items: Any, *args: Any, **named: Any) -> list:
        for kind, items in mm_items.items():
            if isinstance(items, EmbeddingItems | DictEmbeddingItems):
                raise ValueError(f"pass the {kind} itself: ready-made features are not pruned")
        updates = super()._get_prompt_updates(mm_items, *args, **named)  # type: ignore[misc]
        return [replace(each, replacement=partial(self._left, each.content)) for each in updates]

    def _left(self, content: Callable[[int], list[int]], item: int) -> list[int]:
        places = content(item)
        return places[: self.drop.count(len(places))]


class Pruned:
    """A model of which every picture loses tokens behind the vision tower."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        # Positions are asked for where vLLM prunes by itself, and there its tables of rotary
        # embeddings reach further than the longest prompt.
        asked = vllm_config.model_config.multimodal_config
        asked.is_multimodal_pruning_enabled = partial(bool, True)
        if current_platform.is_cpu():
            _ask_on_cpu()
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # But it does not prune.
        self.is_multimodal_pruning_enabled = False
        self.drop, self.family = configured()[1], family(self.config)
        # By depth of the vision tower's layer: queries and keys of the pictures just seen.
        self.heard: dict[float | None, tuple[Tensor, Tensor]] = {}
        if self.drop.method.reads_vision:
            self._listen()

    # ---- the vision tower ------------------------------------------------------------------------
    def _listen(self) -> None:
        layers = next(
            m
            for name, m in find_tower(self).named_modules()
            if name.split(".")[-1] in ("layers", "blocks")
        )
        number = first(self.config.vision_config, ["num_hidden_layers", "depth"])
        for depth in (None, *self.drop.method.vision_depths):
            at = self.family.token_layer(number) if depth is None else self.family.layer_at(
                depth, number
            )
            for module in layers[at].modules():
                if isinstance(module, MMEncoderAttention):
                    module.register_forward_pre_hook(partial(self._hear, depth), with_kwargs=True)

    def _hear(self, depth: float | None, module: Any, args: tuple, kwargs: dict) -> None:
        given = {**dict(zip(("query", "key"), args, strict=False)), **kwargs}
        query, key = (
            given[name].view(*given[name].shape[:2], heads, module.head_size).transpose(1, 2)
            for name, heads in (("query", module.num_heads), ("key", module.num_kv_heads))
        )
        self.heard[depth] = query.detach(), key.detach(), module.scale

    def _of_tower(self, kind: str, inputs: dict, depth: float | None) -> Tensor:
        """Attention and keys (n, 1 + E) of all tokens of the pictures just seen, in order."""
        query, key, scale = self.heard[depth]
        sizes = [query.shape[2]]
        if inputs:
            # Each frame attends to itself.
            grids = inputs[f"{kind}_grid_thw"].tolist()
            sizes = [h * w for t, h, w in grids for _ in range(t)]
        calls = [(q, k, None, scale) for q, k in zip(query.split(sizes, 2), key.split(sizes, 2))]
        values = of_patches(calls, self.family.class_token(self.config))
        return self.family.tokens_from_patches(values, inputs, kind)

    # ---- pruning ---------------------------------------------------------------------------------
    def _process_image_input(self, given: Any) -> list[Tensor]:
        return self._kept("image", super()._process_image_input(given), given)

    def _process_video_input(self, given: Any) -> list[Tensor]:
        return self._kept("video", super()._process_video_input(given), given)

    def _kept(self, kind: str, features: Sequence[Tensor], given: Any) -> list[Tensor]:
        """Of each picture the tokens (K, D + 8) that are kept, with where they stood."""
        inputs, sizes = self.made_from(kind, given), [len(x) for x in features]

        def of_tower(i: int, depth: float | None) -> tuple[Tensor, Tensor]:
            mine = self._of_tower(kind, inputs, depth).split(sizes)[i]
            return mine[:, 0], mine[:, 1:]

        kept = []
        for i, x in enumerate(features):
            own = {name: value[i : i + 1] for name, value in inputs.items()}
            places = partial(self.family.places, len(x), own, kind)
            # Qwen3-VL's tower gives further features, which enter behind the first layers.
            enters, later = x.split([self.entering, x.shape[1] - self.entering], 1)
            enters, chosen = self.drop.keep(enters, places, partial(of_tower, i))
            stood = self.standing(kind, len(x), own)[:, chosen.cpu()]
            number = torch.arange(len(chosen))
            columns = to_columns(torch.cat([stood, number[None]]).T).to(x)
            kept.append(torch.cat([enters, later[chosen], columns], 1))
        self.heard.clear()
        return kept

    # ---- positions -------------------------------------------------------------------------------
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
            positions[:, at] = torch.stack(stood).to(positions) + self.begins(
                positions, at, number
            )
        return features, positions, int(positions.max()) + 1 - positions.shape[1]


def text(position: int, length: int) -> Tensor:
    """Positions (3, length) of text that begins at `position`."""
    return (position + torch.arange(length)).expand(3, -1)


class Qwen(Pruned):
    """Qwen's positions: time, height and width. Text comes before and after every picture."""

    @property
    def entering(self) -> int:
        """Columns of the features that enter the first layer."""
        return self.config.get_text_config().hidden_size

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


class OneRow(Pruned):
    """LLaVA's positions: a number, to which the rows of height and width are of no account.

    They hold where the picture begins and ends, so that pictures may follow one another.
    """

    @property
    def entering(self) -> int:
        """Columns of the features: all."""
        return self.config.text_config.hidden_size

    def made_from(self, kind: str, given: Any) -> dict[str, Tensor]:
        """What the adapter is told of pictures: nothing, for they have one size."""
        return {}

    def data(self, item: Any) -> dict[str, Tensor]:
        """The same, of one picture of a request."""
        return {}

    def standing(self, kind: str, n: int | None, inputs: dict) -> Tensor:
        """Positions (1, n) of the tokens of one picture, its first, and its last."""
        row = torch.arange(self.family.tokens_per_tile(self.config))
        return torch.stack([row, 0 * row, 0 * row + len(row) - 1])

    def begins(self, positions: Tensor, at: Tensor, number: Tensor) -> Tensor:
        """Where the pictures begin, to which the tokens at the places `at` belong."""
        return positions[1, at]


def processor(base: type) -> type:
    """vLLM's processor of a family, which counts what will be kept."""
    return type(f"Counting{base.__name__}", (Counting, base), {})


@MULTIMODAL_REGISTRY.register_processor(
    processor(llava.LlavaMultiModalProcessor),
    info=llava.LlavaProcessingInfo,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class Llava(
    OneRow, llava.LlavaForConditionalGeneration, SupportsMRoPE, SupportsMultiModalPruning
):
    """LLaVA-1.5."""


@MULTIMODAL_REGISTRY.register_processor(
    processor(qwen2_5_vl.Qwen2_5_VLMultiModalProcessor),
    info=qwen2_5_vl.Qwen2_5_VLProcessingInfo,
    dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
class Qwen25VL(Qwen, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


class NoVideos(qwen3_vl.Qwen3VLProcessingInfo):
    """Of Qwen3-VL: it counts the tokens of each frame, which are known when it is too late."""

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        return {"image": None, "video": 0}


class NoVideosMoe(NoVideos, qwen3_vl_moe.Qwen3VLMoeProcessingInfo):
    """The same, of its mixtures of experts."""


@MULTIMODAL_REGISTRY.register_processor(
    processor(qwen3_vl.Qwen3VLMultiModalProcessor),
    info=NoVideos,
    dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder,
)
class Qwen3VL(Qwen, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL, pictures only."""


@MULTIMODAL_REGISTRY.register_processor(
    processor(qwen3_vl.Qwen3VLMultiModalProcessor),
    info=NoVideosMoe,
    dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder,
)
class Qwen3VLMoe(Qwen, qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration):
    """Qwen3-VL, its mixtures of experts."""
