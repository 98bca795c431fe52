"""testbed-smollm: LLaVA with a pretrained language model of 30 layers, SmolLM2-135M-Instruct.

The repository holds what was trained for it: a vision tower, a projector, and low-rank changes to
the language model (LoRA). The language model itself comes out of a package: see `language`.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import gguf, language
from .processor import IMAGE_SIZE, PATCH, chat_template, llava_processor
from .vocab import CELLS, IMAGE, NUMERALS

NAME = "testbed-smollm"
#: A token that the language model has never used. It stands for a visual token here.
UNUSED, IMAGE_ID = "<reponame>", 4
#: The end of a turn, which also fills up shorter rows.
END_ID = PAD_ID = 2
#: A layer's weight matrices, by their place in the layer.
MATRICES = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
#: W becomes W + LORA_SCALE B A.
LORA_SCALE = 2.0


def build(path: Path, file: gguf.Gguf, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """The model in eval mode, and its processor.

    path: what was trained: `vision_tower.*`, `multi_modal_projector.*`, and for every matrix of the
    language model `lora.layers.*.A` (rank, in) and `.B` (out, rank). file: the language model.
    dtype: of the weights; None: `language.fast_dtype()`.
    Raises KeyError, ValueError or RuntimeError if the weights do not fit.
    """
    from safetensors.torch import load_file
    from transformers import LlavaForConditionalGeneration

    trained = load_file(path)
    base = language.build_model(file, torch.float32)
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(
        None,
        config=build_config(base.config),
        state_dict=merge(base.state_dict(), trained),
        dtype=dtype or language.fast_dtype(),
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    model, found = loaded
    if found["missing_keys"] or found["unexpected_keys"]:
        raise ValueError(f"its weights are not those of {NAME}")
    return model.eval(), build_processor(file)


def build_config(text: Any) -> Any:
    """The LlavaConfig around the language model's configuration `text`.

    The vision tower has three CLIP layers of width 96, for pictures of 64x64 pixels. A visual token
    is a patch of 8x8 pixels.
    """
    from transformers import CLIPVisionConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=64,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        image_seq_length=CELLS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )


def merge(base: dict[str, Tensor], trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """LLaVA's weights: the language model's `base` with its changes, the tower, the projector.

    W + LORA_SCALE B A for every matrix W (arXiv 2106.09685), in float32.
    Raises KeyError if a change is missing.
    """
    state = {f"model.{name}": w for name, w in trained.items() if not name.startswith("lora.")}
    for name, weight in base.items():
        matrix = name.removeprefix("model.").removesuffix(".weight")
        if matrix.endswith(MATRICES):
            a, b = (trained[f"lora.{matrix}.{part}"].float() for part in "AB")
            weight = weight + LORA_SCALE * b @ a
        state[name.replace("model.", "model.language_model.", 1)] = weight
    return state


# ---- its words --------------------------------------------------------------------------------
def build_processor(file: gguf.Gguf) -> Any:
    """The processor: pictures of 64x64 pixels, and the language model's tokenizer.

    A blank comes before an answer that is a word, none before a numeral.
    """
    blank = "('' if part['text'][:1] in '0123456789' else ' ')"
    return llava_processor(build_tokenizer(file), IMAGE, chat_template(IMAGE, blank))


def build_tokenizer(file: gguf.Gguf) -> Any:
    """The language model's tokenizer, with a token for pictures."""
    return language.build_tokenizer(file, {UNUSED: IMAGE})


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """The tokenizer, read once. Raises ImportError that says what to install."""
    return build_tokenizer(language.read())


def question(text: str) -> list[int]:
    """Token ids of a question. Raises ImportError without the language model."""
    return tokenizer()(text, add_special_tokens=False).input_ids


def answer(text: str) -> list[int]:
    """Token ids of an answer. Raises ImportError without the language model."""
    return question(text if text in NUMERALS else f" {text}")
