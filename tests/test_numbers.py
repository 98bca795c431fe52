"""What vispco promises of numbers.

Nothing that is not finite goes unseen, ties go to the first, seeds and precisions agree.
"""

import ast
import copy
import functools
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import vispco
from oracles import Constant, pruned_with, rows_alone
from tiny import IMAGE, PER_IMAGE, batch, our_hooks, tiny_llava, without_labels
from vispco import PruningConfig, testbed
from vispco.pruning._tensors import BLOCK, column_sum, masked_softmax, products
from vispco.pruning._tower import received
from vispco.registry import METHODS
from vispco.relaxation import hard_mask

HERE = Path(__file__).parent
CONFIG = PruningConfig("fastv", [1, 1, 0.5, 0.5, 0.25, 0.25])
SHAPE = {"images": (1, 2, 0, 1), "text": (9, 7, 6, 12), "before": (2, 0, 3, 8)}
BAD = [math.nan, math.inf]


class Probe(vispco.Method):
    """Does what another method does, and writes down the scores."""

    def __init__(self, method):
        self.method, self.seen = method, []
        for flag in ("first_layer", "reads_vision", "vision_depths", "reads_grid"):
            setattr(self, flag, getattr(method, flag))
        self.limit, self.merge = method.limit, method.merge

    def score(self, ctx):
        scores = self.method.score(ctx)
        self.seen.append((ctx, scores))
        return scores


def steep(name, layers=6):
    """A schedule with three drops, from the first layer that the method can prune on."""
    first = METHODS.get(name).first_layer
    return [1.0] * first + [0.7, 0.7, 0.4, 0.4, 0.1, 0.1, *[0.1] * layers][: layers - first]


def kept_by(model, method, ratios, inputs, mode="deploy"):
    """({layer: (B, S) bool}, [(context, scores)])"""
    probe = Probe(method)
    with pruned_with(model, probe, ratios, mode) as handle, torch.no_grad():
        model(**inputs)
        return handle.kept(), probe.seen


# ---- what is not finite stops, and says where ----------------------------------------------------
def spoilt(model, layer, value, when=lambda module, output: True):
    """A hook that puts `value` into what a layer puts out."""

    def hook(module, args, output):
        return output.index_fill(-1, torch.tensor([3]), value) if when(module, output) else output

    return model.get_decoder().layers[layer].register_forward_hook(hook)


@pytest.fixture
def model():
    """A tiny LLaVA of one's own."""
    return tiny_llava()


BATCHES = [batch(images=(1, 2), text=(9, 6), before=(2, 0), seed=s) for s in range(2)]
RUNS = {
    "evaluate": lambda model: vispco.evaluate(model, BATCHES, CONFIG),
    "search": lambda model: vispco.search(
        model, BATCHES, budgets=[0.5], start=vispco.Gradient(steps=2)
    ),
    "amortise": lambda model: vispco.search(
        model, BATCHES, budgets=(), start=vispco.Shared(steps=2)
    ),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("layer, value", [(0, math.nan), (3, math.inf), (5, -math.inf)])
def test_a_layer_that_fails_is_named(model, run, layer, value):
    spoilt(model, layer, value)
    with pytest.raises(
        FloatingPointError,
        match=rf"batches\[0\]: the full model's logits .* from the output of layer {layer} on",
    ):
        RUNS[run](model)
    assert not our_hooks(model)


@pytest.mark.parametrize("run", RUNS)
def test_a_picture_that_is_not_finite_is_told_from_a_layer_that_fails(model, run, monkeypatch):
    monkeypatch.setitem(
        BATCHES[1], "pixel_values", torch.full_like(BATCHES[1]["pixel_values"], math.nan)
    )
    with pytest.raises(
        FloatingPointError, match=r"batches\[1\]: .* already in what enters layer 0"
    ):
        RUNS[run](model)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    "layer, where",
    [
        (3, "the hidden states that enter layer 4 are not finite"),
        (5, "the pruned model's logits are not finite, from the output of layer 5 on"),
    ],
)
def test_evaluate_names_the_layer_that_fails_under_pruning_only(model, layer, where, value):
    real = BATCHES[0]["attention_mask"].bool()
    spoilt(
        model, layer, value, lambda module, output: bool((output[real] == 0).all(-1).any())
    )  # dropped ones are zero
    vispco.evaluate(model, BATCHES[:1])
    with pytest.raises(FloatingPointError, match=rf"batches\[0\]: {where}"):
        vispco.evaluate(model, BATCHES[:1], CONFIG)


@pytest.mark.parametrize("mode", ["deploy", "search"])
@pytest.mark.parametrize("name", vispco.list_methods())
def test_a_pruned_model_does_not_rank_what_is_not_finite(model, name, mode):
    """Also methods whose scores are ranks: they would hide it."""
    first = METHODS.get(name).first_layer
    spoilt(model, first, math.nan)
    message = f"hidden states that enter layer {first + 2} are not finite"
    pruning = vispco.apply(model, PruningConfig(name, steep(name)), mode=mode)
    with pytest.raises(FloatingPointError, match=message), pruning, torch.no_grad():
        model(**without_labels(batch(**SHAPE)))


def test_a_search_names_budget_step_and_layer(model):
    """In the forward pass of a step.

    The layer that is named is the next that is pruned, or the last one, seen in the logits.
    """
    calls = []
    for layer, where in (
        (2, "the hidden states that enter layer 3"),
        (5, "the pruned .* from the output of layer 5 on"),
    ):
        calls.clear()

        def third(module, output):
            calls.append(torch.is_grad_enabled())
            return sum(calls) >= 3

        hook, seen = spoilt(model, layer, math.nan, third), []
        with pytest.raises(FloatingPointError, match=f"budget '50%', step 2: {where}"):
            vispco.search(
                model,
                BATCHES,
                budgets=["50%"],
                callback=seen.append,
                start=vispco.Gradient(steps=4),
            )
        hook.remove()
        assert len(seen) == 2 and not our_hooks(model)


def test_scores_that_fail_late_are_named_by_layer_and_step(model):
    class Late(Constant):
        def score(self, ctx):
            Late.calls += ctx.exhaustive and ctx.layer == 4
            return super().score(ctx) / (
                0.0 if ctx.exhaustive and ctx.layer == 4 and Late.calls == 2 else 1.0
            )

    Late.calls = 0
    vispco.register_method("late", Late)
    try:
        with pytest.raises(
            FloatingPointError, match="budget 0.5, step 1: the scores at layer 4 contain NaN"
        ):
            vispco.search(
                model, BATCHES, method="late", budgets=[0.5], start=vispco.Gradient(steps=3)
            )
    finally:
        METHODS.remove("late")


@pytest.mark.parametrize("run, where", [("search", "budget 0.5, step 0"), ("amortise", "step 0")])
def test_a_gradient_that_is_not_finite_is_never_stepped_on(model, run, where):
    def hook(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.nan)

    model.get_decoder().layers[4].register_forward_hook(hook)
    with pytest.raises(
        FloatingPointError, match=rf"^{where}: the loss is [-0-9.e]+, its gradient nan"
    ):
        RUNS[run](model)


def test_hardening_refuses_ratios_that_are_not_finite():
    from vispco.budget import Budget
    from vispco.flops import CostModel, Dimensions

    limit = Budget(
        0.5, CostModel(Dimensions(2, 8, 2, 2, 4, 16, 10)), torch.tensor([16]), torch.tensor([4])
    )
    with pytest.raises(FloatingPointError, match="must be finite"):
        limit.harden(torch.tensor([1.0, math.nan]))


# ---- float16 -------------------------------------------------------------------------------------
@functools.cache
def loud():
    """In float16, with queries and keys whose products exceed what float16 can hold.

    In the decoder and in the tower.
    """
    model = tiny_llava().half()
    with torch.no_grad():
        for module_name, module in model.named_modules():
            if module_name.endswith(("q_proj", "k_proj")):
                module.weight.mul_(600 if "vision" in module_name else 150)
    return model


@pytest.mark.parametrize("mode", ["deploy", "search"])
@pytest.mark.parametrize("name", vispco.list_methods())
def test_scores_do_not_overflow_in_float16(name, mode):
    """Every registered method: finite scores and exact counts.

    Queries and keys do overflow here.
    """
    model, inputs, largest = loud(), without_labels(batch(**SHAPE)), []
    inputs["pixel_values"] = inputs["pixel_values"].half()

    class Loud(Probe):
        def score(self, ctx):
            if ctx.layer:
                largest.append(
                    (
                        ctx.queries().float()
                        @ ctx.keys().float().repeat_interleave(2, 1).transpose(-1, -2)
                    )
                    .abs()
                    .max()
                )
                rows = ctx.attention(at=ctx.last).sum(-1)
                assert torch.allclose(rows, torch.ones(()), atol=1e-3)
            return super().score(ctx)

    probe = Loud(METHODS.get(name)())
    with pruned_with(model, probe, steep(name), mode) as handle, torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
        kept = handle.kept()
    assert max(largest) > 65504 and all(
        scores[ctx.valid].isfinite().all() for ctx, scores in probe.seen
    )
    text = inputs["attention_mask"].sum(1) - PER_IMAGE * torch.tensor(SHAPE["images"])
    for layer, mask in kept.items():
        assert (mask.sum(1) - text).tolist() == [
            PruningConfig(name, steep(name)).tokens(PER_IMAGE * n)[layer] for n in SHAPE["images"]
        ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [False, True])
def test_rows_of_attention_are_of_float32_products(dtype, cast):
    """Large logits, as real models have: products in bfloat16 keep other tokens, by ties.

    cast: within autocast, which rounds the inputs of products.
    """
    generator = torch.Generator().manual_seed(0)
    query = (12 * torch.randn(2, 4, 1, 64, generator=generator)).to(dtype)
    key = torch.randn(2, 4, 1100, 64, generator=generator).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        found = products(query, key)
    exact = query.double() @ key.double().transpose(-1, -2)
    assert found.dtype == torch.float32 and (found - exact).abs().max() < 1e-3
    best, least = exact.mean(1).argsort(), (query @ key.transpose(-1, -2)).mean(1).argsort()
    assert torch.equal(found.mean(1).argsort()[..., -144:], best[..., -144:])
    if dtype == torch.bfloat16:
        assert not torch.equal(least[..., -144:].sort().values, best[..., -144:].sort().values)


def test_rows_of_attention_take_no_memory_but_their_own():
    """And one block of keys in float32."""
    query, key = (torch.randn(1, 8, n, 128).bfloat16() for n in (1, 8192))
    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.append(out.untyped_storage().nbytes() if isinstance(out, torch.Tensor) else 0)
            return out

    with Sizes():
        products(query, key)
    # The keys themselves are seen through their views.
    own = key.untyped_storage().nbytes()
    assert max(size for size in made if size != own) == 8 * BLOCK * 128 * 4 < own / 4


def test_a_bfloat16_model_ranks_by_what_its_own_layers_hand_over():
    """The tokens that fastv keeps are those that exact arithmetic on its queries and keys keeps."""
    model, inputs = copy.deepcopy(loud()).bfloat16(), without_labels(batch(**SHAPE))
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    probe = Probe(METHODS.get("fastv")())
    with pruned_with(model, probe, steep("fastv")) as handle, torch.no_grad():
        model(**inputs)
        kept = handle.kept()
    assert kept and probe.seen
    for ctx, scores in probe.seen:
        key = ctx.heard.key.double().repeat_interleave(2, 1)
        row = (ctx.queries(at=ctx.last).double() @ key.transpose(-1, -2)) * ctx.heard.scaling
        seen = (ctx.present & (ctx.order <= ctx.order.gather(1, ctx.last)))[:, None, None]
        exact = row.masked_fill(~seen, -torch.inf).softmax(-1).mean(1)[:, 0][ctx.visual]
        torch.testing.assert_close(scores[ctx.valid].double(), exact[ctx.valid], atol=1e-5, rtol=0)


def test_the_towers_attention_does_not_overflow_in_float16():
    generator = torch.Generator().manual_seed(0)
    query, key = (400 * torch.randn(2, 9, 8, generator=generator).half() for _ in range(2))
    assert not (query @ key.transpose(1, 2)).isfinite().all()
    torch.testing.assert_close(received(query, key), received(query.float(), key.float()))


# ---- nothing to see ------------------------------------------------------------------------------
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_a_softmax_of_nothing_is_zero_forward_and_backward(rows, n, seed):
    """And of something, that of what is seen, by hand."""
    generator = torch.Generator().manual_seed(seed)
    scores = (20 * torch.randn(rows, n, generator=generator)).requires_grad_()
    hidden = torch.rand(rows, n, generator=generator) < 0.6
    hidden[0] = True
    out = masked_softmax(scores, hidden)
    (gradient,) = torch.autograd.grad(
        (out * torch.randn(rows, n, generator=generator)).sum(), scores
    )
    assert gradient.isfinite().all() and (gradient[hidden] == 0).all()
    for s, h, row in zip(scores.tolist(), hidden.tolist(), out.tolist(), strict=True):
        total = math.fsum(math.exp(x) for x, gone in zip(s, h, strict=True) if not gone)
        assert row == pytest.approx(
            [0 if gone else math.exp(x) / total for x, gone in zip(s, h, strict=True)], rel=1e-4
        )
    assert (
        not masked_softmax(torch.tensor([[math.nan, 0.0]]), torch.tensor([[False, False]]))
        .isfinite()
        .any()
    )


def test_a_picture_of_padding_receives_nothing():
    x = torch.randn(2, 5, 4)
    assert received(x, x, torch.zeros(5, dtype=torch.bool)).tolist() == [0] * 5


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", vispco.list_methods())
def test_samples_without_images_or_without_anything_are_no_nan(model, name, padding):
    """One is all padding, one has no image, one is padded.

    Finite forward in both modes, and backward.
    """
    inputs = without_labels(
        batch(images=(1, 0, 2, 0), text=(9, 6, 3, 4), before=(1, 2, 0, 0), padding=padding)
    )
    inputs["attention_mask"][3] = 0
    real = inputs["attention_mask"].bool()
    ratios = torch.tensor(steep(name), dtype=torch.float64, requires_grad=True)
    for mode in ("deploy", "search"):
        with pruned_with(model, METHODS.get(name)(), ratios.detach(), mode), torch.no_grad():
            assert model(**inputs).logits[real].isfinite().all()
    with pruned_with(model, METHODS.get(name)(), ratios, "search"):
        model(**inputs).logits[real].square().mean().backward()
    assert ratios.grad.isfinite().all() and (ratios.grad != 0).any()


# ---- ties ----------------------------------------------------------------------------------------
#: Methods whose tokens differ even where all look alike, and what decides then.
#: tests/test_methods.py compares each with a naive one.
OTHERWISE = {
    "random": "a hash of the running number",
    "strided": "every second, fourth, ... running number",
    "pool": "every second, fourth, ... place of the grid",
    "visionzip": "every n-th of those not attended to most",
    "vispruner": "of the duplicates, every other one goes",
    "evs": "of a film's first frame, every second, fourth, ... running number",
    "hiprune": "neighbours on the grid of those attended to most",
    "holov": "every crop has its share",
    "ivcprune": "tokens at extreme positions",
    "vidcom2": "every frame has its share",
    "vscan": "every window has its share",
}


@functools.cache
def uniform():
    """No attention to speak of, and one feature for all patches.

    Whatever a method looks at, all visual tokens are alike.
    """
    model = tiny_llava()
    with torch.no_grad():
        for module_name, parameter in model.named_parameters():
            if "self_attn" in module_name or "projector" in module_name:
                parameter.zero_()
        model.model.multi_modal_projector.linear_2.bias.fill_(0.3)
    return model


@pytest.mark.parametrize("mode", ["deploy", "search"])
@pytest.mark.parametrize("name", vispco.list_methods())
def test_where_all_tokens_are_alike_the_first_are_kept(name, mode):
    """In every batch.

    A method that decides otherwise is listed above. It decides the same however a sample is padded.
    """
    model, found = uniform(), []
    for padding in ("left", "right"):
        inputs = without_labels(batch(**SHAPE, padding=padding))
        kept, _ = kept_by(model, METHODS.get(name)(), steep(name), inputs, mode)
        assert kept
        for b in range(len(SHAPE["images"])):
            alone, real = rows_alone(inputs, SHAPE["images"], b)
            single, _ = kept_by(model, METHODS.get(name)(), steep(name), alone, mode)
            for layer, mask in kept.items():
                places = mask[b][inputs["input_ids"][b] == IMAGE].tolist()
                assert layer not in single or torch.equal(single[layer][0], mask[b, real])
                found.append((padding, layer, b, places))
                first = places == sorted(places, reverse=True)
                assert first or name in OTHERWISE, (
                    f"{name} keeps {places} of equal tokens: the first, or say what in OTHERWISE"
                )
    half = len(found) // 2
    assert [f[1:] for f in found[:half]] == [f[1:] for f in found[half:]]


@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 3), st.integers(0, 99))
def test_equal_columns_have_equal_sums(heads, n, batch_size, seed):
    """Wherever the columns stand.

    PyTorch's own float32 sums of the last few columns differ by a rounding.
    """
    row = torch.rand(batch_size, heads, 1, generator=torch.Generator().manual_seed(seed))
    sums = column_sum(row.expand(-1, -1, n).contiguous(), 1)
    assert (sums == sums[:, :1]).all() and torch.allclose(sums[:, 0], row.sum((1, 2)))


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=60), min_size=1, max_size=4),
    st.floats(0, 1),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.booleans(),
)
def test_ties_are_broken_as_python_sorts_them(table, share, dtype, left):
    """By (-score, index), of each sample, alone and in a batch.

    Padded on either side with the best score of all.
    """
    width = max(map(len, table))
    scores, alive = (
        torch.full((len(table), width), 9.0),
        torch.zeros(len(table), width, dtype=torch.bool),
    )
    for b, row in enumerate(table):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        scores[b, at], alive[b, at] = torch.tensor(row).float(), True
    keep = torch.tensor([round(share * len(row)) for row in table])
    mask = hard_mask(scores.to(dtype), keep, alive)
    for b, row in enumerate(table):
        best = sorted(range(len(row)), key=lambda j: (-row[j], j))[: round(share * len(row))]
        assert mask[b, alive[b]].nonzero()[:, 0].tolist() == sorted(best)
        alone = hard_mask(
            torch.tensor([row]).to(dtype),
            keep[b : b + 1],
            torch.ones(1, len(row), dtype=torch.bool),
        )
        assert torch.equal(alone[0], mask[b, alive[b]])


def test_every_sort_is_stable():
    """Of tensors and arrays.

    `list.sort` is always stable, and values alone may be in any order. Of topk and kthvalue,
    nothing but the values may be used.
    """
    for path in sorted((HERE.parent / "vispco").rglob("*.py")):
        if "reproduction" in path.parts or "testbed" in path.parts and path.name != "evaluate.py":
            continue
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text if "sort(" in text or "topk" in text or "kthvalue" in text else "")
        values = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr == "values"
        }
        for call in (
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        ):
            options = {
                word.arg: ast.literal_eval(word.value)
                for word in call.keywords
                if word.arg == "stable"
            }
            stable = (
                options.get("stable") is True
                or id(call) in values
                or any(word.arg == "key" for word in call.keywords)
            )
            chosen = call.func.attr in ("topk", "kthvalue") and id(call) not in values
            # The largest cosine is the same, whichever of equal neighbours is found.
            chosen = chosen and path.name != "vispruner.py"
            assert not chosen, f"{path}:{call.lineno}: topk breaks ties as it likes"
            if call.func.attr in ("sort", "argsort") and not (
                isinstance(call.func.value, ast.Name) and call.func.value.id == "np"
            ):
                assert stable, f"{path}:{call.lineno}: pass stable=True"


# ---- precisions ----------------------------------------------------------------------------------
#: First, the least share of the kept tokens that float32 keeps too, on average over the questions.
#: Second, how far the float32 scores of the others may be from the threshold's score, as a share of
#: it.
TOLERANCE = {torch.bfloat16: (0.97, 0.1), torch.float16: (0.99, 0.02)}


class Several(Constant):
    """Scores of several methods at one layer, in one forward pass."""

    first_layer = 1

    def score(self, ctx):
        self.valid = ctx.valid
        self.scores = {
            name: METHODS.get(name)().score(ctx)
            for name in ("fastv", "sparsevlm", "pdrop", "fitprune")
        }
        return super().score(ctx)


@pytest.mark.parametrize("which", ["testbed-llava", "testbed-qwen"])
def test_half_precision_keeps_what_float32_keeps(which):
    """Half and a fifth of the tokens before layer 3, of 32 questions.

    Where they differ, the scores are near the threshold.
    """
    model, found = testbed.load(which)[0], {}
    inputs = without_labels(testbed.batches("test", n=32, batch_size=32, model=which)[0])
    for dtype in (torch.float32, *TOLERANCE):
        given_ = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        low, ratios = (
            copy.deepcopy(model).to(dtype),
            [1.0] * 3 + [0.0] * (len(model.get_decoder().layers) - 3),
        )
        with pruned_with(low, Several(), ratios) as handle:
            with torch.no_grad():
                low(**given_)
            found[dtype], valid = handle.method.scores, handle.method.valid
    for dtype, (least, nearest) in TOLERANCE.items():
        for (name, scores), share in itertools.product(found[torch.float32].items(), (0.5, 0.2)):
            keep = (share * valid.sum(1)).long()
            kept, other = (hard_mask(s, keep, valid) for s in (scores, found[dtype][name]))
            threshold = scores.masked_fill(~kept, math.inf).amin(1, keepdim=True)
            assert ((kept & other).sum(1) / keep).mean() >= least, f"{name}, {dtype}, {share}"
            assert (((scores - threshold).abs() / threshold)[kept ^ other] <= nearest).all(), (
                f"{name}, {dtype}, {share}"
            )


# ---- the same again ------------------------------------------------------------------------------
def test_a_seed_means_the_same_in_every_process_and_thread():
    """One process after the other: to the bit.

    With two threads sums may round otherwise; what is found is the same.
    """

    def run(threads):
        environment = {
            **os.environ,
            "PYTHONPATH": str(HERE.parent),
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        done = subprocess.run(
            [sys.executable, str(HERE / "search_once.py"), str(threads)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    one, again, two = run(1), run(1), run(2)
    assert one == again
    assert one["tokens"] == two["tokens"] and one["kept"] == two["kept"]
    for a, b in zip(one["points"], two["points"], strict=True):
        assert a["flops"] == b["flops"] and a["loss"] == pytest.approx(b["loss"], rel=1e-4)
