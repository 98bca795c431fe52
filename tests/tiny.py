"""Tiny models with random weights, one per model family, and batches for them."""

import functools
from dataclasses import fields

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vispco
from tiny_families import BUILDERS

IMAGE, PAD, BOS, VOCAB = 5, 0, 1, 60
PER_IMAGE = 16


def tiny_llava(layers=6, kv_heads=2, attention="sdpa", scale=0.3, **text):
    """A random LLaVA: 16 visual tokens an image, grouped-query attention."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        ),
        text_config=LlamaConfig(
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            vocab_size=VOCAB,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=2,
            initializer_range=scale,
            **text,
        ),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        attn_implementation=attention,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = PAD
    return model


#: One builder per registered adapter: the contract suite fails if one is missing here.
FAMILIES = {"llava": tiny_llava, **BUILDERS}


@functools.cache
def make(family):
    """The tiny model of a family, built once."""
    return FAMILIES[family]()


def batch(images=(1, 1), text=(9, 9), before=(2, 2), answer=2, padding="left", seed=0):
    """A batch of samples: `images[b]` images and `text[b]` text tokens, `before[b]` of them first.

    The last `answer` text tokens are labelled. Returns a dict of tensors, as a processor and a
    collator give it.
    """
    g = torch.Generator().manual_seed(seed)
    rows, labels = [], []
    for n, t, b in zip(images, text, before, strict=True):
        words = torch.randint(6, VOCAB, (t,), generator=g).tolist()
        row = [BOS] + words[:b] + [IMAGE] * (n * PER_IMAGE) + words[b:]
        rows.append(row)
        labels.append([-100] * (len(row) - answer) + row[len(row) - answer :])
    width = max(map(len, rows))

    def padded(lists, fill):
        space = [[fill] * (width - len(r)) for r in lists]
        pairs = zip(lists, space, strict=True)
        return torch.tensor([s + r if padding == "left" else r + s for r, s in pairs])

    result = {
        "input_ids": padded(rows, PAD),
        "attention_mask": padded([[1] * len(r) for r in rows], 0),
        "labels": padded(labels, -100),
    }
    if sum(images):
        result["pixel_values"] = torch.randn(sum(images), 3, 16, 16, generator=g)
    return result


def without_labels(inputs):
    """The model's inputs alone."""
    return {k: v for k, v in inputs.items() if k != "labels"}


def our_hooks(model):
    """Hooks that vispco registered on any module (transformers leaves some of its own)."""
    return [
        hook
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in hooks.values()
        if getattr(getattr(hook, "func", hook), "__module__", "").startswith("vispco")
    ]


def search_with(model, batches, start=vispco.Gradient, **options):
    """`vispco.search`, with the options of its start and of `SearchOptions` among its own."""

    def take(kind):
        names = {field.name for field in fields(kind)}
        return kind(**{name: options.pop(name) for name in names & options.keys()})

    return vispco.search(
        model, batches, start=take(start), options=take(vispco.SearchOptions), **options
    )
