"""Tiny random models of every family of vision-language models that transformers has.

>>> model = make("qwen3_vl")
>>> inputs, n_visual = prompts("qwen3_vl")
>>> model(**inputs).logits.shape[:2] == inputs["input_ids"].shape
True
"""

import functools
from dataclasses import replace

from zoo import (
    families_gemma,
    families_hybrid,
    families_llava,
    families_query,
    families_qwen,
    families_sparse,
)
from zoo.build import build, missing
from zoo.entry import Entry
from zoo.prompts import prompts as _for_model
from zoo.variants import variants

__all__ = ["FAMILIES", "FAST", "Entry", "build", "make", "missing", "prompts"]

_FILES = (
    families_llava,
    families_qwen,
    families_gemma,
    families_hybrid,
    families_sparse,
    families_query,
)
_BASE = {
    name: replace(entry, model_type=entry.model_type or name)
    for file in _FILES
    for name, entry in file.FAMILIES.items()
}

#: Entries that the default tests run, and what each stands for.
FAST = {
    "llava_eager": "attention written out",
    "qwen3_vl_moe": "experts; features that enter at several layers",
    "qwen3_5": "layers of linear attention",
    "lfm2_vl": "layers of convolution",
    "gemma3n": "hidden states of four dimensions; ready-made features",
    "gemma4_shared": "keys shared between layers",
    "gemma4_heads": "heads that differ by layer",
    "llama4": "rotary embeddings as complex numbers; attention in chunks",
    "kimi_k25": "latent attention",
    "minimax_m3_vl_sparse": "an indexer that chooses what to attend to",
    "blip-2": "its own `generate`, given embeddings",
    "kosmos-2": "its own `generate`, given a mask of visual tokens",
}

#: Every entry by name. The name is the `model_type` of its configuration, or that of a variant.
FAMILIES: dict[str, Entry] = {
    name: replace(entry, fast=name in FAST) for name, entry in {**_BASE, **variants(_BASE)}.items()
}


@functools.cache
def make(name):
    """The tiny model of an entry, built once. Tests must leave it as it was."""
    return build(FAMILIES[name])


def prompts(which, counts=None, text=(9, 7), padding="left", seed=0, video=False):
    """A batch for an entry, by name, or for a model made here: see `zoo.prompts.prompts`."""
    model = make(which) if isinstance(which, str) else which
    return _for_model(model, model.zoo_entry, counts, text, padding, seed, video)
