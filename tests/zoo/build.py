"""Builds the tiny random model of an entry."""

from __future__ import annotations

import contextlib
import copy
import inspect
from unittest import mock

import torch
import transformers
from torch import nn

from zoo.entry import AUDIO, BOS, END, EOS, FILM_END, FILM_START, IMAGE, PAD, START, VIDEO, VOCAB

#: Options of decoders. Each configuration takes those that it knows.
TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    ffn_dim=48,
    word_embed_proj_dim=32,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=VOCAB,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
    initializer_range=0.3,
    max_position_embeddings=512,
    sliding_window=None,
    # Mixtures of experts.
    num_experts=4,
    n_routed_experts=4,
    num_local_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    moe_topk=2,
    moe_k=2,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=24,
    # Latent attention (MLA), and its sparse indexer.
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    index_topk=8,
    index_head_dim=8,
    index_n_heads=2,
    # Linear attention.
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)

#: Options of vision towers and of all other parts.
OTHER = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    depth=2,
    num_attention_heads=2,
    num_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    image_size=16,
    patch_size=4,
    out_hidden_size=32,
    projection_dim=32,
    text_hidden_size=32,
    num_position_embeddings=64,
    vision_use_head=False,
    initializer_range=0.3,
)

#: Names under which configurations keep the ids of special tokens.
IDS = {
    **dict.fromkeys(["image_token_id", "image_token_index", "image_patch_id"], IMAGE),
    **dict.fromkeys(["video_token_id", "video_token_index"], VIDEO),
    **dict.fromkeys(["audio_token_id", "audio_token_index"], AUDIO),
    **dict.fromkeys(["vision_start_token_id", "image_start_token_id"], START),
    **dict.fromkeys(["vision_end_token_id", "image_end_token_id"], END),
    **dict.fromkeys(["boi_token_id", "boi_token_index"], START),
    **dict.fromkeys(["eoi_token_id", "eoi_token_index"], END),
    "video_start_token_id": FILM_START,
    "video_end_token_id": FILM_END,
}


def missing(entry, video=False):
    """What this release of transformers lacks of an entry, in words; "" if it has all.

    With `video`, what it lacks to run the entry on films.
    """
    here = transformers.__version__
    for name in filter(None, (entry.cls, entry.text_class)):
        if not hasattr(transformers, name):
            return f"transformers {here} has no {name}"
    since = (entry.video_since if video else "") or entry.since
    if since and release(here) < release(since):
        return f"transformers {here} has an older {entry.cls}: this is for {since} and newer"
    forward = inspect.signature(getattr(transformers, entry.cls).forward)
    if entry.ready and "mm_encoder_outputs" not in forward.parameters:
        return f"{entry.cls} of transformers {here} takes no ready-made features"
    return ""


def release(version):
    """(major, minor) of a version."""
    return tuple(map(int, version.split(".")[:2]))


def build(entry):
    """The tiny model of an entry: in eval mode, float32, the same at each call.

    Raises ValueError if this release of transformers lacks its class.
    """
    if lack := missing(entry):
        raise ValueError(lack)
    cls = getattr(transformers, entry.cls)
    config = configuration(entry, cls.config_class)
    if entry.attention is not None:
        config._attn_implementation = entry.attention
    with torch.random.fork_rng(devices=[]), without_timm():
        torch.manual_seed(0)
        model = cls(config).float().eval()
        if entry.shrink is not None:
            entry.shrink(model)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = PAD
    stir(model)
    model.zoo_entry = entry
    return model


# ---- configurations ------------------------------------------------------------------------------
def configuration(entry, cls):
    """The configuration of an entry's model."""
    # Configurations write into the dictionaries that they are given.
    entry = copy.deepcopy(entry)
    options = {"text_config": entry.text, "vision_config": entry.vision, **entry.others}
    default = cls()
    parts = {}
    for name, kind in (getattr(cls, "sub_configs", None) or {}).items():
        usual = getattr(default, name, None)
        # What is absent by default stays so, unless the entry says how to make it.
        if name in entry.top or (usual is None and not options.get(name)):
            continue
        kind = kind if usual is None else type(usual)
        if name == "text_config" and entry.text_class:
            kind = getattr(transformers, entry.text_class)
        shared = TEXT if name == "text_config" else OTHER
        parts[name] = part(kind, shared, options.get(name, {})).to_dict()
    # A configuration without a part for the text is that of the text.
    if "text_config" in parts:
        return cls(**{**known(cls, IDS), **parts, **entry.top})
    return cls(**{**known(cls, {**TEXT, **IDS}), **entry.text, **parts, **entry.top})


def part(cls, shared, options):
    """One configuration within: the shared options that it knows, then its own."""
    parts = {}
    for name in getattr(cls, "sub_configs", None) or {}:
        inner = getattr(cls(), name, None)
        if inner is not None:
            parts[name] = part(type(inner), OTHER, options.get(name, {}))
    return cls(**{**known(cls, shared), **options, **parts})


def known(cls, options):
    """Those of the options that a configuration class has.

    Decoders read the id of padding even where the first releases of transformers 5 list none.
    """
    names = {*cls().to_dict(), *inspect.signature(cls.__init__).parameters, "pad_token_id"}
    return {name: value for name, value in options.items() if name in names}


# ---- weights -------------------------------------------------------------------------------------
@torch.no_grad()
def stir(model):
    """Makes every parameter matter: some are zero, constant or tiny at first."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.numel() or not parameter.is_floating_point() or not parameter.ndim:
            continue
        finite = bool(parameter.isfinite().all())
        spread = float(parameter.std(correction=0))
        if not finite or spread == 0:
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            # The weights of a norm stay around one.
            scale = finite and parameter.ndim == 1 and float(parameter.mean()) == 1
            parameter.copy_(1 + 0.2 * noise if scale else noise)
        elif parameter.ndim >= 2 and spread < 0.1:
            parameter.mul_(0.25 / spread)


class Blind(nn.Module):
    """Stands where a tower of the package timm would: these pictures are ready-made features."""

    dtype = torch.float32

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.ones(1))


@contextlib.contextmanager
def without_timm():
    """Within, `AutoModel.from_config` makes a `Blind` for towers that need timm."""
    real = transformers.AutoModel.from_config

    def from_config(config, **options):
        blind = config.model_type in ("timm_wrapper", "gemma3n_vision")
        return Blind(config) if blind else real(config, **options)

    with mock.patch.object(transformers.AutoModel, "from_config", from_config):
        yield
