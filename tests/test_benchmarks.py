"""The benchmarks: the harness's arithmetic by a fake clock, and each command at a tiny size. No speed is asserted."""

import contextlib
import json

import pytest
import torch

import vispco
from benchmarks import against, overhead, shapes, speedup
from benchmarks.side_by_side import peak_memory, side_by_side

TINY = ["--model", "tiny", "--visual", "32", "--text", "16", "--rounds", "2", "--warmup", "1"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- harness -----------------------------------------------------------------------------------------------
def test_ratios_are_taken_round_by_round_so_that_drift_cancels():
    """The machine gets slower all the time; b takes 3 times what a takes in the same round."""
    calls = {"a": lambda: 1.0, "b": lambda: 3.0}
    ticks = iter(range(100))
    times = side_by_side(calls, baseline="a", rounds=5, warmup=0, timer=lambda call: call() * 2.0 ** (next(ticks) // 2))
    assert times["b"] == {"ratio": 3.0, "low": 3.0, "high": 3.0, "ms": None} and times["a"]["ratio"] == 1


def test_median_and_quantiles_of_known_ratios_without_the_warm_up():
    seconds = {"a": iter([9.0] + [1.0] * 11), "b": iter([9.0] + [1.0 + i / 10 for i in range(11)])}
    times = side_by_side({"a": "a", "b": "b"}, baseline="a", rounds=11, warmup=1, timer=lambda name: next(seconds[name]))
    assert [times["b"][key] for key in ("low", "ratio", "high")] == pytest.approx([1.1, 1.5, 1.9])


def test_calls_take_turns_in_rotating_order_each_within_its_context():
    log = []

    @contextlib.contextmanager
    def context():
        log.append("<")
        yield
        log.append(">")

    def timer(name):
        log.append(name)
        return 1.0

    side_by_side(dict(zip("abc", "abc")), baseline="a", rounds=3, warmup=1, timer=timer, within={"b": context})
    assert "".join(log) == "ca<b>" + "a<b>c" + "<b>ca" + "ca<b>"


def test_milliseconds_on_a_gpu_only():
    times = side_by_side({"a": lambda: None}, baseline="a", rounds=3, device="cuda", timer=lambda call: 0.25)
    assert times["a"]["ms"] == 250


@pytest.mark.parametrize("wrong, what", [({"baseline": "x"}, "baseline 'x' is not among a"),
                                         ({"baseline": "a", "rounds": 0}, "rounds must be at least 1"),
                                         ({"baseline": "a", "warmup": -1}, "warmup at least 0")])
def test_bad_arguments_of_the_harness(wrong, what):
    with pytest.raises(ValueError, match=what):
        side_by_side({"a": lambda: None}, **wrong)


def test_peak_memory_counts_what_is_held_at_once():
    size = 4 * 1000**2

    def call():
        x = torch.zeros(1000, 1000)
        y = x + 1  # two held
        del x
        z = y + 1  # two held
        del y, z

    def leak():
        return [torch.zeros(1000, 1000) for _ in range(3)]

    assert 2 * size <= peak_memory(call) < 2.1 * size
    assert 3 * size <= peak_memory(leak) < 3.1 * size


# ---- shapes ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, parameters", [("llava-1.5-7b", 6.74e9), ("qwen2.5-vl-3b", 3.09e9), ("qwen2.5-vl-7b", 7.62e9)])
def test_the_true_shapes_have_the_true_number_of_parameters(name, parameters):
    """Of the language models published: Vicuna-7B, Qwen2.5-3B, Qwen2.5-7B."""
    model = shapes.build(name, vision_layers=1, device="meta")
    counted = sum(p.numel() for p in model.get_decoder().parameters())
    tied = name == "qwen2.5-vl-3b"
    assert counted + (0 if tied else model.lm_head.weight.numel()) == pytest.approx(parameters, rel=2e-3)


@pytest.mark.parametrize("wrong, what", [({"name": "x"}, "unknown model 'x'"), ({"name": "tiny", "layers": 0}, "at least 1")])
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
    assert before == shapes.kv_bytes(cache) == 2 * 6 * 2 * 2 * 24 * 8 * 4 and torch.equal(keys, cache.layers[3].keys)


def test_features_are_those_of_the_tower():
    """A prefill with ready-made features is the one with pictures, the tower apart."""
    model = shapes.build("tiny")
    prompt = shapes.prompt(model, 32, 8, 2)
    features = model.model.get_image_features(**prompt.pictures).pooler_output
    ready = prompt.inputs["mm_encoder_outputs"]["image"].pooler_output
    assert torch.cat(list(features)).shape == torch.cat(list(ready)).shape


# ---- full eager attention, the rival -----------------------------------------------------------------------
@pytest.mark.parametrize("schedule", ["50%", "10%", "steps"])
def test_the_eager_rival_computes_what_vispco_does(schedule):
    """Written apart from each other, in the same precision: the same tokens, the same keys."""
    model = shapes.build("tiny")
    config, prompt = shapes.schedules(6)[schedule], shapes.prompt(model, 32, 16, 2)
    with vispco.apply(model, config):
        ours = shapes.prefill(model, prompt)
    with against.eager_pruning(model, config):
        theirs = shapes.prefill(model, prompt)
    for a, b in zip(ours.layers, theirs.layers):
        assert a.keys.shape == b.keys.shape and torch.allclose(a.keys, b.keys, atol=1e-5)
    assert model.get_decoder().layers[1].self_attn.config._attn_implementation == "sdpa"


# ---- commands ----------------------------------------------------------------------------------------------
def written(command, tmp_path, *more):
    """The JSON that a command writes."""
    path = tmp_path / "figures.json"
    assert command.main([*TINY, *more, "--output", str(path)]) == 0
    data = json.loads(path.read_text())
    assert data.keys() == {"command", "seed", "versions", "machine", "dtype", "attention", "rounds", "figures"}
    assert data["command"].startswith(f"python -m {command.__name__} --model tiny") and data["attention"] == "sdpa"
    assert data["machine"]["threads"] == 1
    return data["figures"]


def test_overhead(tmp_path):
    figures = written(overhead, tmp_path, "--steps", "2")
    assert [f["work"] for f in figures] == ["prefill", "decode", "decode after pruning"]
    assert all(0 < f["low"] <= f["ratio"] <= f["high"] and f["ms"] is f["bare_ms"] is None for f in figures)


def test_speedup(tmp_path):
    figures = written(speedup, tmp_path, "--steps", "2", "--batch", "1", "2", "--trace")
    assert [(f["batch"], f["schedule"]) for f in figures] == [
        (b, s) for b in (1, 2) for s in ("full", "50%", "25%", "10%", "steps")]
    for f in figures:
        assert f["realised"] == pytest.approx(f["speedup"] / f["flops_ratio"]) and f["low"] <= f["realised"] <= f["high"]
        assert 1 <= f["with_tower"]["flops_ratio"] <= f["flops_ratio"] and f["ttft_ms"] is f["decode_ms"] is None
        assert 0 < sum(f["limits"]["shares"].values()) <= 1
    kept = {"full": [32] * 6, "50%": [32] * 2 + [16] * 4, "10%": [32] * 2 + [3] * 4}
    for f in figures:
        if f["schedule"] in kept:
            assert f["kv_bytes"] == f["batch"] * 2 * 2 * 8 * 4 * (sum(kept[f["schedule"]]) + 6 * 16)


def test_against(tmp_path):
    figures = written(against, tmp_path)
    assert [f["way"] for f in figures] == ["bare", "deploy", "eager", "mask"] * 4
    for bare, deploy, eager, mask in zip(*[iter(figures)] * 4):
        assert deploy["kv_bytes"] == eager["kv_bytes"] < bare["kv_bytes"] == mask["kv_bytes"] and bare["ratio"] == 1


@pytest.mark.parametrize("given, what", [(["--device", "cuda"], "torch finds no GPU"), (["--rounds", "0"], "rounds must be"),
                                         (["--layers", "3"], "at least 5 layers"), (["--visual", "0"], "visual tokens"),
                                         (["--threads", "0"], "--threads must be"), (["--method", "nothing"], "nothing"),
                                         (["--output", "no/such/folder.json"], "no folder")])
def test_what_a_user_can_get_wrong_is_one_line(given, what, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert speedup.main([*TINY, *given]) == 2
    printed = capsys.readouterr().err
    assert what in printed and printed.count("\n") == 1 and not list(tmp_path.iterdir())
