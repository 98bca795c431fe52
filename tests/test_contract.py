"""One contract for everything registered: every method x every model family x both modes.

Registering a method or an adapter enrols it here. A method as a user would register it is tested
too.
"""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vispco
from oracles import Replay, Witness, by_hand, error, hook_counts, pruned_with, rows_alone
from tiny import FAMILIES, IMAGE, PER_IMAGE, batch, make, without_labels
from tiny_families import PROCESSORS, processed
from vispco import PruningConfig
from vispco.registry import ADAPTERS, METHODS, adapter_for, build_method

USER = "user-key-norm"
#: Of drops at layers 0, 2 and 4, each part ranks one at least.
COMPOSITES = ("visionzip+pdrop", "vispruner+fastv@3")
# Relative to the largest logit.
FLOAT32, FLOAT64 = 2e-5, 1e-10


class KeyNorm(vispco.Method):
    """What a user would write."""

    def score(self, ctx):
        """(B, n_visual) key norms of the layer just run.

        Taken before any norm that would make them all the same.
        """
        return ctx.projected_keys.norm(dim=-1)[ctx.visual]


@pytest.fixture(scope="module", params=[*vispco.list_methods(), *COMPOSITES, USER])
def name(request):
    """Every registered method, two composites, and the user's, by name."""
    if request.param == USER:
        vispco.register_method(USER, KeyNorm)
    yield request.param
    if request.param == USER:
        METHODS.remove(USER)


@pytest.fixture(scope="module")
def double(family):
    """The family's model in float64."""
    return copy.deepcopy(family).double()


def layers_of(model):
    """Number of decoder layers."""
    return len(model.get_decoder().layers)


def config_for(name, model, ratios=(0.75, 0.5, 0.2)):
    """Drop at the method's first layer and at every second one after it."""
    start, layers = build_method(name).first_layer, layers_of(model)
    steps = {start + 2 * j: r for j, r in enumerate(ratios)}
    return PruningConfig(
        name,
        [min([r for i, r in steps.items() if i <= layer], default=1.0) for layer in range(layers)],
    )


def logits(model, inputs, **kwargs):
    """Logits, without gradient."""
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def pruned_logits(model, config, inputs, mode="deploy"):
    """Logits and kept sets under a configuration."""
    with vispco.apply(model, config, mode=mode) as handle:
        return logits(model, inputs), handle.kept()


def in_dtype(inputs, dtype):
    """The inputs with floating-point tensors in `dtype`."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def alive(inputs, kept):
    """(B, S) bool: the tokens that are there at the end."""
    there = inputs["attention_mask"].bool()
    for mask in kept.values():
        there = there & mask
    return there


MIXED = {"images": (1, 2, 0, 1), "text": (9, 7, 6, 12), "before": (2, 0, 3, 8)}


@st.composite
def cases(draw, size=4):
    """A batch of any composition, and any non-increasing schedule (as cumulative factors)."""
    n = draw(st.integers(1, size))
    text = draw(st.lists(st.integers(1, 9), min_size=n, max_size=n))
    shape = {
        "images": draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)),
        "text": text,
        # At least one word after the image.
        "before": [draw(st.integers(0, t - 1)) for t in text],
        "padding": draw(st.sampled_from(["left", "right"])),
        "seed": draw(st.integers(0, 5)),
    }
    levels = draw(
        st.lists(st.sampled_from([0.0, 0.03, 0.25, 0.29, 0.5, 0.77, 1.0]), min_size=6, max_size=6)
    )
    return without_labels(batch(answer=0, **shape)), shape["images"], sorted(levels, reverse=True)


def schedule(name, model, levels):
    """The levels, stretched to the layers the method can prune."""
    start, layers = build_method(name).first_layer, layers_of(model)
    return PruningConfig(name, ([1.0] * start + levels + levels[-1:] * layers)[:layers])


# ---- enrolment -----------------------------------------------------------------------------------
def test_every_registered_adapter_has_a_tiny_model():
    """An adapter that none of the tiny models is of is not checked."""
    used = {adapter_for(make(name)) for name in FAMILIES}
    missing = [name for name in vispco.list_adapters() if ADAPTERS.get(name) not in used]
    assert not missing, f"adapters without a tiny model in tests/tiny.py FAMILIES: {missing}"


# ---- nothing changes but what should -------------------------------------------------------------
@pytest.mark.parametrize("mode", ["deploy", "search"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_keep_all_is_bit_identical(family, name, mode, padding):
    inputs = without_labels(batch(**MIXED, padding=padding))
    got, kept = pruned_logits(family, PruningConfig(name, [1.0] * layers_of(family)), inputs, mode)
    assert torch.equal(got, logits(family, inputs)) and kept == {}


@pytest.mark.parametrize("mode", ["deploy", "search"])
def test_afterwards_the_model_is_bit_identical_and_unhooked(family, name, mode):
    inputs, hooks = without_labels(batch(**MIXED)), hook_counts(family)
    before = logits(family, inputs)
    pruned, _ = pruned_logits(family, config_for(name, family), inputs, mode)
    # It did something.
    assert error(pruned, before) > 0.1
    assert torch.equal(logits(family, inputs), before) and hook_counts(family) == hooks


@pytest.mark.parametrize("mode", ["deploy", "search"])
def test_an_exception_in_the_block_leaves_the_model_as_it_was(family, name, mode):
    inputs, hooks = without_labels(batch(**MIXED)), hook_counts(family)
    before = logits(family, inputs)
    with (
        pytest.raises(KeyboardInterrupt),
        vispco.apply(family, config_for(name, family), mode=mode),
    ):
        logits(family, inputs)
        raise KeyboardInterrupt
    assert torch.equal(logits(family, inputs), before) and hook_counts(family) == hooks


@pytest.mark.parametrize("mode", ["deploy", "search"])
def test_an_exception_in_a_forward_leaves_no_trace(family, name, mode, monkeypatch):
    """Neither on the model nor in a handle that lives on."""
    inputs, hooks, config = (
        without_labels(batch(**MIXED)),
        hook_counts(family),
        config_for(name, family),
    )
    before, (pruned, _) = logits(family, inputs), pruned_logits(family, config, inputs, mode)
    with vispco.apply(family, config, mode=mode):
        with monkeypatch.context() as patch, pytest.raises(ArithmeticError):
            patch.setattr(family.get_decoder().layers[-1].mlp, "forward", lambda x: 1 // 0)
            logits(family, inputs)
        assert torch.equal(logits(family, inputs), pruned)
    assert torch.equal(logits(family, inputs), before) and hook_counts(family) == hooks


@pytest.mark.parametrize("mode", ["deploy", "search"])
def test_deterministic_whatever_ran_before(family, name, mode):
    inputs, other = (
        without_labels(batch(**MIXED)),
        without_labels(batch(images=(2,), text=(4,), before=(1,), seed=9)),
    )
    with vispco.apply(family, config_for(name, family), mode=mode) as handle:
        first, kept = logits(family, inputs), handle.kept()
        logits(family, other)
        assert torch.equal(logits(family, inputs), first)
        assert all(torch.equal(kept[i], again) for i, again in handle.kept().items())


# ---- soft == deploy == by hand -------------------------------------------------------------------
@settings(max_examples=12)
@given(case=cases())
def test_search_equals_deploy_float32(family, name, case):
    inputs, _, levels = case
    config = schedule(name, family, levels)
    (hard, kept), (soft, kept_soft) = (
        pruned_logits(family, config, inputs, m) for m in ("deploy", "search")
    )
    assert kept.keys() == kept_soft.keys() and all(torch.equal(kept[i], kept_soft[i]) for i in kept)
    there = alive(inputs, kept)
    assert error(hard[there], soft[there]) <= FLOAT32


@settings(max_examples=12)
@given(case=cases())
def test_search_equals_deploy_float64(double, name, case):
    inputs, _, levels = case
    inputs, config = in_dtype(inputs, torch.float64), schedule(name, double, levels)
    (hard, kept), (soft, kept_soft) = (
        pruned_logits(double, config, inputs, m) for m in ("deploy", "search")
    )
    assert kept.keys() == kept_soft.keys() and all(torch.equal(kept[i], kept_soft[i]) for i in kept)
    there = alive(inputs, kept)
    assert error(hard[there], soft[there]) <= FLOAT64


def test_search_equals_deploy_where_it_matters(double, name):
    """The two properties above are not vacuous.

    Here pruning moves the logits by more than a tenth.
    """
    inputs = in_dtype(without_labels(batch(**MIXED)), torch.float64)
    (hard, kept), (soft, _) = (
        pruned_logits(double, config_for(name, double), inputs, m) for m in ("deploy", "search")
    )
    there = alive(inputs, kept)
    full = logits(double, inputs)
    assert error(hard[there], soft[there]) <= FLOAT64 < 0.1 < error(hard[there], full[there])
    # The sample without an image is as it was.
    assert error(hard[2][there[2]], full[2][there[2]]) <= FLOAT64


@settings(max_examples=8)
@given(case=cases(size=1))
def test_deploy_equals_tokens_dropped_by_hand(double, name, case):
    """Layer by layer on the tokens selected, with explicit positions and a causal mask."""
    inputs, _, levels = case
    inputs = in_dtype(inputs, torch.float64)
    witness = Witness(build_method(name))
    with pruned_with(double, witness, schedule(name, double, levels).keep_ratios) as handle:
        got, kept = logits(double, inputs), handle.kept()
    reference = by_hand(
        double,
        inputs,
        {i: mask[0] for i, mask in kept.items()},
        merged={i: into[0] for i, into in witness.merged.items()},
    ).logits
    assert error(got[alive(inputs, kept)], reference[0]) <= FLOAT64


def test_dropped_tokens_have_zero_hidden_states(family, name):
    """The output keeps its length, so that labels and masks of the caller still fit."""
    inputs = without_labels(batch(**MIXED))
    with vispco.apply(family, config_for(name, family)) as handle, torch.no_grad():
        states = family.model(**inputs).last_hidden_state
    there = alive(inputs, handle.kept())
    gone = inputs["attention_mask"].bool() & ~there
    assert states.shape[:2] == inputs["input_ids"].shape and gone.sum() > 10
    assert (states[gone] == 0).all() and (states[there] != 0).any(-1).all()


# ---- counts --------------------------------------------------------------------------------------
@settings(max_examples=15)
@given(case=cases())
@pytest.mark.parametrize("mode", ["deploy", "search"])
def test_exact_numbers_nested_sets_and_all_text(family, name, mode, case):
    inputs, images, levels = case
    config = schedule(name, family, levels)
    _, kept = pruned_logits(family, config, inputs, mode)
    real = inputs["attention_mask"].bool()
    visual = (
        torch.isin(inputs["input_ids"], torch.tensor(adapter_for(family)(family).image_token_ids()))
        & real
    )
    there = real
    for layer in range(config.num_layers):
        now = kept.get(layer, there)
        assert not (now & ~there).any(), "a dropped token came back"
        assert torch.equal(now & ~visual, real & ~visual), "text was dropped"
        assert (now & visual).sum(1).tolist() == [
            config.tokens(PER_IMAGE * n)[layer] for n in images
        ]
        there = now
    changing = {
        i
        for i in config.steps
        if any(
            config.tokens(PER_IMAGE * n)[i] < ([PER_IMAGE * n] + config.tokens(PER_IMAGE * n))[i]
            for n in images
        )
    }
    assert kept.keys() == changing


@pytest.mark.parametrize("mode", ["deploy", "search"])
def test_bfloat16_is_finite_and_counts_exactly(family, name, mode):
    model = copy.deepcopy(family).bfloat16()
    inputs = in_dtype(without_labels(batch(**MIXED)), torch.bfloat16)
    config = config_for(name, model)
    got, kept = pruned_logits(model, config, inputs, mode)
    assert got.dtype == torch.bfloat16 and got[alive(inputs, kept)].isfinite().all()
    text = inputs["attention_mask"].sum(1) - torch.tensor(MIXED["images"]) * PER_IMAGE
    for i, mask in kept.items():
        assert (mask.sum(1) - text).tolist() == [
            config.tokens(n * PER_IMAGE)[i] for n in MIXED["images"]
        ]


# ---- batches -------------------------------------------------------------------------------------
@settings(max_examples=8)
@given(case=cases())
@pytest.mark.parametrize("mode", ["deploy", "search"])
def test_a_sample_alone_is_as_in_a_batch(double, name, mode, case):
    inputs, images, levels = case
    inputs, config = in_dtype(inputs, torch.float64), schedule(name, double, levels)
    together, kept = pruned_logits(double, config, inputs, mode)
    for b in range(len(images)):
        alone, real = rows_alone(inputs, images, b)
        got, kept_alone = pruned_logits(double, config, alone, mode)
        there = torch.ones_like(alone["input_ids"][0], dtype=torch.bool)
        for i, mask in kept.items():
            there = kept_alone[i][0] if i in kept_alone else there
            assert torch.equal(mask[b, real], there)
        assert (
            error(together[b, real][there], got[0, there]) <= 1e-5
        )  # rotary angles are float32: shifts are seen


@pytest.mark.parametrize("mode", ["deploy", "search"])
def test_scores_do_not_depend_on_fillers(family, name, mode):
    """Fillers may point at other tokens, with other running numbers.

    The scores of real slots stay as they are.
    """
    compared = []

    class Probe(Witness):
        def score(self, ctx):
            scores = super().score(ctx)
            rows, columns = ctx.visual
            for shift in (1, 5):
                moved = torch.where(ctx.valid, columns, (columns + shift) % ctx.hidden.shape[1])
                other = super().score(
                    dataclasses.replace(
                        ctx,
                        visual=(rows, moved),
                        slot=torch.where(ctx.valid, ctx.slot, ctx.slot + shift),
                    )
                )
                assert torch.equal(other[ctx.valid], scores[ctx.valid])
                compared.append(int((~ctx.valid).sum()))
            return scores

    probe = Probe(build_method(name))
    with pruned_with(family, probe, config_for(name, family).keep_ratios, mode):
        logits(family, without_labels(batch(**MIXED)))
    assert min(compared) > 0


# ---- gradients -----------------------------------------------------------------------------------
@pytest.mark.parametrize("images", [(1, 1), (1, 0), (2, 1)])
def test_gradients_reach_the_ratios(family, name, images):
    first = build_method(name).first_layer
    ratios = torch.tensor(
        config_for(name, family, (0.8, 0.6, 0.4)).keep_ratios, dtype=torch.float64
    )
    ratios.requires_grad_()
    with pruned_with(family, build_method(name), ratios, "search"):
        family(**batch(images=images)).loss.backward()
    family.zero_grad()
    assert ratios.grad.isfinite().all() and (ratios.grad[:first] == 0).all()
    assert (ratios.grad[first:] != 0).sum() >= layers_of(family) // 2


def test_no_gradient_without_images(family, name):
    inputs = batch(images=(0, 0))
    before = logits(family, inputs)
    ratios = torch.full((layers_of(family),), 0.5, dtype=torch.float64, requires_grad=True)
    with pruned_with(family, build_method(name), ratios, "search"):
        output = family(**inputs)
        output.loss.backward()
    family.zero_grad()
    assert torch.equal(output.logits, before) and (ratios.grad is None or (ratios.grad == 0).all())


# ---- costs ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("ratios", [(1.0,), (0.75, 0.5, 0.2), (0.5, 0.0)])
def test_flops_of_what_ran_equal_the_count(family, name, size, images, ratios):
    """To the FLOP, vision tower and projector too.

    MATH attention, as the counter does not know the CPU's fused kernel.
    """
    inputs = without_labels(batch(images=(images,) * size, text=(9,) * size, before=(2,) * size))
    config = config_for(name, family, ratios)
    with (
        vispco.apply(family, config),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        logits(family, inputs, logits_to_keep=1)
    report = vispco.count_flops(family, config, n_visual=PER_IMAGE * images, n_text=10)
    assert counter.get_total_flops() == size * report.total_with_vision
    assert report.tokens == config.tokens(PER_IMAGE * images)


# ---- generation ----------------------------------------------------------------------------------
def one_pass_each(model, inputs, sequences):
    """Logits of each new token, from one pass over all that comes before it, without a cache."""
    start, steps = inputs["input_ids"].shape[1], []
    for end in range(start, sequences.shape[1]):
        new = {
            k: torch.nn.functional.pad(v, (0, end - start), value=int(k == "attention_mask"))
            for k, v in inputs.items()
            if v.shape == inputs["input_ids"].shape
        }
        steps.append(
            logits(model, {**inputs, **new, "input_ids": sequences[:, :end]}, use_cache=False)[
                :, -1
            ]
        )
    return torch.stack(steps, 1)


def test_generation_with_the_cache_equals_recomputation(family, name):
    """Three new tokens by `generate`, and each again in one pass.

    The same tokens are kept and merged in both.
    """
    plain = without_labels(batch(**MIXED))
    inputs = processed(family, plain) if type(family) in PROCESSORS else plain
    options = {
        "do_sample": False,
        "max_new_tokens": 3,
        "output_logits": True,
        "return_dict_in_generate": True,
        "suppress_tokens": [2, 3, 4, IMAGE],
    }
    bare = family.generate(**inputs, **options)
    if error(torch.stack(bare.logits, 1), one_pass_each(family, inputs, bare.sequences)) > FLOAT32:
        pytest.skip(
            "one pass over prompt and answer is not what this family generates by, pruned or not"
        )
    witness, config = Witness(build_method(name)), config_for(name, family)
    with pruned_with(family, witness, config.keep_ratios) as handle:
        out = family.generate(**inputs, **options)
        kept = handle.kept()
    with pruned_with(family, Replay(kept, witness.merged), config.keep_ratios):
        again = one_pass_each(family, inputs, out.sequences)
    assert error(torch.stack(out.logits, 1), again) <= FLOAT32
    # It did something.
    assert error(out.logits[0], bare.logits[0]) > 0.05
