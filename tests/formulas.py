"""FLOPs of vision towers and projectors, family by family, written down by hand.

An oracle: the library counts them on a blank model instead, and has no formula of any family.
Conventions of `vispco.flops`.
"""

from math import prod

from vispco.models.towers import class_token, patches, side


def encoder_layer(tokens, hidden, ffn, matrices=2, spans=None):
    """One transformer layer. spans: lengths of the pieces within which tokens attend."""
    attention = sum(n * n for n in ([tokens] if spans is None else spans))
    return 2 * tokens * (4 * hidden * hidden + matrices * hidden * ffn) + 4 * attention * hidden


def two_matrices(tokens, width, hidden, out):
    """Two matrices, width -> hidden -> out."""
    return 2 * tokens * (width * hidden + hidden * out)


def vit(v):
    """CLIP, SigLIP or InternViT on one image: patches, every layer, SigLIP's pooling head."""
    d, n = v.hidden_size, patches(v)
    embedding = 2 * n * v.num_channels * side(v.patch_size) ** 2 * d
    layers = v.num_hidden_layers * encoder_layer(n + class_token(v), d, v.intermediate_size)
    head = 4 * d * d + 4 * n * d * d + 4 * n * d + 4 * d * v.intermediate_size
    siglip = v.model_type == "siglip_vision_model" and v.vision_use_head
    return embedding + layers + (head if siglip else 0)


def tiles(config, count):
    """Tower and projector of families of tiles, for `count` of them."""
    v, hidden = config.vision_config, config.get_text_config(decoder=True).hidden_size
    return count * vit(v), count * PROJECTORS[config.model_type](config, v, patches(v), hidden)


def llava(config, v, n, hidden):
    """Outputs of several tower layers may be joined; "full" takes the class token in."""
    n += config.vision_feature_select_strategy == "full" and class_token(v)
    layers = config.vision_feature_layer
    joined = len(layers) if isinstance(layers, (list, tuple)) else 1
    return two_matrices(n, joined * v.hidden_size, hidden, hidden)


def internvl(config, v, n, hidden):
    """Squares of patches side by side, two matrices."""
    square = int(1 / config.downsample_ratio) ** 2
    return two_matrices(n // square, square * v.hidden_size, hidden, hidden)


PROJECTORS = {
    "llava": llava,
    "llava_next": llava,
    "llava_onevision": llava,
    "internvl": internvl,
    "idefics3": lambda config, v, n, hidden: 2 * n * v.hidden_size * hidden,
    "smolvlm": lambda config, v, n, hidden: 2 * n * v.hidden_size * hidden,
    "gemma3": lambda config, v, n, hidden: 2 * config.mm_tokens_per_image * v.hidden_size * hidden,
    "paligemma": lambda config, v, n, hidden: 2 * n * v.hidden_size * v.projection_dim,
}


def qwen(config, grids):
    """Tower and mergers of the Qwen families. grids: (time, height, width) of each image."""
    v, n = config.vision_config, sum(map(prod, grids))
    first = config.model_type == "qwen2_vl"
    width, out = (v.embed_dim, v.hidden_size) if first else (v.hidden_size, v.out_hidden_size)
    ffn = v.embed_dim * v.mlp_ratio if first else v.intermediate_size
    total = 2 * n * v.in_channels * v.temporal_patch_size * side(v.patch_size) ** 2 * width
    for layer in range(v.depth):
        spans, matrices = [h * w for t, h, w in grids for _ in range(t)], 2
        if config.model_type == "qwen2_5_vl":
            matrices = 3
            spans = spans if layer in v.fullatt_block_indexes else windows(v, grids)
        total += encoder_layer(n, width, ffn, matrices, spans)
    unit = v.spatial_merge_size**2
    mergers = 1 + len(getattr(v, "deepstack_visual_indexes", ()))
    return total, mergers * two_matrices(n // unit, unit * width, unit * width, out)


def windows(v, grids):
    """Patches of each window: squares of whole tokens, smaller at the right and bottom edge."""
    size = v.window_size // v.spatial_merge_size // side(v.patch_size) * v.spatial_merge_size

    def pieces(length):
        return [min(size, length - start) for start in range(0, length, size)]

    return [a * b for t, h, w in grids for _ in range(t) for a in pieces(h) for b in pieces(w)]
