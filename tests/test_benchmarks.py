"""The benchmarks.

What the harness counts, and each command at a tiny size. No speed is asserted.
"""

import importlib.util
import json
import re
import shutil

import pytest
import torch

import vispco
from benchmarks import (
    against,
    host,
    overhead,
    page,
    prediction,
    ranking,
    search_cost,
    serving,
    shapes,
    speedup,
)
from benchmarks.side_by_side import peak_memory

pytest.importorskip(
    "transformers",
    "5.20",
    reason="the prompts come with ready-made image features: transformers >= 5.20",
)

TINY = ["--model", "tiny", "--visual", "32", "--text", "16", "--rounds", "2", "--warmup", "1"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- harness -------------------------------------------------------------------------------------
def test_peak_memory_counts_what_is_held_at_once():
    size = 4 * 1000**2

    def call():
        x = torch.zeros(1000, 1000)
        # Two tensors are held.
        y = x + 1
        del x
        # Two tensors are held.
        z = y + 1
        del y, z

    def leak():
        return [torch.zeros(1000, 1000) for _ in range(3)]

    assert 2 * size <= peak_memory(call) < 2.1 * size
    assert 3 * size <= peak_memory(leak) < 3.1 * size


# ---- shapes --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, parameters",
    [("llava-1.5-7b", 6.74e9), ("qwen2.5-vl-3b", 3.09e9), ("qwen2.5-vl-7b", 7.62e9)],
)
def test_the_true_shapes_have_the_true_number_of_parameters(name, parameters):
    """Of the language models published: Vicuna-7B, Qwen2.5-3B, Qwen2.5-7B."""
    model = shapes.build(name, vision_layers=1, device="meta")
    counted = sum(p.numel() for p in model.get_decoder().parameters())
    tied = name == "qwen2.5-vl-3b"
    assert counted + (0 if tied else model.lm_head.weight.numel()) == pytest.approx(
        parameters, rel=2e-3
    )


@pytest.mark.parametrize(
    "wrong, what",
    [({"name": "x"}, "unknown model 'x'"), ({"name": "tiny", "layers": 0}, "at least 1")],
)
def test_bad_shapes(wrong, what):
    with pytest.raises(ValueError, match=what):
        shapes.build(**wrong)


@pytest.mark.parametrize("n, text, batch", [(0, 8, 1), (16, 1, 1), (16, 8, 0)])
def test_bad_prompts(n, text, batch):
    with pytest.raises(ValueError, match="need visual tokens >= 1"):
        shapes.prompt(shapes.build("tiny"), n, text, batch)


def test_decoding_leaves_the_cache_as_it_was():
    model = shapes.build("tiny")
    prompt = shapes.prompt(model, 16, 8, 2)
    cache = shapes.prefill(model, prompt)
    before, keys = shapes.kv_bytes(cache), cache.layers[3].keys.clone()
    shapes.decode(model, cache, 3, prompt.inputs["input_ids"][:, -1:])
    assert before == shapes.kv_bytes(cache) == 2 * 6 * 2 * 2 * 24 * 8 * 4 and torch.equal(
        keys, cache.layers[3].keys
    )


def test_a_plain_copy_decodes_without_vispco_what_was_pruned_with_it():
    model = shapes.build("tiny")
    prompt, first = shapes.prompt(model, 16, 8), torch.tensor([[7]])
    with vispco.apply(model, shapes.schedules(6)["50%"]):
        cache = shapes.prefill(model, prompt)
        copy = shapes.plain(cache)
        shapes.decode(model, cache, 1, first)
    with pytest.raises(ValueError, match="filled while the model was pruned"):
        shapes.decode(model, cache, 1, first)
    shapes.decode(model, copy, 1, first)
    assert shapes.kv_bytes(copy) == shapes.kv_bytes(cache)


def test_features_are_those_of_the_tower():
    """A prefill with ready-made features is the one with pictures, the tower apart."""
    model = shapes.build("tiny")
    prompt = shapes.prompt(model, 32, 8, 2)
    features = model.model.get_image_features(**prompt.pictures).pooler_output
    ready = prompt.inputs["mm_encoder_outputs"]["image"].pooler_output
    assert torch.cat(list(features)).shape == torch.cat(list(ready)).shape


def test_a_step_keeps_no_graph_before_the_first_layer_that_prunes():
    model = shapes.build("tiny")
    prompt, seen = shapes.prompt(model, 16, 8), []
    labels = torch.full_like(prompt.inputs["input_ids"], -100)
    labels[:, -1] = prompt.inputs["input_ids"][:, -1]
    adapter, scorer = search_cost.adapter_for(model)(model), search_cost.build_method("fastv", {})
    curve = search_cost.Monotone(6, scorer.first_layer)
    prepared = search_cost.run_teacher(
        model, search_cost.prepare(model, [{**prompt.inputs, "labels": labels}])
    )
    hooks = [
        layer.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
        for layer in adapter.layers
    ]
    with (
        search_cost.frozen(model),
        search_cost.Masking(adapter, scorer, curve()).install() as pruner,
    ):
        search_cost.step(prepared[0], curve, pruner)
    for hook in hooks:
        hook.remove()
    assert seen == [i >= scorer.first_layer for i in range(6)] and scorer.first_layer > 0


# ---- full eager attention, the rival -------------------------------------------------------------
@pytest.mark.parametrize("schedule", ["50%", "10%", "steps"])
def test_the_eager_rival_computes_what_vispco_does(schedule):
    """Written apart from each other, in the same precision: the same tokens, the same keys."""
    model = shapes.build("tiny")
    config, prompt = shapes.schedules(6)[schedule], shapes.prompt(model, 32, 16, 2)
    with vispco.apply(model, config):
        ours = shapes.prefill(model, prompt)
    with against.eager_pruning(model, config):
        theirs = shapes.prefill(model, prompt)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert a.keys.shape == b.keys.shape and torch.allclose(a.keys, b.keys, atol=1e-5)
    assert model.get_decoder().layers[1].self_attn.config._attn_implementation == "sdpa"


# ---- commands ------------------------------------------------------------------------------------
def written(command, tmp_path, *more):
    """The JSON that a command writes."""
    path = tmp_path / "figures.json"
    assert command.main([*TINY, *more, "--output", str(path)]) == 0
    data = json.loads(path.read_text())
    assert data.keys() == {
        "command",
        "seed",
        "versions",
        "machine",
        "dtype",
        "attention",
        "rounds",
        "clock",
        "figures",
    }
    assert (
        data["command"].startswith(f"python -m {command.__name__} --model tiny")
        and data["attention"] == "sdpa"
    )
    assert data["machine"]["threads"] == 1
    return data["figures"]


@pytest.mark.parametrize("order", [[], ["--whole-order"]])
def test_ranking(tmp_path, order):
    """Of every method: the share of a prefill, and memory."""
    figures = written(ranking, tmp_path, *order)
    assert [row["method"] for row in figures] == vispco.list_methods()
    assert all(row["ratio"] > 0 and row["peak_bytes"] >= 0 for row in figures)
    held = {row["method"]: row["peak_bytes"] for row in figures}
    assert held["cdpruner"] > held["vtw"] and all(row["whole"] == bool(order) for row in figures)


def test_overhead(tmp_path):
    figures = written(overhead, tmp_path, "--steps", "2")
    assert [f["work"] for f in figures] == ["prefill", "decode", "decode after pruning"]
    assert all(
        0 < f["low"] <= f["ratio"] <= f["high"] and f["ms"] is f["bare_ms"] is None for f in figures
    )


def test_host(tmp_path):
    """Pruning asks for more operators, whatever it drops; a bare model for as many as before."""
    figures = written(host, tmp_path)
    assert [row["schedule"] for row in figures] == ["50%", "25%", "10%", "steps"]
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in figures)
    once, *others, steps = (row["operators"] for row in figures)
    assert 1 < once < steps and set(others) == {once}


def test_speedup(tmp_path):
    figures = written(speedup, tmp_path, "--steps", "2", "--batch", "1", "2", "--trace")
    assert [(f["batch"], f["schedule"]) for f in figures] == [
        (b, s) for b in (1, 2) for s in ("full", "50%", "25%", "10%", "steps")
    ]
    for f in figures:
        assert (
            f["realised"] == pytest.approx(f["speedup"] / f["flops_ratio"])
            and f["low"] <= f["realised"] <= f["high"]
        )
        assert (
            1 <= f["with_tower"]["flops_ratio"] <= f["flops_ratio"]
            and f["ttft_ms"] is f["decode_ms"] is None
        )
        assert 0 < sum(f["limits"]["shares"].values()) <= 1
    kept = {"full": [32] * 6, "50%": [32] * 2 + [16] * 4, "10%": [32] * 2 + [3] * 4}
    for f in figures:
        if f["schedule"] in kept:
            assert f["kv_bytes"] == f["batch"] * 2 * 2 * 8 * 4 * (sum(kept[f["schedule"]]) + 6 * 16)


def test_prediction(tmp_path):
    figures = written(prediction, tmp_path, "--tokens", "1", "3")
    assert [(f["new_tokens"], f["schedule"]) for f in figures] == [
        (n, s) for n in (1, 3) for s in ("50%", "25%", "10%", "steps")
    ]
    for f in figures:
        assert f["tower"] and 0 <= f["fixed"] < 1 and f["full_ms"] is f["measured_ms"] is None
        assert f["fixed"] < f["predicted"] <= 1 and 0 < f["low"] <= f["measured"] <= f["high"]
    assert not any(
        f["tower"]
        for f in written(prediction, tmp_path, "--tokens", "1", "--no-tower", "--cpu-time")
    )
    assert prediction.main([*TINY, "--tokens", "0"]) == 2


def test_against(tmp_path):
    figures = written(against, tmp_path)
    assert [f["way"] for f in figures] == ["bare", "deploy", "eager", "mask"] * 4
    for bare, deploy, eager, mask in zip(*[iter(figures)] * 4, strict=True):
        assert (
            deploy["kv_bytes"] == eager["kv_bytes"] < bare["kv_bytes"] == mask["kv_bytes"]
            and bare["ratio"] == 1
        )


@pytest.mark.parametrize(
    "given, what",
    [
        (["--device", "cuda"], "torch finds no GPU"),
        (["--rounds", "0"], "rounds must be"),
        (["--layers", "3"], "at least 5 layers"),
        (["--visual", "0"], "visual tokens"),
        (["--threads", "0"], "--threads must be"),
        (["--threads", "2", "--cpu-time"], "one thread"),
        (["--method", "nothing"], "nothing"),
        (["--output", "no/such/folder.json"], "no folder"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(given, what, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert speedup.main([*TINY, *given]) == 2
    printed = capsys.readouterr().err
    assert what in printed and printed.count("\n") == 1 and not list(tmp_path.iterdir())


# ---- the page ------------------------------------------------------------------------------------
@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_the_benchmark_of_vllm_needs_vllm(capsys, tmp_path):
    assert serving.main(["--output", str(tmp_path / "serving.json")]) == 2
    assert "this benchmark needs vLLM" in capsys.readouterr().err


def test_the_page_says_what_the_json_says():
    """Neither its tables nor its picture were written by hand."""
    text = (page.DOCS / page.PAGE).read_text(encoding="utf-8")
    results = page.load(page.DOCS / page.FOLDER)
    assert text.partition(page.MARKER)[2] == page.tables(results)


def test_the_command_writes_all_tables_again(tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copytree(page.DOCS / "results" / "benchmarks", tmp_path / page.FOLDER)
    for name in (page.GPU, page.GPU.with_suffix(".md"), page.PAGE):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(page.DOCS / name, tmp_path / name)
    text = (page.DOCS / page.PAGE).read_text(encoding="utf-8")
    without = re.sub(r"^\| .*\n", "", text, flags=re.MULTILINE)
    (tmp_path / page.PAGE).write_text(without, encoding="utf-8")
    (tmp_path / page.GPU).with_suffix(".md").unlink()
    assert without.count("\n") < text.count("\n") and page.main(["--docs", str(tmp_path)]) == 0
    for name in (page.PAGE, page.GPU.with_suffix(".md")):
        assert (tmp_path / name).read_bytes() == (page.DOCS / name).read_bytes()
    (tmp_path / page.PAGE).write_text(text.replace(page.GPU_MARKERS[0], ""), encoding="utf-8")
    assert page.main(["--docs", str(tmp_path)]) == 2


def test_a_verdict_counts_the_medians_that_meet_the_target():
    row = {"layers": 6, "n_visual": 32, "batch": 1, "work": "decode", "low": 1.0, "high": 1.1}
    both = page.tables(
        [
            (
                "overhead",
                {
                    "command": "c",
                    "seed": 0,
                    "rounds": 2,
                    "dtype": "float32",
                    "attention": "sdpa",
                    "clock": "wall",
                    "machine": {"device": "cpu", "name": "x", "threads": 1},
                    "versions": {"torch": "2", "transformers": "5"},
                    "figures": [{**row, "ratio": 1.02}, {**row, "ratio": 1.03}],
                },
            )
        ]
    )
    assert (
        "Missed**: by 1 of 2 medians" in both and "| decode | 1.0300 (1.0000 to 1.1000) |" in both
    )


@pytest.mark.parametrize(
    "files, what",
    [
        ({}, "expected files named"),
        ({"other.json": '{"figures": [1]}'}, "expected files named"),
        ({"overhead.json": "{}"}, "it has no figures"),
        ({"overhead.json": "{"}, "overhead.json"),
    ],
)
def test_a_folder_without_figures_is_one_line_and_leaves_the_page(files, what, capsys, tmp_path):
    (tmp_path / page.FOLDER).mkdir(parents=True)
    (tmp_path / page.PAGE).write_text("above\n" + page.MARKER)
    for name, text in files.items():
        (tmp_path / page.FOLDER / name).write_text(text)
    assert page.main(["--docs", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert what in printed and printed.count("\n") == 1
    assert (tmp_path / page.PAGE).read_text() == "above\n" + page.MARKER
