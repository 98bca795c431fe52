"""FlashAttention's functions in plain PyTorch, under the names that transformers looks up.

So transformers' own code runs, up to the kernels: it decides between dense and varlen calls, unpads
by the mask, and reads position ids. What is asked of the kernels is written down.
"""

import contextlib
import sys
import types
from unittest import mock

import torch
from transformers import modeling_flash_attention_utils as utils

#: Package, and the name of its implementation in transformers.
PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def attention(q, k, v, causal, scale, window):
    """One sequence: (queries, H, E) over (keys, G, E), the last query at the last key."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
    places = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    seen = places >= 0 if causal else places > -len(k)
    if window[0] >= 0:
        seen &= places <= window[0]
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@contextlib.contextmanager
def installed(name):
    """In the block, the package of an implementation is there. Gives a list of its calls."""
    calls = []

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)
    ):
        calls.append(("dense", tuple(q.shape[:2]), k.shape[1]))
        each = zip(q, k, v, strict=True)
        return torch.stack([attention(*x, causal, softmax_scale, window_size) for x in each])

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
    ):
        calls.append(("varlen", cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()))
        assert max_seqlen_q == max(calls[-1][1]) and max_seqlen_k == max(calls[-1][2])
        parts = (q.split(calls[-1][1]), k.split(calls[-1][2]), v.split(calls[-1][2]))
        each = zip(*parts, strict=True)
        return torch.cat([attention(*x, causal, softmax_scale, window_size) for x in each])

    package = types.ModuleType(PACKAGES[name])
    package.flash_attn_func = flash_attn_func
    package.flash_attn_varlen_func = flash_attn_varlen_func
    package.flash_attn_with_kvcache = lambda *args, **kwargs: None
    padding = types.ModuleType("flash_attn.bert_padding")
    padding.pad_input, padding.unpad_input = utils._pad_input, utils._unpad_input
    modules = {package.__name__: package, padding.__name__: padding}
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(utils, "is_flash_attn_2_available", lambda: name.endswith("2")),
        mock.patch.object(utils, "is_flash_attn_3_available", lambda: name.endswith("3")),
        mock.patch.object(utils, "_loaded_implementation", None),
    ):
        yield calls


def switched(model, name):
    """The model, and all its parts, under an implementation: transformers would ask for a GPU."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = name
    return model
