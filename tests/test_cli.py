"""The command line: every command, every fault of the user, in-process and as a real process."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import vispco
from tests.reproduction.training.build import build_processor
from vispco import (
    Frontier,
    FrontierPoint,
    LatencyTable,
    Profile,
    PruningConfig,
    __version__,
    testbed,
)
from vispco.commands import demo, demo_report
from vispco.commands.answer import answer
from vispco.commands.main import main
from vispco.commands.options import budgets
from vispco.commands.progress import Progress
from vispco.flops import Dimensions
from vispco.testbed.model import build_config
from vispco.utils.console import (
    flops,
    layers_entered,
    output_folder,
    table,
    token_grid,
    tokens,
    wilson,
)

COMMANDS = ("search", "profile", "evaluate", "plot", "apply", "convert", "list", "demo")
SMALL = ["--limit", "8", "--batch-size", "8"]
TINY_DEMO = {
    "budgets": (0.3, 0.7),
    "n_calibration": 8,
    "n_test": 8,
    "method": ["fastv", "visionzip"],
    "refinement": 1,
}


@pytest.fixture(scope="module")
def stand_in():
    """A random model of four narrow layers, and its processor.

    It has the testbed's words and images.
    """
    from transformers import LlavaForConditionalGeneration

    config = build_config()
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    for key, value in sizes.items():
        setattr(config.text_config, key, value)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval(), build_processor()


@pytest.fixture(autouse=True)
def small_testbed(stand_in, monkeypatch, request):
    """`testbed.load` gives the stand-in; unknown names fail as always.

    Tests run in a folder of their own.
    """
    real = testbed.load
    monkeypatch.setattr(
        testbed,
        "load",
        lambda name="testbed", dtype=None: stand_in if name.startswith("testbed") else real(name),
    )
    monkeypatch.chdir(request.getfixturevalue("tmp_path"))


def config_file(name="config.json", ratios=(1, 1, 0.5, 0.25), **more):
    PruningConfig("fastv", ratios, **more).save(name)
    return name


@pytest.fixture(scope="module")
def frontier_text(stand_in):
    """What `vispco search` writes for the stand-in: searched once."""
    from vispco import Gradient, search

    batches = testbed.batches("calibration", 8, 8)
    frontier = search(stand_in[0], batches, budgets=[0.3, 0.7], start=Gradient(steps=2))
    points = [p.to_dict() for p in frontier.points]
    return json.dumps({"schema_version": 1, "meta": frontier.meta, "points": points})


@pytest.fixture
def frontier_file(frontier_text):
    Path("frontier.json").write_text(frontier_text)
    return "frontier.json"


def files():
    return sorted(str(p) for p in Path(".").rglob("*"))


# ---- what works ----------------------------------------------------------------------------------
@pytest.mark.parametrize("words", [["--help"], *([c, "--help"] for c in COMMANDS)])
def test_help(words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: vispco") and not err
    assert len(words) == 1 or f"example:\n  vispco {words[0]}" in out
    assert max(map(len, out.splitlines())) <= 100


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vispco {__version__}\n"


def test_search_writes_what_it_found(capsys):
    assert (
        main(["search", "--budgets", "0.3,70%", "--steps", "3", "--output", "deep/run", *SMALL])
        == 0
    )
    out, err = capsys.readouterr()
    assert sorted(p.name for p in Path("deep/run").iterdir()) == [
        "config-0.3.json",
        "config-0.7.json",
        "frontier.json",
        "journal.jsonl",
        "log.jsonl",
        "report.html",
    ]
    frontier = Frontier.load("deep/run/frontier.json")
    assert [p.budget for p in frontier.points] == [0.3, 0.7] and frontier.meta["data"] == "testbed"
    assert all(p.share <= p.budget for p in frontier.points)
    assert PruningConfig.load("deep/run/config-0.3.json") == frontier.points[0].config
    lines = [json.loads(line) for line in Path("deep/run/log.jsonl").read_text().splitlines()]
    assert [(x["budget"], x["step"]) for x in lines[:6]] == [
        (b, s) for b in (0.7, 0.3) for s in range(3)
    ]
    assert {"loss", "slack", "multiplier", "penalty"} <= set(lines[0])
    assert len(lines) > 6 and all(
        {"budget", "schedule", "loss", "best"} == set(x) for x in lines[6:]
    )
    for point in frontier.points:
        assert [x["best"] for x in lines[6:] if x["budget"] == point.budget][-1:] in (
            [point.loss],
            [],
        )
    assert out.splitlines()[0].split()[:3] == ["budget", "FLOPs", "share"]
    assert "deep/run/config-0.7.json" in out
    # No terminal, no progress bar.
    assert not err


def test_search_json_and_overwrite(capsys):
    command = [
        "search",
        "--budgets",
        "0.5",
        "--steps",
        "1",
        "--kernel=linear",
        "-o",
        "run",
        *SMALL,
        "--json",
    ]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["meta"]["kernel"] == "linear" and result["configurations"][0]["tokens"][0] == 64
    assert Path(result["configurations"][0]["file"]).exists() and Path(result["log"]).exists()
    assert main([*command, "--overwrite"]) == 0
    assert json.loads(capsys.readouterr().out)["configurations"] == result["configurations"]
    assert main([*command, "--overwrite", "--steps", "0", "--refinement", "0"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["configurations"][0]["share"] <= 0.5 and result["meta"]["steps"] == 0
    # The log of the earlier search is gone.
    assert not Path("run/log.jsonl").exists()


def test_resume_says_how_far_the_search_was(capsys):
    command = [
        "search",
        "--budgets",
        "0.5",
        "--steps",
        "2",
        "--refinement",
        "0",
        "-o",
        "run",
        *SMALL,
        "--resume",
    ]
    for whole, said in (
        (99, ""),
        (99, "run: the search had finished\n"),
        (3, "run: the search went on after 2 results, with {} more\n"),
    ):
        if said:
            lines = Path("run/journal.jsonl").read_text().splitlines(keepends=True)
            Path("run/journal.jsonl").write_text("".join(lines[:whole]))
        assert main(command) == 0
        shown = capsys.readouterr()
        assert (
            shown.err == said.format(len(lines) - 3 if said else None)
            and "run/config-0.5.json" in shown.out
        )


def test_a_budget_that_needs_no_search(capsys):
    assert main(["search", "--budgets", "1", "-o", "run", *SMALL]) == 0
    assert "100.0 %" in capsys.readouterr().out and not Path("run/log.jsonl").exists()


@pytest.mark.parametrize(("start", "steps"), [("ramp", 0), ("shared", 3)])
def test_other_starts(start, steps, capsys):
    asked = ["--start", start, "--budgets", "0.3,0.7", "--refinement", "2", "-o", "run", *SMALL]
    assert main(["search", *asked, *["--steps", str(steps)] * bool(steps)]) == 0
    assert "run/config-0.7.json" in capsys.readouterr().out
    frontier = Frontier.load("run/frontier.json")
    assert frontier.meta["start"] == start and all(p.share <= p.budget for p in frontier.points)
    lines = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert sum("step" in line for line in lines) == steps and len(lines) > steps
    assert ("The gradient, step by step" in Path("run/report.html").read_text()) is bool(steps)


def test_profile_writes_and_says_what_it_found(capsys):
    pytest.importorskip("matplotlib")
    command = ["profile", "-o", "deep/p", "--measurements", "2", *SMALL]
    assert main(command) == 0
    out, err = capsys.readouterr()
    names = sorted(path.name for path in Path("deep/p").iterdir())
    assert names == ["journal.jsonl", "profile.json", "profile.png"] and not err
    found = Profile.load("deep/p/profile.json")
    assert found.method == "fastv" and found.layers == 4 and found.tokens == 64
    lines = out.splitlines()
    assert lines[2].split()[:5] == ["layer", "0", "%", "10", "%"]
    assert lines[3].split()[:2] == ["1", f"{found.loss(1, 0):.3f}"]
    assert (
        f"Cost: {found.forward_passes:,.0f} forward passes" in out and "deep/p/profile.png" in out
    )
    fails(command, capsys, "deep/p holds a profile.json: choose another --output, --resume it")
    assert main([*command, "--resume"]) == 0
    assert capsys.readouterr().err == "deep/p: the profile had finished\n"
    assert main([*command, "--overwrite", "--method", "random", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    found = Profile.load(result["profile"])
    assert found.method == "random" and Path(result["picture"]).is_file()
    assert result["losses"]["2"]["0.0"] == found.loss(2, 0) and result["exit"] == found.exit()
    assert result["traps"] == found.traps() and len(result["findings"]) == 3


def test_a_profile_goes_on_where_it_was(capsys):
    command = ["profile", "-o", "p", "--measurements", "1", "--quiet", *SMALL]
    assert main(command) == 0
    capsys.readouterr()
    whole, journal = Profile.load("p/profile.json"), Path("p/journal.jsonl")
    lines = journal.read_text().splitlines(keepends=True)
    # The profile itself, whether passes share layers, one measurement for each of three layers.
    assert len(lines) == 5
    Path("p/profile.json").unlink()
    journal.write_text("".join(lines[:2]))
    fails(command, capsys, "a profile that was interrupted")
    assert main([*command, "--resume"]) == 0
    assert Profile.load("p/profile.json") == whole and journal.read_text().count("\n") == 5


def test_a_profile_without_matplotlib_says_why_there_is_no_picture(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["profile", "-o", "p", "--measurements", "1", *SMALL]) == 0
    assert (
        'no picture: plots need matplotlib: pip install "vispco[plot]"' in capsys.readouterr().out
    )
    assert not Path("p/profile.png").exists() and Path("p/profile.json").exists()


def test_search_from_a_profile(monkeypatch, capsys):
    totals = []
    real = vispco.search.__globals__["Progress"]
    counted = lambda n, *a, **k: (totals.append(n), real(n, *a, **k))[1]  # noqa: E731
    monkeypatch.setitem(vispco.search.__globals__, "Progress", counted)
    asked = ["--start", "profile", "--budgets", "0.3,0.7", "--refinement", "2", "-o", "run"]
    assert main(["search", *asked, *SMALL, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    found = Profile.load(result["profile"])
    assert found.layers == 4 and result["meta"]["start"] == "profile" and totals == [4]
    assert len(Path("run/log.jsonl").read_text().splitlines()) <= 4
    assert all(row["share"] <= row["budget"] for row in result["configurations"])
    page = Path("run/report.html").read_text()
    assert "What your model does with its image" in page
    if "No picture" not in page:
        assert all(f"budget {share} %" in page for share in (30, 70))
    assert main(["search", *asked, *SMALL, "--resume"]) == 0
    assert capsys.readouterr().err == "run: the search had finished\n"
    # A profile that is known costs nothing; another start's folder has none.
    known = ["--profile", "run/profile.json", "--start", "profile", "--budgets", "0.3,0.7"]
    assert main(["search", *known, "--refinement", "2", "-o", "again", *SMALL, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    spent = result["meta"]["forward_passes"] - again["meta"]["forward_passes"]
    # The full model's answers are needed in any case.
    assert spent == pytest.approx(found.forward_passes - 8)
    assert again["configurations"][0]["tokens"] == result["configurations"][0]["tokens"]
    fails(["search", *known, "--method", "random", "-o", "x", *SMALL], capsys, "measure another")
    ramp = ["--start", "ramp", "--budgets", "0.5", "-o", "run", "--overwrite"]
    assert main(["search", *ramp, *SMALL]) == 0
    assert not Path("run/profile.json").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.2,0.5", [0.2, 0.5]),
        ("50%", [0.5]),
        ("0.1:0.9:9", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        ("20%:40%:3,0.3", [0.2, 0.3, 0.4]),
        ("1.8TFLOPs,0.5", ["1.8TFLOPs", 0.5]),
        ("2e6", [2e6]),
        ("192tokens, 64 tokens", ["192tokens", "64 tokens"]),
        ("64tokens:192tokens:3", ["64tokens", "128tokens", "192tokens"]),
        (" 1 , 0", [1, 0]),
        ("flops=0.5+kv_cache=40%", [{"flops": 0.5, "kv_cache": "40%"}]),
        (
            "0.5,flops=1e+12+latency=20ms,flops=0.2",
            [0.5, {"flops": 1e12, "latency": "20ms"}, {"flops": 0.2}],
        ),
        ("flops=0.5, flops=0.5", [{"flops": 0.5}]),
        ("flops=0.5+tokens=192tokens", [{"flops": 0.5, "tokens": "192tokens"}]),
    ],
)
def test_budgets(text, expected):
    assert budgets(text) == expected


def test_evaluate_configs(capsys):
    ones = config_file("ones.json", (1, 1, 1, 1))
    assert main(["evaluate", "--config", ones, config_file(), "--json", "--limit", "16"]) == 0
    result = json.loads(capsys.readouterr().out)
    full, (same, pruned) = result["full"], result["configurations"]
    assert result["n"] == 16 and same["accuracy"] == full["accuracy"] and abs(same["kl"]) < 1e-6
    assert (
        pruned["share"] < 1 == full["share"]
        and pruned["flops"] < full["flops"]
        and pruned["kl"] > 0
    )
    low, high = full["interval"]
    assert low <= full["accuracy"] <= high and set(full["tasks"]) == set(testbed.TASKS)
    assert (
        main(
            ["evaluate", "--config", config_file(), "--per-task", *SMALL, "--tasks", "count,digit"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert out.splitlines()[0].endswith("count  digit")
    assert "8 questions of testbed, split 'test'" in out


def test_evaluate_latency_predicts_and_measures(capsys):
    command = [
        "evaluate",
        "--config",
        config_file("ones.json", (1, 1, 1, 1)),
        config_file(),
        "--latency",
        "1",
        *SMALL,
    ]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["latency"]
    assert (
        found["n_visual"] == 64
        and found["rounds"] == 1
        and 0 <= found["fixed"] < 1
        and found["full_ms"] is None
    )
    same, pruned = found["configurations"]
    assert (
        same["predicted"] == 1 >= pruned["predicted"] > 0
        and pruned["low"] <= pruned["measured"] <= pruned["high"]
    )
    assert main(command) == 0
    out = capsys.readouterr().out
    # On a CPU: ratios.
    assert "predicted  measured" in out and "64 visual tokens" in out and " ms" not in out
    assert main(["evaluate", "--config", config_file(), *SMALL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["latency"] is None


def test_latency_needs_a_question_about_one_picture(capsys):
    from PIL import Image

    config_file(), Image.new("RGB", (8, 8)).save("p.png")
    Path("two.jsonl").write_text(
        '{"images": ["p.png", "p.png"], "question": "same?", "answer": "yes"}\n'
    )
    fails(
        ["evaluate", "--config", "config.json", "--data", "two.jsonl", "--latency"],
        capsys,
        "a question about one picture",
    )


def test_milliseconds_are_printed_where_there_are_any():
    from vispco.commands.evaluate import latency_text

    row = {
        "predicted": 0.5,
        "measured": 0.625,
        "low": 0.6,
        "high": 0.65,
        "predicted_ms": 20.0,
        "measured_ms": 25.0,
    }
    text = latency_text(
        {
            "question": "what?",
            "rounds": 9,
            "n_visual": 576,
            "n_text": 40,
            "fixed": 0.1,
            "full_ms": 40.0,
            "configurations": [row],
        },
        ["a.json"],
    )
    assert text.splitlines()[2].split() == [
        "a.json",
        "0.500",
        "0.625",
        "0.600",
        "–",
        "0.650",
        "20.0",
        "25.0",
    ]
    assert "over the full model's, 40.0 ms" in text and "10.0 % of the full" in text


def test_a_search_with_checkpoints_finds_the_same(monkeypatch, capsys):
    from vispco import calibration as teacher

    runs, real = [], teacher._checkpoint
    monkeypatch.setattr(
        teacher, "_checkpoint", lambda *args, **kwargs: (runs.append(1), real(*args, **kwargs))[1]
    )
    for more in ([], ["--checkpoint"]):
        assert not runs
        assert (
            main(
                [
                    "search",
                    "--budgets",
                    "0.5",
                    "--steps",
                    "2",
                    "-o",
                    f"run{len(more)}",
                    *SMALL,
                    *more,
                ]
            )
            == 0
        )
    # Two steps, on four layers each.
    assert len(runs) == 2 * 4
    assert Path("run0/config-0.5.json").read_text() == Path("run1/config-0.5.json").read_text()


def test_published_configurations_are_measured_with_a_frontier(frontier_file, capsys):
    assert (
        main(
            ["evaluate", "--frontier", frontier_file, "--published", "-o", "measured.json", *SMALL]
        )
        == 0
    )
    others = Frontier.load("measured.json").meta["competitors"]
    assert [o["label"] for o in others] == ["fastv k2-r50", "fastv k3-r50", "fastv k3-r75"]
    assert all(0 < o["share"] < 1 and o["kind"] == "published" for o in others)
    assert "fastv k3-r75" in capsys.readouterr().out
    assert main(["evaluate", "--config", config_file(), "--published", *SMALL]) == 2
    assert "--published goes together with --frontier" in capsys.readouterr().err


def test_plot_draws_kept_tokens(capsys):
    pytest.importorskip("matplotlib")
    Image = pytest.importorskip("PIL.Image")
    example = testbed.examples("test", 1)[0]
    Image.fromarray(example.image).save("a.png")
    asked = ["--tokens", "a.png", "--question", example.question, "--config", config_file()]
    assert main(["plot", *asked, "-o", "tokens.svg", "-o", "tokens.png"]) == 0
    assert "layer 3: 16 of 64 enter" in Path("tokens.svg").read_text()
    for wrong, words in (
        (asked[:4], "--tokens PICTURE with --question and --config"),
        ([], "give frontier.json"),
        ([*asked[:3], "zebra", *asked[4:]], "does not know every word"),
    ):
        assert main(["plot", *wrong, "-o", "other.svg"]) == 2
        assert words in capsys.readouterr().err and not Path("other.svg").exists()


def test_evaluate_a_frontier_then_plot_it(frontier_file, capsys):
    assert main(["evaluate", "--frontier", frontier_file, "-o", "measured.json", *SMALL]) == 0
    measured = Frontier.load("measured.json")
    assert all({"accuracy", "kl", "interval", "n"} <= set(p.metrics) for p in measured.points)
    assert "full_accuracy" in measured.meta
    pytest.importorskip("matplotlib")
    assert main(["plot", "measured.json", frontier_file, "-o", "a.svg", "-o", "a.png"]) == 0
    assert capsys.readouterr().out.endswith("a.svg\na.png\n")
    assert "measured.json" in Path("a.svg").read_text()


def test_apply(capsys):
    assert main(["apply", "--config", config_file(), "--index", "3"]) == 0
    out = capsys.readouterr().out
    assert "64 64 32 16" in out and "64 64 64 64" in out and "█" in out
    assert f"question: {testbed.examples('test', 4)[3].question}?" in out


@pytest.mark.parametrize("method", ["fastv", "visionzip"])
def test_an_answer_does_not_need_the_cache(method):
    """Checkpoints that were saved in training with gradient checkpointing say use_cache: false."""
    model, processor = testbed.load("testbed-llava")
    inputs = testbed.collate(testbed.examples("test", 1), with_answers=False)
    config = PruningConfig(method, [1, 0.3, 0.2, 0.1])
    found = []
    for use_cache in (True, False):
        model.generation_config.use_cache = model.config.text_config.use_cache = use_cache
        found.append(answer(model, processor, inputs, config))
    assert found[0] == found[1] and found[0]["tokens"] == config.tokens(64)


def test_apply_to_a_picture(capsys):
    from PIL import Image

    item = testbed.examples("test", 1)[0]
    Image.fromarray(item.image).save("picture.png")
    command = ["apply", "--config", config_file(), "--json"]
    assert main([*command, "--image", "picture.png", "--question", item.question]) == 0
    given = json.loads(capsys.readouterr().out)
    assert main(command) == 0
    example = json.loads(capsys.readouterr().out)
    assert given["pruned"] == example["pruned"] and given["full"] == example["full"]
    assert given["pruned"]["tokens"] == [64, 64, 32, 16] and example["expected"] == item.answer
    assert sorted(given["pruned"]["depth"]) == [2] * 32 + [3] * 16 + [4] * 16


@pytest.mark.parametrize("what", ["methods", "kernels", "adapters", "models", "tasks"])
def test_list(what, capsys):
    assert main(["list", what]) == 0
    text = capsys.readouterr().out
    assert main(["list", what, "--json"]) == 0
    names = json.loads(capsys.readouterr().out)
    assert all(name in text and line and line in text for name, line in names.items())
    expected = {
        "methods": "fastv",
        "kernels": "monotone",
        "adapters": "llava",
        "models": "testbed-llava",
        "tasks": "count",
    }
    assert expected[what] in names


def test_list_everything(capsys):
    assert main(["list", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == [
        "methods",
        "presets",
        "kernels",
        "adapters",
        "models",
        "tasks",
    ]


def test_demo(capsys):
    pytest.importorskip("matplotlib")
    frontier = demo.demonstrate("out", **TINY_DEMO)
    out, err = capsys.readouterr()
    assert [line[:5] for line in err.splitlines()] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert sorted(p.name for p in Path("out").iterdir()) == [
        "frontier.json",
        "frontier.png",
        "frontier.svg",
        "profile.json",
        "profile.png",
        "profile.svg",
        "pruning_config-0.3.json",
        "pruning_config-0.7.json",
    ]
    loaded, profile = Frontier.load("out/frontier.json"), Profile.load("out/profile.json")
    competitors = loaded.meta["competitors"]
    kinds = [c["kind"] for c in competitors]
    counted = {k: kinds.count(k) for k in set(kinds)}
    assert counted == {"published": 3, "blind": 2, "coarse": 4}
    for row, point in zip(loaded.meta["comparison"], loaded.points, strict=True):
        for kind in demo_report.RIVALS:
            own = [c for c in competitors if c["kind"] == kind and c["share"] <= point.budget]
            own = [c for c in own if c.get("budget", point.budget) == point.budget]
            assert (row[kind] or {}).get("kl") == min((c["kl"] for c in own), default=None)
        # Random tokens enter the layers in the same numbers.
        (blind,) = (c for c in competitors if c["kind"] == "blind" and c["budget"] == point.budget)
        assert blind["share"] <= point.share <= point.budget
    assert profile.forward_passes < loaded.meta["forward_passes"]
    assert demo_report.report(frontier, profile) in out
    assert demo_report.FLOOR in out and "question:" in out and "It was chosen: " in out


def test_demo_command_passes_its_options_on(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(demo, "demonstrate", lambda *a, **k: seen.update(a=a, k=k))
    assert main(["demo", "--fast", "--seed", "3", "-q", "-o", "x"]) == 0
    assert seen == {"a": ("x", 3, True), "k": {"model_name": "testbed-llava", **demo.FAST}}


# ---- what goes wrong -----------------------------------------------------------------------------
def fails(words, capsys, *expected, code=2):
    """The command ends with `code`.

    One line on stderr says so; nothing on stdout, and no new files.
    """
    before = files()
    assert main(words) == code
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("vispco: "), (out, err)
    assert "Traceback" not in err
    for part in expected:
        assert part in err, err
    assert files() == before
    return err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "required: COMMAND"),
        (["serach"], "invalid choice: 'serach'"),
        (["search", "--bogus"], "unrecognized arguments: --bogus"),
        (["search", "--meth", "fastv"], "unrecognized arguments"),
        (["search", "--method", "fastvv"], "did you mean 'fastv'?"),
        (["search", "--kernel", "monoton"], "did you mean 'monotone'?"),
        (["search", "--budgets", "2"], "over 1"),
        (["search", "--budgets", "-0.5"], "--budgets"),
        (["search", "--budgets", ""], "is not understood"),
        (["search", "--budgets", "half"], "'half' is not understood"),
        (["search", "--budgets", "0.1:0.9"], "did you mean 0.1:0.9:5, which"),
        (["search", "--budgets", "0.1:0.9:1"], "start:stop:count"),
        (["search", "--budgets", "0.1:0.9:1000000000"], "count of 2 to 1000"),
        (["search", "--budgets", "0.1:3TFLOPs:4"], "mixes"),
        (["search", "--budgets", "0.001", *SMALL], "the reachable range is"),
        (["search", "--budgets", "1 MFLOPs", *SMALL], "FLOPs"),
        (["search", "--steps", "-1"], "from 0"),
        (["search", "--steps", "many"], "'many'"),
        (["search", "--start", "gradients"], "did you mean 'gradient'?"),
        (
            ["search", "--start", "ramp", "--steps", "3"],
            "--steps goes with --start gradient or shared",
        ),
        (["search", "--start", "ramp", "--checkpoint"], "--checkpoint goes with"),
        (["search", "--start", "ramp", "--before-llm"], "not allowed with"),
        (
            ["search", "--before-llm", "--method", "fastv", "--budgets", "0.5", *SMALL],
            "choose from cdpruner, ",
        ),
        (["search", "--start", "profile", "--steps", "3"], "not with profile"),
        (["search", "--start", "profile", "--profile", "missing.json"], "missing.json: No such"),
        (
            ["search", "--start", "profile", "--profile", "good.json"],
            "expected a profile, got a pruning conf",
        ),
        (["search", "--start", "ramp", "--profile", "good.json"], "goes with --start profile"),
        (
            ["search", "--start", "profile", "--kernel", "linear", "--budgets", "0.5", *SMALL],
            "start='profile'",
        ),
        (["profile", "--method", "fastvv"], "did you mean 'fastv'?"),
        (["profile", "--objective", "loss"], "invalid choice: 'loss'"),
        (["profile", "--measurements", "0"], "from 1"),
        (["profile", "--limit", "0"], "from 1"),
        (["profile", "--output", "taken"], "taken is a file"),
        (["profile", "--model", "llava-7b"], "unknown model 'llava-7b'"),
        (["profile", "--overwrite", "--resume"], "not allowed with"),
        (["search", "--start", "shared", "--steps", "0"], "steps must be at least 1"),
        (
            ["search", "--start", "ramp", "--kernel", "linear", "--budgets", "0.5", *SMALL],
            "start='ramp'",
        ),
        (["search", "--learning-rate", "-1"], "positive number"),
        (["search", "--learning-rate", "nan"], "positive number"),
        (["search", "--limit", "0"], "from 1"),
        (["search", "--batch-size", "0"], "from 1"),
        (["search", "--seed", "-1"], "from 0"),
        (["search", "--data", "no/such.jsonl"], "no/such.jsonl: No such file"),
        (["search", "--data", "coco"], "'coco' is no file and no folder here"),
        (["search", "--tasks", "ocr"], "'easy_vqa'"),
        (["search", "--model", "llava-7b"], "unknown model 'llava-7b': expected testbed"),
        (["search", "--model", "."], "there is no config.json"),
        (["search", "--output", "taken"], "taken is a file"),
        (["search", "--output", "taken/run"], "taken/run"),
        (["search", "--output", "/proc/run"], "/proc/run"),
        (["evaluate"], "one of the arguments --config --frontier is required"),
        (["evaluate", "--config", "a", "--frontier", "b"], "not allowed with"),
        (["evaluate", "--config", "missing.json"], "missing.json: there is no such file or folder"),
        (["evaluate", "--frontier", "missing.json"], "missing.json: No such file"),
        (["evaluate", "--config", "taken"], "taken: this is no JSON"),
        (["evaluate", "--config", "empty"], "empty: there is no config-<budget>.json"),
        (["evaluate", "--frontier", "empty"], "empty: there is no frontier.json"),
        (["evaluate", "--config", "preset:fastv/k2"], "there are preset:fastv/k2-r50,"),
        (["evaluate", "--config", "preset:fastw/k2"], "did you mean 'fastv'?"),
        (["evaluate", "--config", "preset:random/k2"], "nothing was published for random"),
        (["apply", "--config", "run"], "name one of run/config-0.3.json, run/config-0.7.json"),
        (["apply", "--config", "run"], "the search recommends run/config-0.7.json"),
        (["apply", "--config", "run/frontier.json"], "take one of run/config-0.3.json, run/"),
        (["apply", "--config", "fastv/k2-r50"], "did you mean preset:fastv/k2-r50?"),
        (["apply", "--config", "presets:pdrop"], "did you mean preset:pdrop/lambda-0.5?"),
        (["evaluate", "--config", "good.json,five.json"], "between them: good.json five.json"),
        (["apply", "--config", "preset:"], "give a method and the name of its configuration"),
        (["apply", "--config", "K=2 R=0.5"], "`vispco convert --from fastv 'K=2 R=0.5'` reads"),
        (["apply", "--config", "newer.json"], "this vispco reads 1: pip install --upgrade vispco"),
        (["apply", "good.json"], "such as --config good.json (see `vispco apply --help`)"),
        (["apply", "--configs", "good.json"], "--configs: did you mean --config?"),
        (["apply", "--frontier", "run"], "--frontier: did you mean --config?"),
        (["apply", "--config", "good.json", "--prompt", "x"], "did you mean --question?"),
        (
            ["apply", "--config", "good.json", "--image", "p.png", "--question", " "],
            "--question is empty",
        ),
        (
            ["apply", "--config", "good.json", "--image", "taken", "--question", "x"],
            "taken: expected a picture, but the file is empty",
        ),
        (
            ["apply", "--config", "good.json", "--image", "https://a.b/c.png", "--question", "x"],
            "https://a.b/c.png is an address: download it",
        ),
        (["evaluate", "--configs", "good.json"], "--configs: did you mean --config?"),
        (["plot", "--frontier", "run", "-o", "a.svg"], "give the value without --frontier"),
        (["convert", "--from", "fastv", "--num-layers", "8"], "2 arguments, NOTATION TEXT"),
        (
            ["convert", "--from", "fastv", "K=2", "R=0.5", "--num-layers", "8"],
            "R=0.5: put it in quotes, 'K=2 R=0.5'",
        ),
        (["search", "testbed"], "needs the name of its option, such as --model testbed"),
        (["--model", "testbed"], "name a command before --model: one of search,"),
        (["search", "--outdir", "run"], "did you mean --output?"),
        (["search", "--method", "FASTV"], "did you mean 'fastv'?"),
        (["search", "--method", "fastv,"], "expected the name of a method"),
        (["search", "--method", "all"], "did you mean 'auto'?"),
        (["search", "--device", "gpu"], "did you mean cuda?"),
        (["search", "--device", "0"], "did you mean cuda:0?"),
        (["search", "--columns", "img=image"], "did you mean image=img?"),
        (["search", "--columns", "image:img"], "did you mean image=img?"),
        (["search", "--model", "testbed_llava"], "did you mean 'testbed-llava'?"),
        (["search", "--model", "https://huggingface.co/a/b"], "alone, --model a/b"),
        (["search", "--model", "a/b/"], "alone, --model a/b"),
        (["search", "--output", "/proc/x"], "choose an --output that can be written"),
        (["apply", "--config", "frontier.json"], "take one of the files config-<budget>.json"),
        (["plot", "empty", "-o", "a.svg"], "empty: there is no frontier.json"),
        (["convert", "--config", "preset:fastv/k2-r50"], "needs --num-layers"),
        (["search", "--budgets", "20"], "did you mean 20%?"),
        (["search", "--budgets", "20,50,80"], "did you mean 20%,50%,80%?"),
        (["search", "--budgets", "0.2-0.8"], "did you mean 0.2:0.8:5, which is five budgets"),
        (["search", "--budgets", "0.2 0.5"], "did you mean 0.2,0.5?"),
        (["search", "--budgets", "20% 50%"], "did you mean 20%,50%?"),
        (["search", "--budgets", "192"], "did you mean 192tokens?"),
        (["search", "--budgets", "192,128,64"], "did you mean 192tokens,128tokens,64tokens?"),
        (["search", "--budgets", "20%,50"], "did you mean 20%,50%?"),
        (["search", "--budgets", ".2;.5"], "did you mean .2,.5?"),
        (["search", "--budgets", "0,5"], "did you mean 0.5?"),
        (["search", "--budgets", "[0.2,0.5]"], "did you mean 0.2,0.5?"),
        (["search", "--budgets", "0.2,0.5,"], "did you mean 0.2,0.5?"),
        (["search", "--budgets", "20-80"], "did you mean 20%:80%:5,"),
        (["search", "--budgets", "20:80:5"], "did you mean 20%:80%:5?"),
        (["search", "--budgets", "0.2:0.8:0.1"], "did you mean 0.2:0.8:7?"),
        (["search", "--budgets", "32tok"], "did you mean '32tokens'?"),
        (["search", "--budgets", "20ms"], "did you mean latency=20ms,"),
        (["search", "--budgets", "latency=20"], "did you mean '20ms'?"),
        (["search", "--budgets", "1.5GB"], "did you mean kv_cache=1.5GB,"),
        (["search", "--budgets", "1/2"], "did you mean 0.5?"),
        (["search", "--budgets", "50percent"], "did you mean '50%'?"),
        (
            ["search", "--budgets", "0.2", "0.5"],
            "joined by commas, --budgets 0.2,0.5 (see `vispco se",
        ),
        (["search", "--budget", "0.5"], "did you mean --budgets? (see `vispco search --help`)"),
        (["search", "--model", "/nope/model"], "/nope/model: there is no such folder"),
        (["search", "--model", "good.json"], "this is a file: give its folder"),
        (["search", "--dtype", "fp16"], "did you mean 'float16'?"),
        (["search", "--dtype", "int8"], "choose from auto, float32"),
        (
            ["convert", "--from", "fastv", "K=2 R=50", "--num-layers", "8"],
            "did you mean 'K=2 R=0.5'?",
        ),
        (["evaluate", "--config", "good.json", "--split", "dev"], "calibration"),
        (["evaluate", "--config", "good.json", "--limit", "0"], "from 1"),
        (["evaluate", "--config", "good.json", "--latency", "0"], "from 1"),
        (["evaluate", "--config", "good.json", "--output", "x.json"], "together with --frontier"),
        (["evaluate", "--config", "five.json", *SMALL], "5 keep_ratios"),
        (["evaluate", "--config", "other.json", *SMALL], "'qwen2_vl'"),
        (["evaluate", "--config", "truncated.json"], "truncated.json: "),
        (["evaluate", "--config", "binary.json"], "binary.json: "),
        (["evaluate", "--config", "list.json"], "must be a JSON object"),
        (["evaluate", "--config", "rising.json"], "must not increase"),
        (["evaluate", "--config", "unknown_key.json"], "unknown keys: ratios"),
        (["evaluate", "--config", "old.json"], "schema_version 0"),
        (
            ["evaluate", "--config", "option.json"],
            "option.json: method 'fastv' does not take the options {'sharp': 1}",
        ),
        (["evaluate", "--frontier", "good.json"], "expected a frontier, got a pruning conf"),
        (["plot", "good.json", "-o", "a.svg"], "expected a frontier, got a pruning conf"),
        (["plot", "frontier.json"], "--output"),
        (
            ["plot", "frontier.json", "-o", "a.svg", "-o", "a.pdf"],
            "a.pdf: the name of a picture must end in",
        ),
        (["plot", "frontier.json", "-o", "no/a.svg"], "there is no folder"),
        (["plot", "frontier.json", "-o", "a.svg", "--y", "accuracy"], "no point has an accuracy"),
        (["plot", "missing.json", "-o", "a.svg"], "missing.json: No such file"),
        (["apply"], "--config"),
        (["apply", "--config", "good.json", "--index", "-1"], "from 0 to 9,999"),
        (["apply", "--config", "good.json", "--image", "x.png"], "belong together"),
        (
            ["apply", "--config", "good.json", "--image", "x.png", "--question", "what?"],
            "x.png: there is no such file; --image",
        ),
        (
            ["apply", "--config", "good.json", "--image", "good.json", "--question", "what?"],
            "is none of PNG, JPEG",
        ),
        (
            ["apply", "--config", "good.json", "--image", "p.png", "--question", "who is he?"],
            "not know every",
        ),
        (["apply", "--config", "five.json"], "5 keep_ratios"),
        (["list", "colours"], "invalid choice: 'colours'"),
        (["demo", "--output", "taken"], "taken is a file"),
    ],
)
def test_every_fault_is_one_line(words, expected, frontier_file, capsys):
    from PIL import Image

    good = Path(config_file("good.json")).read_text()
    config_file("five.json", (1,) * 5)
    config_file("other.json", model_type="qwen2_vl")
    for name, text in {
        "truncated": good[:-40],
        "list": "[1]",
        "rising": good.replace("0.25", "0.75"),
        "unknown_key": good.replace('"budget"', '"ratios"'),
        "option": good.replace('"method_options": {}', '"method_options": {"sharp": 1}'),
        "newer": good.replace('"schema_version": 1', '"schema_version": 2'),
        "old": good.replace('"schema_version": 1', '"schema_version": 0'),
    }.items():
        Path(f"{name}.json").write_text(text)
    Path("binary.json").write_bytes(b"\xff\xfe\x00")
    Path("taken").write_text("")
    Path("empty").mkdir()
    Path("run").mkdir()
    searched = json.loads(Path(frontier_file).read_text())
    searched["meta"]["recommended_budget"] = 0.7
    Path("run/frontier.json").write_text(json.dumps(searched))
    # The first is of an earlier search.
    for budget in (0.2, 0.3, 0.7):
        config_file(f"run/config-{budget}.json")
    Image.new("RGB", (64, 64)).save("p.png")
    fails(words, capsys, expected)


def test_a_hub_that_does_not_answer_is_said_at_once(monkeypatch, capsys):
    """Without a network: one line, and no more than a few seconds."""
    from urllib.error import HTTPError, URLError

    from huggingface_hub import constants

    from vispco.commands import model

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(model, "_PATIENCE", 0.1)

    def answer(error):
        def urlopen(*args, **options):
            raise error

        return urlopen

    for error in (URLError("no such host"), TimeoutError("timed out")):
        monkeypatch.setattr(model, "urlopen", answer(error))
        begun = time.perf_counter()
        fails(["search", "--model", "owner/model-x"], capsys, "does not answer: check the network")
        assert time.perf_counter() - begun < 5
    # A name server that says nothing.
    silent = threading.Event()
    monkeypatch.setattr(
        model, "urlopen", lambda *args, **options: (silent.wait(60), io.BytesIO())[1]
    )
    fails(["search", "--model", "owner/model-x"], capsys, "does not answer")
    silent.set()
    # A hub that refuses does answer.
    monkeypatch.setattr(model, "urlopen", answer(HTTPError("", 401, "gated", {}, None)))
    assert model._reachable("owner/model-x")
    # What is in the cache needs no hub.
    import huggingface_hub

    monkeypatch.setattr(model, "urlopen", answer(URLError("no such host")))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *names: "config.json")
    assert not model._reachable("owner/model-x")


def test_device_auto_needs_accelerate(monkeypatch, capsys):
    from vispco.commands import model

    Path("folder").mkdir()
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    fails(["search", "--model", "folder", "--device", "auto"], capsys, "pip install accelerate")


def test_configurations_by_name(capsys):
    """Of a folder all; published ones at the model's depth, said where it is another."""
    Path("run").mkdir()
    config_file("run/config-0.4.json")
    asked = ["evaluate", "--config", "run", "preset:fastv/k3-r75", *SMALL]
    assert main([*asked, "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["configurations"]]
    assert names == ["run/config-0.4.json", "preset:fastv/k3-r75"]
    assert main(asked) == 0
    said = (
        "preset:fastv/k3-r75 was published for 32 layers; in these 4: fastv: layer 2 keeps 25.0 %"
    )
    assert said in capsys.readouterr().out
    assert main(["apply", "--config", "run", "--repeats", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pruned"]["tokens"] == [64, 64, 32, 16]
    asked = ["convert", "--config", "preset:fastv/k2-r50", "--num-layers", "28", "-o", "c.json"]
    assert main(asked) == 0
    expected = PruningConfig.from_fastv(2, 0.5, num_layers=28)
    assert PruningConfig.load("c.json").keep_ratios == expected.keep_ratios


def test_presets_are_listed_by_the_names_that_config_takes(capsys):
    from vispco.commands.configs import find_config

    assert main(["list", "presets", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert "preset:fastv/k2-r50" in listed
    for name, line in listed.items():
        assert re.match(r"published for \d+ layers: ", line)
        assert line.endswith(find_config(name)(32).describe().split(": ", 1)[1])


def test_an_own_model_is_not_asked_a_toy_question(capsys):
    config_file()
    Path("folder").mkdir()
    Path("folder/config.json").write_text('{"model_type": "llava"}')
    words = ["apply", "--config", "config.json", "--model", "folder"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vispco.commands.apply.find_model", lambda options: None)
        fails(words, capsys, "folder needs a question of its own: give --image and --question")


def test_an_earlier_frontier_is_not_lost(frontier_file, capsys):
    fails(["search", "--output", "."], capsys, "--overwrite")


@pytest.mark.parametrize("words", [["plot", "frontier.json", "-o", "a.svg"], ["demo"]])
def test_without_matplotlib(words, frontier_file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails(words, capsys, 'pip install "vispco[plot]"')


def test_without_the_testbed_extra(monkeypatch, capsys):
    from vispco.testbed import easyvqa

    easyvqa.load.cache_clear()
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    fails(["search", "--tasks", "easy_vqa"], capsys, 'pip install "vispco[testbed]"')
    assert main(["list", "--json"]) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    assert 'pip install "vispco[testbed]"' in tasks["easy_vqa"] and tasks["count"].startswith(
        "such as: "
    )


def test_a_loss_that_is_not_finite(monkeypatch, capsys):
    import vispco.commands.search

    def diverge(*args, **options):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(vispco.commands.search, "search", diverge)
    fails(["search", *SMALL], capsys, "the loss is nan")


def test_interrupted(monkeypatch, capsys):
    import vispco.commands.search

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(vispco.commands.search, "search", interrupt)
    fails(["search", *SMALL], capsys, "interrupted", code=130)


def test_a_bug_is_not_hidden(monkeypatch):
    import vispco.commands.search

    monkeypatch.setattr(vispco.commands.search, "search", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["search", *SMALL])


# ---- a real process ------------------------------------------------------------------------------
def process(words, **options):
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(demo.__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "vispco", *words],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Ctrl-C reaches it even where the tests run in the background (`&`).
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def test_processes():
    """At the same time, because importing takes longest: good, bad, a reader that leaves."""
    good, bad = process(["list", "methods"]), process(["search", "--method", "fastvv"])
    gone = process(["list", "kernels"])
    gone.stdout.close()
    out, err = good.communicate(timeout=300)
    assert good.returncode == 0 and "fastv" in out and not err
    out, err = bad.communicate(timeout=300)
    assert bad.returncode == 2 and not out
    assert err.count("\n") == 1 and err.startswith("vispco: error: unknown method")
    assert gone.wait(timeout=300) == 141 and not gone.stderr.read()


@pytest.mark.slow
def test_demo_on_the_shipped_model():
    """`vispco demo --fast` as a user starts it, and Ctrl-C in the middle of a search."""
    quick = process(["demo", "--fast"])
    out, err = quick.communicate(timeout=600)
    assert quick.returncode == 0 and "It was chosen" in out and "[4/4] writing the results" in err
    long = process(["search", "--steps", "10000", "-o", "run"])
    while not Path("run/log.jsonl").exists() and long.poll() is None:
        time.sleep(0.2)
    long.send_signal(signal.SIGINT)
    out, err = long.communicate(timeout=300)
    assert (long.returncode, out) == (130, "")
    again = "vispco search --steps 10000 -o run --resume"
    assert err == f"vispco: interrupted; `{again}` goes on where it was\n"
    assert sorted(p.name for p in Path("run").iterdir()) == ["journal.jsonl", "log.jsonl"]


def test_the_bar_tells_how_the_search_stands(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    record = {
        "budget": {"flops": 0.5, "kv_cache": "40%"},
        "loss": 0.25,
        "violation": 0.125,
        "multiplier": 3.0,
        "penalty": 100.0,
    }
    for quiet in (False, True):
        monkeypatch.setattr(sys, "stderr", Terminal())
        with Progress(2, "search", quiet) as bar:
            bar._bar.dynamic_ncols, bar._bar.ncols, bar._bar.mininterval = None, 80, 0
            bar.say("full model on 8 questions")
            bar(record)
            bar({"budget": 0.5, "schedule": 1, "loss": 0.5, "best": 0.125})
            bar({"layer": 3})
            bar.layers = 8
            bar({"layer": 4})
        shown = sys.stderr.getvalue()
        assert bool(shown) != quiet
        lines = [line.rstrip() for line in re.split(r"[\r\n]", shown)]
        assert max(map(len, lines)) <= 80
        for line in (
            r"search   0% \|.*\| \? left, full model on 8 questions",
            r"search  50% \|.*\| 00:\d\d left, budget flops=0.5\+kv_cache=40%, loss 0.2500",
            r"search 100% \|.*\| 00:00 left, budget 0.5, best 0.1250",
            r"search 100% \|.*\| 00:00 left, profile, layer 3",
            r"search 100% \|.*\| 00:00 left, profile, layer 4 of 7",
        ):
            assert quiet or any(re.fullmatch(line, shown) for shown in lines), (line, lines)


def test_a_terminal_that_does_not_know_its_size_has_a_bar(monkeypatch):
    """Such as that of `script` or of a container: 0 rows, 0 columns."""
    from tqdm import std

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    for size in ((-1, -1), (None, None), (79, -1)):
        monkeypatch.setattr(std, "_screen_shape_wrapper", lambda size=size: lambda file: size)
        with Progress(2, "search") as bar:
            bar.say("full model on 8 questions")
        assert "left, full model on 8 questions" in sys.stderr.getvalue(), size
        sys.stderr.truncate(0)


# ---- small parts ---------------------------------------------------------------------------------
def test_table_and_units():
    assert table(["a", "name"], [[1.5, "x"], [-10, "yy"]]) == "  a  name\n1.5  x\n-10  yy"
    assert table(["only", "header"], []) == "only  header"
    assert (
        flops(0) == "0.000 FLOPs"
        and flops(999.99e6) == "1.000 GFLOPs"
        and flops(2e18) == "2000 PFLOPs"
    )
    assert tokens([4, 4, 2]) == "4 4 2" and tokens([9] * 20 + [1]) == "20x9 1"


def test_wilson_is_within_0_and_1_and_covers():
    for right, n in ((0, 1), (1, 1), (0, 50), (50, 50), (7, 9)):
        low, high = wilson(right, n)
        assert 0 <= low <= right / n <= high <= 1 and low < high
    low, high = wilson(5000, 10000)
    assert high - low == pytest.approx(2 * 1.96 * 0.005, rel=1e-2)
    with pytest.raises(ValueError, match="successes"):
        wilson(2, 1)


def test_layers_entered_and_the_grid():
    visual = torch.tensor([False, True, True, True, True, False])
    kept = {1: torch.tensor([1, 1, 1, 1, 0, 1]).bool(), 3: torch.tensor([1, 1, 0, 0, 0, 1]).bool()}
    assert layers_entered(kept, visual, 4) == [4, 3, 3, 1]
    assert layers_entered({}, visual, 4) == [4] * 4
    assert token_grid([4, 3, 3, 1]) == "█ ▓\n▓ ·" and token_grid([2] * 4) == "█ █\n█ █"


def test_output_folder_cleans_up_after_itself():
    with pytest.raises(KeyError), output_folder("a/b/c"):
        raise KeyError
    assert not files()
    with pytest.raises(KeyError), output_folder("a/b") as folder:
        (folder / "log").write_text("kept")
        raise KeyError
    assert files() == ["a", "a/b", "a/b/log"]


# ---- what a search says of its result ---------------------------------------------------------
def test_a_tenth_is_kept_aside_and_measured(stand_in, capsys):
    """Ten batches: nine are searched on; the last one is measured, by hand here."""
    from vispco import evaluate

    asked = ["--start", "ramp", "--refinement", "0", "--budgets", "0.4,1", "--limit", "80"]
    assert main(["search", *asked, "--batch-size", "8", "-o", "run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    found = Frontier.load("run/frontier.json")
    batches = testbed.batches("calibration", 80, 8)
    assert found.meta["samples"] == 72 and found.meta["held_out"] == 8 and not result["notes"]
    for point, row in zip(found, result["configurations"], strict=True):
        held = evaluate(stand_in[0], batches[9:], point.config)
        own = evaluate(stand_in[0], batches[:9], point.config)
        assert point.metrics["held_out_kl"] == pytest.approx(held.kl) == row["held_out_kl"]
        assert point.metrics["held_out_accuracy"] == held.accuracy
        assert point.metrics["calibration_accuracy"] == own.accuracy
        assert point.metrics["calibration_agreement"] == own.agreement
        assert own.kl == pytest.approx(point.loss)
    assert found[1].metrics["calibration_agreement"] == 1
    # The stand-in answers nothing right, and nothing cannot get worse.
    assert found.meta["full_calibration_accuracy"] == found.meta["full_held_out_accuracy"] == 0
    assert found.meta["recommended_budget"] is None
    full, pruned = found.meta["full_prefill_seconds"], found.meta["prefill_seconds"]
    assert 0 < pruned[0] <= pruned[1] == full


def test_a_search_on_few_questions_says_so(capsys):
    assert main(["search", "--start", "ramp", "--budgets", "0.5", "-o", "run", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "note: 8 questions are few" in out and "8 calibration questions, none kept aside" in out
    assert "recommended: none by accuracy, as the full model answers none of 8 questions" in out


def test_notes_of_a_frontier_that_fits_its_questions_alone():
    from vispco.commands.held_out import notes, recommended, verdict

    def frontier(**metrics):
        point = FrontierPoint(PruningConfig("fastv", [1, 0.5]), 0.5, 1e9, 0.5, 0.1, metrics)
        return Frontier([point], {"samples": 64, "objective": "kl"})

    assert notes(frontier(held_out_kl=0.15)) == notes(frontier()) == []
    (note,) = notes(frontier(held_out_kl=0.3))
    assert "more than twice the calibration's at 0.5" in note
    few = frontier()
    few.meta["samples"] = 63
    assert notes(few)[0].startswith("63 questions are few")
    assert recommended([0.2, 0.79, 0.85], 0.8) == 1 and recommended([0.2], 0.8) is None
    assert verdict("0.5", 0.9, 100).startswith(
        "recommended: budget 0.5, the cheapest within 1 point"
    )
    assert "(standard error 3.0 points)" in verdict(None, 0.9, 100)
    assert "on 1 question (standard error" in verdict("0.5", 1, 1)


def test_from_which_size_on_pruning_pays():
    from vispco.commands.too_small import pays_from

    config, dimensions = (
        PruningConfig("fastv", (1, 1, 0.5, 0.25)),
        Dimensions(4, 32, 4, 2, 8, 48, 60),
    )
    # A layer takes n microseconds: the config saves 0.5 + 0.75 of each visual token's.
    table = LatencyTable(dimensions, (1, 10**6), (1e-6, 1.0))
    least = pays_from(table, config, 64, 0, missing=144e-6)
    assert 144 / 1.25 < least <= 144 / 1.25 * 2**0.125 + 1
    flat = LatencyTable(dimensions, (1, 10**6), (1e-3, 1e-3))
    assert pays_from(flat, config, 64, 0, missing=144e-6) is None


class Machine:
    """A timer that runs nothing: what calls would take on a machine that other work disturbs.

    A layer takes 1 ms and 20 us a token; a drop takes `drop` seconds. Each call takes up to a fifth
    longer, the machine drifts by a third, and one call in ten takes three times as long.
    """

    def __init__(self, model, drop, seed):
        self.model, self.drop, self.noise = model, drop, random.Random(seed)
        self.drift, self.calls = 1.0, 0

    def __call__(self, call):
        embeds = getattr(call, "keywords", {}).get("inputs_embeds")
        layers = self.model.model.language_model.layers
        counts = [64 + 8] * 4 if embeds is None else [embeds.shape[1]] * 4
        taken = 0.02 * (embeds is None)
        if any(layer._forward_pre_hooks for layer in layers):
            counts, taken = [64 + 8, 64 + 8, 32 + 8, 16 + 8], taken + 2 * self.drop
        taken += sum(1e-3 + 2e-5 * n for n in counts)
        self.calls += 1
        if self.calls % 7 == 0:
            self.drift = self.noise.uniform(1, 1.33)
        spike = 3 if self.noise.random() < 0.1 else 1
        return taken * self.drift * self.noise.uniform(1, 1.2) * spike


@pytest.mark.parametrize("drop", [4e-3, 12e-3])
def test_where_pruning_does_not_pay_the_same_is_said_each_time(stand_in, drop):
    """It saves (0.5 + 0.75) n 20 us and takes two drops: from 320 and 960 visual tokens on."""
    from vispco.commands.too_small import slow_note

    config, model = PruningConfig("fastv", (1, 1, 0.5, 0.25)), stand_in[0]
    inputs = dict(testbed.batches("test", 1, 1)[0])
    del inputs["labels"]
    text = inputs["input_ids"].shape[1] - 64
    assert text == 8 and slow_note(model, inputs, config, 0.9) == ""
    least, said = 2 * drop / (1.25 * 2e-5), []
    for seed in range(12):
        note = slow_note(model, inputs, config, 1.5, timer=Machine(model, drop, seed))
        assert "64 visual tokens in 4 layers of width 32 are too few" in note and "\n" not in note
        found = re.search(r"save at about ([\d,]+) of them, give or take a factor of two", note)
        said.append(int(found[1].replace(",", "")))
    # Two of 1, 2, 5, 10, ... at most.
    assert all(least / 2 <= n <= 2 * least for n in said) and len(set(said)) <= 2
    never = slow_note(model, inputs, config, 1.5, timer=Machine(model, 1.0, 0))
    assert "not with 32 times as many tokens either; larger models save" in never
    nothing = slow_note(model, inputs, PruningConfig("fastv", (1,) * 4), 1.5)
    assert nothing == "note: this configuration drops nothing, so it saves no time"
