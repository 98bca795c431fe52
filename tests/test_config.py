"""PruningConfig: validation, whole tokens, files, published notations."""

import dataclasses
import json
import math
import os
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st

import vispco
from vispco import PruningConfig
from vispco.config import whole_tokens


class TakesAnything(vispco.Method):
    """A method with options of any name and value."""

    def __init__(self, **options):
        self.options = options

    def score(self, ctx):
        """Nothing here is ever run."""
        raise NotImplementedError


@pytest.fixture(scope="module", autouse=True)
def takes_anything():
    """Registered for this module only."""
    vispco.register_method("takes-anything", TakesAnything)
    yield
    vispco.registry.METHODS.remove("takes-anything")


ratio = st.floats(0, 1) | st.sampled_from([0.0, 0.1, 0.29, 0.5, 1 / 3, 2 / 3, 0.7, 1.0, 5e-324])
ratios = st.lists(ratio, min_size=1, max_size=40).map(lambda r: sorted(r, reverse=True))


# ---- validation ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "bad",
    [
        math.nan,
        math.inf,
        -math.inf,
        -0.1,
        1.0000001,
        2,
        -1,
        True,
        False,
        "0.5",
        None,
        [0.5],
        0.5j,
        np.nan,
        np.True_,
        torch.tensor(float("nan")),
        torch.tensor(1.5),
    ],
)
def test_a_ratio_is_a_number_from_0_to_1(bad):
    with pytest.raises(ValueError, match=r"keep_ratios\[1\] must be a number in \[0, 1\], got "):
        PruningConfig("random", [1.0, bad, 0.0])


@pytest.mark.parametrize(
    "bad", [torch.tensor([0.5, 0.5]), 10**400], ids=["two numbers", "too large for a float"]
)
def test_a_ratio_that_is_no_float(bad):
    with pytest.raises(ValueError, match=r"keep_ratios\[1\] must be a number in \[0, 1\], got "):
        PruningConfig("random", [1.0, bad, 0.0])


@pytest.mark.parametrize(
    "bad", ["1, 0.5", b"10", 0.5, None, 3, torch.tensor(0.5), {1: 0.5, 0: 0.2}, {1.0, 0.5}]
)
def test_ratios_are_a_sequence(bad):
    """Of numbers in order: the keys of a mapping and the members of a set are neither."""
    with pytest.raises(
        ValueError, match="keep_ratios must be a sequence of numbers, one per decoder layer, got "
    ):
        PruningConfig("random", bad)


@pytest.mark.parametrize("empty", [[], (), torch.tensor([]), np.array([])])
def test_ratios_are_not_empty(empty):
    with pytest.raises(
        ValueError, match="keep_ratios is empty: give one keep ratio per decoder layer"
    ):
        PruningConfig("random", empty)


def test_ratios_do_not_increase():
    with pytest.raises(
        ValueError,
        match="must not increase .* layer 2 has 0.6 after 0.5; "
        "they are fractions of the ORIGINAL tokens",
    ):
        PruningConfig("random", [1, 0.5, 0.6, 0.7])


@given(r=st.lists(ratio, min_size=2, max_size=6))
def test_increasing_is_refused_and_anything_else_is_not(r):
    if any(b > a for a, b in pairwise(r)):
        with pytest.raises(ValueError, match="must not increase"):
            PruningConfig("random", r)
    else:
        assert PruningConfig("random", r).keep_ratios == tuple(r)


def test_any_sequence_of_numbers():
    expected = PruningConfig("random", [1.0, 0.5, 0.25])
    for same in (
        (1, 0.5, 0.25),
        np.array([1, 0.5, 0.25]),
        np.array([1, 0.5, 0.25], dtype=np.float32),
        torch.tensor([1, 0.5, 0.25], requires_grad=True),
        iter([1, 0.5, 0.25]),
        (x for x in (1, 0.5, 0.25)),
    ):
        config = PruningConfig("random", same)
        assert config == expected and all(type(r) is float for r in config.keep_ratios)


def test_unknown_method():
    with pytest.raises(ValueError, match="unknown method 'fast': did you mean 'fastv'"):
        PruningConfig("fast", [1.0])


@pytest.mark.parametrize("options", [None, [], "seed", 3])
def test_options_are_a_mapping(options):
    with pytest.raises(ValueError, match="method_options must be a mapping, got "):
        PruningConfig("random", [1.0], options)


@pytest.mark.parametrize(
    "field, bad",
    [
        ("model_type", 3),
        ("model_type", b"llava"),
        ("budget", [0.5]),
        ("budget", True),
        ("flops", "1e12"),
        ("flops", False),
        ("n_visual", 5.0),
        ("n_visual", "576"),
        ("versions", "0.1.0"),
    ],
)
def test_provenance_types(field, bad):
    with pytest.raises(ValueError, match=f"{field} must be .*, got "):
        PruningConfig("random", [1.0], **{field: bad})


def test_frozen_and_equal_by_value():
    config = PruningConfig(
        "random", [1, 0.5], {"seed": 3}, "llava", 0.4, 1e12, 576, {"vispco": "0.1.0"}
    )
    assert config == PruningConfig(
        "random", (1.0, 0.5), {"seed": 3}, "llava", 0.4, 1e12, 576, {"vispco": "0.1.0"}
    )
    others = {
        "method": "takes-anything",
        "keep_ratios": [1, 0.4],
        "method_options": {"seed": 4},
        "model_type": None,
        "budget": 0.5,
        "flops": None,
        "n_visual": 1,
        "versions": None,
    }
    assert others.keys() == {f.name for f in dataclasses.fields(config)}
    for field, other in others.items():
        assert dataclasses.replace(config, **{field: other}) != config
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field, other)


def test_options_are_those_of_the_method():
    with pytest.raises(ValueError, match="method 'fastv' does not take the options {'seed': 3}"):
        PruningConfig("fastv", [1.0, 0.5], {"seed": 3})


def test_it_does_not_change_with_what_it_was_made_of():
    r, options = [1.0, 0.5], {"seed": 1}
    config = PruningConfig("random", r, options)
    r[1], options["seed"] = 0.1, 2
    assert config.keep_ratios == (1.0, 0.5) and config.method_options == {"seed": 1}


# ---- whole tokens --------------------------------------------------------------------------------
@given(r=ratio, n=st.integers(0, 5000))
@example(r=0.29, n=100)
def test_whole_tokens(r, n):
    """floor(r n), in exact rational arithmetic up to 1e-6 of a token.

    At least one unless r is 0.
    """
    kept = whole_tokens(r, n)
    assert isinstance(kept, int) and 0 <= kept <= n
    top, bottom = float(r).as_integer_ratio()
    assert (
        kept == max(top * n // bottom, min(n, 1) * (r > 0))
        or kept * bottom - top * n <= bottom * 1e-6
    )
    assert (kept == 0) == (r == 0 or n == 0)
    assert kept <= r * n + 1e-6 or kept == 1
    assert kept + 1 > r * n


@given(k=st.integers(0, 3000), n=st.integers(1, 3000))
def test_a_ratio_of_whole_tokens_gives_them_back(k, n):
    """Whatever float error the division has."""
    assert whole_tokens(min(k, n) / n, n) == min(k, n)


@given(percent=st.integers(0, 100), n=st.integers(1, 2000))
def test_percentages_are_meant_exactly(percent, n):
    expected = percent * n // 100
    assert whole_tokens(percent / 100, n) == (max(expected, 1) if percent else 0)
    assert whole_tokens(1 - (100 - percent) / 100, n) == (max(expected, 1) if percent else 0)


@given(
    r=st.lists(ratio, min_size=1, max_size=8),
    n=st.lists(st.integers(0, 3000), min_size=1, max_size=4),
)
@example(r=[0.57, 0.29], n=[100])
def test_tensors_give_what_numbers_give(r, n):
    expected = [[whole_tokens(x, m) for x in r] for m in n]
    table = whole_tokens(torch.tensor(r, dtype=torch.float64), torch.tensor(n)[:, None])
    assert table.dtype == torch.int64 and table.tolist() == expected
    assert whole_tokens(torch.tensor(r, dtype=torch.float64), n[0]).tolist() == expected[0]
    assert whole_tokens(r[0], torch.tensor(n)).tolist() == [row[0] for row in expected]


@given(r=ratios, n=st.integers(0, 1000))
def test_tokens_and_steps(r, n):
    config = PruningConfig("random", r)
    assert (
        config.tokens(n)
        == [whole_tokens(x, n) for x in r]
        == sorted(config.tokens(n), reverse=True)
    )
    assert config.num_layers == len(r)
    level, rebuilt = 1.0, []
    for i in range(len(r)):
        level = config.steps.get(i, level)
        rebuilt.append(level)
    assert rebuilt == list(config.keep_ratios)
    assert all(x < ([1.0] + r)[i] for i, x in config.steps.items())


def test_describe():
    assert PruningConfig("fastv", [1, 1, 0.5, 0.25]).describe() == (
        "fastv: layer 2 keeps 50.0 % (drops 50.0 %); layer 3 keeps 25.0 % (drops 75.0 %)"
    )
    assert PruningConfig("strided", [1, 1]).describe() == "strided: keeps everything"


# ---- files ---------------------------------------------------------------------------------------
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
json_values = st.recursive(
    scalars,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3),
    max_leaves=6,
)
configs = st.builds(
    PruningConfig,
    st.just("takes-anything"),
    ratios,
    st.dictionaries(st.text().filter(lambda name: name != "self"), json_values, max_size=3),
    st.none() | st.text(),
    st.none() | st.floats(0, 1) | st.text() | st.integers(0, 10**15),
    st.none() | st.floats(0, 1e30) | st.integers(0, 10**20),
    st.none() | st.integers(0, 10**6),
    st.none() | st.dictionaries(st.text(), st.text(), max_size=3),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for all examples of a property."""
    return tmp_path_factory.mktemp("configs")


@given(config=configs)
def test_save_and_load_give_the_same_back(folder, config):
    config.save(folder / "a.json")
    loaded = PruningConfig.load(folder / "a.json")
    assert loaded == config and PruningConfig.from_dict(config.to_dict()) == config
    # To the bit.
    assert loaded.keep_ratios == config.keep_ratios
    assert [p.name for p in folder.iterdir()] == ["a.json"]


def test_the_file_is_readable():
    data = PruningConfig.from_fastv(2, 0.5, num_layers=4).to_dict()
    assert data == {
        "schema_version": 1,
        "method": "fastv",
        "keep_ratios": [1, 1, 0.5, 0.5],
        "num_layers": 4,
        "method_options": {},
        "model_type": None,
        "budget": None,
        "flops": None,
        "n_visual": None,
        "versions": None,
    }


GOOD = PruningConfig("random", [1, 0.5], {"seed": 3}, "llava", 0.4, 1e12, 576)


def written(folder, text):
    """A file with this content."""
    path = folder / "broken.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def without(data, *keys):
    return {k: v for k, v in data.items() if k not in keys}


@pytest.mark.parametrize(
    "text, fault",
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("nonsense", "Expecting value"),
        (json.dumps(GOOD.to_dict())[:-9], "Expecting|Unterminated|delimiter"),
        (b"\xff\xfe\x00\x80", "expected JSON in UTF-8, got the byte 0xff"),
        (b"PK\x03\x04\x80\x81", "expected JSON in UTF-8, got the byte 0x80"),
        ("[" * 100_000, "recursion|nested"),
        ('{"a":' * 100_000, "recursion|nested"),
        ("[1, 2]", "must be a JSON object, got list"),
        ("null", "must be a JSON object, got NoneType"),
        ('"x"', "must be a JSON object, got str"),
        (
            json.dumps(without(GOOD.to_dict(), "schema_version")),
            "is not a pruning configuration: it has no schema_version",
        ),
        (
            json.dumps({**GOOD.to_dict(), "schema_version": 99}),
            "schema_version 99, this vispco reads 1: pip install --upgrade vispco",
        ),
        (
            json.dumps({**GOOD.to_dict(), "schema_version": "1"}),
            "schema_version '1', this vispco reads 1",
        ),
        (json.dumps(without(GOOD.to_dict(), "method", "keep_ratios")), "lacks keep_ratios, method"),
        (
            json.dumps({**GOOD.to_dict(), "keep_ratio": 1, "colour": 2}),
            "unknown keys: colour, keep_ratio",
        ),
        (
            json.dumps({**GOOD.to_dict(), "num_layers": 3}),
            "num_layers says 3, but there are 2 keep_ratios",
        ),
        (json.dumps({**GOOD.to_dict(), "keep_ratios": [0.5, 1]}), "must not increase"),
        (json.dumps({**GOOD.to_dict(), "keep_ratios": "11"}), "must be a sequence of numbers"),
        (
            json.dumps({**GOOD.to_dict(), "keep_ratios": [math.nan]}),
            "expected finite numbers, got NaN",
        ),
        (
            json.dumps({**GOOD.to_dict(), "keep_ratios": [1, 10**400]}),
            "expected numbers of at most 300 digits, got 1000",
        ),
        (
            '{"schema_version": 1, "method": "random", "keep_ratios": [' + "9" * 5000 + "]}",
            "digits|number",
        ),
        (json.dumps({**GOOD.to_dict(), "method": ["random"]}), "unknown method"),
        (json.dumps({**GOOD.to_dict(), "method": None}), "unknown method None"),
        (json.dumps({**GOOD.to_dict(), "method": "rnadom"}), "did you mean 'random'"),
        (json.dumps({**GOOD.to_dict(), "method_options": [1]}), "method_options must be a mapping"),
        (json.dumps({**GOOD.to_dict(), "n_visual": "many"}), "n_visual must be int"),
        (json.dumps({**GOOD.to_dict(), "budget": []}), "budget must be"),
    ],
)
def test_faults_in_files_name_the_file(tmp_path, text, fault):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=fault) as caught:
        PruningConfig.load(path)
    assert str(path) in str(caught.value)


@given(cut=st.integers(0, len(json.dumps(GOOD.to_dict())) - 1))
def test_truncated_anywhere(folder, cut):
    path = written(folder, json.dumps(GOOD.to_dict())[:cut])
    with pytest.raises(ValueError, match="broken.json"):
        PruningConfig.load(path)
    path.unlink()


@settings(max_examples=200)
@given(key=st.sampled_from(sorted(GOOD.to_dict())), value=json_values)
def test_edited_by_hand_it_loads_or_says_why(folder, key, value):
    path = written(folder, json.dumps({**GOOD.to_dict(), key: value}))
    try:
        config = PruningConfig.load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert PruningConfig.from_dict(config.to_dict()) == config
    path.unlink()


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.json"):
        PruningConfig.load(tmp_path / "absent.json")


def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch):
    """A write may fail while the text is made, written or moved.

    In each case nothing else is left lying about.
    """
    path = tmp_path / "config.json"
    GOOD.save(path)
    old = path.read_bytes()
    with pytest.raises((TypeError, ValueError)):
        PruningConfig("random", [1.0], {"seed": object()}).save(path)
    with pytest.raises(ValueError):
        PruningConfig("random", [1.0], flops=math.nan).save(path)
    for function in ("replace", "chmod", "fsync"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
            patch.setattr(os, function, lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
            PruningConfig("strided", [0.0]).save(path)
        assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["config.json"]
    PruningConfig("strided", [0.0]).save(path)
    assert PruningConfig.load(path) == PruningConfig("strided", [0.0])


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="absent"):
        GOOD.save(tmp_path / "absent" / "config.json")
    with pytest.raises(OSError, match="file"):
        GOOD.save(tmp_path / "file" / "config.json")
    with pytest.raises(OSError):
        GOOD.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---- published notations -------------------------------------------------------------------------
def test_from_fastv():
    config = PruningConfig.from_fastv(num_layers=32)
    assert config == PruningConfig("fastv", [1.0] * 2 + [0.5] * 30) and config.tokens(576)[1:3] == [
        576,
        288,
    ]
    assert PruningConfig.from_fastv(3, 0.75, num_layers=40).tokens(576)[2:4] == [576, 144]
    assert PruningConfig.from_fastv(1, 1.0, num_layers=2).keep_ratios == (1.0, 0.0)
    for percent in range(101):
        assert (
            PruningConfig.from_fastv(2, percent / 100, num_layers=3).tokens(1000)[2]
            == 1000 - 10 * percent
        )


def test_from_pdrop():
    config = PruningConfig.from_pdrop(num_layers=32)
    assert config == PruningConfig("pdrop", [1.0] * 8 + [0.5] * 8 + [0.25] * 8 + [0.125] * 8)
    assert PruningConfig.from_pdrop([1, 2], [0.3, 0.3], num_layers=3).keep_ratios == (1.0, 0.3, 0.3)


@pytest.mark.parametrize("tokens", [(300, 200, 110), (303, 110, 36), (66, 30, 17)])
def test_from_sparsevlm(tokens):
    """AFTER layers 2, 6 and 15, exactly as published.

    Layers 3, 7 and 16 are the first to see fewer tokens.
    """
    config = PruningConfig.from_sparsevlm(tokens, num_layers=32)
    assert config.method == "sparsevlm"
    assert config.tokens(576) == [576] * 3 + [tokens[0]] * 4 + [tokens[1]] * 9 + [tokens[2]] * 16


@pytest.mark.parametrize(
    "build, match",
    [
        (
            lambda: PruningConfig.from_fastv(4, num_layers=4),
            r"layers must increase within 0..3, got \[4\]",
        ),
        (
            lambda: PruningConfig.from_fastv(-1, num_layers=4),
            r"layers must increase within 0..3, got \[-1\]",
        ),
        (lambda: PruningConfig.from_fastv(2, 1.5, num_layers=4), "must be a number in"),
        (lambda: PruningConfig.from_fastv(2, -0.5, num_layers=4), "must be a number in"),
        (lambda: PruningConfig.from_fastv(2, 50, num_layers=4), "did you mean 0.5"),
        (lambda: PruningConfig.from_fastv(2), "number of decoder layers, got None"),
        (lambda: PruningConfig.from_fastv("2", num_layers=4), "layers must be whole numbers"),
        (lambda: PruningConfig.from_fastv(2, num_layers="4"), "decoder layers, got str"),
        (lambda: PruningConfig.from_sparsevlm(192), "a number for each of the layers"),
        (lambda: PruningConfig.from_sparsevlm(["300"] * 3, num_layers=32), "must be numbers"),
        (
            lambda: PruningConfig.from_pdrop([3, 2], [0.5, 0.2], num_layers=8),
            "layers must increase",
        ),
        (
            lambda: PruningConfig.from_pdrop([2, 2], [0.5, 0.2], num_layers=8),
            "layers must increase",
        ),
        (
            lambda: PruningConfig.from_pdrop([2], [0.5, 0.2], num_layers=8),
            "need one ratio per layer, got 1 layers and 2",
        ),
        (lambda: PruningConfig.from_pdrop([2, 3], [0.2, 0.5], num_layers=8), "must not increase"),
        (lambda: PruningConfig.from_pdrop(num_layers=12), "layers must increase within 0..11"),
        (
            lambda: PruningConfig.from_sparsevlm((600, 200, 100), num_layers=32),
            "tokens must be at most the n_visual=576 that there are, got 600",
        ),
        (
            lambda: PruningConfig.from_sparsevlm((300, 200), num_layers=32),
            "need one ratio per layer",
        ),
        (lambda: PruningConfig.from_sparsevlm(num_layers=16), "layers must increase within 0..15"),
    ],
)
def test_published_notations_refuse_nonsense(build, match):
    with pytest.raises(ValueError, match=match):
        build()


# ---- apply ---------------------------------------------------------------------------------------
def test_apply_refuses_another_number_of_layers(llava):
    with pytest.raises(
        ValueError,
        match="has 4 keep_ratios, but LlavaForConditionalGeneration has 6 decoder layers",
    ):
        vispco.apply(llava, PruningConfig("random", [1, 1, 1, 0.5]))


def test_apply_refuses_another_model_type(llava):
    config = PruningConfig("random", [0.5] * 6, model_type="qwen2_vl")
    with pytest.raises(
        ValueError, match="made for model type 'qwen2_vl', this is 'llava'.*set model_type to None"
    ):
        vispco.apply(llava, config)
    vispco.apply(llava, dataclasses.replace(config, model_type="llava")).remove()


@pytest.mark.parametrize("method", ["fastv", "sparsevlm"])
def test_apply_refuses_a_method_that_cannot_prune_so_early(llava, method):
    with pytest.raises(
        ValueError,
        match=rf"method '{method}' reads the attention of the layer before, so it cannot prune "
        r"before layer 1: set keep_ratios\[:1\] to 1.0",
    ):
        vispco.apply(llava, PruningConfig(method, [0.9] * 6))
    vispco.apply(llava, PruningConfig(method, [1.0] + [0.9] * 5)).remove()


@pytest.mark.parametrize(
    "options, match", [({"seed": "x"}, "seed must be an integer"), ({"sead": 1}, "sead")]
)
def test_apply_refuses_options_the_method_does_not_have(llava, options, match):
    with pytest.raises(ValueError, match=match):
        vispco.apply(llava, PruningConfig("random", [0.5] * 6, options))
