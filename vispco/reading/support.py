"""Which models cannot be pruned, and why: told by a configuration alone, before any weights.

Pruning takes visual tokens out of the prompt that a decoder reads. So it needs a decoder that holds
them, and a prompt that says where they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

_CROSS = "cross-attention, its decoder never holds visual tokens"
_ENCODER = "encoder-decoder, its decoder never holds visual tokens: they stay in the encoder"
_TEXT = "a language model without a vision part, so without visual tokens"

#: {model_type: why it cannot be pruned}, of families whose default configurations do not say so.
NAMED = {
    "blip": _CROSS,
    "vision-encoder-decoder": _ENCODER,
    "diffusion_gemma": "diffusion, it refines blocks of text instead of writing token by token",
    "git": "its image tokens are added inside the model, so the prompt does not say where they are",
    "pi0": "robotics, it predicts actions instead of writing text",
}
# Where configurations name the layers of cross-attention: Mllama, Idefics, Evolla.
_CROSS_LAYERS = ("cross_attention_layers", "cross_layer_interval", "aligner_num_add_layers")
# In the names of what a configuration says of pictures: vision_config, image_token_id, vq_config.
_PICTURES = re.compile("vision|visual|image|img|video|picture|pixel|vq_")
_ADVICE = (
    "choose a vision-language model whose decoder reads the image as tokens of its prompt, such as "
    "LLaVA, Qwen2.5-VL or InternVL"
)


def check_supported(model: Any) -> None:
    """Raise ValueError, with the type of the model and the reason, if it cannot be pruned.

    model: a model of Hugging Face, or its configuration. No weights are needed. A model that passes
    need not work: nothing in its configuration speaks against it. For a model that an adapter of
    your own handles, ask that adapter instead.

    >>> from transformers import LlavaConfig, MllamaConfig
    >>> check_supported(LlavaConfig())
    >>> check_supported(MllamaConfig())  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: cannot prune 'mllama' models: cross-attention, its decoder never holds visual ...
    """
    from transformers import PreTrainedConfig

    config = getattr(model, "config", model)
    if isinstance(model, str | os.PathLike):
        raise ValueError(
            f"expected a model of Hugging Face or its configuration, got the name {str(model)!r}: "
            f"load it, transformers.AutoModelForImageTextToText.from_pretrained({str(model)!r})"
        )
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(
            "expected a model of Hugging Face or its configuration, got "
            f"{type(model).__name__}; of a wrapper give the model inside"
        )
    found = _fault(config, loaded=config is not model)
    if found:
        reason, advice = found
        name = getattr(config, "model_type", "") or type(config).__name__
        raise ValueError(f"cannot prune {name!r} models: {reason}; {advice}")


def candidates() -> dict[str, str]:
    """{model_type: class}, of the image-text-to-text models of the installed transformers.

    Without those of `not_applicable`. Nothing in the default configuration speaks against the
    others; whether they work is for a test to say.
    """
    return {name: cls for name, cls, reason in _survey() if reason is None}


def not_applicable() -> dict[str, str]:
    """{model_type: why it cannot be pruned}, of transformers' image-text-to-text models."""
    return {name: reason for name, _, reason in _survey() if reason is not None}


def _survey() -> Iterator[tuple[str, str, str | None]]:
    """(model_type, class, why it cannot be pruned) by the default configurations."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    for name, cls in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items():
        try:
            found = _fault(CONFIG_MAPPING[name]())
        except Exception:
            # A configuration without defaults, or one that needs another package.
            found = (NAMED[name], _ADVICE) if name in NAMED else None
        yield name, cls, found[0] if found else None


def _fault(config: Any, loaded: bool = False) -> tuple[str, str] | None:
    """(why a model cannot be pruned, what to do instead), or None.

    loaded: whether there is a model already, of whatever class.
    """
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as MAPPING,
        PreTrainedConfig,
        __version__,
    )

    if config.model_type in NAMED:
        return NAMED[config.model_type], _ADVICE
    # BLIP-2 may have a T5 as its language model.
    texts = config, getattr(config, "text_config", None)
    if any(getattr(text, "is_encoder_decoder", False) for text in texts):
        return _ENCODER, _ADVICE
    if any(getattr(text, name, None) for text in texts for name in _CROSS_LAYERS):
        return _CROSS, _ADVICE
    listed = type(config) in MAPPING
    parts = {key: part for key, part in vars(config).items() if isinstance(part, PreTrainedConfig)}
    for name, part in parts.items():
        if type(part) in MAPPING and not (listed or loaded):
            reason = f"only its part {name.removesuffix('_config')!r} is a vision-language model"
            return reason, f"give that part, a {part.model_type!r} model, to vispco in Python"
    if not any(map(_speaks_of_pictures, [config, *parts.values()])):
        return _TEXT, _ADVICE
    # A class of the user's own, or one that comes with the model, is in no list of transformers.
    foreign = not type(config).__module__.startswith("transformers.")
    if not (listed or foreign or loaded):
        missing = f"transformers {__version__} has no image-text-to-text class for them"
        own = "or register an adapter of your own with vispco.register_adapter()"
        return f"{missing} (AutoModelForImageTextToText)", f"{_ADVICE}, {own}"
    return None


def _speaks_of_pictures(config: Any) -> bool:
    return any(_PICTURES.search(name) and value is not None for name, value in vars(config).items())
