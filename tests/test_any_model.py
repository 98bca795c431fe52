"""The contract over every family of transformers: one adapter that reads the loaded model.

By default the entries of the zoo that stand for a kind of model, `--every` for all of them.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vispco
import zoo
from oracles import Replay, error, hook_counts, pruned_with
from vispco import PruningConfig
from vispco.registry import METHODS, adapter_for
from zoo.build import without_timm
from zoo.entry import AUDIO, BOS, END, EOS, FILM_END, FILM_START, IMAGE, PAD, START, VIDEO

METHOD = "fastv"
#: Relative to the largest logit.
FLOAT32 = 1e-4
#: {entry: why the check is not for it}
WITHOUT_CACHE = {
    "nemotron_h_omni": "its cache gives other logits than one pass, pruned or not",
    "dots3_note": "its indexer chooses other tokens with the cache, pruned or not",
    "mistral_large4": "its indexer chooses other tokens with the cache, pruned or not",
}

NOT_TO_THE_FLOP = {
    "ernie4_5_vl_moe": "its experts for pictures are smaller than those for text: the count, of "
    "text, is an upper bound",
}


def pytest_generate_tests(metafunc):
    """Each entry by name: the fast ones, or all with --every."""
    if "name" in metafunc.fixturenames:
        every = metafunc.config.getoption("every")
        chosen = [name for name, entry in zoo.FAMILIES.items() if every or entry.fast]
        metafunc.parametrize("name", chosen, scope="module")


@pytest.fixture(scope="module")
def model(name):
    """The tiny model of an entry; skipped where this release of transformers lacks its class."""
    if lack := zoo.missing(zoo.FAMILIES[name]):
        pytest.skip(lack)
    model = zoo.make(name).requires_grad_(False)
    with torch.no_grad():
        cache = model(**fresh(zoo.prompts(name)[0])).get("past_key_values")
    if cache is not None and not hasattr(cache, "layers"):
        pytest.skip(f"in this release of transformers its cache is a {type(cache).__name__}")
    return model


def fresh(inputs):
    """A copy of inputs: some models take ready-made features out of them."""
    return {k: copy.copy(v) for k, v in inputs.items()}


def logits(model, inputs, **options):
    """(B, S, V), without gradient."""
    with torch.no_grad():
        return model(**fresh(inputs), **options).logits


def finite_error(a, b):
    """Largest difference relative to the largest logit, of those that are not ruled out."""
    some = (a.abs() < 1e30) & (b.abs() < 1e30)
    assert some.any()
    return error(a[some], b[some])


def schedule(model, method=METHOD, ratios=(0.75, 0.5, 0.25)):
    """Drops at the method's first layer for this model, and at later ones."""
    adapter = adapter_for(model)(model)
    start, layers = adapter.first_layer(METHODS.get(method)), len(adapter.layers)
    every = 2 if layers - start > 4 else 1
    levels = [
        1.0 if i < start else ratios[min((i - start) // every, len(ratios) - 1)]
        for i in range(layers)
    ]
    return PruningConfig(method, levels)


def pruned(model, config, inputs, mode="deploy"):
    """Logits, and what was kept."""
    with vispco.apply(model, config, mode=mode) as handle:
        return logits(model, inputs), handle.kept()


def alive(inputs, kept):
    """(B, S) bool: the tokens that are there at the end."""
    there = inputs["attention_mask"].bool()
    for mask in kept.values():
        there = there & mask
    return there


def kinds(name):
    """Pictures; and films, of an entry that takes them."""
    entry = zoo.FAMILIES[name]
    films = entry.video is not None and not zoo.missing(entry, video=True)
    return [False, True] if films else [False]


@pytest.mark.parametrize("mode", ["deploy", "search"])
def test_keep_all_is_bit_identical(name, model, mode):
    """In both modes."""
    inputs, _ = zoo.prompts(name)
    layers = len(adapter_for(model)(model).layers)
    got, kept = pruned(model, PruningConfig(METHOD, [1.0] * layers), inputs, mode)
    assert torch.equal(got, logits(model, inputs)) and kept == {}


@pytest.mark.parametrize("padding", ["left", "right"])
def test_exact_counts_and_search_equals_deploy(name, model, padding):
    """Both paddings, pictures and films; afterwards the model is bit-identical and unhooked."""
    config = schedule(model)
    for video in kinds(name):
        inputs, n_visual = zoo.prompts(name, padding=padding, video=video)
        full, hooks = logits(model, inputs), hook_counts(model)
        hard, kept = pruned(model, config, inputs)
        soft, kept_soft = pruned(model, config, inputs, "search")
        # Counts, to the token.
        text = inputs["attention_mask"].sum(1) - torch.tensor(n_visual)
        for layer, mask in kept.items():
            expected = [config.tokens(n)[layer] for n in n_visual]
            assert (mask.sum(1) - text).tolist() == expected
        before = [[n, *config.tokens(n)] for n in n_visual]
        assert kept.keys() == {
            i for i in range(config.num_layers) if any(row[i + 1] < row[i] for row in before)
        }
        # The same tokens and logits in both modes, and pruning did something.
        assert kept.keys() == kept_soft.keys()
        assert all(torch.equal(kept[i], kept_soft[i]) for i in kept)
        there = alive(inputs, kept)
        assert finite_error(hard[there], soft[there]) <= FLOAT32
        assert finite_error(hard[there], full[there]) > 0.01
        # Hooks in, hooks out.
        assert torch.equal(logits(model, inputs), full) and hook_counts(model) == hooks


def test_generation_with_the_cache_equals_recomputation(name, model):
    """Three new tokens by `generate`, and each again in one pass that keeps the same tokens."""
    if name in WITHOUT_CACHE:
        pytest.skip(WITHOUT_CACHE[name])
    inputs, _ = zoo.prompts(name)
    if not generates_as_in_one_pass(name, model, inputs):
        # A batch with padding may not be what the family generates by, pruned or not.
        inputs, _ = zoo.prompts(name, counts=(1,), text=(9,))
        assert generates_as_in_one_pass(name, model, inputs)
    config = schedule(model)
    with vispco.apply(model, config) as handle:
        out, kept = generate(model, inputs), handle.kept()
    with pruned_with(model, Replay(kept), config.keep_ratios):
        again = one_pass_each(name, model, inputs, sequences(inputs, out))
    assert finite_error(torch.stack(out.logits, 1), again) <= FLOAT32


def generates_as_in_one_pass(name, model, inputs):
    """Whether the model as it is gives the same logits with the cache as without."""
    out = generate(model, inputs)
    again = one_pass_each(name, model, inputs, sequences(inputs, out))
    return finite_error(torch.stack(out.logits, 1), again) <= FLOAT32 / 10


def generate(model, inputs):
    """Three new tokens, which are words."""
    return model.generate(
        **fresh(inputs),
        do_sample=False,
        max_new_tokens=3,
        output_logits=True,
        return_dict_in_generate=True,
        suppress_tokens=[
            PAD,
            BOS,
            EOS,
            FILM_START,
            FILM_END,
            IMAGE,
            VIDEO,
            START,
            END,
            AUDIO,
            95,
            96,
        ],
    )


def sequences(inputs, out):
    """Prompt and answer. Some models give the answer alone."""
    ids = inputs["input_ids"]
    alone = out.sequences.shape[1] <= ids.shape[1]
    return torch.cat([ids, out.sequences], 1) if alone else out.sequences


def one_pass_each(name, model, inputs, ids):
    """Logits of each new token, from one pass over all that comes before it, without a cache."""
    start, steps = inputs["input_ids"].shape[1], []
    prefix = not zoo.FAMILIES[name].types_mark_images
    ones = {"attention_mask", "token_type_ids"} if prefix else {"attention_mask"}
    for end in range(start, ids.shape[1]):
        new = {
            k: torch.nn.functional.pad(v, (0, end - start), value=int(k in ones))
            for k, v in inputs.items()
            if getattr(v, "shape", None) == inputs["input_ids"].shape
        }
        steps.append(
            logits(model, {**inputs, **new, "input_ids": ids[:, :end]}, use_cache=False)[:, -1]
        )
    return torch.stack(steps, 1)


@pytest.mark.parametrize("ratios", [(1.0,), (0.75, 0.5, 0.25)])
def test_flops_of_what_ran_equal_the_count(name, model, ratios):
    """Of the decoder's layers and the ranking, to the FLOP."""
    inputs, n_visual = zoo.prompts(name, counts=(1,), text=(9,))
    model = with_plain_experts(model)
    config, adapter = schedule(model, ratios=ratios), adapter_for(model)(model)
    spent = {}
    with (
        vispco.apply(model, config),
        counted(adapter.decoder, spent, "decoder"),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as spent["counter"],
    ):
        logits(model, inputs)
    outside = outside_layers(adapter, inputs)
    n_text = inputs["input_ids"].shape[1] - n_visual[0]
    # A tower of another package is not installed.
    with without_timm() if zoo.FAMILIES[name].ready else nullcontext():
        report = vispco.count_flops(model, config, n_visual=n_visual[0], n_text=n_text)
    expected = sum(report.per_layer) + report.scoring + outside
    if name in NOT_TO_THE_FLOP:
        assert spent["decoder"] <= expected
        pytest.skip(NOT_TO_THE_FLOP[name])
    assert spent["decoder"] == expected


def with_plain_experts(model):
    """A copy, its experts one after the other: the counter does not know all of them at once."""
    model = copy.deepcopy(model)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


class counted:
    """FLOPs of the calls of a module, in `spent[key]`; the counter is `spent["counter"]`."""

    def __init__(self, module, spent, key):
        self.module, self.spent, self.key = module, spent, key

    def __enter__(self):
        forward, spent, key = self.module.forward, self.spent, self.key
        self.before = vars(self.module).get("forward")
        spent[key] = spent.get(key, 0)

        def run(*args, **kwargs):
            start = spent["counter"].get_total_flops()
            output = forward(*args, **kwargs)
            spent[key] += spent["counter"].get_total_flops() - start
            return output

        self.module.forward = run

    def __exit__(self, *_):
        del self.module.forward
        if self.before is not None:
            self.module.forward = self.before


def outside_layers(adapter, inputs):
    """FLOPs of the full model's decoder that are not of its layers."""
    spent = {}
    layers = [counted(layer, spent, "layers") for layer in adapter.layers]
    with counted(adapter.decoder, spent, "decoder"), FlopCounterMode(display=False) as counter:
        spent["counter"] = counter
        for layer in layers:
            layer.__enter__()
        with sdpa_kernel(SDPBackend.MATH):
            logits(adapter.model, inputs)
        for layer in layers:
            layer.__exit__()
    return spent["decoder"] - spent["layers"]


@pytest.mark.parametrize("mode", ["deploy", "search"])
def test_bfloat16_is_finite_and_counts_exactly(name, model, mode):
    """In both modes."""
    half = copy.deepcopy(model).bfloat16()
    inputs, n_visual = zoo.prompts(name)
    inputs = {k: as_half(v) for k, v in fresh(inputs).items()}
    try:
        logits(half, inputs)
    except RuntimeError as error_of_the_model:
        pytest.skip(f"does not run in bfloat16 here, pruned or not: {error_of_the_model}")
    config = schedule(half)
    got, kept = pruned(half, config, inputs, mode)
    assert not got[alive(inputs, kept)].isnan().any()
    text = inputs["attention_mask"].sum(1) - torch.tensor(n_visual)
    for layer, mask in kept.items():
        assert (mask.sum(1) - text).tolist() == [config.tokens(n)[layer] for n in n_visual]


def as_half(value):
    """Tensors of numbers in bfloat16, within whatever holds them."""
    if isinstance(value, torch.Tensor):
        return value.bfloat16() if value.is_floating_point() else value
    if hasattr(value, "items"):
        other = copy.copy(value)
        for key, each in value.items():
            other[key] = as_half(each)
        return other
    return type(value)(map(as_half, value)) if isinstance(value, (list, tuple)) else value


def test_gradients_reach_the_ratios_through_attention(name, model):
    """Through every layer that takes a mask."""
    adapter, config = adapter_for(model)(model), schedule(model)
    # No padding: some families' own gradients are not finite there.
    inputs, _ = zoo.prompts(name, counts=(1,), text=(9,))
    ratios = torch.tensor(config.keep_ratios, dtype=torch.float64, requires_grad=True)
    with pruned_with(model, METHODS.get(METHOD)(), ratios, "search"):
        output = model(**fresh(inputs)).logits[:, -1]
    start = adapter.first_layer(METHODS.get(METHOD))
    passes = [i for i in range(start, len(adapter.layers)) if adapter.masks(i)]
    assert bool(passes) == adapter.differentiable(METHODS.get(METHOD)) == output.requires_grad
    if not passes:
        pytest.skip("no layer takes a mask that hides a token: the search says so, and refines")
    output.clamp(min=-100).log_softmax(-1)[:, 7:20].sum().backward()
    assert ratios.grad.isfinite().all() and (ratios.grad[start : passes[-1] + 1] != 0).any()
    assert (ratios.grad[:start] == 0).all()
