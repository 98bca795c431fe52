"""One drop before the language model, for serving engines, without an engine.

What vLLM itself does with it: `test_vllm.py`.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

import vispco
from vispco import testbed
from vispco.integrations import vllm as plugin
from vispco.integrations.serving import OneDrop
from vispco.integrations.vllm.positions import COLUMNS, OneRow, Qwen, family, to_columns
from vispco.registry import list_methods

ABLE = ["divprune", "evs", "hiprune", "holov", "pool", "prumerge", "random", "strided"]
ABLE += ["vidcom2", "visionzip", "vispruner", "vscan"]


@pytest.fixture(scope="module")
def llava():
    return testbed.load("testbed-llava")[0]


@pytest.fixture(scope="module")
def qwen():
    return testbed.load("testbed-qwen")[0]


def drop(method, ratio=0.3, **options):
    return OneDrop.of(vispco.PruningConfig(method, [ratio] * 8, options))


def test_the_methods_that_can_rank_a_picture_are_those_that_read_the_vision_side():
    able = []
    for name in list_methods():
        try:
            drop(name)
        except ValueError as error:
            message = str(error)
            assert message.startswith(f"method {name!r} cannot rank a picture before the language")
            assert message.endswith(f"choose from {', '.join(ABLE)}")
            reason = "reads the text of the prompt" if name == "cdpruner" else "language model"
            assert reason in message
        else:
            able.append(name)
    # vtw keeps the first tokens, whatever they are.
    assert able == sorted([*ABLE, "vtw"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            vispco.PruningConfig("fastv", [1, 1, 0.5]),
            "layer 2 keeps 50.0 % .* must drop once, befor",
        ),
        (vispco.PruningConfig("evs", [0.5, 0.5, 0.25]), "must drop once, before layer 0: find one"),
        (vispco.PruningConfig("evs", [1.0] * 3), "keeps everything.* must drop once"),
        (vispco.PruningConfig("evs", [0.0] * 3), "drops all visual tokens.* set keep_ratios above"),
        (
            vispco.PruningConfig("prumerge", [0.5] * 3, {"adaptive": True}),
            "PruMerge keeps 1 of 16 tokens, and 8 places .* leave out the option",
        ),
        (vispco.PruningConfig("pdrop+fastv@2", [0.5] * 3), "cannot rank a picture"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(config, message):
    with pytest.raises(ValueError, match=message):
        OneDrop.of(config)


def test_a_composite_ranks_by_its_first_part():
    assert type(drop("visionzip+fastv@3").method).__name__ == "VisionZip"


@pytest.mark.parametrize(
    "method", ["divprune", "pool", "strided", "random", "vispruner", "visionzip"]
)
def test_a_picture_keeps_what_enters_layer_0_under_apply(llava, method):
    """Which tokens, merged or not; the tower's numbers as its own eager attention gives them."""
    config = vispco.PruningConfig(method, [0.3] * 8)
    batch = testbed.batches("test", n=1, batch_size=1)[0]
    entered = []
    layer = llava.model.language_model.layers[0]
    with torch.no_grad(), vispco.apply(llava, config) as handle:
        hook = layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: entered.append(kwargs["hidden_states"]), with_kwargs=True
        )
        llava(**batch)
        hook.remove()
    kept = handle.kept()[0][0]
    visual = batch["input_ids"][0] == llava.config.image_token_index

    def tower(depth):
        heard = {}
        tower = llava.model.vision_tower
        attention = tower.encoder.layers[-1].self_attn
        hooks = [
            getattr(attention, name).register_forward_hook(
                lambda module, args, output, name=name: heard.update({name: output[0]})
            )
            for name in ("q_proj", "k_proj")
        ]
        tower(batch["pixel_values"])
        for each in hooks:
            each.remove()
        q, k = (heard[name].unflatten(1, (4, 16)).transpose(0, 1) for name in ("q_proj", "k_proj"))
        rows = (q[:, :1] @ k.transpose(1, 2) / 4).softmax(-1).mean(0)[0]
        return rows[1:], k.mean(0)[1:]

    with torch.no_grad():
        features = llava.get_image_features(batch["pixel_values"]).pooler_output[0]
        places = lambda: family(llava.config).places(64, {}, "image")  # noqa: E731
        found, chosen = OneDrop.of(config).keep(features, places, tower)
    assert chosen.tolist() == kept[visual].nonzero()[:, 0].tolist() and len(chosen) == 19
    # What the layer's norm makes of them.
    with torch.no_grad():
        torch.testing.assert_close(layer.input_layernorm(found), entered[0][0, visual[kept]])


def made(kind, model):
    """An object that answers as a model of vLLM does."""
    answering = kind()
    answering.config, answering.family = model.config, family(model.config)
    return answering


def picture(offset, length, grid=None, kind="image", seconds=None):
    """A picture of a request, as vLLM describes it."""
    data = {}
    if grid is not None:
        data[f"{kind}_grid_thw"] = SimpleNamespace(data=torch.tensor(grid))
    if seconds is not None:
        data["second_per_grid_ts"] = SimpleNamespace(data=torch.tensor(seconds))
    place = SimpleNamespace(offset=offset, length=length)
    return SimpleNamespace(mm_position=place, modality=kind, data=data)


def features(answering, item, chosen, dtype):
    """Features of one picture of which the tokens `chosen` are kept, with their columns."""
    stood = answering.standing(item.modality, None, answering.data(item))[:, chosen]
    columns = to_columns(torch.cat([stood, torch.arange(len(chosen))[None]]).T)
    return torch.cat([torch.zeros(len(chosen), 4), columns], 1).to(dtype)


def in_parts(answering, ids, items, embeds, cuts):
    """Positions and delta after a prompt came in parts that end at `cuts`, as vLLM asks."""
    positions, delta = answering.get_mrope_input_positions(ids, items)
    for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        come = []
        for item, x in zip(items, embeds, strict=True):
            first, length = item.mm_position.offset, item.mm_position.length
            piece = x[max(0, start - first) : max(0, min(length, stop - first))]
            come += [piece] if len(piece) else []
        out, positions, delta = answering.recompute_mrope_positions(ids, come, positions, start)
        assert [len(x) for x in out] == [len(x) for x in come]
        assert all(x.shape[1] == 4 for x in out)
    return positions, delta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cuts", [[], [3], [7, 8, 20], [30]])
def test_qwens_positions_are_those_of_the_whole_prompt(qwen, dtype, cuts):
    """By `get_rope_index` of transformers, in whatever parts and precision, two pictures."""
    answering, config = made(Qwen, qwen), qwen.config
    start, end, pad = (
        config.vision_start_token_id,
        config.vision_end_token_id,
        config.image_token_id,
    )
    # One has more rows than bfloat16 can count.
    grids = [[1, 8, 12], [1, 2, 700]]
    ids, generator = [5, 6], torch.Generator().manual_seed(0)
    whole, kept, items, embeds = [5, 6], [True, True], [], []
    for grid in grids:
        n = grid[1] * grid[2] // 4
        chosen = torch.randperm(n, generator=generator)[: 9 if n < 100 else 5].sort().values
        items.append(picture(len(ids) + 1, len(chosen), grid))
        embeds.append(features(answering, items[-1], chosen, dtype))
        ids += [start, *[pad] * len(chosen), end]
        whole += [start, *[pad] * n, end]
        kept += [True, *torch.isin(torch.arange(n), chosen).tolist(), True]
    ids, whole, kept = [*ids, 7, 8, 9], [*whole, 7, 8, 9], [*kept, True, True, True]
    tokens = torch.tensor([whole])
    expected, delta = qwen.model.get_rope_index(
        tokens, mm_token_type_ids=(tokens == pad).long(), image_grid_thw=torch.tensor(grids)
    )
    positions, found = in_parts(answering, ids, items, embeds, cuts)
    assert positions.tolist() == expected[:, 0, torch.tensor(kept)].tolist()
    # vLLM adds it to the number of a token among those that are left.
    assert found + len(ids) == int(delta) + len(whole)


def test_qwens_positions_in_time(qwen):
    """A film of 3 x 4 x 6 tokens, of which each frame stands for 1.5 seconds of 2 positions."""
    answering = made(Qwen, qwen)
    start, end = qwen.config.vision_start_token_id, qwen.config.vision_end_token_id
    pad = qwen.config.video_token_id
    item = picture(2, 3, [3, 8, 12], "video", 1.5)
    ids = [5, start, pad, pad, pad, end, 7]
    chosen = torch.tensor([0, 24 + 7, 2 * 24 + 23])
    x = features(answering, item, chosen, torch.bfloat16)
    positions, delta = in_parts(answering, ids, [item], [x], [3])
    # The film begins at 2 and ends at 2 + 6; rows and columns end before.
    assert positions.tolist() == [
        [0, 1, 2, 5, 8, 9, 10],
        [0, 1, 2, 3, 5, 9, 10],
        [0, 1, 2, 3, 7, 9, 10],
    ]
    assert delta == 11 - 7


@pytest.mark.parametrize("cuts", [[], [1, 2], [4], [5, 6]])
def test_llavas_positions_count_what_was_dropped(llava, cuts):
    """Two pictures side by side, the second at the end; asked twice, as after preemption."""
    answering, pad = made(OneRow, llava), llava.config.image_token_index
    items = [picture(1, 3), picture(4, 2)]
    embeds = [
        features(answering, item, torch.tensor(chosen), torch.bfloat16)
        for item, chosen in zip(items, [[0, 5, 63], [2, 40]], strict=True)
    ]
    ids = [9, pad, pad, pad, pad, pad]
    positions, delta = in_parts(answering, ids, items, embeds, cuts)
    assert positions[0].tolist() == [0, 1, 6, 64, 65 + 2, 65 + 40]
    assert delta + len(ids) == 1 + 64 + 64
    again = answering.recompute_mrope_positions(ids, embeds, positions, 0)
    assert again[1].tolist() == positions.tolist() and again[2] == delta


def test_columns_hold_in_any_precision():
    numbers = torch.tensor([[0, 255, 256, 65535], [1, 300, 511, 40001]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        columns = to_columns(numbers).to(dtype)
        assert columns.shape == (2, COLUMNS)
        assert plugin.positions.from_columns(columns).tolist() == numbers.tolist()


def test_without_the_variable_nothing_happens(monkeypatch):
    monkeypatch.delenv(plugin.VARIABLE, raising=False)
    assert plugin.register() is None


def test_the_variable_names_a_configuration_that_can_be_served(monkeypatch, tmp_path):
    file = tmp_path / "config.json"
    monkeypatch.setenv(plugin.VARIABLE, str(file))
    with pytest.raises(FileNotFoundError):
        plugin.register()
    file.write_text("{}")
    with pytest.raises(ValueError, match=f"{file}: this is not a pruning configuration"):
        plugin.register()
    vispco.PruningConfig("fastv", [1, 0.5]).save(file)
    with pytest.raises(ValueError, match=f"VISPCO_CONFIG={file}: .*must drop once, before layer 0"):
        plugin.register()
    vispco.PruningConfig("evs", [0.25, 0.25]).save(file)
    config, found = plugin.configured()
    assert config.method == "evs" and [found.count(n) for n in (1, 64, 577)] == [1, 16, 144]


def test_a_configuration_of_another_model_is_refused():
    served = AutoConfig.for_model("llava")
    layers = served.text_config.num_hidden_layers
    plugin.check_model(vispco.PruningConfig("evs", [0.5] * layers, model_type="llava"), served)
    with pytest.raises(ValueError, match=f"8 keep_ratios, but the model has {layers} decoder"):
        plugin.check_model(vispco.PruningConfig("evs", [0.5] * 8), served)
    other = vispco.PruningConfig("evs", [0.5] * layers, model_type="qwen2_5_vl")
    with pytest.raises(ValueError, match="made for model type 'qwen2_5_vl', this is 'llava'"):
        plugin.check_model(other, served)
