"""The benchmark for a GPU, rehearsed with tiny shapes on the CPU. No speed is asserted."""

import doctest
import json
import sys
import textwrap
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version

import vispco
from benchmarks.gpu import (
    __main__ as command,
    estimate,
    models,
    page,
    parts,
    passes,
    profiling,
    worker,
)
from benchmarks.gpu.parts import Part

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.10"), reason="transformers >= 5.10"
)


def here(settings, model, parts, deadline):
    """In this process."""
    return worker.work(settings, model, parts)


def rehearse(folder, *more, launch=here):
    """The exit code, and what gpu.json holds."""
    given = ["--rehearse", "--output", str(folder), "--rounds", "2", *more]
    code = command.main(given, launch)
    return code, json.loads((folder / "gpu.json").read_text())["parts"]


@pytest.fixture
def small(monkeypatch):
    """One model, and no batch of 8."""
    monkeypatch.setattr(command, "MODELS", {"qwen2.5-vl-7b": (1200,)})
    every = command.plan
    few = staticmethod(lambda tiny: [part for part in every(tiny) if part.batch < 8])
    monkeypatch.setattr(command, "plan", few)


# ---- end to end ----------------------------------------------------------------------------------
def test_a_rehearsal_measures_every_part_once(small, tmp_path, capsys, monkeypatch):
    for kind in ("decode", "compiled"):
        whole, seconds = worker.KINDS[kind]
        monkeypatch.setitem(worker.KINDS, kind, (partial(whole, tokens=5), seconds))
    code, found = rehearse(tmp_path)
    assert code == 0 and [name.split()[0] for name in found] == [
        "first-token",
        "search",
        "profile",
        "decode",
        "compiled",
    ]
    assert all(part["took"] >= 0 and "failed" not in part for part in found.values())
    first, steps, profile, decode, compiled = (part["figures"] for part in found.values())
    names = ["full", "50%", "25%", "10%", "steps", "keep all", "layer 0", "features"]
    assert [row["schedule"] for row in first] == names
    layers, n, text = 6, 12, parts.TEXT
    config = models.config("qwen2.5-vl-7b", tiny=True)
    for row in first:
        pruning = parts.schedules(layers).get(row["schedule"])
        counted = vispco.count_flops(config, pruning, n, text, images=[[1, 6, 8]])
        tokens = sum(counted.tokens) + layers * text
        # Two key-value heads of 16 numbers in bfloat16.
        assert row["kv_bytes"] == tokens * 2 * 2 * 16 * 2 and row["flops"] == counted.total
        assert row["flops_ratio"] == pytest.approx(counted.full / counted.total)
        assert row["realised"] == pytest.approx(row["speedup"] / row["flops_ratio"])
        assert row["ms"] is None and row["peak_bytes"] > 0
    assert [row["call"] for row in steps[:4]] == ["plain", "tower", "step", "checkpoint"]
    by_call = {row["call"]: row for row in steps}
    whole, ratio = by_call["frontier"], {name: row.get("ratio") for name, row in by_call.items()}
    budgets = sum(ratio[f"{100 * budget:.0f}%"] for budget in whole["budgets"])
    known = passes.default_search(layers, batch=4)
    total = 64 * ratio["tower"] + known.profile / 4 + known.measured / 4 * budgets
    assert whole["plain_passes"] == pytest.approx(total) and whole["seconds"] is None
    assert by_call["checkpoint"]["peak_bytes"] < by_call["step"]["peak_bytes"]
    assert all(sum(row["kinds"].values()) == pytest.approx(1) for row in profile)
    assert [row["way"] for row in decode] == ["full", "keep all", "25%", "10%"]
    # What is compiled is compiled once, and only where it was asked for.
    assert [(row["way"], row["graphs"] > 0, row["graphs_later"]) for row in compiled] == [
        ("full, eager", False, 0),
        ("full, compiled", True, 0),
        ("25%, eager", False, 0),
        ("25%, compiled", True, 0),
    ]
    data = json.loads((tmp_path / "gpu.json").read_text())
    text = (tmp_path / "gpu.md").read_text()
    assert text == page.page(data) and "no figure means anything" in text
    assert all(f"## {title}" in text for title, *_ in page.SECTIONS.values())

    # Again: nothing is left to do.
    before, nothing = (tmp_path / "gpu.json").read_bytes(), []
    code, _ = rehearse(tmp_path, launch=lambda *given: nothing.append(given) or ())
    assert code == 0 and not nothing and before == (tmp_path / "gpu.json").read_bytes()
    assert "5 of 5 parts are known already" in capsys.readouterr().out


def test_a_rehearsal_in_processes_of_their_own(tmp_path):
    only = ["--only", "profile llava-1.5-7b 16x1"]
    code, found = rehearse(tmp_path, *only, launch=command.processes)
    assert code == 0 and list(found) == only[1:] and len(found[only[1]]["figures"]) == 3


# ---- what goes wrong -----------------------------------------------------------------------------
@pytest.fixture
def kinds(monkeypatch, small):
    """What the kinds of parts do: figures, unless a test says otherwise."""
    done = {kind: (lambda work: [work.part.name], 9.0) for kind in worker.KINDS}
    monkeypatch.setattr(worker, "KINDS", done)
    model = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr(models, "build", lambda *given: model)
    # It collects garbage, which takes a while in a test.
    monkeypatch.setattr(worker, "emptied", lambda device: None)
    monkeypatch.setattr(page, "SECTIONS", {})
    return done


def raising(error):
    def measure(work):
        raise error

    return measure, 9.0


def test_a_part_out_of_memory_is_recorded_and_the_others_go_on(kinds, tmp_path, capsys):
    fine = kinds["search"]
    kinds["search"] = raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    kinds["decode"] = raising(RuntimeError("first line\nsecond"))
    code, found = rehearse(tmp_path)
    failed = {name.split()[0]: part["failed"] for name, part in found.items() if "failed" in part}
    assert (
        code == 1
        and len(found) == 5
        and failed
        == {
            "search": "out of memory: CUDA out of memory. Tried to allocate 2 GiB",
            "decode": "RuntimeError: first line second",
        }
    )
    assert "2 parts failed" in capsys.readouterr().out
    assert "search qwen2.5-vl-7b 12x4: out of memory" in (tmp_path / "gpu.md").read_text()
    # They are tried again if asked for, and the others are not.
    kinds["search"], calls = fine, []
    kinds["first-token"] = raising(AssertionError("again"))
    assert rehearse(tmp_path)[0] == 1
    code, found = rehearse(tmp_path, "--retry")
    assert code == 1 and [n.split()[0] for n, p in found.items() if "failed" in p] == ["decode"]
    assert not calls


def test_an_interrupted_run_does_only_what_is_missing(kinds, tmp_path):
    kinds["profile"] = raising(KeyboardInterrupt())
    code, begun = rehearse(tmp_path)
    assert code == 130 and [name.split()[0] for name in begun] == ["first-token", "search"]
    kinds["first-token"] = kinds["search"] = raising(AssertionError("again"))
    kinds["profile"] = kinds["decode"]
    code, found = rehearse(tmp_path)
    assert code == 0 and len(found) == 5


def test_no_part_begins_after_the_last_minute(kinds, tmp_path, capsys):
    def slow(settings, model, parts, deadline):
        yield from worker.work(settings, model, parts[:1])
        while time.monotonic() < deadline:
            time.sleep(0.01)

    code, found = rehearse(tmp_path, "--minutes", "0.001", launch=slow)
    assert code == 1 and len(found) == 1 and "4 parts are left" in capsys.readouterr().out


def test_what_other_code_measured_is_measured_anew(kinds, tmp_path, monkeypatch):
    rehearse(tmp_path)
    monkeypatch.setattr(command, "code", lambda: "other")
    kinds["search"] = raising(ValueError("anew"))
    code, found = rehearse(tmp_path, "--keep")
    assert code == 0 and {part["code"] for part in found.values()} == {found_code()}
    code, found = rehearse(tmp_path)
    assert code == 1 and {part["code"] for part in found.values()} == {"other"}


def found_code():
    from benchmarks.gpu.records import code

    return code()


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda d: d["made_by"]["versions"].update(torch="1.0"), "versions.torch was"),
        (lambda d: d["made_by"]["machine"].update(name="H100"), 'machine.name was "H100"'),
        (lambda d: d["made_by"].update(tiny=False), "tiny was false and is true"),
        (lambda d: d.update(format=0), "expected what this benchmark writes"),
        (lambda d: d["parts"].update(x={}), "neither figures nor why it failed"),
    ],
)
def test_a_file_of_another_run_is_refused(kinds, tmp_path, change, what, capsys):
    rehearse(tmp_path)
    path = tmp_path / "gpu.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    assert command.main(["--rehearse", "--output", str(tmp_path)], here) == 2
    printed = capsys.readouterr().err
    assert what in printed and printed.count("\n") == 1 and json.loads(path.read_text()) == data
    assert rehearse(tmp_path, "--fresh")[0] == 0


@pytest.mark.parametrize(
    "given, what",
    [
        ([], "--output DIR"),
        (["--output", "x"], "torch finds no GPU: try --rehearse"),
        (["--output", "x", "--rounds", "1"], "--rounds must be"),
        (["--output", "x", "--rehearse", "--only", "nothing*"], "is none of the parts"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(given, what, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(given) == 2
    printed = capsys.readouterr().err
    assert what in printed and printed.count("\n") == 1


# ---- processes -----------------------------------------------------------------------------------
PARTS = [Part("profile", "llava-1.5-7b", n, 1) for n in (1, 2, 3)]


def events(monkeypatch, script, seconds=20.0):
    """What is told of three parts by a process that runs a script for each of them.

    The script knows the part's visual tokens, and `tell`.
    """
    begin = """
        import json, os, sys, time
        settings, name, parts = json.load(sys.stdin)
        def tell(**event): print("@gpu " + json.dumps(event), flush=True)
        tell(begin="model")
        for kind, model, n, batch in parts:
            part = f"{kind} {model} {n}x{batch}"
            tell(begin=part)
    """
    lines = textwrap.dedent(begin) + textwrap.indent(textwrap.dedent(script), "    ")
    monkeypatch.setattr(command, "WORKER", [sys.executable, "-S", "-c", lines])
    told = command.processes({}, PARTS[0].model, PARTS, time.monotonic() + seconds)
    return [event for event in told if "begin" not in event]


def outcome(told):
    return [(event.get("part", "")[-3:], event.get("failed", "fine")) for event in told]


def test_the_parts_after_one_that_ends_its_process_get_another(monkeypatch, capfd):
    script = """
        print("a library says something", flush=True)
        if n == 2: os._exit(3)
        tell(part=part, figures=[])
    """
    assert outcome(events(monkeypatch, script)) == [
        ("1x1", "fine"),
        ("2x1", "the process ended (3)"),
        ("3x1", "fine"),
    ]
    assert capfd.readouterr().err.count("a library says something") == 3


def test_a_part_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setitem(command.KINDS, "profile", (None, 0.5))
    script = """
        if n == 1: time.sleep(60)
        tell(part=part, figures=[])
    """
    assert outcome(events(monkeypatch, script)) == [
        ("1x1", "took longer than its limit"),
        ("2x1", "fine"),
        ("3x1", "fine"),
    ]


def test_the_deadline_ends_a_part_that_is_not_recorded(monkeypatch):
    script = """
        if n == 2: time.sleep(60)
        tell(part=part, figures=[])
    """
    told = events(monkeypatch, script, seconds=2.0)
    assert outcome(told)[0] == ("1x1", "fine") and told[1:] == [{"stopped": PARTS[1].name}]


def test_without_a_model_none_of_its_parts_is_measured(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "WORKER", [sys.executable, "-S", "-c", "import os; os._exit(9)"])
    code, found = rehearse(tmp_path, launch=command.processes)
    assert (
        code == 1
        and [part["failed"] for part in found.values()] == ["the process ended (9)"] * len(found)
        and len(found) == 5
    )


# ---- models, counts and estimates ----------------------------------------------------------------
@pytest.mark.parametrize("module", [parts, passes, profiling], ids=lambda m: m.__name__)
def test_examples(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed


def test_features_are_made_once_and_the_logits_are_the_same():
    for name in ("llava-1.5-7b", "qwen2.5-vl-7b", "qwen3-vl-8b"):
        model = models.build(name, True, "cpu", torch.float32)
        inputs = models.prompt(model, 48, 8, 2)
        with torch.no_grad():
            expected = model(**inputs).logits
            with models.without_tower(model, inputs) as tower:
                assert torch.equal(model(**inputs).logits, expected)
                again = tower().pooler_output
        assert "get_image_features" not in vars(model.model)
        assert sum(len(x) for x in again) in (96, 6) and model.training is False
    with pytest.raises(ValueError, match="a picture has 16 visual tokens: 17 is no multiple"):
        models.prompt(models.build("llava-1.5-7b", True, "cpu", torch.float32), 17, 8, 1)


@pytest.mark.parametrize(
    "name, billions",
    [("qwen2.5-vl-3b", 3.75), ("qwen2.5-vl-7b", 8.29), ("llava-1.5-7b", 7.06)],
)
def test_the_true_shapes_have_the_published_number_of_parameters(name, billions):
    """As the checkpoints on the hub say."""
    model = models.build(name, False, "meta", torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.slow
def test_a_search_takes_no_more_passes_than_are_counted():
    model = models.build("llava-1.5-7b", True, "cpu", torch.float32)
    batches = []
    for seed in range(4):
        inputs = models.prompt(model, 16, 8, 2, seed)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -1] = inputs["input_ids"][:, -1]
        batches.append({**inputs, "labels": labels})
    found = vispco.search(model, batches, progress=False).meta["forward_passes"]
    counted = passes.default_search(6, questions=8, batch=2).total()
    assert 0.6 * counted < found <= counted


def test_an_estimate_is_what_its_formula_says():
    found = estimate.estimate("llava-1.5-7b", 576)
    config = models.config("llava-1.5-7b")
    full = vispco.count_flops(config, None, 576, 64)
    known = passes.default_search(32)
    # Each layer's projections and attention, by hand.
    d, m, n = 4096, 11008, 640
    layer = 2 * n * (4 * d * d + 3 * d * m) + 4 * n * n * d
    assert full.full == 32 * layer + 2 * d * 32064
    profile = 32 * (3 * 32 + 6) * full.full
    teacher = 256 * full.total_with_vision
    pruned = [full.text_only + b * (full.full - full.text_only) for b in passes.BUDGETS]
    assert found.flops == pytest.approx(profile + teacher + known.measured * sum(pruned))
    assert found.plain - 2 * found.parameters == 32 * 4 * n * (8 * d + 6 * m + 4 * 64 * 128)
    assert estimate.on("H100 SXM 80 GB", found) == estimate.time(found.flops / (0.4 * 989e12))
    assert estimate.on("RTX 4090 24 GB", estimate.Estimate(1, 1e15, 30e9, 0, 0, 1)) == (
        "0 min (2 GPUs)"
    )
