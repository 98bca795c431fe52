"""Variants of families: another decoder in them, or another attention implementation."""

from dataclasses import replace

from zoo.families_gemma import FULL, SLIDING

#: Latent attention with rotary embeddings stretched to longer texts.
YARN = dict(
    type="yarn",
    rope_type="yarn",
    rope_theta=1000.0,
    factor=2.0,
    original_max_position_embeddings=64,
    max_position_embeddings=128,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.1,
    partial_rotary_factor=0.5,
)
#: Latent attention (MLA).
LATENT = dict(
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    head_dim=16,
    num_key_value_heads=4,
    first_k_dense_replace=1,
    rope_parameters=YARN,
    max_position_embeddings=128,
)
#: Caps on attention logits.
GEMMA2 = dict(
    sliding_window=8,
    layer_types=[SLIDING, FULL] * 3,
    query_pre_attn_scalar=8,
    attn_logit_softcapping=2.0,
)
#: Wider heads in the layers of full attention.
WIDE = dict(per_layer_config={f"{layer:02d}": {"head_dim": 16} for layer in (2, 4, 6)})
#: Visual tokens that attend to each other in both directions, and experts.
BOTH_WAYS = dict(
    use_bidirectional_attention="vision",
    enable_moe_block=True,
    num_experts=4,
    top_k_experts=2,
    moe_intermediate_size=24,
)
SPARSE = dict(layer_types=["full_attention", "minimax_m3_sparse"] * 3)
#: An indexer that chooses all: as in prompts shorter than its budget.
DENSE = dict(index_topk=512)

#: One of each kind of decoder, again with the attention that is written out.
EAGER = (
    "llava",
    "gemma3",
    "gemma4",
    "llama4",
    "qwen3_5",
    "qwen3_vl",
    "lfm2_vl",
    "mistral3",
    "paligemma2",
    "kimi_k25",
)


def variants(families):
    """{name: Entry}: the families, by name, with some options of their decoders changed."""

    def changed(name, **options):
        return replace(families[name], text={**families[name].text, **options})

    found = {
        "gemma4_shared": changed("gemma4", num_kv_shared_layers=2),
        "gemma4_heads": changed("gemma4", **WIDE),
        "gemma4_moe_bidirectional": changed("gemma4", **BOTH_WAYS),
        "minimax_m3_vl_sparse": changed("minimax_m3_vl", **SPARSE),
        "dots3_note_dense": changed("dots3_note", **DENSE),
        "mistral_large4_dense": changed("mistral_large4", **DENSE),
        "mistral3_mla": replace(families["mistral3"], text=LATENT, text_class="Mistral4Config"),
        "paligemma2": replace(families["paligemma"], text=GEMMA2, text_class="Gemma2Config"),
    }
    each = {**families, **found}
    return found | {f"{name}_eager": replace(each[name], attention="eager") for name in EAGER}
