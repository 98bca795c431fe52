"""The models of the testbed: two small ones that are trained from nothing, and `smollm`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.stills import load_processor
from ..registry import did_you_mean
from ..utils.files import brief
from . import language, smollm, vocab
from .processor import IMAGE_SIZE, PATCH
from .vocab import CELLS, ID, QWEN_ID, VIDEO_ID

#: Pixels a side of a Qwen patch. Qwen merges 2x2 of them to a token, and wants two frames of every
#: picture.
QWEN_PATCH, MERGE, FRAMES = 4, 2, 2
FOLDER = Path(__file__).resolve().parent / "checkpoints"
_ALIASES = {"testbed": "testbed-llava"}


@dataclass(frozen=True)
class ImageTokens:
    """Token ids of an image in a prompt: before it, for each of its visual tokens, and after it."""

    image: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


IMAGE_TOKENS = {
    "testbed-llava": ImageTokens(ID[vocab.IMAGE]),
    "testbed-qwen": ImageTokens(
        QWEN_ID[vocab.IMAGE_PAD], (QWEN_ID[vocab.VISION_START],), (QWEN_ID[vocab.VISION_END],)
    ),
    smollm.NAME: ImageTokens(smollm.IMAGE_ID),
}
#: testbed-qwen, trained further on clips: see `vispco.testbed.video`.
VIDEO = "testbed-qwen-video"
#: Those that answer about pictures.
MODELS = tuple(IMAGE_TOKENS)
#: Those that need no other package's weights.
EMBEDDED = MODELS[:2]


def resolve(name: str) -> str:
    """The full name of a testbed model. Raises ValueError if there is none of that name."""
    key = _ALIASES.get(name, name)
    if key not in MODELS:
        known = ", ".join(MODELS)
        hint = did_you_mean(name, MODELS)
        raise ValueError(f"unknown testbed model {name!r}: {hint}expected one of {known}")
    return key


def build_config(name: str = "testbed-llava"):
    """The configuration of the model `name`, one of `EMBEDDED`, or `VIDEO`."""
    if name == VIDEO:
        return _qwen_config(VIDEO_ID)
    return _qwen_config(QWEN_ID) if resolve(name) == "testbed-qwen" else _llava_config()


def _llava_config():
    """Two CLIP layers (64 patches of 8x8 pixels), and a Llama decoder of eight layers."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=64,
    )
    text = LlamaConfig(
        **_text_options(ID),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ID[vocab.IMAGE],
        image_seq_length=CELLS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )


def _qwen_config(words: dict[str, int]):
    """A vision tower of one windowed and one full layer, and a decoder of sixteen layers.

    words: the vocabulary. A visual token is 2x2 patches of 4x4 pixels. The decoder has
    grouped-query attention and M-RoPE.
    """
    from transformers import Qwen2_5_VLConfig

    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "patch_size": QWEN_PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "window_size": 32,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 96,
        "tokens_per_second": 2,
        "initializer_range": 0.06,
    }
    text = {
        **_text_options(words),
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        # Slow frequencies would leave the rows and columns of a small picture all alike.
        # The time section is what finds a colour or a shape wherever it lies.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 6.0,
            "mrope_section": [4, 3, 5],
        },
    }
    return Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=QWEN_ID[vocab.IMAGE_PAD],
        video_token_id=QWEN_ID[vocab.VIDEO_PAD],
        vision_start_token_id=QWEN_ID[vocab.VISION_START],
        vision_end_token_id=QWEN_ID[vocab.VISION_END],
        tie_word_embeddings=False,
    )


def _text_options(words: dict[str, int]) -> dict[str, Any]:
    """What the configurations of both decoders share."""
    return {
        "vocab_size": len(words),
        "num_attention_heads": 4,
        "pad_token_id": ID[vocab.PAD],
        "eos_token_id": ID[vocab.EOS],
        "bos_token_id": None,
        "tie_word_embeddings": False,
        # Scaled to the small width: with 0.02 training starts far more slowly.
        "initializer_range": 0.08,
    }


def load(name: str = "testbed-llava", dtype: torch.dtype | None = None):
    """Load a model by name, without a network: (model in eval mode, processor).

    name: one of `MODELS`, or "testbed-qwen-video".
    dtype: of the weights. None: float32; for testbed-smollm bfloat16, on a CPU that multiplies
    matrices of it.
    Raises ValueError that names the folder if its files are damaged; FileNotFoundError if there are
    none; ImportError that says what to install if testbed-smollm's language model is missing.

    >>> model, processor = load("testbed-qwen")
    >>> model.config.text_config.num_hidden_layers
    16
    """
    from transformers.utils import logging

    key = name if name == VIDEO else resolve(name)
    folder = FOLDER / key
    if not (folder / "model.safetensors").exists():
        raise FileNotFoundError(f"no checkpoint in {folder}: install vispco again")
    # Whose absence or damage is no fault of the folder.
    file = language.read() if key == smollm.NAME else None
    level = logging.get_verbosity()
    # A remark on how the processor's class is written is of no use to its users.
    logging.set_verbosity_error()
    try:
        if file:
            return smollm.build(folder / "model.safetensors", file, dtype)
        model = _weights(key, folder, dtype or torch.float32)
        return model, load_processor(str(folder), local_files_only=True)
    # Readers of damaged files raise anything.
    except Exception as error:
        message = f"{folder}: the checkpoint is damaged, install vispco again: {brief(error)}"
        raise ValueError(message) from error
    finally:
        logging.set_verbosity(level)


def _weights(key: str, folder: Path, dtype: torch.dtype):
    """The model of a folder.

    Its sizes come from `build_config`: a damaged number in the folder would make a model without
    end.
    """
    from transformers import AutoModelForImageTextToText

    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        folder,
        config=build_config(key),
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    model, found = loaded
    if found["missing_keys"] or found["unexpected_keys"]:
        raise ValueError(f"its weights are not those of {key}")
    return model.eval()
