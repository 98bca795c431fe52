"""Adapter: where a Hugging Face vision-language model keeps the things that pruning needs.

Everything is read off the loaded model and its configuration, so `Adapter` itself serves any model
whose decoder holds visual tokens. A family's own file names its classes, and overrides what cannot
be read: how patches become tokens, and where these stand in the picture.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from ..pruning._tower import placed, ready_made
from ..pruning.context import positions
from ..reading.structure import find_decoder, find_tower, first
from ..reading.support import check_supported
from ..registry import ADAPTERS
from .costs import Costs
from .layers import RECURRENT, Layers

#: How configurations name the id of a visual token, after "image_" or "video_".
ID_NAMES = ("token_id", "token_index", "patch_id")
#: Arguments of models by which the caller says which tokens are visual.
MASK_NAMES = ("image_embeds_position_mask",)


class Adapter(Costs, Layers):
    """One loaded model, seen by the pruner: of any family that has no adapter of its own.

    Subclasses set `architectures` and `model_types`, and override what differs here or in `Costs`.
    Shapes below: B samples, S tokens of the prompt, N tokens present now, D hidden, E head size.

    Attributes: `model`, its `config`, its language model `decoder`, and the decoder's `layers`.
    """

    #: Names of the model classes of this family.
    architectures: ClassVar[tuple[str, ...]] = ()
    #: `model_type` of their configurations.
    model_types: ClassVar[tuple[str, ...]] = ()
    #: Whether no token of a known family's decoder sees a later one, and each sees all before it.
    #: An instance looks its sliding windows up in the configuration.
    causal: bool = True

    def __init__(self, model: Any):
        self.model = model
        self.config: Any = model.config
        self.text: Any = self.config.get_text_config(decoder=True)
        self.decoder, self.layers = self.find_decoder()
        kinds = {self.kind(i) for i in range(len(self.layers))}
        window = getattr(self.text, "sliding_window", None)
        windowed = window and not getattr(self.text, "layer_types", None)
        # Whether some layers see no further than a number of tokens.
        self.slides = bool(windowed) or not kinds <= {"full_attention", *RECURRENT}
        known = bool(self.architectures) and self.causal
        self.causal = known and kinds == {"full_attention"} and not windowed

    def find_decoder(self) -> tuple[Any, Any]:
        """The decoder, and the list of its layers.

        Raises ValueError if they cannot be told from the model's other modules.
        """
        return find_decoder(self.model)

    # ---- which models ----------------------------------------------------------------------------
    @classmethod
    def handles(cls, model) -> bool:
        """Whether `model` is of this family: a module by its class, a configuration by its type.

        `Adapter` itself serves every model that can be pruned, and raises ValueError with the
        reason for another.
        """
        if cls is Adapter:
            check_supported(model)
            return True
        if isinstance(model, nn.Module):
            return any(base.__name__ in cls.architectures for base in type(model).__mro__)
        return getattr(model, "model_type", None) in cls.model_types

    # ---- inputs ----------------------------------------------------------------------------------
    @property
    def backbone(self) -> Any:
        """The module that receives `input_ids` and puts the image features among the embeddings."""
        base = self.model.base_model
        holds = base is not self.decoder and any(m is self.decoder for m in base.modules())
        return base if holds else self.model

    @property
    def generates_apart(self) -> bool:
        """Whether `generate` makes the embeddings itself and has the decoder go on alone."""
        return type(self.model).generate is not GenerationMixin.generate

    def token_ids(self) -> dict[str, int]:
        """{"image" or "video": id of the token that stands for a visual token in a prompt}."""
        ids = {
            kind: first(self.config, [f"{kind}_{name}" for name in ID_NAMES])
            for kind in ("image", "video")
        }
        vocabulary = getattr(self.config, "vocabulary_map", None) or {}
        if ids["image"] is None:
            ids["image"] = vocabulary.get("<image>")
        return {kind: number for kind, number in ids.items() if isinstance(number, int)}

    def image_token_ids(self) -> list[int]:
        """The ids that stand for visual tokens in a prompt, of images and of videos."""
        return list(self.token_ids().values())

    def visual_mask(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, ids: Any = None
    ) -> Tensor:
        """(B, S) bool: which tokens of a prompt are visual.

        The prompt is given as ids (B, S) or as embeddings (B, S, D).
        ids: the token ids that count as visual; default: `image_token_ids`.
        Raises ValueError if neither input_ids nor inputs_embeds is given.
        """
        given = inputs_embeds if input_ids is None else input_ids
        if given is None:
            raise ValueError(
                "the model was called with neither input_ids nor inputs_embeds: give it the prompt"
            )
        ids = torch.tensor(self.image_token_ids() if ids is None else ids)
        ids = ids.to(given.device, non_blocking=True)
        if input_ids is not None:
            return torch.isin(input_ids, ids)
        table = self.model.get_input_embeddings()(ids)  # (ids, D)
        return (given[:, :, None] == table).all(-1).any(-1)

    def visual_tokens(self, inputs: dict) -> Tensor:
        """(B, S) bool: which tokens of a prompt are visual.

        inputs: what the model is called with. Some models are told by a mask of their own.
        Raises ValueError if none is found, and this does not mean that there are none.
        """
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        told = next((inputs[name] for name in MASK_NAMES if inputs.get(name) is not None), None)
        if told is not None:
            return told.bool()
        visual = self.visual_mask(ids, embeds)
        pictures = self.pictures(inputs)
        if (ids is None or pictures) and not bool(visual.any()):
            came = " and ".join(["inputs_embeds"] * (ids is None) + pictures)
            raise ValueError(
                f"no visual token is found in the prompt (token ids {self.image_token_ids()}), "
                f"which came with {came}: say where they are with visual_mask=, (B, S) bool, of "
                "vispco.apply or its handle; all False if there are none"
            )
        return visual

    def pictures(self, inputs: dict) -> list[str]:
        """Names of the inputs that hold pictures, or what was made of them."""
        return [name for name in inputs if is_picture(name) and inputs[name] is not None]

    # ---- vision tower ----------------------------------------------------------------------------
    def vision_layer(self, depth: float | None = None) -> nn.Module:
        """The tower's layer whose output becomes the visual tokens; of several, the deepest.

        depth: another layer, see `layer_at`.
        Raises ValueError if the tower has no list of layers.
        """
        tower = find_tower(self.model, self.tower) or nn.Module()
        modules = tower.named_modules()
        lists = [m for name, m in modules if name.split(".")[-1] in ("layers", "layer", "blocks")]
        if not lists:
            raise ValueError(
                f"{type(self.model).__name__} has no vision tower with a list of layers: use a "
                "method that does not read the tower, or override `tower` or `vision_layer` in an "
                "adapter"
            )
        number = len(lists[0])
        return lists[0][self.token_layer(number) if depth is None else self.layer_at(depth, number)]

    def layer_at(self, depth: float, layers: int) -> int:
        """Number of the tower's layer, of `layers`, at a depth from 0 (the first) to 1."""
        return min(int(depth * layers + 0.5), layers - 1)

    def token_layer(self, depth: int) -> int:
        """Number of the tower's layer, of `depth`, whose output becomes the visual tokens.

        `vision_feature_layer` counts hidden states. The first of these is the tower's input, so
        hidden state i is the output of layer i - 1.
        """
        chosen = getattr(self.config, "vision_feature_layer", -1)
        chosen = chosen if isinstance(chosen, (list, tuple)) else [chosen]
        return max(0, max(state % (depth + 1) for state in chosen) - 1)

    def kinds(self, inputs: dict) -> dict[str, Tensor]:
        """{"image" or "video": (B, S) bool, its visual tokens}.

        inputs: keyword arguments of the backbone.
        """
        prompt = inputs.get("input_ids"), inputs.get("inputs_embeds")
        return {kind: self.visual_mask(*prompt, [i]) for kind, i in self.token_ids().items()}

    def tokens_from_patches(self, values: Tensor, inputs: dict, kind: str) -> Tensor:
        """Numbers of the tower's patches to numbers of the visual tokens that are made of them.

        values: (tiles, patches, C); one tile of all patches in towers whose tiles differ in size.
        inputs: what the features were made from. kind: "image" or "video".
        Returns (n, C), in the order in which the n tokens stand in the prompt.
        Raises ValueError unless the family's own adapter says so.
        """
        raise ValueError(
            self._unknown("which patches a visual token is made of", "reads the tower")
        )

    def places(self, n: int, inputs: dict, kind: str) -> Tensor:
        """Frame, row and column (n, 3) of `n` visual tokens of one kind, "image" or "video".

        A frame is a tile, an image or a video frame; frames are counted through the batch.
        inputs: what the features were made from.
        Raises ValueError unless the family's own adapter says so.
        """
        raise ValueError(self._unknown("where its visual tokens stand", "looks at their places"))

    def _unknown(self, what: str, method: str) -> str:
        return (
            f"{type(self.model).__name__} does not tell {what}, and no adapter says it; the method "
            f"{method}: use another, or write an adapter (docs/08-add-a-model-family.md)"
        )

    def grid(self, inputs: dict, visual: Tensor) -> Tensor:
        """Frame, row and column (B, S, 3) of each visual token; 0 at text.

        A frame is a tile, an image or a video frame; frames are counted through the sample. A token
        that ends a row stands after its last column.
        inputs: keyword arguments of the backbone. visual: (B, S) bool.
        """
        full = torch.zeros(*visual.shape, 3, dtype=torch.long, device=visual.device)
        for i, (kind, mask) in enumerate(self.kinds(inputs).items()):
            if bool(mask.any()):
                made_from = (ready_made(inputs, kind) or {}).get("inputs", {})
                places = self.places(int(mask.sum()), {**inputs, **made_from}, kind)
                # Even numbers for the frames of images, odd ones for those of videos.
                places = places * torch.tensor([2, 1, 1]) + torch.tensor([i, 0, 0])
                full = full + placed(places, mask)
        index, _ = positions(visual, visual.shape[1])
        frames = full[index][..., 0]
        number = nn.functional.pad((frames[:, 1:] != frames[:, :-1]).cumsum(1), (1, 0))
        full[..., 0] = number.scatter(1, index[1], number)
        return full * visual[..., None]

    # ---- input downsampling ----------------------------------------------------------------------
    def smaller(self, inputs: dict, scale: float) -> tuple[dict, list[tuple[int, int]]]:
        """The pictures in a processor's `inputs`, with their sides times `scale`, in whole tokens.

        Returns the inputs that change, and (tokens before, tokens after) of each picture.
        Raises ValueError if the family's pictures cannot be made smaller after its processor.
        """
        raise ValueError(
            f"the processed pictures of {type(self.model).__name__} cannot be made smaller here: "
            "give its processor smaller pictures, or override `smaller` in an adapter"
        )

    def embedded(self, inputs: dict) -> dict:
        """What the model runs with on the pictures that `smaller` made.

        That is `inputs` itself, unless the tower takes pictures of one size only.
        """
        return inputs


def is_picture(name: str) -> bool:
    """Whether an argument of a model holds pictures, or what was made of them."""
    return name.startswith(("pixel_values", "image_embeds", "image_features", "flattened_patches"))


#: Of every family that has none of its own.
ADAPTERS.fallback = ADAPTERS.base = Adapter
