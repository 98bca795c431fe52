"""Published configurations: the token counts and the costs that their authors state."""

from itertools import pairwise

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

import vispco
from vispco.baselines.presets import PUBLISHED
from vispco.registry import METHODS

SEVEN = LlavaConfig(
    text_config=LlamaConfig(vocab_size=32064),
    vision_config=CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    ),
)
ALL = [(method, name) for method in PUBLISHED for name in PUBLISHED[method]]
FIRST = {
    "fastv": {"k2-r50": [2], "k3-r50": [3], "k3-r75": [3]},
    "pdrop": {"lambda-0.5": [8, 16, 24]},
    "sparsevlm": dict.fromkeys(("192", "128", "64"), [3, 7, 16]),
    "vtw": {"k15": [15], "k16": [16]},
    "visionzip": dict.fromkeys(("192", "128", "64"), [0]),
    "vispruner": dict.fromkeys(("128", "64", "32"), [0]),
    "dart": {"128": [2]},
    "divprune": {"0.098": [0]},
    "cdpruner": dict.fromkeys(("128", "64", "32"), [0]),
    "holov": {"64": [0]},
    "pact": {"k4": [4]},
    "vidcom2": {"0.25": [0]},
}
#: Those of LLaVA-OneVision-7B.
OF_28_LAYERS = ("pact", "vidcom2")
TOKENS = {
    ("fastv", "k3-r75"): [144],
    ("pdrop", "lambda-0.5"): [288, 144, 72],
    ("sparsevlm", "192"): [300, 200, 110],
    ("sparsevlm", "128"): [303, 110, 36],
    ("sparsevlm", "64"): [66, 30, 17],
    ("vtw", "k15"): [0],
    ("visionzip", "192"): [162 + 30],
    ("visionzip", "128"): [108 + 20],
    ("visionzip", "64"): [54 + 10],
    ("dart", "128"): [4 + 8 * 16],
    ("divprune", "0.098"): [56],
    ("cdpruner", "32"): [32],
    ("holov", "64"): [64],
    ("pact", "k4"): [316],
    ("vidcom2", "0.25"): [32 * 49],
}


def preset(method, name, **kwargs):
    """One of a method's presets."""
    return vispco.presets(method, **kwargs)[name]


@pytest.mark.parametrize("method, name", ALL)
def test_published_token_counts(method, name):
    """At the layers of the publication, exactly as many tokens as it says."""
    layers = 28 if method in OF_28_LAYERS else 32
    config, published = vars(preset(method, name, num_layers=layers)).values()
    assert config.method == method and config.num_layers == published.num_layers == layers
    assert sorted(config.steps) == FIRST[method][name] == sorted(published.steps)
    counts = [published.n_visual, *config.tokens(published.n_visual)]
    kept = [n for before, n in pairwise(counts) if n != before]
    assert kept == list(published.tokens) == TOKENS.get((method, name), kept)
    METHODS.get(method)(**config.method_options)


@pytest.mark.parametrize("method, name", [(m, n) for m, n in ALL if PUBLISHED[m][n].convention])
def test_published_costs(method, name):
    config, p = vars(preset(method, name)).values()
    report = vispco.count_flops(SEVEN, config, p.n_visual, p.n_text, p.convention)
    if p.share is not None:
        assert f"{report.share:.0%}" == f"{p.share:.0%}"
    if p.flops is not None:
        assert f"{report.total:.2e}" == f"{p.flops:.2e}"
    assert p.share is not None or p.flops is not None


def test_the_figures_of_the_papers():
    """Published costs.

    57 % of FastV's cost with 64 text tokens; 3.82 T to 1.78 T for PyramidDrop's visual tokens.
    """
    fastv, pdrop = PUBLISHED["fastv"]["k2-r50"], PUBLISHED["pdrop"]["lambda-0.5"]
    assert (fastv.share, fastv.n_text, fastv.convention) == (0.57, 64, "fastv")
    assert (pdrop.flops, pdrop.convention) == (1.78e12, "pdrop")
    full = vispco.count_flops(SEVEN, None, pdrop.n_visual, pdrop.n_text, pdrop.convention)
    assert f"{full.total:.2e}" == "3.82e+12"


@pytest.mark.parametrize("name", PUBLISHED["sparsevlm"])
def test_sparsevlms_averages(name):
    """Its presets are named after an average that counts merged tokens.

    Its steps are a layer earlier.
    """
    total, left = 0.0, 576
    for tokens, layers in zip(PUBLISHED["sparsevlm"][name].tokens, (4, 9, 17), strict=True):
        merged = 0.3 * (left - tokens) / 10
        total, left = total + layers * (tokens + merged), tokens + merged
    assert round((2 * 576 + total) / 32) == int(name)
    as_run = preset("sparsevlm", name).config.tokens(576)
    assert int(name) + 10 < sum(as_run) / 32 < int(name) + 17


@pytest.mark.parametrize("method", ["visionzip", "vispruner", "cdpruner", "holov"])
def test_one_step_at_layer_0_is_its_own_average(method):
    for name in PUBLISHED[method]:
        assert set(preset(method, name).config.tokens(576)) == {int(name)}


@pytest.mark.parametrize("name, contextual", [("192", 30), ("128", 20), ("64", 10)])
def test_visionzips_two_kinds(name, contextual):
    """By its default option."""
    config = preset("visionzip", name).config
    method = METHODS.get("visionzip")(**config.method_options)
    assert round(method.contextual * int(name)) == contextual


def test_vispruners_two_kinds():
    assert METHODS.get("vispruner")().important == 0.5


@pytest.mark.parametrize(
    "method, name", [(m, n) for m, n in ALL if m in ("fastv", "pdrop", "sparsevlm")]
)
def test_presets_equal_the_published_notations(method, name):
    """`PruningConfig.from_...` and the presets say the same."""
    build = getattr(vispco.PruningConfig, f"from_{method}")
    arguments = {"k2-r50": (2, 0.5), "k3-r50": (3, 0.5), "k3-r75": (3, 0.75), "lambda-0.5": ()}
    arguments = arguments.get(name, (PUBLISHED[method][name].tokens,))
    assert build(*arguments, num_layers=32) == preset(method, name).config


# ---- other depths --------------------------------------------------------------------------------
def test_another_depth_has_its_steps_at_the_same_relative_depth():
    # 2.5, rounded
    assert preset("fastv", "k2-r50", num_layers=40).config.steps == {3: 0.5}
    assert preset("pdrop", "lambda-0.5", num_layers=28).config.steps == {
        7: 0.5,
        14: 0.25,
        21: 0.125,
    }
    assert list(preset("sparsevlm", "192", num_layers=64).config.steps) == [6, 14, 32]


@pytest.mark.parametrize("method", sorted(PUBLISHED))
@pytest.mark.parametrize("layers", [1, 2, 3, 6, 24, 28, 36, 80])
def test_every_depth_can_be_had(method, layers):
    """Never a step before the first layer that the method can prune.

    The count of the last step stays to the end.
    """
    for p in vispco.presets(method, num_layers=layers).values():
        assert p.config.num_layers == layers
        assert all(i >= METHODS.get(method).first_layer for i in p.config.steps)
        if layers >= 6:
            assert p.config.tokens(p.published.n_visual)[-1] == p.published.tokens[-1]


@pytest.mark.parametrize("method", sorted(PUBLISHED))
@pytest.mark.parametrize("layers", [*range(5, 33), 36, 40, 64, 80])
def test_no_two_become_one_in_another_depth(method, layers):
    """Each has its name, and as many steps as were published; the first is near where it was."""
    found = vispco.presets(method, layers)
    assert list(found) == list(PUBLISHED[method])
    for p in found.values():
        own = 28 if method in OF_28_LAYERS else 32
        assert p.published.num_layers == own
        assert len(p.config.steps) == len(p.published.steps)
        for moved, layer in zip(p.config.steps, p.published.steps, strict=True):
            exact = layer * layers / own
            assert abs(moved - exact) < 1.6 and (layers < 32 or abs(moved - exact) <= 0.5)


def test_layers_that_would_meet_go_apart_as_little_as_can_be():
    # k3 is at 0.75 of 8 layers, k2 at 0.5; k15 at 3.75, k16 at 4.
    assert [min(p.config.steps) for p in vispco.presets("fastv", 8).values()] == [1, 2, 2]
    assert [min(p.config.steps) for p in vispco.presets("vtw", 8).values()] == [3, 4]
    # One layer can be pruned, so there is no room.
    assert list(vispco.presets("fastv", 2)) == ["k2-r50, k3-r50", "k3-r75"]


@pytest.mark.parametrize("method", sorted(PUBLISHED))
@pytest.mark.parametrize("layers", [1, 2, 3, 6, 8, 24, 32])
def test_schedules_that_coincide_are_given_once(method, layers):
    """Under all of their names; no two are the same, and no name is lost."""
    found = vispco.presets(method, num_layers=layers)
    assert [name for names in found for name in names.split(", ")] == list(
        PUBLISHED[method]
    ) or layers < 6
    assert sorted(name for names in found for name in names.split(", ")) == sorted(
        PUBLISHED[method]
    )
    schedules = [p.config.keep_ratios for p in found.values()]
    assert len(set(schedules)) == len(schedules)
    for names, p in found.items():
        assert p.published == PUBLISHED[method][names.split(", ")[0]]


def test_presets_at_the_very_layers():
    """Without those that do not fit into the model."""
    at_layer = vispco.presets("fastv", 8, at="layer")
    assert [p.config.steps for p in at_layer.values()] == [{2: 0.5}, {3: 0.5}, {3: 0.25}]
    assert list(vispco.presets("fastv", 3, at="layer")) == ["k2-r50"]
    with pytest.raises(ValueError, match="at must be 'depth' or 'layer', got 'top'"):
        vispco.presets("fastv", 8, at="top")


def test_a_preset_runs(llava):
    from tiny import batch, without_labels

    config = preset("fastv", "k2-r50", num_layers=6).config
    inputs = without_labels(batch())
    with vispco.apply(llava, config) as handle:
        llava(**inputs)
    assert list(handle.kept()) == [1]


# ---- names ---------------------------------------------------------------------------------------
def test_an_unknown_method_comes_with_the_nearest():
    with pytest.raises(ValueError, match="unknown method 'fastvv': did you mean 'fastv'"):
        vispco.presets("fastvv")


@pytest.mark.parametrize(
    "method",
    ["random", "strided", "pool", "fitprune", "evs", "framefusion", "hiprune", "ivcprune"]
    + ["prumerge", "vscan"],
)
def test_a_method_without_published_configurations_has_none(method):
    assert vispco.presets(method) == {}


@pytest.mark.parametrize("layers", [0, -1, 2.0, True, None, "32"])
def test_number_of_layers(layers):
    with pytest.raises(
        ValueError, match="num_layers must be the model's number of decoder layers, got"
    ):
        vispco.presets("fastv", num_layers=layers)


def test_every_published_method_is_registered():
    assert set(PUBLISHED) <= set(vispco.list_methods())
