"""Models spread over several devices, against the same models on one device.

The devices are pretended (`pretend_devices`).
"""

import functools

import pytest
import torch

import vispco
from pretend_devices import dispatch, moved, placed, pretending
from tests.reproduction import estimator_zoo  # noqa: F401
from tiny import FAMILIES, batch, search_with, without_labels
from tiny_families import processed
from vispco import PruningConfig
from vispco.baselines.downsample import evaluate_downsampled
from vispco.baselines.rules import fitprune_schedule, vtw_schedule
from vispco.calibration import prepare
from vispco.commands import answer
from vispco.latency.table import LatencyTable
from vispco.latency.timing import timed
from vispco.plot.tokens import kept_patches
from vispco.pruning._attention import SoftMask
from vispco.pruning.state import PassState
from vispco.registry import adapter_for

# The layers are on cpu:1, cpu:1, cpu:2, cpu:2.
RATIOS = (1.0, 0.8, 0.5, 0.2)
SHAPES = {"images": (1, 1, 1), "text": (9, 7, 12), "before": (2, 1, 3)}
LLAVA = ["llava"]
FAMILY = ["llava", "qwen2_5_vl"]


@pytest.fixture(autouse=True)
def devices():
    """On in every test: what is on the CPU stays there."""
    with pretending():
        yield


@functools.cache
def single(family):
    """A tiny model on the CPU."""
    return FAMILIES[family](layers=4)


@functools.cache
def spread(family, by=dispatch):
    """The same model as `device_map="auto"` would have it.

    But the vision tower is on a device of its own.
    """
    model = FAMILIES[family](layers=4)
    decoder = adapter_for(model)(model).decoder
    name = next(name for name, module in model.named_modules() if module is decoder)
    places = {
        f"model.{part}": "cpu:3"
        for part, module in model.model.named_children()
        if module is not decoder
    }
    places |= {
        f"{name}.{part}": "cpu:1" for part, module in decoder.named_children() if part != "layers"
    }
    places |= {f"{name}.layers.{i}": f"cpu:{1 + i // 2}" for i in range(4)}
    return by(model, {**places, f"{name}.norm": "cpu:2", "lm_head": "cpu:2"})


def by_accelerate(model, places):
    """Accelerate's own way, with the arguments that transformers has for it."""
    accelerate = pytest.importorskip("accelerate")
    return accelerate.dispatch_model(
        model, places, main_device="cpu:1", skip_keys=model._skip_keys_device_placement
    )


@functools.cache
def batches(family):
    """Two, with padding, on the CPU."""
    model = single(family)
    return [
        processed(model, batch(seed=seed, **SHAPES))
        if family != "llava"
        else batch(seed=seed, **SHAPES)
        for seed in (0, 1)
    ]


def logits(model, inputs):
    """Of one batch, back on the CPU."""
    with torch.no_grad():
        return model(**moved(without_labels(inputs), model.device)).logits.cpu()


def generated(model, inputs):
    """Five new tokens for each prompt of a batch."""
    inputs = moved(without_labels(inputs), model.device)
    return model.generate(
        **inputs, max_new_tokens=5, do_sample=False, suppress_tokens=[2, 4, 5]
    ).tolist()


# ---- the pretence --------------------------------------------------------------------------------
def test_tensors_of_two_devices_do_not_meet():
    here, there, elsewhere = (
        torch.ones(3, 3),
        torch.ones(3, 3, device="cpu:1"),
        torch.ones(3, 3).to("cpu:2"),
    )
    for left, right in ((here, there), (there, elsewhere)):
        for operation in (
            torch.add,
            torch.matmul,
            lambda a, b: torch.cat([a, b]),
            lambda a, b: a.gather(1, b.long()),
            lambda a, b: a.masked_fill(b.bool(), 0),
            lambda a, b: torch.where(a > 0, a, b),
        ):
            with pytest.raises(RuntimeError, match="on the same device"):
                operation(left, right)
    assert torch.equal((there @ elsewhere.to(there.device)).cpu(), here @ here)
    assert (
        there.new_zeros(2).device
        == torch.tensor([1], device="cpu:1").device
        == torch.zeros_like(there[0]).device
        == there.device
    )


def test_what_pytorch_lets_through_is_let_through():
    here, there, index = torch.arange(3.0), torch.arange(3.0, device="cpu:1"), torch.tensor([2, 0])
    assert (there * torch.tensor(2.0)).tolist() == [0, 2, 4] and there[index].tolist() == [2, 0]
    there[index] = torch.tensor(7.0)
    assert there.tolist() == [7, 1, 7] and there.masked_fill(
        there > 6, torch.tensor(0.0)
    ).tolist() == [0, 1, 0]
    for tensor in (here, there):
        with pytest.raises(
            RuntimeError, match="indices should be either on cpu or on the same device"
        ):
            tensor[index.to("cpu:2")]
    with pytest.raises(TypeError, match="can't convert"):
        there.numpy()


def test_gradients_cross_devices():
    x = torch.ones(2, 3, requires_grad=True)
    there = (x * 2).to("cpu:1")
    there[:, 1] = 0
    (there.to("cpu:2") ** 2).sum().to("cpu:3").backward()
    assert x.grad.device.index is None and x.grad.tolist() == [[8, 0, 8]] * 2


@pytest.mark.parametrize("family", LLAVA)
def test_a_pruner_that_leaves_its_state_behind_is_caught(family, monkeypatch):
    monkeypatch.setattr(PassState, "follow", lambda self, device, kwargs: kwargs)
    for mode in ("deploy", "search"):
        with (
            pytest.raises(RuntimeError, match="on the same device"),
            vispco.apply(spread(family), PruningConfig("pdrop", RATIOS), mode=mode),
        ):
            logits(spread(family), batches(family)[0])


# ---- the library ---------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILY)
def test_keeping_all_changes_nothing(family):
    model, inputs = spread(family), batches(family)[0]
    bare = logits(model, inputs)
    assert torch.equal(bare, logits(single(family), inputs))
    for mode in ("deploy", "search"):
        # Hooks, but no drops.
        with vispco.apply(model, PruningConfig("pdrop", [1 - 1e-9] * 4), mode=mode) as handle:
            assert torch.equal(bare, logits(model, inputs)) and not handle.kept()


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("method", vispco.list_methods())
def test_every_method_keeps_the_same_tokens_and_says_the_same(method, family):
    inputs, found = batches(family)[0], []
    for model in (single(family), spread(family)):
        with vispco.apply(model, PruningConfig(method, RATIOS)) as handle:
            first = logits(model, inputs)
            kept = {layer: mask.tolist() for layer, mask in handle.kept().items()}
            found.append((kept, generated(model, inputs), first))
    (kept, words, first), (kept_apart, words_apart, first_apart) = found
    assert kept == kept_apart and set(kept) == {1, 2, 3} and words == words_apart
    assert torch.equal(first, first_apart)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_measures_the_same(family):
    """VisionZip reads the tower; PDrop each layer's projections before it runs."""
    for method, mode in (("visionzip", "deploy"), ("pdrop", "search")):
        config = PruningConfig(method, RATIOS)
        apart, together = (
            vispco.evaluate(build(family), batches(family)[:1], config, mode=mode)
            for build in (spread, single)
        )
        assert (
            apart == together and apart.kl > 1e-3 and torch.equal(apart.correct, together.correct)
        )


def searched(model, family, **options):
    """What a search finds, and the course of it."""
    steps = []
    frontier = search_with(
        model,
        batches(family),
        **{"budgets": [0.4], "steps": 2, "inner": 2, "refinement": 0, **options},
        callback=steps.append,
    )
    return frontier.points, steps


@pytest.mark.parametrize(
    "family, options",
    [
        ("llava", {"method": "pdrop", "objective": "task"}),
        ("llava", {"estimator": "fractional", "checkpoint": True}),
        ("qwen2_5_vl", {"method": "sparsevlm"}),
    ],
)
def test_search_takes_the_same_course(family, options):
    points, steps = searched(spread(family), family, **options)
    assert (points, steps) == searched(single(family), family, **options) and steps[0][
        "gradient"
    ] > 0


@pytest.mark.parametrize("conditioned", [False, True])
def test_amortised_search_learns_the_same(conditioned):
    apart, together = (
        vispco.search(
            model,
            batches("llava"),
            budgets=(),
            start=vispco.Shared(steps=2, conditioned=conditioned),
        )
        .frontier([0.4, 0.8])
        .points
        for model in (spread("llava"), single("llava"))
    )
    assert apart == together


def test_batches_may_be_on_a_device_already():
    there = [moved(inputs, "cpu:2") for inputs in batches("llava")]
    config = PruningConfig("fastv", RATIOS)
    assert vispco.evaluate(spread("llava"), there, config) == vispco.evaluate(
        single("llava"), batches("llava"), config
    )


# ---- all of a model on another device than its batches -------------------------------------------
@functools.cache
def away(family):
    """The same model after `model.to("cpu:1")`: unlike `spread`, it moves no input itself."""
    return placed(FAMILIES[family](layers=4), "cpu:1")


def prompt_of(given):
    """The first picture's prompt, which has no padding."""
    tokens = int(given[0]["attention_mask"][0].sum())
    inputs = without_labels(given[0])
    pixels = inputs.pop("pixel_values")
    if "image_grid_thw" in inputs:
        inputs["image_grid_thw"] = inputs["image_grid_thw"][:1]
    kept = {k: v[:1, -tokens:] if v.shape[1] >= tokens else v for k, v in inputs.items()}
    return {**kept, "pixel_values": pixels[: len(pixels) // 3]}


class Words:
    @staticmethod
    def decode(tokens, **_):
        return str(tokens.tolist())


def timed_alone(model, given):
    """That it runs. Times differ."""
    inputs = prompt_of(given)
    config = PruningConfig("fastv", RATIOS)
    answer.speeds(model, inputs, config, repeats=1, new_tokens=2)
    call = answer.first_token(model, inputs)
    found = answer.latency(model, call, [config], 16, 10, rounds=1, warmup=0)
    return len(found["configurations"]), LatencyTable.measure(model, [8, 16], repeats=1).lengths


#: What calls a model or its tower, from batches to something that two models can be compared by.
CALLS = {
    "smaller pictures": lambda m, x: evaluate_downsampled(m, prepare(m, x), 0.5),
    "smaller pictures, features kept": lambda m, x: evaluate_downsampled(
        m, prepare(m, x, keep_features=True), 0.5
    ),
    "full": lambda m, x: vispco.evaluate(m, x),
    "deploy": lambda m, x: vispco.evaluate(m, x, PruningConfig("visionzip", RATIOS)),
    "profile": lambda m, x: vispco.profile(m, x[:1], method="fastv").to_dict(),
    "before_llm": lambda m, x: (
        vispco.search(m, x[:1], "divprune", [0.5], start="before_llm").points
    ),
    "shared": lambda m, x: vispco.search(
        m, x[:1], budgets=(), start=vispco.Shared(steps=1, conditioned=True)
    ).config(0.5),
    "FitPrune's rule": lambda m, x: fitprune_schedule(m, x, 0.5),
    "VTW's rule": lambda m, x: vtw_schedule(m, x),
    "answer": lambda m, x: answer.answer(m, Words, prompt_of(x), PruningConfig("fastv", RATIOS)),
    "kept patches": lambda m, x: str(kept_patches(m, prompt_of(x), PruningConfig("fastv", RATIOS))),
    "times": timed_alone,
}


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("call", CALLS)
def test_inputs_are_taken_to_the_models_device(call, family):
    here = CALLS[call](single(family), batches(family))
    assert CALLS[call](away(family), batches(family)) == here
    there = [moved(inputs, "cpu:1") for inputs in batches(family)]
    assert CALLS[call](away(family), there) == here


@pytest.mark.parametrize("family", FAMILY)
def test_the_hooks_of_accelerate_itself(family):
    model = spread(family, by_accelerate)
    points, steps = searched(model, family, method="pdrop")
    assert (points, steps) == searched(single(family), family, method="pdrop")
    with vispco.apply(model, points[0].config):
        words = generated(model, batches(family)[0])
    with vispco.apply(single(family), points[0].config):
        assert words == generated(single(family), batches(family)[0])


def test_the_mask_of_a_search_moves_without_being_made():
    policy = torch.tensor([[1.0, 0.0, 1.0]], requires_grad=True)
    mask = SoftMask.of(
        torch.ones(1, 1, 3, 3, dtype=torch.bool), policy, torch.float32, causal=False
    )
    for place in ("cpu:1", torch.device("cpu:1"), torch.ones(1, device="cpu:1")):
        apart = mask.to(place)
        assert type(apart) is SoftMask and apart.bias.device == apart.own.device == torch.device(
            "cpu:1"
        )
        assert torch.equal((apart + 0).cpu(), mask + 0)
    assert (
        type(mask.to(torch.float64)) is torch.Tensor
        and mask.to(torch.float64).dtype == torch.float64
    )


def test_clocks_wait_for_every_device(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert timed("cuda:0", clock=lambda: 0.0)(lambda: waited.append("call")) == 0.0
    assert waited == [0, 1, "call", 0, 1]
