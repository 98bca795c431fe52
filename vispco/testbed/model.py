"""The testbed's two architectures and their loader: small, real models of the LLaVA and of the Qwen2.5-VL class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..utils.files import brief
from .vocab import (CELLS, EOS, ID, IMAGE, IMAGE_PAD, PAD, QWEN_ID, VIDEO_PAD, VISION_END, VISION_START, WORDS,
                    build_tokenizer)  # fmt: skip

IMAGE_SIZE, PATCH = 64, 8  # one visual token is 8x8 pixels in both models
MEAN, STD = 0.5, 0.5  # pixel normalisation
QWEN_PATCH, MERGE, FRAMES = 4, 2, 2  # Qwen merges 2x2 patches to a token and wants every picture as two frames
_ALIASES = {"testbed": "testbed-llava"}
FOLDER = Path(__file__).resolve().parent / "checkpoints"


@dataclass(frozen=True)
class Spec:
    """What training and evaluation ask of a model, besides its configuration."""

    layers: int
    hidden: int
    aux_layer: int  # the auxiliary heads read the visual states after so many layers: perception goes on in the decoder
    hint_layer: int  # what a question refers to should be known here, and used in the layers above
    opens: tuple[int, ...]  # first layers in which the text may see the image, drawn a step (0.35, 0.3, 0.35)
    closes: tuple[int, ...]  # first layers in which it may no longer (0.5, 0.1, 0.4)
    image: int  # id of the image token
    before: tuple[int, ...] = ()  # ids that open the image
    after: tuple[int, ...] = ()  # ids that close it
    margins: float = 0.0  # in so many of the steps the board lies on a larger picture
    half: bool = False  # stored in float16
    steps: int = 2200
    aux_steps: int = 1500  # steps until the auxiliary objectives weigh nothing
    decay: float = 1 / 3  # last part of the steps, in which the learning rate goes to zero


SPECS = {
    "testbed-llava": Spec(8, 128, 2, 3, (0, 1, 2), (8, 7, 6), ID[IMAGE]),
    "testbed-qwen": Spec(16, 96, 4, 6, (0, 2, 4), (16, 14, 12), QWEN_ID[IMAGE_PAD], (QWEN_ID[VISION_START],),
                         (QWEN_ID[VISION_END],), margins=0.2, half=True, steps=2300, aux_steps=2300, decay=0.15),
}  # fmt: skip
MODELS = tuple(SPECS)


def resolve(name: str) -> str:
    """The full name of a testbed model; ValueError if there is none of that name."""
    key = _ALIASES.get(name, name)
    if key not in SPECS:
        known = (*MODELS, *_ALIASES)
        raise ValueError(f"unknown testbed model {name!r}: expected one of {known}; see testbed.MODELS")
    return key


def name_of(model) -> str:
    """Which testbed model this is, by its architecture."""
    return "testbed-qwen" if model.config.model_type == "qwen2_5_vl" else "testbed-llava"


def _llava_config():
    """The `LlavaConfig`: two CLIP layers (64 patches of 8x8 pixels) and a Llama decoder of eight layers."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    spec = SPECS["testbed-llava"]
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        image_size=IMAGE_SIZE, patch_size=PATCH, projection_dim=64,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=spec.hidden, intermediate_size=352, num_hidden_layers=spec.layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
        pad_token_id=ID[PAD], eos_token_id=ID[EOS], bos_token_id=None, tie_word_embeddings=False,
        initializer_range=0.08,  # scaled to the small width; 0.02 makes training start far more slowly
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=ID[IMAGE],
        image_seq_length=CELLS, vision_feature_layer=-1, vision_feature_select_strategy="default",
        projector_hidden_act="gelu", tie_word_embeddings=False,
    )  # fmt: skip


def _qwen_config():
    """The `Qwen2_5_VLConfig`: a vision tower of one windowed and one full layer, 2x2 patches of 4x4 pixels a visual
    token, and sixteen decoder layers with grouped-query attention and M-RoPE."""
    from transformers import Qwen2_5_VLConfig

    spec = SPECS["testbed-qwen"]
    vision = dict(
        depth=2, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=QWEN_PATCH, spatial_merge_size=MERGE,
        temporal_patch_size=FRAMES, window_size=32, fullatt_block_indexes=[1], out_hidden_size=spec.hidden,
        tokens_per_second=2, initializer_range=0.06,
    )  # fmt: skip
    text = dict(
        vocab_size=len(QWEN_ID), hidden_size=spec.hidden, intermediate_size=256, num_hidden_layers=spec.layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        pad_token_id=ID[PAD], eos_token_id=ID[EOS], bos_token_id=None, tie_word_embeddings=False, initializer_range=0.08,
        # slow frequencies would leave the rows and columns of a small picture all alike; the time section is what
        # finds a colour or a shape wherever it lies
        rope_parameters={"rope_type": "default", "rope_theta": 6.0, "mrope_section": [4, 3, 5]},
    )  # fmt: skip
    return Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=QWEN_ID[IMAGE_PAD], video_token_id=QWEN_ID[VIDEO_PAD],
        vision_start_token_id=QWEN_ID[VISION_START], vision_end_token_id=QWEN_ID[VISION_END], tie_word_embeddings=False,
    )  # fmt: skip


def build_config(name: str = "testbed-llava"):
    """The configuration of the model `name`."""
    return _qwen_config() if resolve(name) == "testbed-qwen" else _llava_config()


def build_model(seed: int, name: str = "testbed-llava"):
    """A fresh, untrained model with seeded weights (the global generator is left as it was)."""
    from transformers import AutoModelForImageTextToText

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(build_config(name))
    if resolve(name) == "testbed-qwen":  # a deep residual stream starts better if every layer adds little
        for key, weight in model.named_parameters():
            if key.endswith(("o_proj.weight", "down_proj.weight")):
                weight.data.mul_((2 * SPECS[resolve(name)].layers) ** -0.5)
    return model


def _llava_processor():
    """A `LlavaProcessor`: a PIL image processor that only rescales and normalises, and the words."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(
        size=square, crop_size=square, resample=2, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    return LlavaProcessor(
        image_processor=images, tokenizer=build_tokenizer(), patch_size=PATCH, image_token=IMAGE,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=_template(IMAGE),
    )  # fmt: skip


def _qwen_processor():
    """Qwen2.5-VL's image processor and the words, for pictures of up to 1024 visual tokens; their sides are rounded to
    8 pixels. The processor class that Qwen shares with its videos would need torchvision; this one is the same without."""
    from transformers import PaddleOCRVLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": PATCH**2, "longest_edge": 1024 * PATCH**2}, patch_size=QWEN_PATCH, merge_size=MERGE,
        temporal_patch_size=FRAMES, image_mean=[MEAN] * 3, image_std=[STD] * 3,
    )  # fmt: skip
    special = {"image_token": IMAGE_PAD, "video_token": VIDEO_PAD, "vision_start_token": VISION_START,
               "vision_end_token": VISION_END}  # fmt: skip
    template = _template(VISION_START + IMAGE_PAD + VISION_END)
    return PaddleOCRVLProcessor(images, build_tokenizer(QWEN_ID, special), chat_template=template)


def _template(image: str) -> str:
    """A chat template for what the models were trained on: image, question, answer, end."""
    return (
        "{% for turn in messages %}{% for part in turn['content'] %}{% if part['type'] == 'image' %}" + image
        + "{% elif part['type'] == 'text' %}{{ ' ' if turn['role'] == 'assistant' }}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% if turn['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )  # fmt: skip


def build_processor(name: str = "testbed-llava"):
    """The processor of the model `name`."""
    return _qwen_processor() if resolve(name) == "testbed-qwen" else _llava_processor()


def load(name: str = "testbed-llava"):
    """Load a shipped model by name: (model in eval mode and float32, processor). Touches no network.

    Raises ValueError that names the folder if its files are damaged; FileNotFoundError if there are none.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    key = resolve(name)
    folder = FOLDER / key
    if not (folder / "model.safetensors").exists():
        raise FileNotFoundError(
            f"no checkpoint in {folder}: make it with `python -m vispco.testbed.train --model {key}`"
        )
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # a remark on how the processor's class is written is of no use to its users
    try:
        # The sizes come from here, not from the folder: a damaged number there would make a model without end.
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder, config=build_config(key), dtype=torch.float32, local_files_only=True, use_safetensors=True,
            attn_implementation="sdpa", output_loading_info=True,
        )  # fmt: skip
        model, found = loaded
        if found["missing_keys"] or found["unexpected_keys"]:
            raise ValueError(f"its weights are not those of {key}")
        return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # readers of damaged files raise anything
        raise ValueError(f"{folder}: the checkpoint is damaged, install vispco again: {brief(error)}") from error
    finally:
        logging.set_verbosity(level)
