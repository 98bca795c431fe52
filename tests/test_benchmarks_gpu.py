"""The benchmark for a GPU, rehearsed with tiny shapes on the CPU. No speed is asserted."""

import doctest
import json
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version

import vispco
from benchmarks import page as short
from benchmarks.gpu import (
    __main__ as command,
    estimate,
    models,
    page,
    parts,
    passes,
    planned,
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
    monkeypatch.setattr(planned, "MODELS", {"qwen2.5-vl-7b": (1200,)})
    every = planned.parts
    few = staticmethod(lambda tiny: [part for part in every(tiny) if part.batch < 8])
    monkeypatch.setattr(planned, "parts", few)


# ---- end to end ----------------------------------------------------------------------------------
def test_a_rehearsal_measures_every_part_once(small, tmp_path, capsys, monkeypatch):
    for kind in ("decode", "compiled"):
        whole, seconds = worker.KINDS[kind]
        monkeypatch.setitem(worker.KINDS, kind, (partial(whole, tokens=5), seconds))
    code, found = rehearse(tmp_path)
    assert code == 0 and [name.split()[0] for name in found] == [
        "first-token",
        "decode",
        "search",
        "profile",
        "compiled",
    ]
    assert all(part["took"] >= 0 and "failed" not in part for part in found.values())
    first, decode, steps, profile, compiled = (part["figures"] for part in found.values())
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
    assert all(row["rounds"] == 2 and row["low"] <= row["ratio"] <= row["high"] for row in decode)
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
    fine, kinds["search"] = kinds["search"], raising(KeyboardInterrupt())
    code, begun = rehearse(tmp_path)
    assert code == 130 and [name.split()[0] for name in begun] == ["first-token", "decode"]
    kinds["first-token"] = kinds["decode"] = raising(AssertionError("again"))
    kinds["search"] = fine
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


# ---- the order, and decoding ---------------------------------------------------------------------
def test_what_matters_most_comes_first_and_models_are_loaded_six_times():
    every = planned.parts()
    kinds = [part.kind for part in every]
    half = [kind in ("first-token", "decode") for kind in kinds]
    assert half == sorted(half, reverse=True) and half.count(True) == 16 and len(set(every)) == 26
    assert [kind == "compiled" for kind in kinds] == [False] * 24 + [True] * 2
    llava, qwen2_5, qwen3 = planned.MODELS
    loaded = [model for model, _ in command._groups(every)]
    assert loaded == [llava, qwen2_5, qwen3, qwen2_5, llava, qwen2_5]
    # Of each model, time to first token comes before decoding.
    for _, own in command._groups(every[:16]):
        assert [part.kind for part in own] == sorted((p.kind for p in own), reverse=True)


def test_decoding_counts_no_first_call_and_takes_the_middle_of_two_rounds(monkeypatch):
    # Each way once, then the full model to see how many rounds fit.
    seconds = iter([*[90.0] * 5, 1.0, 2.0, 3.0, 4.0, 8.0, 9.0, 6.0, 1.0])
    monkeypatch.setattr(parts, "generated", lambda *given: next(seconds))
    model = models.build("qwen2.5-vl-7b", True, "cpu", torch.bfloat16)
    work = parts.Work(Part("decode", "qwen2.5-vl-7b", 12, 1), model, 40.0, 2)
    rows = {row["way"]: row for row in parts.decode(work)}
    # The second round begins with the second way.
    ratios = {"full": 1.0, "keep all": (2 + 8) / 2, "25%": (3 + 9) / 2, "10%": (4 + 6) / 2}
    assert {way: row["ratio"] for way, row in rows.items()} == ratios and not list(seconds)
    assert all(row["ms"] is row["tokens_per_second"] is None for row in rows.values())


# ---- models, counts and estimates ----------------------------------------------------------------
@pytest.mark.parametrize("module", [page, parts, passes, profiling], ids=lambda m: m.__name__)
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


# ---- what was measured ---------------------------------------------------------------------------
DOCS = Path(__file__).parent.parent / "docs"
MEASURED = json.loads((DOCS / "results" / "gpu" / "gpu.json").read_text())


def measured(kind, **of):
    """The rows of a kind of part whose values are these."""
    rows = [
        row
        for name, part in MEASURED["parts"].items()
        if name.split()[0] == kind
        for row in part["figures"]
    ]
    return [row for row in rows if all(row[name] == value for name, value in of.items())]


def between(numbers, digits=2):
    numbers = list(numbers)
    return f"{min(numbers):.{digits}f} to {max(numbers):.{digits}f}"


def test_the_tables_say_what_the_json_says():
    written = (DOCS / "results" / "gpu" / "gpu.md").read_text(encoding="utf-8")
    assert written == page.page(MEASURED)
    text = (DOCS / short.PAGE).read_text(encoding="utf-8")
    begin, end = short.GPU_MARKERS
    table = text.partition(begin)[2].partition(end)[0].strip()
    assert table == short.on_a_gpu(MEASURED) and table.count("\n") == 9


def test_the_conclusions_say_what_the_json_says():
    text = " ".join((DOCS / short.PAGE).read_text(encoding="utf-8").split())
    summary, _, text = text.partition("## A model of the time")[0].partition("## On a GPU")
    full = measured("first-token", schedule="full")
    prompts = {(r["model"], r["n_visual"], r["batch"]): r for r in full}
    fastv = [r for r in measured("first-token") if r["schedule"] in ("50%", "25%", "10%")]
    slow, fast = ([r for r in fastv if (r["speedup"] < 1) is less] for less in (True, False))
    pays = {(r["model"], r["n_visual"], r["batch"]) for r in fast}
    costs = {(r["model"], r["n_visual"], r["batch"]) for r in slow}
    least = min(prompts[each]["ms"] for each in pays)
    assert not pays & costs and costs == {("llava-1.5-7b", 576, 1), ("qwen2.5-vl-7b", 1200, 1)}
    assert len(pays) == 6 and f"six prompts whose full prefill takes {least:.0f} ms or" in text
    assert max(prompts[each]["ms"] for each in costs) < least
    batches = [r for r in fast if r["batch"] == 8]
    speedup = between(r["speedup"] for r in batches)
    assert f"Batches of 8 are {speedup} times as fast: " in text
    assert f"{between(r['realised'] for r in batches)} of what the FLOPs promise" in text
    alone = between(r["speedup"] for r in fast if r["batch"] == 1)
    assert f"2,880 or 4,800 visual tokens is {alone} times as fast" in text
    few, more = (between(r["speedup"] for r in slow if r["n_visual"] == n) for n in (576, 1200))
    assert f"576 visual tokens runs at {few} times the speed, of 1,200 at {more}" in text
    took = " and ".join(f"{prompts[each]['ms']:.0f}" for each in sorted(costs))
    assert f"full prefills take {took} ms" in text
    every = between(r["speedup"] for r in fast)
    assert f"7B models get {every} times as fast" in summary
    busy = " and ".join(
        f"{100 * r['busy']:.0f} %"
        for model, n, _ in sorted(costs)
        for r in measured("profile", schedule="full", model=model, n_visual=n)
    )
    assert f"busy for {busy}" in text
    assert f"FastV took less than {min(r['ms'] for r in fastv):.0f} ms" in text

    llava = between((r["tower_ms"] for r in full if r["model"] == "llava-1.5-7b"), 0)
    assert f"LLaVA's takes {llava} ms" in text
    qwen = [r for r in full if r["model"] == "qwen2.5-vl-7b"]
    assert f"{between((r['tower_ms'] / r['ms'] for r in qwen), 1)} times as long" in text
    rows = measured("first-token", model="qwen2.5-vl-7b")
    best = max(r["with_tower"]["speedup"] for r in rows)
    assert f"the best speed-up is {best:.2f}" in text
    tower = prompts["qwen2.5-vl-7b", 1200, 1]["tower_ms"]
    assert f"2,244 times for 1,200 tokens, in {tower:.0f} ms" in text
    config = models.config("qwen2.5-vl-7b")
    counted = vispco.count_flops(config, None, 1200, parts.TEXT, images=[[1, 60, 80]])
    assert f"By FLOPs it would be {counted.vision / counted.total:.2f} of the prefill" in text

    (one,) = measured("first-token", schedule="features", n_visual=4800, batch=1)
    whole = prompts["qwen2.5-vl-7b", 4800, 1]["ms"]
    assert f"it makes {one['ms']:.0f} ms of {whole:.0f}" in text
    eight = (
        between(r["speedup"] for r in measured("first-token", batch=8, schedule=name))
        for name in ("features", "25%")
    )
    assert "{} times as fast, and FastV at the same share {}".format(*eight) in text

    before = prompts["llava-1.5-7b", 2880, 8]
    (after,) = measured("first-token", n_visual=2880, batch=8, schedule="10%")
    kv, peak = (
        f"{after[k] / 2**30:.1f}{{}} in place of {before[k] / 2**30:.1f}"
        for k in ("kv_bytes", "peak_bytes")
    )
    cache, above = kv.format(" GiB"), peak.format("")
    assert f"the KV cache is {cache}, the peak above the weights {above}" in text

    assert f"{between((r['ms'] for r in measured('decode')), 0)} ms a step for LLaVA" in text
    ms = {row["way"]: row["ms"] for row in measured("compiled")}
    steps = f"{ms['full, compiled']:.1f} ms in full and {ms['25%, compiled']:.1f} ms pruned"
    assert f"a step takes {steps}" in text
    minutes = [f"{row['seconds'] / 60:.1f}" for row in measured("search", call="frontier")]
    assert "{} minutes on LLaVA (576 tokens) and {} on Qwen2.5-VL".format(*minutes) in text
    steps = between((row["ratio"] for row in measured("search", call="step")), 1)
    assert f"gradient search takes {steps} plain passes there: the target of 3.0 is missed" in text


def test_other_pages_say_what_the_json_says():
    def prose(name):
        return " ".join((DOCS / name).read_text(encoding="utf-8").split())

    took = sum(part["took"] for part in MEASURED["parts"].values())
    every = planned.parts()
    assert f"{len(MEASURED['parts'])} of the {len(every)} parts took {took:.0f} seconds" in prose(
        "10-benchmarks.md"
    )
    weights = {r["model"]: r["weight_bytes"] for r in measured("first-token")}
    rows = measured("first-token") + [r for r in measured("search") if "peak_bytes" in r]
    most = max(weights[r["model"]] + r["peak_bytes"] for r in rows)
    assert f"The largest part took {most / 1e9:.0f} GB" in prose("10-benchmarks.md")
    fastv = [r for r in measured("first-token") if r["schedule"] in ("50%", "25%", "10%")]
    eight = between(r["speedup"] for r in fastv if r["batch"] == 8)
    lost = between(r["speedup"] for r in fastv if r["speedup"] < 1)
    assert f"batches of 8 are {eight} times as fast" in prose("../README.md")
    assert f"gets **slower** ({lost})" in prose("../README.md")
    assert f"batches of 8 were {eight} times as fast" in prose("README.md")
    qwen = [r for r in fastv if (r["n_visual"], r["batch"]) == (1200, 8)]
    pages = prose("qwen-in-ten-minutes.md")
    assert f"eight of them {between(r['speedup'] for r in qwen)} times as fast" in pages
    (whole,) = measured("search", call="frontier", n_visual=1200)
    assert f"needs {whole['seconds'] / 60:.1f} minutes with 1,200 tokens" in pages


def test_the_tower_of_qwen_attends_once_for_each_window(monkeypatch):
    """In 28 of its 32 layers, with sdpa; the page says how often in all."""
    config = models.config("qwen2.5-vl-7b", tiny=True)
    sizes = {name: models.QWEN2_5[name] for name in ("depth", "fullatt_block_indexes")}
    for name, value in sizes.items():
        setattr(config.vision_config, name, value)
    patches = models.QWEN2_5["window_size"] // models.QWEN2_5["patch_size"]
    config.vision_config.window_size = patches * config.vision_config.patch_size
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    assert model.model.visual.config._attn_implementation == "sdpa"
    inputs, calls = models.prompt(model, 1200, 8, 1), []
    attention = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return attention(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    with torch.no_grad():
        model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    assert len(calls) == 28 * (8 * 10) + 4 == 2244
