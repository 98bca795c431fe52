"""The benchmarks of the search: each command at a tiny size. No speed is asserted."""

import json

import pytest
import torch
import transformers
from packaging.version import Version

from benchmarks import frontier_cost, search_cost
from vispco.baselines.grids import paper_grid


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def figures(module, path, *arguments):
    assert module.main([*arguments, "--warmup", "0", "--output", str(path)]) == 0
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["command"].startswith("python -m benchmarks.") and {
        "seed",
        "versions",
        "machine",
        "rounds",
    } <= set(written)
    return written["figures"]


@pytest.mark.parametrize(
    "arguments, batches",
    [
        pytest.param(
            ["--model", "tiny", "--visual", "32", "64", "--text", "16"],
            [(1, 32), (1, 64)],
            marks=pytest.mark.skipif(
                Version(transformers.__version__) < Version("5.20"),
                reason="ready-made image features: transformers >= 5.20",
            ),
        ),
        (["--model", "tiny", "--visual", "32", "--text", "16", "--pictures"], [(1, 32)]),
        (["--model", "testbed-llava", "--batch", "1", "2"], [(1, 64), (2, 64)]),
    ],
)
def test_a_search_step_is_compared_for_every_batch(tmp_path, arguments, batches):
    rows = figures(search_cost, tmp_path / "cost.json", *arguments, "--rounds", "1")
    tower = ["tower"] if {"--pictures", "testbed-llava"} & {*arguments} else []
    count = 4 + len(tower)
    assert [(r["batch"], r["n_visual"]) for r in rows[::count]] == batches
    for i in range(0, len(rows), count):
        calls = {row["call"]: row for row in rows[i : i + count]}
        assert list(calls) == ["plain", "kept", "step", *tower, "checkpoint"]
        assert calls["plain"]["ratio"] == 1 and calls["kept"]["memory_ratio"] == 1
        assert all(
            r["low"] <= r["ratio"] <= r["high"] and r["peak_bytes"] > 0 for r in calls.values()
        )
        # Memory is counted, not timed: it may be asserted.
        assert calls["plain"]["peak_bytes"] < calls["kept"]["peak_bytes"]
        assert calls["checkpoint"]["peak_bytes"] < calls["step"]["peak_bytes"]
        assert (
            0
            < calls["plain"]["operators"]
            < calls["step"]["operators"]
            < calls["checkpoint"]["operators"]
        )
        assert not tower or calls["step"]["operators"] < calls["tower"]["operators"]


def test_the_frontier_is_compared_with_a_grid_of_which_a_sample_is_timed(tmp_path):
    (row,) = figures(
        frontier_cost,
        tmp_path / "frontier.json",
        "--questions",
        "8",
        "--batch",
        "4",
        "--steps",
        "3",
        "--configurations",
        "20",
        "--sample",
        "2",
        "--rounds",
        "2",
    )
    assert row["configurations"] == 20 and row["timed"] == 2 and row["extrapolated"]
    # Search: the full model, 3 steps whose backward pass counts twice, five budgets. Grid: the full
    # model and 20 configurations.
    assert row["passes"] == {"search": 8 + 3 * 4 * 3 + 5 * 8, "grid": 21 * 8}
    assert row["passes_ratio"] == 84 / 168 and 0 < row["low"] <= row["ratio"] <= row["high"]


@pytest.mark.parametrize("layers, count", [(36, 700), (8, 700), (16, 100)])
def test_the_grid_has_as_many_configurations_as_asked_for(layers, count):
    configs = frontier_cost.grid("fastv", layers, count)
    assert len(configs) == len({c.keep_ratios for c in configs}) == count
    assert {sum(r == 1 for r in c.keep_ratios) for c in configs} == set(range(1, layers))


def test_for_as_many_layers_as_the_paper_it_is_the_papers_grid():
    assert frontier_cost.grid("fastv", 36, 700) == paper_grid("fastv", 36)


@pytest.mark.parametrize(
    "module, arguments, message",
    [
        (frontier_cost, ["--sample", "0"], "--sample"),
        (frontier_cost, ["--sample", "9", "--configurations", "8"], "--sample"),
        (frontier_cost, ["--rounds", "0"], "--rounds"),
        (search_cost, ["--visual", "0"], "visual tokens"),
        (search_cost, ["--model", "tiny", "--rounds", "0"], "rounds"),
        (search_cost, ["--output", "no/such/x.json"], "folder"),
        (search_cost, ["--model", "tiny", "--visual", "20", "--pictures"], "--pictures"),
        (search_cost, ["--model", "huge"], "invalid choice"),
        (search_cost, ["--method", "fastvv"], "invalid choice"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    capsys, tmp_path, monkeypatch, module, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert module.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not list(tmp_path.iterdir())
