"""torch.compile and `vispco.apply`.

Compiled code does not see hooks come and go, and must not be wrong for it.
"""

import pytest
import torch

import vispco
from tiny import batch, tiny_llava, without_labels
from vispco import PruningConfig

CONFIG = PruningConfig("fastv", [1, 0.5, 0.25])


@pytest.fixture
def compiled_code():
    """A list that gets an entry each time compiled code runs; nothing compiled is left over."""
    torch._dynamo.reset()
    runs = []

    def backend(graph, example):
        return lambda *args: runs.append(1) or graph.forward(*args)

    yield runs, backend
    torch._dynamo.reset()


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("first", ["compiled before", "compiled within"])
def test_a_compiled_model_is_pruned_within_apply_and_compiled_again_outside(
    compiled_code, in_place, first
):
    runs, backend = compiled_code
    model, inputs = tiny_llava(layers=3), without_labels(batch())
    bare = logits(model, inputs)
    with vispco.apply(model, CONFIG):
        pruned = logits(model, inputs)
    compiled = model if in_place else torch.compile(model, backend=backend)
    if in_place:
        model.compile(backend=backend)
    if first == "compiled before":
        assert torch.allclose(logits(compiled, inputs), bare, atol=2e-5) and runs
    runs.clear()
    # Of the wrapper or of the model itself: the same.
    with vispco.apply(compiled, CONFIG):
        assert torch.equal(logits(compiled, inputs), pruned) and not runs
    assert torch.allclose(logits(compiled, inputs), bare, atol=2e-5) and runs


def test_compiled_code_stays_off_until_the_last_model_is_let_go(compiled_code):
    runs, backend = compiled_code
    a, b, double = (
        tiny_llava(layers=3),
        tiny_llava(layers=3),
        torch.compile(lambda x: 2 * x, backend=backend),
    )
    first, second = vispco.apply(a, CONFIG), vispco.apply(b, CONFIG)
    first.remove()
    assert double(torch.ones(2)).tolist() == [2, 2] and not runs
    second.remove(), first.remove()
    assert double(torch.ones(2)).tolist() == [2, 2] and runs


def test_keep_all_leaves_compiled_code_on(compiled_code):
    runs, backend = compiled_code
    model, double = tiny_llava(layers=3), torch.compile(lambda x: 2 * x, backend=backend)
    with vispco.apply(model, PruningConfig("fastv", [1, 1, 1])):
        assert double(torch.ones(2)).tolist() == [2, 2] and runs
