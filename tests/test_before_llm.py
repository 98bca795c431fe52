"""One drop before the language model: the search for it, and what serving engines take of it."""

import json

import pytest
import torch

import vispco
from tiny import batch
from vispco import BeforeLLM, PruningConfig
from vispco.commands.engines import ENGINES, flags_for
from vispco.commands.main import main
from vispco.registry import METHODS
from vispco.solvers.before import before_llm
from vispco.utils.journal import Journal

SOME = ["divprune", "strided", "visionzip"]


@pytest.fixture(scope="module")
def batches():
    """Eight questions about one picture each."""
    shape = {"images": (1,) * 4, "text": (9,) * 4, "before": (2,) * 4}
    return [batch(**shape, seed=seed) for seed in (1, 2)]


def test_methods_before_the_language_model_need_no_layer():
    names = before_llm()
    assert {"evs", "vidcom2", "holov", "hiprune", "prumerge", "vscan", "pool"} <= {*names}
    assert not {"fastv", "pdrop", "ivcprune", "pact", "framefusion", "vtw"} & {*names}


def test_every_budget_has_the_best_method(llava, batches):
    """Of each, all are measured with the most tokens that fit; none is above its budget."""
    seen = []
    budgets = [0.3, {"flops": 0.7, "kv_cache": 0.5}]
    found = vispco.search(
        llava, batches, SOME, budgets, start="before_llm", refinement=2, callback=seen.append
    )
    assert len(seen) == 6 and {row["layer"] for row in seen} == {0}
    for point in found.points:
        config, own = point.config, [row for row in seen if row["budget"] == point.budget]
        (ratio,) = {*config.keep_ratios}
        losses = {}
        for name in SOME:
            other = PruningConfig(name, [ratio] * config.num_layers)
            losses[name] = vispco.evaluate(llava, batches, other).kl
        assert {row["method"]: row["loss"] for row in own} == pytest.approx(losses, abs=1e-6)
        assert config.method == min(losses, key=losses.get) and point.share <= 0.7
        more = PruningConfig(config.method, [ratio + 1 / 16] * config.num_layers)
        limit = found.meta and vispco.count_flops(llava, more, 16, 9).prunable_share
        assert limit > 0.3
    # Eight questions, of the full model and of three methods with two budgets.
    assert found.meta["forward_passes"] == 8 * 7 and found.meta["start"] == "before_llm"


def test_a_journal_goes_on(llava, batches, tmp_path):
    """Every method is measured once, though all have one schedule."""
    given = {"budgets": [0.4], "start": BeforeLLM()}
    whole = vispco.search(llava, batches, SOME, **given)
    with Journal(tmp_path / "journal.jsonl") as journal:
        first = vispco.search(llava, batches, SOME, **given, options={"journal": journal})
    with Journal(tmp_path / "journal.jsonl") as journal:
        again = vispco.search(llava, batches, SOME, **given, options={"journal": journal})
    points = [[p.to_dict() for p in each.points] for each in (whole, first, again)]
    assert points[0] == points[1] == points[2]


def test_what_reads_the_language_model_is_refused(llava, batches):
    for name in ("fastv", "pdrop", "divprune+fastv@2"):
        with pytest.raises(ValueError, match="drops before the language model runs"):
            vispco.search(llava, batches, name, [0.5], start="before_llm")
    with pytest.raises(ValueError, match="drops once, before layer 0: leave the kernel out"):
        vispco.search(llava, batches, "random", [0.5], start="before_llm", kernel="linear")


# ---- serving engines -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "engine, expected",
    [
        ("vllm", "--video-pruning-rate 0.7"),
        ("sglang", "--json-model-override-args '{\"video_pruning_rate\": 0.7}'"),
        ("openvino", "generation_config.pruning_ratio = 70"),
    ],
)
def test_one_drop_is_one_number(engine, expected):
    own = next(iter(ENGINES[engine].methods))
    flags, cannot = flags_for(engine, PruningConfig(own, [0.3] * 4))
    # Only what the engine prunes at all.
    assert flags == expected and len(cannot) == 1
    if engine == "sglang":
        assert json.loads(flags.split("'")[1]) == {"video_pruning_rate": 0.7}


def test_what_cannot_be_said_is_named():
    """Layers, method, options; as many tokens in the mean are closest."""
    config = PruningConfig(
        "visionzip+pdrop", [0.8, 0.8, 0.4, 0.4], {"visionzip": {"contextual": 0}}
    )
    flags, cannot = flags_for("vllm", config)
    assert flags == "--video-pruning-rate 0.4"
    assert [line.split(":")[0] for line in cannot[:3]] == [
        "drops before layer 0, 2",
        "ranking by visionzip+pdrop",
        "options of the method",
    ]


def test_vllm_ranks_by_vidcom2_if_told():
    flags, cannot = flags_for("vllm", PruningConfig("vidcom2", [0.3] * 4))
    assert flags == "--video-pruning-rate 0.7 --video-pruning-method vidcom2"
    assert len(cannot) == 1 and "of Qwen3-VL and models built on it" in cannot[0]
    assert any(
        "evs or vidcom2" in line for line in flags_for("vllm", PruningConfig("dart", [1]))[1]
    )


def test_openvino_is_never_told_to_drop_everything():
    flags, _ = flags_for("openvino", PruningConfig("cdpruner", [0.001] * 4))
    assert flags == "generation_config.pruning_ratio = 99"


def test_convert_to_an_engine(tmp_path, capsys):
    PruningConfig("fastv", [1, 1, 0.5, 0.5]).save(tmp_path / "config.json")
    asked = ["convert", "--config", str(tmp_path / "config.json"), "--to", "openvino"]
    assert main(asked) == 0
    out = capsys.readouterr().out
    assert out.startswith("generation_config.pruning_ratio = 25\n\nIt cannot express:\n- drops")
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == "generation_config.pruning_ratio = 25" and len(found["cannot"]) == 3
    assert main([*asked[:-1], "vllm"]) == 0
    assert capsys.readouterr().out.endswith("VISPCO_CONFIG=config.json vllm serve MODEL\n")


def test_an_engine_keeps_something(tmp_path, capsys):
    PruningConfig("vtw", [0, 0]).save(tmp_path / "gone.json")
    assert main(["convert", "--config", str(tmp_path / "gone.json"), "--to", "vllm"]) == 2
    assert "vLLM cannot drop all visual tokens" in capsys.readouterr().err


# ---- vispco list methods -------------------------------------------------------------------------
def test_every_method_says_where_it_acts_and_what_it_reads(capsys):
    assert main(["list", "methods", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    built_in = [n for n in lines if METHODS.get(n).__module__.startswith("vispco.")]
    assert len(built_in) >= 22
    for name in built_in:
        where, _, reads = lines[name].partition("; reads ")
        before = name in before_llm() or name == "vtw"
        assert where == ("before the language model" if before else "inside")
        assert reads.split(":")[0] == METHODS.get(name).reads != ""
    # What is read in the tower and of places is what the class asks for.
    for name in built_in:
        cls = METHODS.get(name)
        assert cls.reads_vision == ("tower" in cls.reads)
        assert cls.reads_grid == ("grid" in cls.reads)


def test_before_llm_on_the_command_line(monkeypatch, capsys, tmp_path):
    """It searches all methods that can; the report and the journal are written."""
    assert main(["search", "--before-llm", "--start", "ramp"]) == 2
    assert "not allowed with" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    asked = ["search", "--before-llm", "--budgets", "0.4", "--limit", "8", "--batch-size", "8"]
    assert main([*asked, "-o", "run", "-q"]) == 0
    capsys.readouterr()
    config = PruningConfig.load(tmp_path / "run" / "config-0.4.json")
    assert config.method in before_llm() and list(config.steps) == [0]
    assert (tmp_path / "run" / "report.html").exists()
    assert torch.tensor(config.keep_ratios).unique().numel() == 1
