"""The vision tower as methods see it.

Attention and keys of patches, tokens made of them, their places.
"""

import copy
import functools
import importlib
import inspect
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vispco
from naive_vision import NAIVE_VISION
from oracles import error, hook_counts, pruned_with
from test_families import IMAGES, VIDEO_SAMPLES, generate, image_sizes
from tiny import FAMILIES, PER_IMAGE, batch, make, without_labels
from tiny_families import GRIDS, IMAGE, PROCESSORS, SIZES, VIDEO, VIDEOS, prompts
from vispco import PruningConfig
from vispco.methods.pool import Pool
from vispco.pruning._tower import Replaced, Tower, placed, received
from vispco.reading.structure import find_tower
from vispco.registry import METHODS, adapter_for

# Its plain batches are what its processor gives.
PROCESSORS.setdefault(type(make("llava")), None)
CASES = [(name, "images") for name in FAMILIES] + [(name, "video") for name in sorted(VIDEOS)]
families = pytest.mark.parametrize("name", FAMILIES)
everything = pytest.mark.parametrize("name, samples", CASES)
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@functools.cache
def eager(name):
    """A family's tiny model, with attention weights to be seen."""
    return FAMILIES[name](attention="eager")


@functools.cache
def mixed(name, samples="images", padding="left"):
    """Inputs of a batch: several images of several sizes, none, video."""
    return prompts(make(name), {"images": IMAGES, "video": VIDEO_SAMPLES}[samples], padding)[0]


def listen(model, inputs, run=None):
    """A tower that has heard one forward pass, its adapter, and the visual mask."""
    adapter, handles = adapter_for(model)(model), []
    tower = Tower(adapter)
    tower.register(handles.append)
    with torch.no_grad():
        (run or (lambda: model(**inputs)))()
    for handle in handles:
        handle.remove()
    return tower, adapter, adapter.visual_mask(inputs["input_ids"], None)


# ---- attention and keys --------------------------------------------------------------------------
# By hand: the attention whose layer's output becomes the visual tokens.
LAYER = {
    **dict.fromkeys(
        ("llava", "llava_next", "llava_onevision", "gemma3", "paligemma"),
        "vision_tower.encoder.layers.1.self_attn",
    ),
    **dict.fromkeys(("idefics3", "smolvlm"), "vision_model.encoder.layers.1.self_attn"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), "visual.blocks.1.attn"),
    "qwen3_vl": "visual.blocks.3.attn",
    "internvl": "vision_tower.encoder.layer.1.attention",
}


def heard(model, name, inputs, monkeypatch):
    """[(weights (H, n, n), keys (n, H, E))] of each tile or frame, as they ran."""
    attention, pieces, keys = model.model.get_submodule(LAYER[name]), [], []
    module = importlib.import_module(type(attention).__module__)
    plain = module.eager_attention_forward

    def recording(owner, query, key, *args, **kwargs):
        out, weights = plain(owner, query, key, *args, **kwargs)
        if owner is attention:
            pieces.extend(weights)
            keys.extend(key.transpose(1, 2))
        return out, weights

    monkeypatch.setattr(module, "eager_attention_forward", recording)
    with torch.no_grad():
        model(**inputs)
    return list(zip(pieces, keys, strict=True))


def by_patch(weights, keys, class_token):
    """[[attention received, *head-mean keys]] of each patch of a tile.

    By loops over heads and query rows.
    """
    heads, n, _ = weights.shape
    rows = [0] if class_token else range(n)
    table = weights.tolist()
    return [
        [
            math.fsum(table[h][i][j] for h in range(heads) for i in rows) / (heads * len(rows)),
            *(
                math.fsum(keys[j, h, e].item() for h in range(heads)) / heads
                for e in range(keys.shape[-1])
            ),
        ]
        for j in range(n)
    ]


@everything
@pytest.mark.parametrize("padding", ["left", "right"])
def test_read_is_the_towers_own_attention(name, samples, padding, monkeypatch):
    """Under eager attention, which shows its weights, and under sdpa, which does not."""
    inputs = mixed(name, samples, padding)
    tiles = [
        torch.tensor(by_patch(w, k, name in ("llava", "llava_next", "internvl")))
        for w, k in heard(eager(name), name, inputs, monkeypatch)
    ]
    for model in (eager(name), make(name)):
        tower, adapter, visual = listen(model, inputs)
        expected = torch.zeros(*visual.shape, tiles[0].shape[1])
        start = 0
        for kind, token in (("image", IMAGE), ("video", VIDEO)):
            mask = inputs["input_ids"] == token
            if mask.any():
                count = tile_count(name, kind, inputs)
                part = tiles[start : start + count]
                values = torch.cat(part) if name in QWEN else torch.stack(part)
                # Tested below.
                expected[mask] = adapter.tokens_from_patches(values, tower.inputs, kind)
                start += count
        assert start == len(tiles)
        attention, keys = tower.read(inputs, visual)
        assert torch.allclose(attention, expected[..., 0], atol=1e-6) and attention.std() > 0
        assert torch.allclose(keys, expected[..., 1:], atol=1e-5) and keys.std() > 0.01
        assert (
            (attention[~visual] == 0).all() and (keys[~visual] == 0).all() and bool((~visual).any())
        )


def tile_count(name, kind, inputs):
    """Tiles, images or frames that the tower sees."""
    if name in QWEN:
        return int(inputs[f"{kind}_grid_thw"][:, 0].sum())
    if kind == "video":
        return inputs["pixel_values_videos"].shape[:2].numel()
    pixels = inputs["pixel_values"]
    # LLaVA-OneVision: alone in its sample, an image is cut.
    if "batch_num_images" in inputs:
        cut = [n == 1 for n in inputs["batch_num_images"].tolist() for _ in range(n)]
        return sum(
            int((tiles != 0).flatten(1).any(1).sum()) if c else 1
            for tiles, c in zip(pixels, cut, strict=True)
        )
    return int((pixels != 0).flatten(-3).any(-1).sum())


@pytest.mark.parametrize("name", ["llava", "llava_next"])
@pytest.mark.parametrize(
    "layer, expected", [(-2, 0), (-1, 1), (1, 0), (2, 1), ([-2, 1], 0), ([1, -1], 1), (0, 0)]
)
def test_the_layer_read_is_the_one_whose_output_is_taken(name, layer, expected):
    model = make(name)
    adapter, before = adapter_for(model)(model), model.config.vision_feature_layer
    model.config.vision_feature_layer = layer
    try:
        assert adapter.vision_layer() is model.model.vision_tower.encoder.layers[expected]
    finally:
        model.config.vision_feature_layer = before


def test_windowed_layers_are_not_read():
    """Qwen2.5-VL: the last layer that attends to whole frames."""
    model = copy.deepcopy(make("qwen2_5_vl"))
    model.config.vision_config.fullatt_block_indexes = [0]
    assert adapter_for(model)(model).vision_layer() is model.model.visual.blocks[0]


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_patches_of_padding_neither_get_nor_give(name, attention, monkeypatch):
    """An image that fills only part of its square."""
    inputs = prompts(make(name), [[2, ("image", 0), 3]])[0]
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[..., :12, :8] = True
    inputs = {**inputs, "pixel_attention_mask": mask}
    ((weights, _),) = heard(eager(name), name, inputs, monkeypatch)
    real = mask[0, 0, ::2, ::2].flatten()
    patches = (weights.mean(0)[real].mean(0)).view(4, 2, 4, 2).mean((1, 3)).flatten()
    tower, _, visual = listen(make(name) if attention == "sdpa" else eager(name), inputs)
    got = tower.read(inputs, visual)[0]
    assert (
        torch.allclose(got[visual], patches, atol=1e-6)
        and (got[visual].view(4, 4)[:, 2:] == 0).all()
    )


@everything
def test_precisions(name, samples):
    """bfloat16 towers are read in float32, float64 ones in float64."""
    expected = read(make(name), mixed(name, samples))
    for dtype, close in ((torch.bfloat16, 0.1), (torch.float64, 1e-5)):
        model = copy.deepcopy(make(name)).to(dtype)
        inputs = {
            k: v.to(dtype) if v.is_floating_point() else v for k, v in mixed(name, samples).items()
        }
        got = read(model, inputs)
        assert all(x.dtype == max(dtype, torch.float32, key=lambda d: d.itemsize) for x in got)
        assert all(
            (x - y).abs().max() <= close * y.abs().max() for x, y in zip(got, expected, strict=True)
        )


def read(model, inputs):
    """Attention and keys of one forward pass."""
    tower, _, visual = listen(model, inputs)
    return tower.read(inputs, visual)


# ---- tokens from patches: the model's own way, with projectors that average ----------------------
class Average(nn.Module):
    """Takes the place of a projector: the mean of the patches of a token."""

    def __init__(self, patches=1, width=None):
        super().__init__()
        self.patches, self.width = patches, width

    def forward(self, x):
        """(..., patches * C) or (n * patches, C) to (..., C)."""
        if self.width is not None:
            x = x.view(-1, self.patches * self.width)
        return x.unflatten(-1, (self.patches, -1)).mean(-2)


def averaging(name):
    """The tiny model, its projector an average, its newlines zero."""
    model = copy.deepcopy(make(name))
    inner = model.model
    if name in QWEN:
        inner.visual.merger = Average(4, 16)
    elif name in ("idefics3", "smolvlm"):
        inner.connector.modality_projection = Average(4)
    elif name == "gemma3":
        inner.multi_modal_projector.mm_soft_emb_norm = nn.Identity()
        inner.multi_modal_projector.mm_input_projection_weight = nn.Parameter(torch.eye(24))
    else:
        inner.multi_modal_projector = Average(4 if name == "internvl" else 1)
    if hasattr(inner, "image_newline"):
        inner.image_newline = nn.Parameter(torch.zeros(24))
    return model


def check_tokens(model, inputs, kind):
    """Against `get_image_features`, `get_video_features`, from the tower's hidden states."""
    adapter, seen = adapter_for(model)(model), []
    pixels = {"image": "pixel_values", "video": "pixel_values_videos"}[kind]
    others = {
        "image": ("image_sizes", "image_grid_thw", "batch_num_images"),
        "video": ("video_grid_thw",),
    }[kind]
    inputs = {k: inputs[k] for k in (pixels, *others) if k in inputs}
    tower = find_tower(model)
    # A hidden state, which no norm follows.
    if model.config.model_type.startswith("llava"):
        hook = tower.encoder.layers[-1].register_forward_hook(lambda m, a, out: seen.append(out))
    else:
        hook = tower.register_forward_hook(lambda m, a, out: seen.append(out.last_hidden_state))
    with torch.no_grad():
        out = getattr(model.model, f"get_{kind}_features")(**inputs).pooler_output
    hook.remove()
    expected = torch.cat([x.flatten(0, -2) for x in out])
    got = adapter.tokens_from_patches(seen[0], inputs, kind)
    assert (
        got.shape == expected.shape and torch.allclose(got, expected, atol=1e-5) and got.std() > 0.1
    )


@everything
def test_tokens_are_made_of_the_patches_that_the_model_makes_them_of(name, samples):
    model, inputs = averaging(name), mixed(name, samples)
    for kind in ("image", *(["video"] if samples == "video" else [])):
        check_tokens(model, inputs, kind)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_padding_that_is_cut_off(name):
    """10 x 16 in tiles of 8 x 8: one row of patches goes at the top, one at the bottom."""
    sizes = [(10, 16), (16, 9)]
    pixels = torch.randn(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model, inputs = averaging(name), {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    check_tokens(model, inputs, "image")
    adapter = adapter_for(model)(model)
    expected = [*rows(0, 2, 2), *rows(1, 2, 5), *rows(2, 2, 2), *rows(3, 4, 3)]
    assert adapter.places(len(expected), inputs, "image").tolist() == expected


def test_grids_that_are_shrunk():
    """LLaVA-OneVision with no more than one tile's area of tokens."""
    model = averaging("llava_onevision")
    model.config.vision_aspect_ratio = "anyres_max_1"
    model.model.config.vision_aspect_ratio = "anyres_max_1"
    pixels = torch.randn(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([(16, 16), (8, 24)])}
    check_tokens(model, inputs, "image")
    expected = [*rows(0, 2, 2), *rows(1, 2, 3), *rows(2, 2, 2), *rows(3, 1, 4)]
    assert adapter_for(model)(model).places(len(expected), inputs, "image").tolist() == expected


@pytest.mark.parametrize("strategy, tokens", [("default", 16), ("full", 17)])
def test_class_tokens_that_are_visual_tokens(strategy, tokens):
    """LLaVA may keep the class token.

    It has its own attention, and the place of the first patch.
    """
    model = copy.deepcopy(make("llava"))
    model.config.vision_feature_select_strategy = (
        model.model.config.vision_feature_select_strategy
    ) = strategy
    ids = torch.tensor([[1, *[IMAGE] * tokens, 7, 8, *[IMAGE] * tokens, 9]])
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    tower, adapter, visual = listen(model, inputs)
    attention = tower.read(inputs, visual)[0][visual].view(2, tokens)
    assert torch.allclose(attention.sum(1), torch.ones(2)) == (strategy == "full")
    first = [[0, 0, 0]] if strategy == "full" else []
    assert adapter.grid(inputs, visual)[visual].tolist() == [
        [frame, r, c] for frame in (0, 1) for _, r, c in (*first, *rows(0, 4, 4))
    ]


# ---- places --------------------------------------------------------------------------------------
def rows(frame, height, width):
    """[frame, row, column] of a rectangle."""
    return [[frame, r, c] for r in range(height) for c in range(width)]


def expected_places(name, sample):
    """By hand, from the shapes of the sample's images and videos, in order."""
    places, media = [], [p for p in sample if isinstance(p, tuple)]

    def frame():
        return places[-1][0] + 1 if places else 0

    for kind, shape in media:
        if name in QWEN:
            t, h, w = GRIDS[kind][shape]
            for _ in range(t):
                places += rows(frame(), h // 2, w // 2)
        elif kind == "video":
            # LLaVA-OneVision: 2 x 2 patches a frame, pooled to one token; a newline.
            for _ in range(4):
                places += rows(frame(), 1, 1)
            places += [[places[-1][0], 0, 1]]
        elif name == "llava_onevision" and sum(k == "image" for k, _ in media) > 1:
            places += rows(frame(), 2, 2)
            places += [[places[-1][0], 1, 2]]
        elif name.startswith("llava_"):
            height, width = SIZES[shape]
            places += rows(frame(), 2, 2)
            places += rows(frame(), -(-height // 8) * 2, width // 4 + 1)
        else:
            for _ in range(1 if name in ("gemma3", "paligemma") else shape + 1):
                places += rows(frame(), 4, 4)
    return places


@everything
@pytest.mark.parametrize("padding", ["left", "right"])
def test_places(name, samples, padding):
    inputs, shapes = (
        mixed(name, samples, padding),
        {"images": IMAGES, "video": VIDEO_SAMPLES}[samples],
    )
    adapter = adapter_for(make(name))(make(name))
    visual = adapter.visual_mask(inputs["input_ids"], None)
    grid = adapter.grid(inputs, visual)
    assert grid.dtype == torch.long and (grid[~visual] == 0).all()
    for b, sample in enumerate(shapes):
        assert grid[b, visual[b]].tolist() == expected_places(name, sample)


def test_places_in_a_video():
    """Two frames by hand."""
    inputs, _ = prompts(make("qwen2_5_vl"), [[1, ("video", 0), 2]])
    grid = adapter_for(make("qwen2_5_vl"))(make("qwen2_5_vl")).grid(
        inputs, inputs["input_ids"] == VIDEO
    )
    assert grid[0, 3:-3].tolist() == [
        [0, 0, 0],
        [0, 0, 1],
        [0, 0, 2],
        [0, 0, 3],
        [0, 1, 0],
        [0, 1, 1],
        [0, 1, 2],
        [0, 1, 3],
        [1, 0, 0],
        [1, 0, 1],
        [1, 0, 2],
        [1, 0, 3],
        [1, 1, 0],
        [1, 1, 1],
        [1, 1, 2],
        [1, 1, 3],
    ]


# ---- when the tower runs, and when not -----------------------------------------------------------
@everything
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_tells_as_much_as_a_forward_pass(name, samples, beams):
    """`generate` makes the features before it calls the model.

    Beams repeat rows, not what the tower saw.
    """
    model, inputs, seen = make(name), mixed(name, samples), {}
    tower, adapter, visual = listen(model, inputs)
    expected = (*tower.read(inputs, visual), adapter.grid(inputs, visual))

    def look(module, args, kwargs):
        if "visual" not in seen:
            mask = torch.isin(kwargs["input_ids"], torch.tensor([IMAGE, VIDEO]))
            seen.update(inputs=kwargs, visual=mask)

    hook = model.model.register_forward_pre_hook(look, with_kwargs=True)
    tower, adapter, _ = listen(model, inputs, lambda: generate(model, inputs, num_beams=beams))
    hook.remove()
    kwargs = {**seen["inputs"], **tower.inputs}
    got = (*tower.read(kwargs, seen["visual"]), adapter.grid(kwargs, seen["visual"]))
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y.repeat_interleave(beams, 0))


def test_prompts_without_images():
    """Nothing to read, and nothing is wrong."""
    model = make("llava")
    inputs = without_labels(batch(images=(0, 0)))
    tower, adapter, visual = listen(model, inputs)
    attention, keys = tower.read(inputs, visual)
    assert not attention.any() and keys.shape[:2] == inputs["input_ids"].shape
    assert not adapter.grid(inputs, visual).any()


def test_features_made_elsewhere_are_refused():
    model, inputs = make("llava"), without_labels(batch(images=(1, 0)))
    tower, adapter, visual = listen(model, inputs)
    tower.clear()
    with pytest.raises(
        ValueError, match="vision tower, which did not run for this prompt's image tokens"
    ):
        tower.read(inputs, visual)
    assert adapter.grid(inputs, visual).any()


def test_embeddings_instead_of_ids():
    """Placeholders are known by their embedding then."""
    model, inputs = make("qwen2_vl"), mixed("qwen2_vl", "video")
    tower, adapter, visual = listen(model, inputs)
    embeds = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    others = {k: v for k, v in inputs.items() if k != "input_ids"}
    got, expected = (
        (*tower.read(x, visual), adapter.grid(x, visual)) for x in (others | embeds, inputs)
    )
    assert visual.any() and all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_numbers_that_do_not_fit_are_refused():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="make 4 tokens, but the prompt has 6 visual ones"):
        placed(torch.zeros(4, 1), mask)
    assert placed(torch.arange(3.0)[:, None], mask)[..., 0].tolist() == [[0, 1, 2], [0, 1, 2]]


@families
def test_listening_leaves_no_trace(name):
    model, inputs = make(name), mixed(name)
    before, hooks = model(**inputs).logits, hook_counts(model)
    tower, adapter, visual = listen(model, inputs)
    assert hook_counts(model) == hooks and "get_image_features" not in vars(model.model)
    assert torch.equal(model(**inputs).logits, before)
    tower.clear()
    assert tower.inputs == {} and tower._seen == {}


def test_methods_are_replaced_until_the_handle_is_removed():
    class Owner(nn.Module):
        def twice(self, x):
            return 2 * x

    owner = Owner()
    one = Replaced(owner, "twice", lambda call, given: call() + 1)
    two = Replaced(owner, "twice", lambda call, given: call() + 10)
    assert owner.twice(3) == 17
    two.remove()
    assert owner.twice(3) == 7
    one.remove()
    assert owner.twice(3) == 6 and "twice" not in vars(owner)


# ---- FLOPs ---------------------------------------------------------------------------------------
@everything
def test_flops_of_reading(name, samples):
    """Equal to what runs, for each sample alone."""
    model = make(name)
    for sample in [s for s in (IMAGES if samples == "images" else VIDEO_SAMPLES[:2]) if len(s) > 1]:
        inputs, (n_visual,) = prompts(model, [sample])
        tower, adapter, visual = listen(model, inputs)
        with FlopCounterMode(display=False) as counter:
            tower.read(inputs, visual)
        images = image_sizes(name, sample)
        expected = adapter.vision_flops(model.config, n_visual, images).reading
        assert counter.get_total_flops() == expected
        assert (expected == 0) == (name in ("llava", "llava_next", "internvl"))


def test_chunks_of_query_rows_change_nothing(monkeypatch):
    """Long images are read in pieces."""
    q, k = torch.randn(2, 3, 50, 8, generator=torch.Generator().manual_seed(0)).double()
    weights = torch.einsum("hne,hme->hnm", q, k).mul(8**-0.5).softmax(-1)
    for chunk in (2**24, 1000, 1):
        monkeypatch.setattr("vispco.pruning._tower.CHUNK", chunk)
        assert torch.allclose(received(q, k), weights.mean((0, 1)))


def test_head_sizes():
    sizes = {
        name: adapter_for(make(name)).dimensions(make(name).config).vision_head_dim
        for name in FAMILIES
    }
    assert sizes == {name: 8 if name in QWEN else 12 for name in FAMILIES}


# ---- methods -------------------------------------------------------------------------------------
RATIOS = {
    "quarter": [0.25] * 6,
    "two steps": [0.8, 0.8, 0.8, 0.3, 0.3, 0.3],
    "few": [1, 0.1, 0.1, 0.05, 0.05, 0.05],
    "many": [1, 1, 0.9, 0.9, 0.9, 0.9],
}
BATCHES = {1: [IMAGES[1]], 2: IMAGES[:2], 3: [IMAGES[3], IMAGES[2], IMAGES[1]], 4: VIDEO_SAMPLES}


def traced(model, config, inputs):
    """What happened at each step, as a list.

    Of (context, what the method saw, what entered the layer, where it was packed from).
    """
    steps, entered = [], {}

    class Probe(METHODS.get(config.method)):
        def score(self, ctx):
            steps.append(
                (
                    ctx,
                    dict(
                        attention=ctx.vision_attention if self.reads_vision else None,
                        keys=ctx.vision_keys if self.reads_vision else None,
                        grid=ctx.grid if self.reads_grid else None,
                        other=ctx.vision_attention_at(self.depth) if self.vision_depths else None,
                        keep=ctx.keep.clone(),
                    ),
                )
            )
            return super().score(ctx)

    layers = model.get_decoder().layers
    method = Probe(**config.method_options)
    with pruned_with(model, method, config.keep_ratios) as handle, torch.no_grad():
        hooks = [
            layer.register_forward_pre_hook(
                lambda m, a, kw, i=i: entered.update({i: a[0] if a else kw["hidden_states"]}),
                with_kwargs=True,
            )
            for i, layer in enumerate(layers)
        ]
        model(**inputs)
        packed = handle.steps
        for hook in hooks:
            hook.remove()
    return [(ctx, seen, entered[ctx.layer], packed[ctx.layer]) for ctx, seen in steps]


#: Method, number of samples, padding: all of these of the first three, some of the others.
SOME = [
    (method, size, padding)
    for method in sorted(NAIVE_VISION)
    for size in BATCHES
    for padding in ("left", "right")
    if method in ("pool", "visionzip", "vispruner")
    or (size, padding) in ((3, "right"), (4, "left"))
]


@pytest.mark.parametrize("method, size, padding", SOME)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("ratios", RATIOS)
def test_keeps_and_merges_as_the_naive_method(method, name, ratios, size, padding):
    """The sets, and the hidden states that enter the layer."""
    samples = BATCHES[size] if name == "qwen2_5_vl" or size < 4 else IMAGES
    model, config = make(name), PruningConfig(method, RATIOS[ratios])
    inputs, n_visual = prompts(model, samples, padding, seed=size)
    steps = traced(model, config, inputs)
    assert len(steps) == len(set(RATIOS[ratios])) - (RATIOS[ratios][0] == 1)
    for ctx, seen, entered, packed in steps:
        for b, n in enumerate(n_visual):
            assert_as_naive(NAIVE_VISION[method], ctx, seen, entered, packed, b)
            assert int(seen["keep"][b]) == config.tokens(n)[ctx.layer]


def assert_as_naive(naive, ctx, seen, entered, packed, b):
    """One sample, at one layer: which tokens entered, and what they were."""
    slots = ctx.valid[b].nonzero()[:, 0]
    # Where the visual tokens stand in ctx.hidden.
    at = ctx.visual[1][b, slots]
    lists = {k: None if v is None else v[b, slots].tolist() for k, v in seen.items() if k != "keep"}
    if "numbers" in inspect.signature(naive).parameters:
        lists["numbers"] = ctx.slot[b, slots].tolist()
    groups = naive(**lists, features=ctx.embeddings[b, at].tolist(), k=int(seen["keep"][b]))
    expected = {
        p: x
        for p, x, text in zip(ctx.order[b].tolist(), ctx.hidden[b], ctx.text_mask[b], strict=True)
        if text
    }
    means = {j: ctx.hidden[b, at[members]].mean(0) for j, members in groups.items()}
    expected |= {int(ctx.order[b, at[j]]): mean for j, mean in means.items()}
    got = {
        int(p): x
        for p, x, there in zip(packed.order[b], entered[b], packed.valid[b], strict=True)
        if there
    }
    # Less the padding at the end.
    got = {p: x for p, x in got.items() if p in expected or p < max(expected)}
    assert got.keys() == expected.keys()
    assert all(torch.allclose(got[p], expected[p], atol=1e-5) for p in got)


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen3_vl"])
@pytest.mark.parametrize("ratio, window", [(0.25, (2, 2)), (0.5, (1, 2)), (0.0625, (4, 4))])
def test_pool_is_average_pooling(name, ratio, window):
    """On an even square: 2 x 2 at a quarter; halves of rows at a half."""
    model = make(name)
    inputs = prompts(model, [[2, ("image", 0), 5]])[0]
    ((ctx, _, entered, packed),) = traced(model, PruningConfig("pool", [ratio] * 6), inputs)
    image = ctx.hidden[ctx.visual].view(1, 4, 4, -1).permute(0, 3, 1, 2)
    expected = nn.functional.avg_pool2d(image, window).flatten(2).transpose(1, 2)[0]
    visual = (inputs["input_ids"] == IMAGE)[0, packed.order[0]]
    assert torch.allclose(entered[0, visual], expected, atol=1e-6)


def test_pool_shares_frames_evenly():
    """Of 4 frames of 2 x 2 tokens, a quarter is one token a frame.

    An eighth is one token of every second frame.
    """
    model = make("qwen2_vl")
    inputs = prompts(model, [[2, ("video", 1), 5]])[0]
    for ratio, expected in ((0.25, [0, 1, 2, 3]), (0.125, [0, 2]), (0.5, [0, 0, 1, 1, 2, 2, 3, 3])):
        ((ctx, seen, _, packed),) = traced(model, PruningConfig("pool", [ratio] * 6), inputs)
        assert seen["grid"][0, packed.kept()[inputs["input_ids"] == VIDEO], 0].tolist() == expected


def test_pool_in_chunks(monkeypatch):
    model, inputs = make("llava"), mixed("llava")
    whole = traced(model, PruningConfig("pool", [0.3] * 6), inputs)
    monkeypatch.setattr("vispco.methods.pool.CHUNK", 500)
    parts = traced(model, PruningConfig("pool", [0.3] * 6), inputs)
    assert torch.equal(whole[0][2], parts[0][2]) and Pool.flops(Pool(), None, 9, 9) == 0


def test_visionzip_numbers_are_the_published_ones():
    """30 of 192, 20 of 128, 10 of 64 are contextual."""
    share = METHODS.get("visionzip")().contextual
    assert [math.floor(k * share + 0.5) for k in (192, 128, 64)] == [30, 20, 10]


@pytest.mark.parametrize(
    "method, options",
    [
        ("visionzip", {"contextual": 0.0}),
        ("visionzip", {"contextual": 1.0}),
        ("vispruner", {"important": 0.0}),
        ("vispruner", {"important": 1.0}),
        ("vispruner", {"step": 1}),
        ("vispruner", {"step": 100}),
    ],
)
def test_options(method, options):
    model = make("llava")
    inputs, n_visual = prompts(model, IMAGES)
    for ratio in (0.03, 0.3, 0.9):
        ((ctx, seen, entered, packed),) = traced(
            model, PruningConfig(method, [ratio] * 6, options), inputs
        )
        for b in range(len(n_visual)):
            assert_as_naive(
                functools.partial(NAIVE_VISION[method], **options), ctx, seen, entered, packed, b
            )


@pytest.mark.parametrize(
    "method, options, message",
    [
        (
            "visionzip",
            {"contextual": 1.5},
            "contextual must be a share of the kept tokens, 0 to 1, got 1.5",
        ),
        (
            "vispruner",
            {"important": -1},
            "important must be a share of the kept tokens, 0 to 1, got -1",
        ),
        (
            "vispruner",
            {"step": 0},
            "step must be a number of tokens to remove at once, 1 or more, got 0",
        ),
    ],
)
def test_options_that_make_no_sense(method, options, message):
    with pytest.raises(ValueError, match=message):
        METHODS.get(method)(**options)


@pytest.mark.parametrize("method", sorted(NAIVE_VISION))
@pytest.mark.parametrize(
    "name, samples", [("llava", "images"), ("qwen2_5_vl", "video"), ("llava_onevision", "video")]
)
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_keeps_what_a_forward_pass_keeps(method, name, samples, beams):
    model, inputs = make(name), mixed(name, samples)
    with vispco.apply(model, PruningConfig(method, RATIOS["two steps"])) as handle:
        with torch.no_grad():
            model(**inputs)
        expected = handle.kept()
        generate(model, inputs, num_beams=beams)
        for layer, mask in handle.kept().items():
            assert torch.equal(mask, expected[layer].repeat_interleave(beams, 0))
    assert "get_image_features" not in vars(model.model)


@pytest.mark.parametrize("method", sorted(NAIVE_VISION))
@pytest.mark.parametrize(
    "name, samples", [("llava", "images"), ("qwen2_5_vl", "video"), ("llava_next", "images")]
)
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_without_a_cache(method, name, samples, beams):
    """The same features at every step, and the same tokens of the prompt."""
    model, inputs = make(name), mixed(name, samples)
    with vispco.apply(model, PruningConfig(method, RATIOS["two steps"])):
        (cached, logits), (again, recomputed) = (
            generate(model, inputs, use_cache=c, num_beams=beams) for c in (True, False)
        )
    assert torch.equal(cached, again) and error(logits, recomputed) <= 5e-5


@pytest.mark.parametrize("method", sorted(NAIVE_VISION))
def test_features_made_by_the_pruned_model_are_as_good_as_pixels(method):
    """Also if those of another prompt were made in between."""
    model, inputs = make("qwen2_vl"), mixed("qwen2_vl")
    with vispco.apply(model, PruningConfig(method, RATIOS["quarter"])) as handle, torch.no_grad():
        expected, kept = model(**inputs).logits, handle.kept()[0]
        made = [
            model.get_image_features(x, inputs["image_grid_thw"], return_dict=True)
            for x in (inputs["pixel_values"], inputs["pixel_values"].flip(0))
        ]
        ready = {k: v for k, v in inputs.items() if k != "pixel_values"}
        assert torch.equal(model(**ready, mm_encoder_outputs={"image": made[0]}).logits, expected)
        assert torch.equal(handle.kept()[0], kept)


@pytest.mark.parametrize("method", ["visionzip", "vispruner"])
def test_features_made_elsewhere_are_refused_in_a_pruned_model(method):
    model, inputs = make("llava"), without_labels(batch(images=(1,), text=(5,), before=(2,)))
    with torch.no_grad():
        features = {"image": model.get_image_features(inputs.pop("pixel_values"), return_dict=True)}
        message = "pass pixels to the pruned model, not ready-made features"
        pruning = vispco.apply(model, PruningConfig(method, RATIOS["quarter"]))
        with pruning, pytest.raises(ValueError, match=message):
            model(**inputs, mm_encoder_outputs=features)


@pytest.mark.parametrize("method", sorted(NAIVE_VISION))
def test_flops_of_a_method(method):
    """Ranking and merging, counted as they run."""
    model, dimensions = make("llava"), adapter_for(make("llava")).dimensions(make("llava").config)
    inputs, counted = without_labels(batch(images=(2,), text=(5,), before=(2,))), []

    class Counted(METHODS.get(method)):
        def score(self, ctx):
            with FlopCounterMode(display=False) as counter:
                scores = super().score(ctx)
            counted.append(counter.get_total_flops())
            return scores

        def merge(self, ctx, kept):
            with FlopCounterMode(display=False) as counter:
                into = super().merge(ctx, kept)
            counted.append(counter.get_total_flops())
            return into

    with pruned_with(model, Counted(), RATIOS["quarter"]), torch.no_grad():
        model(**inputs)
    assert sum(counted) == Counted().flops(dimensions, 2 * PER_IMAGE, 6)
