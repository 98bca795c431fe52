"""The vision tower runs once per batch of calibration data, and nothing else changes."""

import warnings

import pytest
import torch
from torch.utils._pytree import tree_leaves

import vispco
from test_vision import CASES, mixed
from tiny import batch, make
from vispco.calibration import answer_logits, frozen, prepare, run_teacher
from vispco.pruning import Masking
from vispco.reading.structure import find_tower
from vispco.registry import adapter_for, build_method
from vispco.utils.lazy import Lazy, Room

torch.set_num_threads(1)


def labelled(name, samples):
    """Prompts whose last two tokens are the answer."""
    inputs = dict(mixed(name, samples))
    inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
    inputs["labels"][:, -2:] = inputs["input_ids"][:, -2:]
    return inputs


def counted(model):
    """A list that grows by one whenever the vision tower runs, and its hook."""
    adapter, runs = adapter_for(model)(model), []
    tower = find_tower(adapter.model)
    return runs, tower.register_forward_pre_hook(lambda *_: runs.append(1))


def results(model, prepared_batch, method="fastv"):
    """The full model's answers, and value and gradient of the objective, twice."""
    found = [run_teacher(model, [prepared_batch])[0].log_probs]
    ratios = torch.tensor([1, 0.75, 0.75, 0.5, 0.5, 0.25], dtype=torch.float64, requires_grad=True)
    with (
        frozen(model),
        Masking(adapter_for(model)(model), build_method(method, {}), ratios).install() as pruner,
    ):
        for _ in range(2):
            loss = pruner.losses(prepared_batch).mean()
            found += [loss.detach(), *torch.autograd.grad(loss, ratios)]
    return found


@pytest.mark.parametrize(("name", "samples"), CASES)
def test_the_tower_runs_once_and_the_numbers_are_the_same_to_the_bit(name, samples, monkeypatch):
    """Nor are its inputs needed then: where it has run once, it gets zeros."""
    monkeypatch.setattr("vispco.utils.lazy.LARGE", 0)
    model, inputs = make(name), labelled(name, samples)
    lazy = Lazy(lambda: inputs, Room(0))
    (often,) = prepare(model, [inputs])
    (once,) = prepare(model, [lazy], keep_features=True)
    assert set(once.inputs) == set(often.inputs)
    runs, hook = counted(model)
    try:
        expected = results(model, often)
        a_pass, rest = divmod(len(runs), 3)
        runs.clear()
        found = results(model, once)
    finally:
        hook.remove()
    assert a_pass and not rest
    makes_its_own = not hasattr(adapter_for(model)(model).backbone, "get_image_features")
    assert len(runs) == a_pass * (3 if makes_its_own else 1)
    assert all(map(torch.equal, expected, found)) and found[-1][1:].abs().max() > 0
    assert (
        not {"get_image_features", "get_video_features"}
        & vars(adapter_for(model)(model).backbone).keys()
    )
    if not makes_its_own:
        assert all(
            getattr(made, "pooler_output", None) is None
            or not {"hidden_states", "last_hidden_state"} & set(made)
            for made in once.features.made.values()
        )


@pytest.mark.parametrize("method", ["visionzip", "pool"])
def test_methods_that_listen_to_the_tower_hear_it(method):
    model, inputs = make("qwen2_5_vl"), labelled("qwen2_5_vl", "images")
    (often,), (once,) = (prepare(model, [inputs], keep_features=keep) for keep in (False, True))
    assert all(map(torch.equal, results(model, often, method), results(model, once, method)))


def test_a_search_runs_the_tower_once_per_batch(llava_batches):
    model, batches = llava_batches
    runs, hook = counted(model)
    try:
        vispco.search(model, batches, budgets=[0.5], start=vispco.Gradient(steps=4, inner=2))
        assert len(runs) == len(batches)
        runs.clear()
        learned = vispco.search(
            model, batches, budgets=(), start=vispco.Shared(steps=4, conditioned=True)
        )
        learned.frontier([0.4, 0.6])
        assert len(runs) == len(batches)
        runs.clear()
        # Evaluation may see many data: nothing is kept.
        vispco.evaluate(model, batches)
        vispco.evaluate(model, batches, learned.config(0.5))
        assert len(runs) == 3 * len(batches)
    finally:
        hook.remove()


def test_what_was_made_before_the_tower_failed_is_not_kept(llava_batches, monkeypatch):
    model, batches = llava_batches
    (prepared_batch,) = prepare(model, batches[:1], keep_features=True)
    tower = adapter_for(model)(model).backbone.vision_tower

    def fail(*_):
        raise MemoryError

    hook = tower.register_forward_hook(fail)
    with torch.no_grad():
        with pytest.raises(MemoryError):
            answer_logits(model, prepared_batch)
        hook.remove()
        (expected,) = prepare(model, batches[:1])
        assert torch.equal(answer_logits(model, prepared_batch), answer_logits(model, expected))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_what_will_be_kept_is_told_before_the_tower_runs(name, monkeypatch):
    """Of each family, as many bytes as are kept afterwards."""
    model, inputs = make(name), [labelled(name, "images")] * 2
    runs, hook = counted(model)
    monkeypatch.setattr("vispco.calibration.MUCH", 0)
    try:
        with pytest.warns(UserWarning, match=r"visual tokens .* GB .*--limit") as warned:
            prepared = prepare(model, inputs, keep_features=True)
        assert not runs
    finally:
        hook.remove()
    run_teacher(model, prepared)
    stored = [tree_leaves(one) for batch in prepared for one in batch.features.made.values()]
    kept = sum(leaf.tensor.nbytes for leaves in stored for leaf in leaves)
    monkeypatch.setattr("vispco.calibration.MUCH", kept - 1)
    with pytest.warns(UserWarning, match="main memory"):
        prepare(model, inputs, keep_features=True)
    monkeypatch.setattr("vispco.calibration.MUCH", kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(model, inputs, keep_features=True)
        monkeypatch.setattr("vispco.calibration.MUCH", 0)
        prepare(model, inputs)
    assert len(warned) == 1


@pytest.fixture
def llava_batches():
    return make("llava"), [batch(seed=seed) for seed in range(3)]
