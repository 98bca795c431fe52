"""A deeper testbed with the same answers.

Logits, generation, files, costs, and stretched schedules.
"""

import pytest
import torch

import vispco
from tests.reproduction.deep import deepen
from vispco import testbed
from vispco.pruning import apply
from vispco.registry import adapter_for
from vispco.testbed.model import EMBEDDED


@pytest.fixture(scope="module", params=EMBEDDED)
def name(request):
    """The small testbed models."""
    return request.param


@pytest.fixture(scope="module")
def shallow(name):
    return testbed.load(name)[0]


@pytest.fixture(scope="module")
def deep(shallow):
    return deepen(shallow, 3)


@pytest.fixture(scope="module")
def questions(name):
    """Sixteen, padded."""
    return testbed.batches("calibration", 16, 16, 0, model=name)[0]


def logits(model, questions, config=None):
    """Of all positions; with a configuration also the tokens that were kept."""
    inputs = {k: v for k, v in questions.items() if k != "labels"}
    with torch.no_grad():
        if config is None:
            return model(**inputs).logits
        with apply(model, config) as pruner:
            return model(**inputs).logits, pruner.kept()


def test_answers_are_the_same_to_the_bit(shallow, deep, questions):
    assert torch.equal(logits(shallow, questions), logits(deep, questions))


def test_the_shallow_model_stays_as_it_was(name, shallow, deep):
    fresh = testbed.load(name)[0]
    assert shallow.config.to_dict() == fresh.config.to_dict()
    assert all(
        torch.equal(a, b)
        for a, b in zip(shallow.state_dict().values(), fresh.state_dict().values(), strict=True)
    )
    assert not {p.data_ptr() for p in shallow.parameters()} & {
        p.data_ptr() for p in deep.parameters()
    }


def test_generation_is_the_same(name, shallow, deep):
    question = testbed.collate(testbed.examples("test", 1, 0), with_answers=False, model=name)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        shallow.generate(**question, **options), deep.generate(**question, **options)
    )
    assert torch.equal(
        deep.generate(**question, **options), deep.generate(**question, **options, use_cache=False)
    )


def test_the_configuration_follows(shallow, deep, tmp_path):
    """Layer count, types and cache indices.

    A model made of the configuration alone takes the weights.
    """
    config, before = (m.config.get_text_config(decoder=True) for m in (deep, shallow))
    layers = adapter_for(deep)(deep).layers
    assert len(layers) == config.num_hidden_layers == 3 * before.num_hidden_layers
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(len(layers)))
    assert all(layer.self_attn.config is layers[0].self_attn.config for layer in layers)
    if getattr(before, "layer_types", None):
        assert len(config.layer_types) == len(layers)
    deep.save_pretrained(tmp_path)
    again = type(deep).from_pretrained(tmp_path).eval()
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), deep.state_dict().values(), strict=True)
    )


def test_inserted_layers_have_attention(shallow, deep, questions):
    """The projections that make the map are those of the layer before.

    Those that write into the stream are 0.
    """
    for i, layer in enumerate(adapter_for(deep)(deep).layers):
        source = adapter_for(shallow)(shallow).layers[i // 3]
        assert torch.equal(layer.self_attn.q_proj.weight, source.self_attn.q_proj.weight)
        for path in ("self_attn.o_proj", "mlp.down_proj"):
            assert layer.get_submodule(path).weight.any() == (i % 3 == 0)


def test_it_costs_as_many_layers(shallow, deep):
    a, b = (vispco.count_flops(m, None, n_visual=64, n_text=12) for m in (shallow, deep))
    layers = len(a.tokens)
    assert len(b.tokens) == 3 * layers
    assert b.per_layer == [cost for cost in a.per_layer for _ in range(3)]
    assert (b.lm_head, b.vision, b.projector) == (a.lm_head, a.vision, a.projector)


@pytest.mark.parametrize("method", ["strided", "divprune"])
def test_stretched_schedules_prune_the_same(shallow, deep, questions, method):
    """Where tokens are ranked by the hidden states, or by nothing.

    The same tokens stay, and the logits are the same.
    """
    layers = len(adapter_for(shallow)(shallow).layers)
    ratios = [1.0] * 2 + [0.5] * 3 + [0.25] * (layers - 5)
    expected, chosen = logits(shallow, questions, vispco.PruningConfig(method, ratios))
    found, kept = logits(
        deep, questions, vispco.PruningConfig(method, [r for r in ratios for _ in range(3)])
    )
    assert torch.equal(kept[6], chosen[2]) and torch.equal(kept[15], chosen[5])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_fastv_reads_the_copy(shallow, deep, questions):
    """It ranks by a map of the same weights on the next hidden state.

    As many tokens stay, and most of them are the same.
    """
    layers = len(adapter_for(shallow)(shallow).layers)
    ratios = [1.0] * 3 + [0.5] * (layers - 3)
    _, chosen = logits(shallow, questions, vispco.PruningConfig("fastv", ratios))
    _, kept = logits(
        deep, questions, vispco.PruningConfig("fastv", [r for r in ratios for _ in range(3)])
    )
    assert torch.equal(kept[9].sum(1), chosen[3].sum(1))
    assert (kept[9] & chosen[3]).sum() > 0.5 * chosen[3].sum()


def test_a_search_runs_on_it(name, deep):
    found = vispco.search(
        deep,
        testbed.batches("calibration", 8, 4, 0, model=name),
        "fastv",
        budgets=[0.5],
        start=vispco.Gradient(steps=1),
    )
    assert found.points[0].config.num_layers == len(adapter_for(deep)(deep).layers)


@pytest.mark.parametrize("factor", [0, -1, 1.5, True, "2", None])
def test_factor_is_checked(factor, llava):
    with pytest.raises(ValueError, match="factor must be a whole number of 1 or more"):
        deepen(llava, factor)


def test_once_is_a_copy(shallow, questions):
    assert torch.equal(logits(deepen(shallow, 1), questions), logits(shallow, questions))


def test_other_decoders_are_refused():
    model, _ = testbed.load()
    del model.model.language_model.layers[1].mlp.down_proj
    with pytest.raises(ValueError, match=r"no mlp\.down_proj"):
        deepen(model, 2)
