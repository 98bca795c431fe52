"""Calls timed in turns, by fake clocks.

What is measured, in what order, and what is predicted. No speed is asserted.
"""

import contextlib
from collections import Counter
from functools import partial

import pytest
import torch

from tiny import batch, tiny_llava, without_labels
from vispco import PruningConfig
from vispco.commands.answer import first_token, latency, speeds
from vispco.latency.timing import side_by_side, timed


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- turns ---------------------------------------------------------------------------------------
def test_ratios_are_taken_round_by_round_so_that_drift_cancels():
    """The machine gets slower all the time; b takes 3 times what a takes in the same round."""
    calls = {"a": lambda: 1.0, "b": lambda: 3.0}
    ticks = iter(range(100))
    times = side_by_side(
        calls,
        baseline="a",
        rounds=5,
        warmup=0,
        timer=lambda call: call() * 2.0 ** (next(ticks) // 2),
    )
    assert (
        times["b"] == {"ratio": 3.0, "low": 3.0, "high": 3.0, "ms": None}
        and times["a"]["ratio"] == 1
    )


def test_median_and_quantiles_of_known_ratios_without_the_warm_up():
    seconds = {"a": iter([9.0] + [1.0] * 11), "b": iter([9.0] + [1.0 + i / 10 for i in range(11)])}
    times = side_by_side(
        {"a": "a", "b": "b"},
        baseline="a",
        rounds=11,
        warmup=1,
        timer=lambda name: next(seconds[name]),
    )
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

    side_by_side(
        dict(zip("abc", "abc", strict=True)),
        baseline="a",
        rounds=3,
        warmup=1,
        timer=timer,
        within={"b": context},
    )
    assert "".join(log) == "ca<b>" + "a<b>c" + "<b>ca" + "ca<b>"


def test_milliseconds_on_a_gpu_only():
    times = side_by_side(
        {"a": lambda: None}, baseline="a", rounds=3, device="cuda", timer=lambda call: 0.25
    )
    assert times["a"]["ms"] == 250


@pytest.mark.parametrize(
    "wrong, what",
    [
        ({"baseline": "x"}, "baseline 'x' is not among a"),
        ({"baseline": "a", "rounds": 0}, "rounds must be at least 1"),
        ({"baseline": "a", "warmup": -1}, "warmup at least 0"),
    ],
)
def test_bad_arguments_of_the_harness(wrong, what):
    with pytest.raises(ValueError, match=what):
        side_by_side({"a": lambda: None}, **wrong)


def test_a_clock_is_read_right_before_and_after():
    ticks = iter([3.0, 10.0])
    assert timed("cpu", lambda: next(ticks))(lambda: None) == 7.0


# ---- prediction ----------------------------------------------------------------------------------
class Clock:
    """Of a model whose layers take 2 + 3 S for S tokens, and whose tower takes 100."""

    def __init__(self, model):
        self.now, self.lengths, self.speed = 0.0, [], 1.0
        for layer in model.get_decoder().layers:
            layer.register_forward_hook(lambda module, args, output: self.add(args[0].shape[1]))
        model.model.vision_tower.register_forward_hook(lambda *_: self.tick(100))

    def add(self, size):
        self.lengths[-1].append(size)
        self.tick(2 + 3 * size)

    def tick(self, seconds):
        self.now += seconds * self.speed

    def timer(self, call):
        """Seconds of a call; the lengths that enter its layers are written down."""
        self.lengths.append([])
        return timed("cpu", lambda: self.now)(call)


@pytest.fixture
def model():
    return tiny_llava()


def prompt(images=1):
    """One prompt: (inputs, visual tokens, text tokens)."""
    inputs = without_labels(batch(images=(images,), text=(9,), before=(2,)))
    return inputs, 16 * images, inputs["input_ids"].shape[1] - 16 * images


CONFIGS = [
    PruningConfig("fastv", r)
    for r in ([1.0] * 2 + [0.5] * 4, [1, 1, 0.75, 0.5, 0.25, 0], [1.0] * 6)
]


@pytest.mark.parametrize("new_tokens", [1, 3])
def test_what_the_formula_says_is_what_a_machine_does_that_follows_it(model, new_tokens):
    """t_0 + sum t(N_t + n_i), with a clock of our own.

    It is exact, for whole answers too, on a machine of any speed.
    """
    inputs, n_visual, n_text = prompt()
    clock = Clock(model)
    clock.speed = 0.125
    found = latency(
        model,
        partial(
            model.generate,
            **inputs,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        ),
        CONFIGS,
        n_visual,
        n_text,
        rounds=3,
        warmup=1,
        timer=clock.timer,
    )
    fixed = 100 + 6 * 5 * (new_tokens - 1)
    full = fixed + 6 * (2 + 3 * (n_visual + n_text))
    assert found["fixed"] == pytest.approx(fixed / full) and found["full_ms"] is None
    for config, row in zip(CONFIGS, found["configurations"], strict=True):
        by_hand = (fixed + sum(2 + 3 * (n_text + n) for n in config.tokens(n_visual))) / full
        assert row["predicted"] == pytest.approx(by_hand) and row["measured"] == pytest.approx(
            by_hand
        )
        assert (
            row["low"] == pytest.approx(row["high"])
            and row["predicted_ms"] is row["measured_ms"] is None
        )


def test_every_round_runs_everything_once_pruned_or_not_in_another_order(model):
    inputs, n_visual, n_text = prompt()
    clock = Clock(model)
    latency(
        model,
        first_token(model, inputs),
        CONFIGS[:2],
        n_visual,
        n_text,
        rounds=2,
        warmup=1,
        timer=clock.timer,
    )
    size = len(clock.lengths) // 3
    turns = [list(map(tuple, clock.lengths[i : i + size])) for i in range(0, 3 * size, size)]
    assert (
        Counter(turns[0]) == Counter(turns[1]) == Counter(turns[2])
        and turns[0] != turns[1] != turns[2]
    )
    pruned = {tuple(n_text + n for n in config.tokens(n_visual)) for config in CONFIGS[:2]}
    # With and without the tower.
    assert pruned < set(turns[0]) and Counter(turns[0])[(n_visual + n_text,) * 6] == 2
    assert all(len(set(turn)) == 1 for turn in set(turns[0]) - pruned)


def test_the_model_is_left_as_it_was(model):
    inputs, n_visual, n_text = prompt()
    hooks = [len(layer._forward_pre_hooks) for layer in model.get_decoder().layers]
    with pytest.raises(ZeroDivisionError):
        latency(model, lambda: 1 / 0, CONFIGS, n_visual, n_text, rounds=1)
    assert hooks == [len(layer._forward_pre_hooks) for layer in model.get_decoder().layers]
    assert all(p.requires_grad for p in model.parameters())


def test_the_time_to_the_first_token_and_the_rate_after_it_are_medians_of_all_in_turns(
    model, monkeypatch
):
    inputs, n_visual, n_text = prompt()
    clock = Clock(model)
    monkeypatch.setattr("vispco.commands.answer.timed", lambda device: clock.timer)
    found = speeds(model, inputs, CONFIGS[0], repeats=2, new_tokens=4)
    assert found["seconds_to_first_token"] == {
        "full": 100 + 6 * (2 + 3 * (n_visual + n_text)),
        "pruned": 100 + sum(2 + 3 * (n_text + n) for n in CONFIGS[0].tokens(n_visual)),
    }
    assert found["tokens_per_second"] == pytest.approx(
        dict.fromkeys(["full", "pruned"], 1 / (6 * 5))
    )
    assert found["attention"] == model.config._attn_implementation and len(clock.lengths) == 4 * 3


def test_a_rate_that_the_clock_cannot_tell_is_none(model, monkeypatch):
    monkeypatch.setattr("vispco.commands.answer.timed", lambda device: lambda call: 1.0)
    assert set(speeds(model, prompt()[0], CONFIGS[0], 1, 2)["tokens_per_second"].values()) == {None}
