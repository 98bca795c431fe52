"""The reproduction's machinery.

Cache, order statistics, volumes, verdicts, and a run of seconds from end to end.
"""

import itertools
import json
import math
import multiprocessing
import random

import pytest
import torch
from hypothesis import given, strategies as st

import test_imports
from mutations import mutations
from tests.reproduction import estimators as study, figures, jobs, paper, report, stats
from tests.reproduction.__main__ import main, sized
from tests.reproduction.benchmark import Benchmark
from tests.reproduction.cache import (
    MEASURING,
    SEARCHING,
    SHRINKING,
    SIZES as SIZES_FILE,
    Cache,
    imported,
    module_name,
)
from tests.reproduction.claims import (
    CLAIMS,
    cost,
    estimators,
    hypervolume as volumes,
    kernels,
    percentile,
)
from tests.reproduction.claims.base import MEASURED, MET, MISSED, NOT_TESTABLE, all_met
from tests.reproduction.sizes import SIZES
from vispco import PruningConfig, evaluate, testbed
from vispco.pareto import hypervolume
from vispco.solvers.evaluator import Evaluator
from vispco.utils import digest

RATIOS = [1.0, 0.75, 0.5, 0.5, 0.25, 0.25, 0.0, 0.0]


def benchmark(folder, **options):
    return Benchmark(
        "testbed-llava",
        options.pop("method", "fastv"),
        Cache(folder),
        calibration=8,
        test=16,
        batch=4,
        **options,
    )


# ---- the cache -----------------------------------------------------------------------------------
def test_a_measurement_is_what_evaluate_says(tmp_path):
    ours = benchmark(tmp_path)
    config = PruningConfig("fastv", RATIOS)
    record = evaluate(ours.model, ours.calibration.batches, config)
    answers = ours.answers(config)
    assert (
        answers.kl == pytest.approx(record.kl, rel=1e-5)
        and answers.right.tolist() == record.correct.tolist()
    )
    held_out = evaluate(ours.model, ours.test.batches, config)
    assert ours.accuracy(config) == held_out.accuracy
    assert ours.answers(None).kl == 0


def test_a_hit_is_the_measurement_to_the_bit_and_costs_the_same(tmp_path):
    config = PruningConfig("fastv", RATIOS)
    first, second = benchmark(tmp_path), benchmark(tmp_path)
    a, b = first.answers(config), second.answers(config)
    assert (first.cache.misses, first.cache.hits, second.cache.misses, second.cache.hits) == (
        1,
        0,
        0,
        1,
    )
    assert torch.equal(a.divergence, b.divergence) and torch.equal(a.right, b.right)
    # The full model's and the configuration's.
    assert first.passes == second.passes == 16


def test_a_part_is_what_it_is_of_the_whole(tmp_path):
    config, (left, right) = (
        PruningConfig("fastv", RATIOS),
        (benchmark(tmp_path / name) for name in "ab"),
    )
    # Measured by itself.
    part = left.answers(config, part=[1])
    whole = right.answers(config)
    # Cut out of what is known.
    again = right.answers(config, part=[1])
    assert (
        (left.cache.misses, right.cache.misses) == (1, 1)
        and left.passes == 8 + 4
        and right.passes == 8 + 8 + 4
    )
    assert torch.equal(again.divergence, whole.divergence[4:]) and torch.equal(
        again.right, part.right
    )
    torch.testing.assert_close(part.divergence, again.divergence, rtol=1e-5, atol=1e-6)


def test_the_bench_is_the_librarys(tmp_path):
    ours = benchmark(tmp_path)
    plain, cached = (
        Evaluator(ours.model, ours.calibration.prepared, {"method": "fastv"}),
        ours.evaluator(),
    )
    schedules = [tuple(RATIOS), (1.0,) * 4 + (0.5,) * 4]
    for part in (None, [1], [1, 0]):
        assert cached.losses(schedules, part) == pytest.approx(
            plain.losses(schedules, part), rel=1e-5
        )
    assert cached.passes == plain.passes and cached.best == plain.best
    # What is known is free, as in the other evaluator.
    assert cached.losses(schedules) and cached.passes == plain.passes


def test_what_can_change_a_measurement_is_in_its_key(tmp_path):
    ours = benchmark(tmp_path)
    ours.answers(PruningConfig("fastv", RATIOS))

    def misses(place, config):
        before = place.cache.misses
        place.answers(config)
        return place.cache.misses - before

    # The same tokens.
    assert misses(ours, PruningConfig("fastv", [r + 1e-9 if 0 < r < 1 else r for r in RATIOS])) == 0
    assert misses(ours, PruningConfig("fastv", [1.0, 0.75, 0.5, 0.5, 0.25, 0.25, 0.25, 0.0])) == 1
    assert misses(ours, PruningConfig("sparsevlm", RATIOS)) == 1
    assert misses(ours, PruningConfig("random", RATIOS)) == 1
    assert misses(ours, PruningConfig("random", RATIOS, {"seed": 1})) == 1
    assert misses(benchmark(tmp_path, seed=1), PruningConfig("fastv", RATIOS)) == 1
    assert misses(benchmark(tmp_path), PruningConfig("fastv", RATIOS)) == 0


def test_the_digest_of_a_model_sees_weights_and_configuration():
    model, _ = testbed.load("testbed-llava")
    before = digest.of_model(model)
    model.config._name_or_path = "/elsewhere"
    assert digest.of_model(model) == before
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    changed = digest.of_model(model)
    assert changed != before
    model.config.text_config.rms_norm_eps *= 2
    assert digest.of_model(model) not in (before, changed)


def test_the_digest_of_the_questions_sees_every_number():
    batch = testbed.batches("test", 4, 4)[0]
    before = digest.of_batches([batch])
    assert digest.of_batches([dict(reversed(batch.items()))]) == before
    for name, tensor in batch.items():
        other = tensor.clone(memory_format=torch.contiguous_format)
        other.view(-1)[0] += 1
        assert digest.of_batches([{**batch, name: other}]) != before


def test_a_torn_line_is_ignored(tmp_path):
    first = Cache(tmp_path)
    assert [first.get("a", lambda: 1), first.get("b", lambda: 2)] == [1, 2]
    (path,) = tmp_path.glob("measured-*.jsonl")
    text = path.read_text()
    path.write_text(text[:-6])
    second = Cache(tmp_path)
    assert second.get("a", pytest.fail) == 1 and second.get("b", lambda: 3) == 3
    path.write_text('{"key": 1\nnot JSON\n[]\n' + "[" * 100_000 + "\n" + text)
    assert Cache(tmp_path).get("b", pytest.fail) in (2, 3)


def test_what_is_damaged_is_measured_again(tmp_path):
    """Five thousand damages: an entry is what was measured, or it is not there."""
    entries = {f"key {i}": {"kl": [i / 7, None], "right": "0110"} for i in range(4)}
    for name, value in entries.items():
        Cache(tmp_path / "whole").get(name, lambda value=value: value)
    whole = b"".join(path.read_bytes() for path in (tmp_path / "whole").iterdir())
    found = lost = 0
    for content in mutations([whole], 5000, seed=0):
        (tmp_path / "measured-1.jsonl").write_bytes(content)
        kept = Cache(tmp_path)
        for name, value in entries.items():
            if name in kept:
                found += kept.get(name, pytest.fail) == value
            else:
                lost += 1
    assert found + lost == 4 * 5000 and found > 5000 and lost > 5000


@pytest.mark.parametrize("roots", [MEASURING, SHRINKING, SEARCHING])
def test_a_key_holds_all_source_files_at_work(roots):
    """A change anywhere below what is measured must not find what was measured before it."""
    modules = test_imports.MODULES
    found = {module_name(path) for path in imported(roots)}
    wanted = {
        name for name in modules if any(f"vispco.{name}.".startswith(f"{root}.") for root in roots)
    }
    own = {name.removeprefix("vispco.") for name in found if name.startswith("vispco.")}
    todo = set(wanted)
    while todo:
        below = set(test_imports.inside(todo.pop())) - {"__init__"}
        below = {name if name in modules else f"{name}.__init__" for name in below}
        below |= {f"{name.rpartition('.')[0]}.__init__" for name in below if "." in name}
        todo |= below - wanted
        wanted |= below
    assert wanted <= own
    assert not [name for name in own if name.startswith(("plot", "commands", "cli", "report"))]
    # A million answers outlive a change of the search.
    if roots == MEASURING:
        assert not [
            name
            for name in own
            if name.startswith(("search", "solvers", "baselines", "budget", "kernels", "alm"))
        ]
    assert {root for root in roots if root.startswith("tests.")} <= found


def test_the_sizes_are_in_no_key():
    """A change of the sizes leaves what was measured; so they must be known by their right name."""
    assert (
        SIZES_FILE.is_file()
        and SIZES_FILE in imported(SEARCHING)
        and SIZES_FILE not in imported(MEASURING)
    )
    names = {module_name(path) for path in imported(SEARCHING)}
    assert {
        "tests.reproduction.searches",
        "tests.reproduction.benchmark",
        "tests.reproduction.gradients",
    } <= names
    assert not [
        name
        for name in names
        if name.startswith(("tests.reproduction.claims", "tests.reproduction.figures"))
    ]
    tests = {module_name(path) for path in imported(MEASURING)} - {
        name for name in names if name.startswith("vispco.")
    }
    assert tests == {
        "tests.reproduction.__init__",
        "tests.reproduction.deep",
        "tests.reproduction.measure",
    }


def test_fresh_begins_with_nothing_and_removes_only_its_own(tmp_path):
    Cache(tmp_path).get("a", lambda: 1)
    (tmp_path / "notes.jsonl").write_text("mine")
    fresh = Cache(tmp_path, fresh=True)
    assert fresh.get("a", lambda: 2) == 2 == Cache(tmp_path).get("a", pytest.fail)
    assert (tmp_path / "notes.jsonl").read_text() == "mine"


def test_a_value_is_as_it_will_be_read(tmp_path):
    made = Cache(tmp_path).get("a", lambda: {"pair": (1, 2), 3: "x"})
    assert made == {"pair": [1, 2], "3": "x"} == Cache(tmp_path).get("a", pytest.fail)
    with pytest.raises(ValueError):
        Cache(tmp_path).get("b", lambda: math.nan)


def fill(folder, start):
    """In another process: forty entries, half of them everybody's."""
    own = Cache(folder)
    for i in range(20):
        own.get(f"shared {i}", lambda i=i: i)
        own.get(f"{start} {i}", lambda i=i: i)


def test_two_processes_share_a_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=fill, args=(tmp_path, name)) for name in ("left", "right")]
    # Before they have written anything.
    mine = Cache(tmp_path)
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for name in ("shared", "left", "right"):
        assert [mine.get(f"{name} {i}", pytest.fail) for i in range(20)] == list(range(20))


# ---- statistics ----------------------------------------------------------------------------------
@pytest.mark.parametrize("pool", [1, 2, 5, 7])
def test_best_of_n_is_the_mean_over_all_subsets(pool):
    values = random.Random(pool).sample(range(100), pool)
    for n in range(1, pool + 1):
        best = [min(subset) for subset in itertools.combinations(values, n)]
        expected = stats.expected_best(values, n)
        assert expected["mean"] == pytest.approx(sum(best) / len(best))
        assert sum(stats.best_of(n, pool)) == pytest.approx(1)
        assert expected["low"] == sorted(best)[max(0, math.ceil(0.1 * len(best)) - 1)]
        assert expected["high"] == sorted(best)[math.ceil(0.9 * len(best)) - 1]
        for mine in (*values, 50.5):
            brute = sum((b > mine) + (b == mine) / 2 for b in best) / len(best)
            assert stats.chance_to_win(mine, values, n) == pytest.approx(brute)
    for n in (0, pool + 1):
        with pytest.raises(ValueError, match=f"1 to {pool}"):
            stats.best_of(n, pool)


def test_held_out_accuracy_of_the_best():
    values = [3.0, 1.0, 2.0, 4.0]
    accuracy = {0: 0.3, 1: 0.9, 2: 0.6, 3: 0.1}
    best = [
        accuracy[min(subset, key=values.__getitem__)]
        for subset in itertools.combinations(range(4), 2)
    ]
    assert stats.expected_held_out(values, accuracy, 2, first=4) == pytest.approx(
        sum(best) / len(best)
    )
    # The best of all is known.
    assert stats.expected_held_out(values, {1: 0.9}, 4, first=0) == 0.9
    # The better of the first two.
    assert stats.expected_held_out(values, {0: 0.3, 1: 0.9}, 2, first=2) == pytest.approx(0.9)
    assert stats.expected_held_out(values, {0: 0.3}, 2, first=1) is None


def test_percentile_counts_ties_half():
    assert (
        stats.percentile(0, [1, 2]) == 100
        and stats.percentile(3, [1, 2]) == 0
        and stats.percentile(1, [1, 1]) == 50
    )


def test_the_paired_bootstrap_finds_the_standard_error():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(400, generator=generator) < p for p in (0.8, 0.6))
    found = stats.paired(a, b)
    exact = float((a.double() - b.double()).std() / 400**0.5)
    assert (
        found["error"] == pytest.approx(exact, rel=0.1)
        and found["low"] < found["difference"] < found["high"]
    )
    assert stats.paired(a, a) == {"difference": 0, "error": 0, "low": 0, "high": 0}


def test_the_volume_is_bounded_by_share_one_and_the_floor():
    points = [(0.2, 0.5), (0.6, 0.9), (0.7, 0.4), (0.1, 0.1)]
    assert stats.volume(points, 0.3) == pytest.approx(0.4 * 0.2 + 0.4 * 0.6)
    assert stats.volume(points, 0.3) == hypervolume(points, (1.0, 0.3), maximize=(False, True))
    # The full model adds nothing.
    assert stats.volume([*points, (1.0, 1.0)], 0.3) == stats.volume(points, 0.3)


@given(share=st.floats(0.05, 0.95), rate=st.floats(0.1, 1), floor=st.floats(0, 0.5))
def test_a_single_configuration_is_worth_the_same_on_either_half(share, rate, floor):
    right = torch.rand(1, 40, generator=torch.Generator().manual_seed(0)) < rate
    # Each question counts in one half of every halving.
    box = (1 - share) * (float(right.double().mean()) - floor)
    assert stats.cross_fitted([share], right, floor) == pytest.approx(box, abs=1e-9)


@pytest.mark.parametrize("skilled", [False, True])
def test_hindsight_is_luck_where_all_are_alike_and_skill_where_they_are_not(skilled):
    """A hundred coins at one price: the luckiest is above a half.

    On other questions it is worth a half. With skill, both agree.
    """
    rate = torch.linspace(0, 1, 100)[:, None] if skilled else torch.full((100, 1), 0.5)
    right = torch.rand(100, 200, generator=torch.Generator().manual_seed(1)) < rate
    best = stats.volume([(0.0, float(row.double().mean())) for row in right], 0.0)
    halves = stats.cross_fitted([0.0] * 100, right, 0.0, draws=50)
    assert (
        (halves > 0.97 and best > 0.97) if skilled else (best > 0.57 and abs(halves - 0.5) < 0.03)
    )


# ---- verdicts, of planted results ----------------------------------------------------------------
def test_all_met():
    assert [
        all_met(v) for v in ([MET, MET], [MET, MISSED], [MET, NOT_TESTABLE], [NOT_TESTABLE], [])
    ] == [MET, MISSED, MET, NOT_TESTABLE, NOT_TESTABLE]


def grid_row(learned, chosen=1.0, hindsight=1.0, passes=100, grid_passes=4000):
    return {
        "testbed": "t",
        "method": "m",
        "volumes": {
            "learned": learned,
            "refined": [1.3],
            "refined_ramp": [1.2],
            "predictor": [1.1],
            "ramp": 0.9,
            "chosen": chosen,
            "hindsight": hindsight,
            "halves": 0.97,
        },
        "learned": [{}] * len(learned),
        "passes": passes,
        "refined_passes": 8 * passes,
        "grid_passes": grid_passes,
        "chosen": [],
        "floor": 0.1,
        "full": 0.9,
        "grid": [],
        "published": [],
    }


@pytest.mark.parametrize(
    "row, verdict",
    [
        (grid_row([1.06, 1.05]), MET),
        (grid_row([1.06, 1.03]), MISSED),
        (grid_row([1.06], hindsight=1.02), MISSED),
        (grid_row([1.06], chosen=1.02), MISSED),
        (grid_row([1.2], passes=101), MISSED),
    ],
)
def test_hypervolume_verdict(row, verdict):
    assert volumes.conclude([row], SIZES["smoke"])["verdict"] == verdict
    both = volumes.conclude([row, grid_row([1.1])], SIZES["smoke"])
    assert both["verdict"] == verdict and len(both["rows"]) == 2
    measured = volumes.conclude([grid_row([9.0])], SIZES["smoke"])["measured"]
    assert (
        "the paper's predictor at the same cost at least 1.100; refined, at most 1/5.0 of its "
        "cost, at least 1.300, a refined ramp 1.200; a ramp, no search: at least 0.900"
    ) in measured
    # Few budgets make no frontier.
    few = grid_row([9.0])
    few["volumes"] |= {"refined": [], "refined_ramp": []}
    found = volumes.conclude([{**few, "refined_passes": 0}], SIZES["smoke"])
    assert "at least 1.100; a ramp" in found["measured"]


def percentile_row(percentiles, high):
    return {
        "testbed": "t",
        "method": "m",
        "budget": 0.5,
        "reachable": True,
        "pool": 200,
        "held_out": 30,
        "passes": 1.0,
        "percentiles": percentiles,
        "kl": [0.1] * len(percentiles),
        "accuracy": [0.8] * len(percentiles),
        "tokens": [[1]] * 9,
        "pool_kl": stats.summary([0.2, 0.3]),
        "pool_accuracy": stats.summary([0.7]),
        "accuracy_percentiles": [50.0],
        "against_best": [
            {"difference": high - 0.01, "error": 0.01, "low": high - 0.02, "high": high}
        ],
    }


def test_percentile_verdict():
    def verdict(*rows):
        return percentile.conclude([None, *rows], SIZES["smoke"])["verdict"]

    lost = {"testbed": "t", "method": "m", "budget": 0.1, "reachable": False, "least": 0.13}
    assert verdict(percentile_row([99.0, 100.0], 0.0), lost) == MET
    assert verdict(percentile_row([98.0, 99.5], 0.0)) == MISSED
    assert verdict(percentile_row([100.0], -0.01)) == MISSED
    assert verdict(lost) == NOT_TESTABLE


def cost_row(ours, rival=1.0, passes=2048.0, mean=2.0, pool=160, **searchers):
    draws = [
        {"n": n, "mean": kl, "low": kl, "high": kl, "passes": 128 * n, "accuracy": 0.5}
        for n, kl in ((1, mean), (pool, rival))
    ]
    rows = [
        {
            "name": name,
            "kl": kl,
            "accuracy": [0.5] * len(kl),
            "share": [0.5] * len(kl),
            "passes": passes,
        }
        for name, kl in {"learned": ours, **searchers}.items()
    ]
    for name in (cost.PREDICTOR, cost.RAMP):
        rows.append({**rows[0], "name": name, "kl": [2 * kl for kl in ours]})
    return {
        "testbed": "t",
        "method": "m",
        "budget": 0.5,
        "reachable": True,
        "rows": rows,
        "random": draws,
        "won": [0.5],
        "coarse": [],
        "n_calibration": 128,
        "n_test": 256,
    }


@pytest.mark.parametrize(
    "row, verdict",
    [
        (cost_row([0.9]), MET),
        (cost_row([1.0]), MET),
        (cost_row([1.2]), MISSED),
        (cost_row([0.9], passes=2049), MISSED),
        (cost_row([0.9], TPE=[0.8]), MISSED),
        (cost_row([0.9], TPE=[0.95, 1.0]), MET),
        (cost_row([9.0], mean=1.01), NOT_TESTABLE),
        (cost_row([0.9], pool=40), NOT_TESTABLE),
        (cost_row([1.2], pool=40), MISSED),
        # The last one within the noise of its seeds.
        (cost_row([0.9, 1.1, 1.0], rival=0.98), MET),
    ],
)
def test_cost_verdict(row, verdict):
    found = cost.conclude([row], SIZES["smoke"])
    assert found["verdict"] == verdict and set(found["rows"][0]["within"].values()) == {"better"}


@pytest.mark.parametrize(
    "several, verdict", [([0.9, 0.95], MET), ([1.0, 1.005], MET), ([1.5, 1.51], MISSED)]
)
def test_kernel_verdict(several, verdict):
    rows = [
        {
            "testbed": "t",
            "method": "m",
            "seed": i,
            "tokens": 64,
            "rows": [
                {
                    "budget": 0.5,
                    "paired": {"difference": 0.0, "error": 0.01},
                    "multi_step": {"kl": kl, "accuracy": 0.5, "tokens": [1]},
                    "single_layer": {"kl": 1.0, "accuracy": 0.5, "tokens": [1]},
                }
            ],
        }
        for i, kl in enumerate(several)
    ]
    assert kernels.conclude(rows, SIZES["smoke"])["verdict"] == verdict


@pytest.mark.parametrize("default, verdict", [(0.5, MET), (0.49, MET), (0.4, MISSED)])
def test_estimator_verdict(default, verdict):
    def row(agreement):
        return {
            "schedule": {
                name: {"4": agreement}
                for name in ("cosine", "cosine of a batch", "scale", "bias", "std")
            }
        }

    study = {
        "model": "t",
        "estimators": {
            "truth on a batch, h = 4": row(0.9),
            "rank": row(default),
            "paper": row(0.5),
        },
    }
    result = estimators.conclude([study], SIZES["smoke"])
    assert result["verdict"] == verdict and result["searched"] == []
    assert estimators.conclude([], SIZES["smoke"])["verdict"] == NOT_TESTABLE


def test_searches_that_differ_in_the_estimator(tmp_path, monkeypatch):
    for name, value in {
        "SEARCHED": ("rank", "paper, clipped"),
        "BUDGETS": (0.5,),
        "STEPS": 2,
    }.items():
        monkeypatch.setattr(estimators, name, value)
    size = SIZES["smoke"]
    rows = [estimators.run(Cache(tmp_path), size, "testbed-llava", seed) for seed in (1, 2)]
    for row in rows:
        ours, theirs = (row["searched"][name] for name in estimators.SEARCHED)
        assert ours["passes"] == theirs["passes"] > 2 * 3 * size.batch and ours["kl"][0] > 0
        assert ours["budgets"] == [0.5] and 0 <= ours["accuracy"][0] <= 1
    for other, row in zip((1.0, 4.0), rows, strict=True):
        row["searched"]["rank"]["kl"], row["searched"]["paper, clipped"]["kl"] = (
            [2.0],
            [2.0 * other],
        )
    default, clipped = estimators._searched(rows)
    assert default["ratio"]["values"] == [1, 1] and clipped["ratio"]["values"] == pytest.approx(
        [1, 4]
    )
    result = {"rows": [], "searched": [default, clipped]}
    (header,) = [
        h for h in parsed("\n\n".join(report.tables.TABLES["estimators"](result, report.markdown)))
    ]
    assert header == (
        "testbed",
        "estimator",
        "KL, 50 %",
        "accuracy, %, 50 %",
        "KL over the default's, mean",
        "passes",
    )


def test_the_study_of_estimators(tmp_path, monkeypatch):
    """As the command writes it, at one batch a schedule."""
    command = [
        "estimators",
        "--only",
        "spread 2",
        "--steps",
        "1",
        "--output",
        str(tmp_path),
        "--questions",
    ]
    monkeypatch.setattr("sys.argv", [*command, str(study.BATCH)])
    study.main()
    found = json.loads((tmp_path / "estimators.json").read_text())
    assert list(found["estimators"]) == [
        "truth on a batch, h = 4",
        "REINFORCE, spread 2",
        "SPSA, spread 2",
    ]
    assert found["questions"] == 4 * study.BATCH and all(
        set(by) == set(found["schedules"]) for by in found["estimators"].values()
    )
    truth = found["estimators"]["truth on a batch, h = 4"]
    assert all(
        row["cosine"]["4"] == pytest.approx(1) and row["bias"]["4"] == pytest.approx(0, abs=1e-6)
        for row in truth.values()
    )
    tables = parsed((tmp_path / "estimators.md").read_text())
    assert [len(rows) for rows in tables.values()] == [3, 3]
    monkeypatch.setattr("sys.argv", [*command, str(study.BATCH - 1)])
    with pytest.raises(SystemExit, match="2"):
        study.main()


def test_every_claim_is_complete():
    assert set(CLAIMS) == set(report.ORDER) == set(report.tables.TABLES) >= set(figures.FIGURES)
    for size in SIZES.values():
        for name, piece in jobs.plan(list(CLAIMS), size):
            assert json.loads(json.dumps(piece.args)) == piece.args and piece.passes >= 0, name
    assert sum(piece.seconds for _, piece in jobs.plan(list(CLAIMS), SIZES["quick"])) < 2 * 3600


def test_the_papers_tables_have_their_shape():
    assert all(len(values) == len(paper.BUDGETS) for values in paper.KERNELS.values())
    assert tuple(paper.AGAINST_SAMPLES) == paper.BUDGETS
    assert all(
        set(row) == {"fastv", "sparsevlm", "fitprune"} for row in paper.AGAINST_SAMPLES.values()
    )
    assert paper.KERNELS["single_layer"] == tuple(
        row["fastv"][2] for row in paper.AGAINST_SAMPLES.values()
    )


# ---- the command ---------------------------------------------------------------------------------
def parsed(text):
    """{header: rows} of the Markdown tables of a page; every row as long as its header."""
    blocks = [
        [line[2:-2].split(" | ") for line in lines]
        for is_table, lines in itertools.groupby(
            text.splitlines(), lambda line: line.startswith("|")
        )
        if is_table
    ]
    for header, rule, *rows in blocks:
        assert rule == ["---"] * len(header)
        assert all(len(row) == len(header) for row in rows), header
    return {tuple(header): rows for header, _, *rows in blocks}


def test_smoke_run_from_end_to_end(tmp_path, capsys):
    folder = tmp_path / "results"
    arguments = [
        "--size",
        "smoke",
        "--workers",
        "1",
        "--output",
        str(folder),
        "--cache",
        str(tmp_path / "cache"),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert all(name in printed.out for name in CLAIMS) and "forward passes" in printed.err
    page = (folder / "README.md").read_text()
    tables = parsed(page)
    summary = tables["claim", "verdict", "measured"]
    assert {row[1] for row in summary} <= {MET, MISSED, NOT_TESTABLE, MEASURED} and len(
        summary
    ) == len(CLAIMS)
    beside = tables["claim of the paper", "the paper", "ours", "verdict", "why"]
    assert {row[3] for row in beside} == {
        "reproduced",
        "not reproduced",
        "not testable offline",
    } or len(beside) == 8
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {f"{name}.json" for name in CLAIMS} < set(before) and not [
        name for name in before if name.startswith(".")
    ]
    for name in CLAIMS:
        assert json.loads(before[f"{name}.json"])["command"] in page
    # All from the cache, to the byte.
    assert main([*arguments, "--claims", "percentile", "hypervolume"]) == 0
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == set()
    # One method of the race again: all that changes is the command.
    assert main([*arguments, "--claims", "winner", "--methods", "auto"]) == 0
    whole = json.loads(before["winner.json"])
    again = json.loads((folder / "winner.json").read_text())
    assert again["command"] == f"{whole['command']}; the same with --methods auto"
    assert {k: again[k] for k in again if k not in ("command", "sha256")} == {
        k: whole[k] for k in whole if k not in ("command", "sha256")
    }


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--methods", "fastvv"], "fastvv is not in the race"),
        (["--methods", "auto"], "add --claims winner"),
        (["--methods", "auto", "--claims", "winner"], "has no race of size quick"),
    ],
)
def test_bad_arguments_get_one_line(arguments, message, tmp_path, capsys):
    assert (
        main([*arguments, "--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")])
        == 2
    )
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_gets_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert (
        main(
            [
                "--size",
                "smoke",
                "--output",
                str(tmp_path / "file"),
                "--cache",
                str(tmp_path / "cache"),
            ]
        )
        == 2
    )
    assert "is a file" in capsys.readouterr().err


def test_seeds_replace_every_size_of_seeds():
    size = sized("quick", 5)
    assert {(s.seeds, s.rivals, s.kernel_seeds) for s in size.settings} == {
        (5, 5, 5)
    } and size.depth_seeds == 5
    assert report.command("winner", sized("deep", 4)).endswith("--seeds 4")
    assert report.command("cost", size).endswith("--seeds 5") and "--seeds" not in report.command(
        "cost", SIZES["quick"]
    )
