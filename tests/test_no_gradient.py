"""Decoders in which no layer takes a mask: a search has no gradient there, and says so."""

import pytest

import vispco
import zoo

NAME, VISUAL, BUDGET = "qwen4_exp", 16, 0.6


@pytest.fixture(scope="module")
def model():
    """Linear and indexed attention alone."""
    if lack := zoo.missing(zoo.FAMILIES[NAME]):
        pytest.skip(lack)
    return zoo.make(NAME)


@pytest.fixture(scope="module")
def batches(model):
    """One question, whose last two tokens are the answer."""
    inputs, n_visual = zoo.prompts(NAME, counts=(1,), text=(9,))
    assert n_visual == [VISUAL]
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    return [{**inputs, "labels": labels}]


def passes(frontier):
    """Forward passes that a search took; a backward pass counts as two."""
    return frontier.meta["forward_passes"]


def test_a_search_says_so_and_refines(model, batches):
    """It is the search of no gradient steps, to the bit, and within its budget."""
    given = {"method": "fastv", "budgets": [BUDGET], "refinement": 2}
    with pytest.warns(UserWarning, match="no gradient flows through Qwen4Exp.*refines"):
        found = vispco.search(model, batches, start=vispco.Gradient(steps=9), **given)
    plain = vispco.search(model, batches, start=vispco.Gradient(steps=0), **given)
    assert found.points[0].config == plain.points[0].config and passes(found) == passes(plain)
    n_text = int((batches[0]["labels"] == -100).sum()) - VISUAL
    report = vispco.count_flops(model, found.points[0].config, n_visual=VISUAL, n_text=n_text)
    assert report.prunable_share <= BUDGET


def test_shared_is_refused(model, batches):
    with pytest.raises(ValueError, match="no gradient flows.*'shared' learns by it: use start='r"):
        vispco.search(model, batches, budgets=[BUDGET], start="shared")


def test_a_ramp_needs_none(model, batches, recwarn):
    frontier = vispco.search(model, batches, budgets=[BUDGET], start="ramp", refinement=1)
    assert len(frontier.points) == 1
    assert not [w for w in recwarn if "no gradient" in str(w.message)]
