"""What critics of pruning methods found: random tokens, smaller pictures, FastV's positions."""

import functools
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

import vispco
from naive import naive_fastv, naive_feather, naive_kept
from oracles import rows_alone
from reproduction import bias, critics
from test_methods import models
from tiny import IMAGE, PER_IMAGE, batch, without_labels
from vispco import PruningConfig
from vispco.calibration import prepare, run_teacher

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "which-method.md"


# ---- random tokens and smaller pictures ----------------------------------------------------------
@functools.cache
def winners():
    return critics.results()


def accuracy(testbed, method):
    """{budget: accuracy} in the results."""
    (row,) = [r for r in winners()["rows"] if (r["testbed"], r["method"]) == (testbed, method)]
    return {point["budget"]: point["accuracy"]["mean"] for point in row["points"]}


def test_every_method_was_measured_beside_random_tokens_and_smaller_pictures():
    """At equal FLOPs: none costs more than its budget. `vtw` ranks nothing; three are for video."""
    rows = winners()["rows"]
    methods = set(vispco.list_methods()) - {"vtw", "evs", "vidcom2", "framefusion"}
    for name in ("testbed-llava", "testbed-qwen", "testbed-smollm"):
        own = {row["method"]: row for row in rows if row["testbed"] == name}
        assert set(own) == methods | {"auto", "smaller pictures"}
    for row in rows:
        for point in row["points"]:
            assert point["share"] <= point.get("budget", 1) + 1e-9


def test_the_table_of_the_page_is_that_of_the_results(tmp_path, capsys):
    text = PAGE.read_text(encoding="utf-8")
    for made in (critics.table(winners()), critics.deep(winners())):
        assert made in text, f"python -m tests.reproduction.critics --write {PAGE}"
    # What is written anew is what stands there.
    copy = shutil.copy(PAGE, tmp_path)
    assert critics.main(["--write", str(copy)]) == 0
    assert Path(copy).read_text(encoding="utf-8") == text
    Path(copy).write_text("nothing")
    assert critics.main(["--write", str(copy)]) == 2
    assert "has no place for the table" in capsys.readouterr().err


def test_what_the_page_says_of_random_tokens():
    """Sentence by sentence."""
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert "below `random` at 20 and 35 %" in text
    random = accuracy("testbed-qwen", "random")
    for name in ("visionzip", "prumerge", "hiprune", "holov", "vscan"):
        for budget in (0.2, 0.35):
            assert accuracy("testbed-qwen", name)[budget] < random[budget], name
    # The best of one testbed are the worst of the other.
    best = accuracy("testbed-llava", "prumerge")[0.2]
    for row in winners()["rows"]:
        if row["testbed"] == "testbed-llava" and "budget" in row["points"][0]:
            assert row["points"][0]["accuracy"]["mean"] <= best
    assert accuracy("testbed-qwen", "prumerge")[0.2] < random[0.2]
    assert "random tokens are among the best on testbed-qwen" in text
    at = {
        row["method"]: row["points"][-1]["accuracy"]["mean"]
        for row in winners()["rows"]
        if row["testbed"] == "testbed-qwen" and "budget" in row["points"][0]
    }
    assert at["random"] == max(at.values())


def test_methods_that_are_clearly_worse_are_found():
    """Of 100 questions, a standard error of a difference of two halves is 7.1 points."""

    def row(name, *means):
        points = [
            {"budget": b, "share": b - 0.01, "accuracy": {"mean": mean}}
            for b, mean in zip((0.2, 0.5), means, strict=True)
        ]
        return {"testbed": "x", "method": name, "n_test": 100, "points": points}

    small = [
        {"share": share, "accuracy": {"mean": mean}}
        for share, mean in ((0.1, 0.3), (0.19, 0.2), (0.4, 0.9))
    ]
    pictures = {"testbed": "x", "method": "smaller pictures", "points": small}
    rows = [
        row("auto", 0.1, 0.1),
        row("random", 0.5, 0.5),
        row("a", 0.37, 0.35),
        row("b", 0.1, 0.9),
        pictures,
    ]
    first, second = critics.found({"rows": rows})
    assert first["worse"] == {"smaller pictures": ["b"], "random": ["b"]}
    assert second["worse"] == {"smaller pictures": ["a"], "random": ["a"]}
    assert first["rivals"] == {"smaller pictures": 0.3, "random": 0.5} and first["methods"] == 2


# ---- where kept tokens lie -----------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, rule", [({}, naive_fastv), ({"rotary": False, "stride": 3}, naive_feather)]
)
def test_places_are_those_of_the_tokens_that_a_naive_method_keeps(options, rule):
    """Pictures of 4 x 4 tokens, in reading order."""
    sdpa, eager = models()
    images = (1, 2, 1)
    inputs = batch(images=images, text=(9, 7, 12), before=(2, 0, 8), padding="left", seed=3)
    config = PruningConfig("fastv", [1, 1, 0.4, 0.4, 0.4, 0.4], options)
    prepared = run_teacher(sdpa, prepare(sdpa, [inputs]))
    record, counts = bias.places(sdpa, prepared, config)
    expected = Counter()
    for b in range(3):
        alone, _ = rows_alone(without_labels(inputs), images, b)
        # What is asked ends before the answer's two tokens.
        alone |= {name: alone[name][:, :-2] for name in ("input_ids", "attention_mask")}
        visual = alone["input_ids"][0] == IMAGE
        kept = naive_kept(eager, alone, config, rule)[2][visual]
        expected.update(divmod(j % PER_IMAGE, 4) for j in kept.nonzero()[:, 0].tolist())
    assert {
        (r, c): int(n) for r, row in enumerate(counts) for c, n in enumerate(row) if n
    } == expected
    assert record.kl == pytest.approx(vispco.evaluate(sdpa, [inputs], config).kl, abs=1e-6)


def test_all_variants_cost_no_more_than_fastv():
    """And one token more would."""
    found = bias.measure(4, {"testbed-llava": (2,)})
    rows = {row["variant"]: row for row in found["rows"]}
    assert len(rows) == 4 and rows[bias.FASTV]["tokens"] == 16
    for row in found["rows"]:
        assert row["flops"] <= rows[bias.FASTV]["flops"] + 1e-9
        assert sum(row["rows"]) == pytest.approx(1, abs=1e-3)
        assert len(row["rows"]) == len(row["columns"]) == 8
    # Scores without rotary positions run a part of a layer again.
    assert rows[bias.UNROTATED]["tokens"] < 16 == rows[bias.RANDOM]["tokens"]


def test_the_page_has_the_figures_of_the_bias():
    found = json.loads((DOCS / "results" / "bias.json").read_text(encoding="utf-8"))
    assert {row["testbed"] for row in found["rows"]} == set(bias.LAYERS)
    text = PAGE.read_text(encoding="utf-8")
    assert bias.table(found) in text and "At 9 of the 12 places" in text
    at = {(row["testbed"], row["layer"], row["variant"]): row for row in found["rows"]}
    places = [key[:2] for key in at if key[2] == bias.FASTV]
    lower = [
        at[(*place, bias.UNROTATED)]["accuracy"] < at[(*place, bias.FASTV)]["accuracy"]
        for place in places
    ]
    assert sum(lower) == 9 and len(lower) == 12
    # Before layer 2 of testbed-smollm, the two lowest rows of eight.
    fastv, unrotated = (at["testbed-smollm", 2, v] for v in (bias.FASTV, bias.UNROTATED))
    assert sum(fastv["rows"][6:]) > 2 / 3 - 0.01 and unrotated["rows"][0] > 0.4
    for name in bias.LAYERS:
        drawn = (DOCS / "results" / f"bias-{name}.svg").read_text(encoding="utf-8")
        assert f"{name}: where the tokens lie" in drawn and f"bias-{name}.svg" in text
