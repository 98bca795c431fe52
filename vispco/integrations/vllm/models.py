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
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention
from vllm.model_executor.models import llava, qwen2_5_vl, qwen3_vl, qwen3_vl_moe
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModalPruning
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems
from vllm.platforms import current_platform

from ...pruning._tower import of_patches
from ...reading.structure import find_tower, first
from ...utils.digest import key
from . import configured
from .positions import OneRow, Positions, Qwen, family, to_columns


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

    @cached_property
    def digest(self) -> str:
        config = configured()[0]
        return key(method=config.method, options=config.method_options, ratio=self.drop.ratio)

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        """Of pictures and of the configuration, since servers may share a cache."""
        hashes = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        return {kind: [f"{each}-{self.digest}" for each in some] for kind, some in hashes.items()}

    def _get_prompt_updates(self, mm_items: Any, *args: Any, **named: Any) -> list:
        for kind, items in mm_items.items():
            if isinstance(items, EmbeddingItems | DictEmbeddingItems):
                raise ValueError(f"pass the {kind} itself: ready-made features are not pruned")
        updates = super()._get_prompt_updates(mm_items, *args, **named)  # type: ignore[misc]
        return [replace(each, replacement=partial(self._left, each.content)) for each in updates]

    def _left(self, content: Callable[[int], list[int]], item: int) -> list[int]:
        places = content(item)
        return places[: self.drop.count(len(places))]


class Pruned(Positions):
    """A model of which every picture loses tokens behind the vision tower."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        # Positions are asked for where vLLM prunes by itself, and there its tables of rotary
        # embeddings reach further than the longest prompt.
        asked = vllm_config.model_config.multimodal_config
        asked.is_multimodal_pruning_enabled = partial(bool, True)
        if current_platform.is_cpu():
            _ask_on_cpu()
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        # But it does not prune.
        self.is_multimodal_pruning_enabled = False
        self.drop, self.family = configured()[1], family(self.config)
        # Columns of the features that enter the first layer.
        self.entering = self.config.get_text_config().hidden_size
        # By depth of the vision tower's layer: queries, keys and their scaling, of the pictures
        # just seen.
        self.heard: dict[float | None, tuple[Tensor, Tensor, float]] = {}
        if self.drop.method.reads_vision:
            self._listen()

    # ---- the vision tower ------------------------------------------------------------------------
    def _listen(self) -> None:
        tower: Any = find_tower(self)
        named = [(name.split(".")[-1], module) for name, module in tower.named_modules()]
        layers = next(module for name, module in named if name in ("layers", "blocks"))
        number = first(self.config.vision_config, ["num_hidden_layers", "depth"])
        for depth in (None, *self.drop.method.vision_depths):
            at = (
                self.family.token_layer(number)
                if depth is None
                else self.family.layer_at(depth, number)
            )
            for module in layers[at].modules():
                if isinstance(module, MMEncoderAttention):
                    module.register_forward_pre_hook(partial(self._hear, depth), with_kwargs=True)

    def _hear(self, depth: float | None, module: Any, args: tuple, kwargs: dict) -> None:
        given = {**dict(zip(("query", "key"), args, strict=False)), **kwargs}
        query, keys = (
            given[name].reshape(*given[name].shape[:2], heads, module.head_size).transpose(1, 2)
            for name, heads in (("query", module.num_heads), ("key", module.num_kv_heads))
        )
        self.heard[depth] = query.detach(), keys.detach(), module.scale

    def _of_tower(self, kind: str, inputs: dict, depth: float | None) -> Tensor:
        """Attention and keys (n, 1 + E) of all tokens of the pictures just seen, in order."""
        query, keys, scale = self.heard[depth]
        sizes = [query.shape[2]]
        if inputs:
            # Each frame attends to itself.
            grids = inputs[f"{kind}_grid_thw"].tolist()
            sizes = [h * w for t, h, w in grids for _ in range(t)]
        pairs = zip(query.split(sizes, 2), keys.split(sizes, 2), strict=True)
        calls = [(q, k, None, scale) for q, k in pairs]
        values = of_patches(calls, self.family.class_token(self.config))
        return self.family.tokens_from_patches(values, inputs, kind)

    # ---- pruning ---------------------------------------------------------------------------------
    def _process_image_input(self, given: Any) -> list[Tensor]:
        return self._kept("image", super()._process_image_input(given), given)  # type: ignore[misc]

    def _process_video_input(self, given: Any) -> list[Tensor]:
        return self._kept("video", super()._process_video_input(given), given)  # type: ignore[misc]

    def _kept(self, kind: str, features: Sequence[Tensor], given: Any) -> list[Tensor]:
        """Of each picture the tokens (K, D + 8) that are kept, with where they stood."""
        inputs, sizes = self.made_from(kind, given), [len(x) for x in features]

        @cache
        def of_all(depth: float | None) -> tuple[Tensor, ...]:
            return self._of_tower(kind, inputs, depth).split(sizes)

        def of_one(i: int, depth: float | None) -> tuple[Tensor, Tensor]:
            mine = of_all(depth)[i]
            return mine[:, 0], mine[:, 1:]

        kept = []
        for i, x in enumerate(features):
            own = {name: value[i : i + 1] for name, value in inputs.items()}
            places = partial(self.family.places, len(x), own, kind)
            # Qwen3-VL's tower gives further features, which enter behind the first layers.
            enters, later = x.split([self.entering, x.shape[1] - self.entering], 1)
            enters, chosen = self.drop.keep(enters, places, partial(of_one, i))
            stood = self.standing(kind, len(x), own)[:, chosen.cpu()]
            number = torch.arange(len(chosen))
            columns = to_columns(torch.cat([stood, number[None]]).T).to(x)
            kept.append(torch.cat([enters, later[chosen], columns], 1))
        self.heard.clear()
        return kept


def processor(base: type) -> type:
    """vLLM's processor of a family, which counts what will be kept."""
    return type(f"Counting{base.__name__}", (Counting, base), {})


@MULTIMODAL_REGISTRY.register_processor(
    processor(llava.LlavaMultiModalProcessor),
    info=llava.LlavaProcessingInfo,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class Llava(
    OneRow, Pruned, llava.LlavaForConditionalGeneration, SupportsMRoPE, SupportsMultiModalPruning
):
    """LLaVA-1.5."""

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, with the row of positions that counts."""
        return super().forward(input_ids, positions[0], *args, **kwargs)


@MULTIMODAL_REGISTRY.register_processor(
    processor(qwen2_5_vl.Qwen2_5_VLMultiModalProcessor),
    info=qwen2_5_vl.Qwen2_5_VLProcessingInfo,
    dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
class Qwen25VL(Qwen, Pruned, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
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
class Qwen3VL(Qwen, Pruned, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL, pictures only."""


@MULTIMODAL_REGISTRY.register_processor(
    processor(qwen3_vl.Qwen3VLMultiModalProcessor),
    info=NoVideosMoe,
    dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder,
)
class Qwen3VLMoe(Qwen, Pruned, qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration):
    """Qwen3-VL, its mixtures of experts."""
