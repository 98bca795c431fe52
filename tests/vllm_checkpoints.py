"""Checkpoints of the testbed as vLLM reads them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vispco import testbed

#: Of testbed-qwen, and of what vLLM's attention for CPUs takes: numbers of a head.
OWN, WIDE = 24, 32
HEADS = 4


def saved(name: str, folder: Path) -> Path:
    """The testbed model `name` and its processor in `folder`, for vLLM."""
    model, processor = testbed.load(name)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    if name == "testbed-qwen":
        weights = widened(weights, folder / "config.json")
    else:
        # vLLM 0.32 knows the names of older releases of transformers.
        weights = {
            key.replace("vision_tower.", "vision_tower.vision_model."): x
            for key, x in weights.items()
        }
    weights = {key: x.contiguous() for key, x in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def widened(weights: dict[str, Tensor], config: Path) -> dict[str, Tensor]:
    """testbed-qwen with heads of 32 numbers, of which 8 are 0: the same function.

    Pair i of a head turns by p theta^(-2i / 24) = p (theta^(32 / 24))^(-2i / 32). Queries are
    scaled up, since their products are divided by sqrt(32). The hidden states, of 96 numbers, get
    32 zeros. So RMSNorm's mean of squares is 3/4 of what it was, and its weights make up for that.
    """
    settings = json.loads(config.read_text())
    text, share = settings["text_config"], OWN / WIDE
    text["hidden_size"] = settings["vision_config"]["out_hidden_size"] = WIDE * HEADS
    text["rms_norm_eps"] *= share
    rope = text["rope_parameters"]
    rope["rope_theta"] **= 1 / share
    rope["mrope_section"][-1] += (WIDE - OWN) // 2
    config.write_text(json.dumps(settings))
    return {name: _wide(name, x, share) for name, x in weights.items()}


def _wide(name: str, x: Tensor, share: float) -> Tensor:
    own, wide = OWN * HEADS, WIDE * HEADS
    if "visual" in name and ".merger.mlp.2." not in name:
        return x
    part = name.split(".")[-2]
    if part in ("q_proj", "k_proj"):
        # Halves of a head turn together: each gets its zeros.
        x = _padded(x.unflatten(0, (-1, 2, OWN // 2)), 2, WIDE // 2).flatten(0, 2)
        x = x * share**-0.5 if part == "q_proj" else x
    elif part == "v_proj":
        x = _padded(x.unflatten(0, (-1, OWN)), 1, WIDE).flatten(0, 1)
    elif part == "o_proj":
        x = _padded(x.unflatten(1, (-1, OWN)), 2, WIDE).flatten(1)
    elif "norm" in part:
        x = x * share**0.5
    if part not in ("q_proj", "k_proj", "v_proj") and x.shape[0] == own:
        x = _padded(x, 0, wide)
    if x.ndim == 2 and x.shape[1] == own:
        x = _padded(x, 1, wide)
    return x


def _padded(x: Tensor, dim: int, size: int) -> Tensor:
    more = list(x.shape)
    more[dim] = size - x.shape[dim]
    return torch.cat([x, x.new_zeros(more)], dim)


def tiny_qwen3_vl(folder: Path, qwen: Path) -> Path:
    """Qwen3-VL with random weights, and the processor of testbed-qwen as saved in `qwen`."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    own = json.loads((qwen / "config.json").read_text())
    ids = {name: number for name, number in own.items() if name.endswith("token_id")}
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
        "initializer_range": 0.3,
    }
    text = {
        "vocab_size": own["text_config"]["vocab_size"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.3,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    }
    torch.manual_seed(0)
    config = Qwen3VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, **ids)
    Qwen3VLForConditionalGeneration(config).eval().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((qwen / name).read_bytes())
    processor = json.loads((qwen / "processor_config.json").read_text())
    processor["processor_class"] = "Qwen3VLProcessor"
    processor["video_processor"]["video_processor_type"] = "Qwen3VLVideoProcessor"
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder
