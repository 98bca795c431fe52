"""The yardstick: every contender holds its budgets, says what it cost, and goes on when killed."""

import json
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tests.reproduction import calibration, conditioned, contenders, predictions, yardstick
from tests.reproduction.cache import Cache
from tests.reproduction.contenders import CONTENDERS, few_drops
from tests.reproduction.searches import by_start
from tests.reproduction.yardstick import Draw, main, measure, table
from vispco import PruningConfig, count_flops, evaluate, testbed
from vispco.baselines import random_schedules
from vispco.budget import Budget
from vispco.flops import CostModel, Dimensions
from vispco.solvers import plan
from vispco.solvers.evaluator import Evaluator

BUDGETS = (0.35, 0.6)
TINY = {
    "ramp": ({"name": "ramp"}, 0),
    "ramp-refined": ({"name": "ramp"}, 1),
    "gradient": ({"name": "gradient", "steps": 1}, 1),
    "shared": ({"name": "shared", "steps": 1}, 1),
    "profile": ({"name": "profile", "measurements": 1}, 1),
    "profile-lean": ({"name": "profile", "measurements": 1}, 0),
}


def tiny(folder, seed=0):
    return Draw("testbed-llava", "fastv", Cache(folder), calibration=8, test=8, batch=4, seed=seed)


@pytest.fixture
def small(monkeypatch):
    """Eight questions and few draws."""
    for name, value in {"QUESTIONS": 8, "BATCH": 4, "HELD_OUT": 8}.items():
        monkeypatch.setattr(yardstick, name, value)
    for name, value in {
        "DENSE": 3,
        "DENSE_FINALS": 2,
        "FEW": 4,
        "FEW_FINALS": 2,
        "TIMES": 1,
    }.items():
        monkeypatch.setattr(contenders, name, value)
    for name, value in TINY.items():
        monkeypatch.setitem(contenders.SEARCHES, name, value)
    monkeypatch.setattr(plan, "GENERATIONS", 1)


def test_every_contender_holds_its_budgets(small, tmp_path):
    output, folder = tmp_path / "found.json", tmp_path / "cache"
    options = {"seeds": [0], "output": output, "cache": folder, "budgets": BUDGETS}
    result = measure("testbed-llava", "fastv", **options)
    rows = result["rows"]
    assert json.loads(output.read_text()) == result
    optional = set() if find_spec("optuna") else {"nsga2", "tpe"}
    assert {row["contender"] for row in rows} == set(CONTENDERS) - optional
    benchmark = tiny(folder)
    for row in rows:
        assert benchmark.limit(row["budget"]).holds(row["tokens"]), row
        # The full model and one schedule per budget, at least.
        assert row["passes"] >= 8 * 2
    by_name = {(row["contender"], row["budget"]): row for row in rows}
    assert {budget for name, budget in by_name if name != "published"} == set(BUDGETS)
    assert by_name["ramp", 0.6]["passes"] == 8 * 3
    for budget in BUDGETS:
        # Refinement starts at the ramp.
        losses = [by_name[name, budget]["kl"] for name in ("ramp", "ramp-refined")]
        assert losses == sorted(losses, reverse=True)
    # What the library says of one of them.
    row = by_name["random-few", 0.35]
    config = PruningConfig("fastv", [n / benchmark.tokens for n in row["tokens"]])
    record = evaluate(benchmark.model, testbed.batches("test", 8, 8), config)
    assert row["held_out_kl"] == pytest.approx(record.kl, rel=1e-4)
    assert row["held_out_accuracy"] == pytest.approx(record.accuracy)
    # All of it is in the cache.
    before = sorted(folder.iterdir())
    assert measure("testbed-llava", "fastv", **options) == result
    assert sorted(folder.iterdir()) == before and not list(folder.glob("*.journal"))
    # Others stay as they are.
    again = measure("testbed-llava", "fastv", **{**options, "seeds": [0, 1]}, only=["ramp"])
    assert [row for row in again["rows"] if row["contender"] != "ramp"] == [
        row for row in rows if row["contender"] != "ramp"
    ]
    assert {row["seed"] for row in again["rows"] if row["contender"] == "ramp"} == {0, 1}
    page = table(again)
    lines = [line for line in page.splitlines() if line.startswith("| ramp |")]
    assert len(lines) == len(yardstick.TABLES) and all(line.count("±") == 2 for line in lines)
    assert "On " not in page and {row["device"] for row in again["rows"]} == {"cpu"}
    elsewhere = [{**row, "device": "some GPU"} for row in rows if row["contender"] == "shared"]
    assert table({**again, "rows": elsewhere}).endswith("\n\nOn some GPU: shared, seed 0.")


def test_the_single_layer_grid_misses_nothing(small, tmp_path):
    """No drop of the whole grid that holds the budget and keeps more is left out."""
    benchmark = tiny(tmp_path)
    found = contenders.single_layer(benchmark, BUDGETS, 0)
    for budget in BUDGETS:
        limit, best = benchmark.limit(budget), {}
        for layer in range(1, benchmark.layers):
            for n in (int(i / 20 * 64 + 0.5) for i in range(20)):
                counts = [64] * layer + [n] * (benchmark.layers - layer)
                if limit.holds(counts):
                    best[layer] = [count / 64 for count in counts]
        losses = [benchmark.kl(benchmark.config(ratios)) for ratios in best.values()]
        assert benchmark.kl(found.configs[budget]) == min(losses)


def test_screened_are_measured_on_a_part_and_the_best_on_all(small, tmp_path):
    benchmark = tiny(tmp_path)
    found = contenders.random_dense(benchmark, [0.5], 0)
    drawn = random_schedules("fastv", benchmark.limit(0.5), 3, 0)
    by_part = sorted(drawn, key=lambda config: benchmark.answers(config, part=[0]).kl)
    assert found.configs[0.5] == min(by_part[:2], key=benchmark.kl)
    # Three on one batch of four, two on all eight questions, and the full model.
    assert found.passes == 3 * 4 + 2 * 8 + 8


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), share=st.floats(0.2, 0.9))
def test_random_plans_of_few_drops_are_on_the_budget(seed, share):
    cost = CostModel(Dimensions(12, 8, 2, 2, 4, 16, 10))
    limit = Budget(share, cost, torch.tensor([16, 16]), torch.tensor([4, 7]))
    found = few_drops(limit, 20, torch.Generator().manual_seed(seed))
    assert found.shape == (20, 12) and len(found.unique(dim=0)) == 20
    before = torch.cat([torch.full_like(found[:, :1], 16), found[:, :-1]], 1)
    assert bool((found <= before).all())
    assert int((found < before).sum(1).max()) <= contenders.DROPS + 1
    # One token more in all layers with drops is too much.
    assert limit.fits(found).all() and not limit.fits((found + 1).clamp(max=16)).any()


def test_the_draws_are_disjoint_and_the_held_out_questions_stay(tmp_path):
    first, second = tiny(tmp_path, 0), tiny(tmp_path, 1)
    pictures = [
        {
            image.numpy().tobytes()
            for batch in each.calibration.batches
            for image in batch["pixel_values"]
        }
        for each in (first, second)
    ]
    assert not pictures[0] & pictures[1]
    assert first.test.digest == second.test.digest


def test_a_search_that_was_killed_goes_on(tmp_path, monkeypatch):
    start, refinement = TINY["ramp-refined"]
    measured, real = [], Evaluator._measure

    def run(folder, most):
        def measure(self, *arguments):
            if len(measured) == most:
                raise KeyboardInterrupt
            measured.append(arguments)
            return real(self, *arguments)

        monkeypatch.setattr(Evaluator, "_measure", measure)
        return by_start(tiny(tmp_path / folder), start, BUDGETS, 0, refinement)

    whole = run("a", 100)
    once = len(measured)
    with pytest.raises(KeyboardInterrupt):
        run("b", once + 2)
    assert list((tmp_path / "b").glob("*.journal"))
    assert run("b", 100) == whole and len(measured) == 2 * once > 4
    assert not list(tmp_path.glob("*/*.journal"))


def test_bad_arguments_get_one_line(small, tmp_path, capsys):
    output = tmp_path / "found.json"
    output.write_text(json.dumps({"model": "testbed-qwen", "method": "fastv", "rows": []}))
    for arguments, message in (
        (["--only", "best"], "no contender 'best'"),
        (["--seeds", "-1"], "seeds must be numbers from 0 on"),
        (["--budgets", "0.01", "--output", f"{output}.other"], "no budget is reachable: fastv nee"),
        ([], "is of another model"),
    ):
        given_ = ["--model", "testbed-llava", "--threads", "1", "--output", str(output)]
        assert main([*given_, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_searches_with_few_and_with_many_questions_cost_the_same(tmp_path, monkeypatch, capsys):
    for name, value in {"HELD_OUT": 8, "BATCH": 4, "PASSES": 900, "SHALLOW": BUDGETS}.items():
        monkeypatch.setattr(calibration, name, value)
    file = tmp_path / "curve.json"
    asked = ["--seeds", "1", "--sizes", "4", "12", "--cache", str(tmp_path), "--output", str(file)]
    assert calibration.main(asked) == 0
    few, many = json.loads(file.read_text())["rows"]
    assert few["questions"] == 4 and many["questions"] == 12
    assert few["passes"] <= 900 and many["passes"] <= 900
    # All that is measured is within the budgets, so it is worse than the full model.
    assert all(row[name] > 0 for row in (few, many) for name in ("kl", "held_out_kl"))
    assert capsys.readouterr().out.count("\n") == 4
    bad = ["--output", str(tmp_path / "none.json"), "--table"]
    assert calibration.main(bad) == 2 and capsys.readouterr().err.count("\n") == 1


def test_predictions_are_ranked_against_measurements(tmp_path, monkeypatch, capsys):
    for name, value in {"QUESTIONS": 8, "BATCH": 4}.items():
        monkeypatch.setattr(predictions, name, value)
    file = tmp_path / "found.json"
    asked = ["--budgets", "0.3", "0.6", "--schedules", "6", "--seeds", "0", "1"]
    asked += ["--cache", str(tmp_path), "--output", str(file)]
    assert predictions.main(asked) == 0
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 2 * 2 * len(predictions.SCALES)
    assert all(-1 <= row["correlation"] <= 1 and row["schedules"] == 6 for row in rows)
    assert capsys.readouterr().out.count("\n") == 2 + len(predictions.SCALES)
    for bad in (["--seeds", "-1"], ["--schedules", "1"]):
        assert predictions.main([*asked, *bad]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@given(st.permutations(range(6)))
def test_ranks_are_alike_whatever_the_values(order):
    """By Spearman's own formula: 1 - 6 sum d^2 / (n^3 - n)."""
    a, b = torch.arange(6.0), torch.tensor(order, dtype=torch.float64)
    by_hand = 1 - 6 * float((a - b).square().sum()) / (6**3 - 6)
    assert predictions.ranked_alike(a.exp(), b**3) == pytest.approx(by_hand, abs=1e-5)


def test_one_schedule_per_question_is_on_each_ones_budget(tmp_path, monkeypatch, capsys):
    for name, value in {"HELD_OUT": 8, "QUESTIONS": 8, "BATCH": 4, "SHALLOW": BUDGETS}.items():
        monkeypatch.setattr(conditioned, name, value)
    shares, ask = [], conditioned.ask

    def noted(model, config, batches):
        (batch,) = batches
        n_visual, n_text = int(batch.n_visual), int(batch.n_text)
        shares.append(count_flops(model, config, n_visual, n_text).prunable_share)
        return ask(model, config, batches)

    monkeypatch.setattr(conditioned, "ask", noted)
    file = tmp_path / "found.json"
    asked = ["--seeds", "1", "--steps", "2", "--cache", str(tmp_path), "--output", str(file)]
    assert conditioned.main(asked) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["budget"] for row in rows] == [*BUDGETS] * 3
    # Two kinds, each budget, eight questions.
    for i, share in enumerate(shares):
        assert share <= BUDGETS[i // 8 % len(BUDGETS)]
    # With one seed, there is nothing to choose from.
    for plain, best in zip(rows, rows[2 * len(BUDGETS) :], strict=False):
        assert {**best, "kind": 0, "passes": 0} == {**plain, "kind": 0, "passes": 0}
    assert capsys.readouterr().out.count("\n") == 8
