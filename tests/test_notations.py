"""Notations of FastV, PyramidDrop and SparseVLM: there and back, and what they cannot say."""

import pytest
from hypothesis import given, strategies as st

from vispco import PruningConfig
from vispco.commands.notations import NOTATIONS, parse_notation, write_notation

layers = st.integers(3, 40)


@given(num=layers, data=st.data(), n_visual=st.integers(1, 3000))
def test_what_is_written_is_read_as_the_same_tokens(num, data, n_visual):
    """Any schedule of whole tokens; a notation says all of it, or refuses."""
    counts = sorted(
        data.draw(st.lists(st.integers(0, n_visual), min_size=num, max_size=num)), reverse=True
    )
    flat = data.draw(st.integers(0, num))
    counts = [n_visual] * flat + counts[flat:]
    config = PruningConfig("random", [c / n_visual for c in counts])
    steps = len(config.steps)
    for name in NOTATIONS:
        able = {
            "fastv": steps <= 1,
            "pdrop": steps > 0,
            "sparsevlm": steps > 0 and 0 not in config.steps,
        }[name]
        try:
            back = parse_notation(name, write_notation(name, config, n_visual), num, n_visual)
        except ValueError as error:
            assert not able and "cannot say" in str(error)
        else:
            assert able and back.tokens(n_visual) == config.tokens(n_visual)


@pytest.mark.parametrize("name", NOTATIONS)
def test_the_examples_mean_the_published_configurations(name):
    published = {
        "fastv": PruningConfig.from_fastv(num_layers=32),
        "pdrop": PruningConfig.from_pdrop(num_layers=32),
        "sparsevlm": PruningConfig.from_sparsevlm(num_layers=32),
    }
    config = parse_notation(name, NOTATIONS[name].example, 32)
    assert (config.method, config.keep_ratios) == (
        name,
        published[name].keep_ratios,
    ) and write_notation(name, config) == NOTATIONS[name].example


def test_tokens_are_counted_out_of_the_prompt():
    small = parse_notation("sparsevlm", "layers=0 tokens=100", 2, n_visual=200)
    assert (
        small.keep_ratios == (1, 0.5)
        and write_notation("sparsevlm", small) == "layers=0 tokens=100"
    )
    config = PruningConfig("sparsevlm", [1, 0.5], n_visual=64)
    assert write_notation("sparsevlm", config) == "layers=0 tokens=32"
    assert write_notation("sparsevlm", config, 1000) == "layers=0 tokens=500"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("fastv", "2,0.5", "expected such as 'K=2 R=0.5': before layer K, drop the fraction R"),
        ("fastv", "K=2 R=half", "is not in the notation of fastv; expected such as"),
        ("fastv", "K=2 R=0.5 S=1", "is not in the notation"),
        ("fastv", "K=1,2 R=0.5", "expected one number for K, got 2"),
        ("fastv", "K=-1 R=0.5", "expected a whole number from 0, got -1"),
        ("fastv", "K=inf R=0.5", "is not in the notation"),
        ("fastv", "K=2 R=nan", "must be a number in [0, 1], got nan"),
        ("pdrop", "layers=8,4 ratios=0.5,0.25", "layers must increase"),
        ("sparsevlm", "layers=2 tokens=1.5", "expected a whole number"),
        ("fitprune", "x", "unknown notation 'fitprune'"),
        ("FastV", "K=2 R=0.5", "did you mean 'fastv'?"),
        ("fastv", "K=2,R=0.5", "did you mean 'K=2 R=0.5'?"),
        ("fastv", "k=2 r=50%", "did you mean 'K=2 R=0.5'?"),
        ("pdrop", "ratios: 50%,25% layers: 2,4", "did you mean 'layers=2,4 ratios=0.5,0.25'?"),
    ],
)
def test_a_bad_notation_shows_a_good_one(name, text, expected):
    with pytest.raises(ValueError) as error:
        parse_notation(name, text, 32)
    assert expected in str(error.value)
