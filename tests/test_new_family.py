"""A family that vispco has never seen, under the whole contract.

With the adapter of its page in docs.
"""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

import test_contract
import vispco
from oracles import error

# These are fixtures.
from test_contract import double as double, name as name
from tiny import IMAGE, PAD, PER_IMAGE, batch, without_labels
from tiny_families import TEXT
from vispco.registry import ADAPTERS, METHODS, adapter_for

PAGE = Path(__file__).parent.parent / "docs" / "08-add-a-model-family.md"
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vision_use_head": False,
    "initializer_range": 0.2,
}

#: The contract's tests, all of them, on the `family` below instead of those that are registered.
globals().update(
    {
        key: check
        for key, check in vars(test_contract).items()
        if key.startswith("test_") and "adapter" not in key
    }
)


def blocks():
    """The page's code of the model, and of the adapter."""
    code = re.findall(
        r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return [block for block in code if re.search(r"^class Glance", block, re.MULTILINE)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's model and adapter as a module, registered while this file's tests run."""
    path = tmp_path_factory.mktemp("page") / "glance_page.py"
    path.write_text("\n".join(blocks()), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("glance_page", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # Some releases look classes up there.
        patch.setitem(sys.modules, "glance_page", module)
        spec.loader.exec_module(module)
        yield module
    ADAPTERS.remove("glance")


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def family(request, page):
    """The page's model with random weights and one of two decoders.

    Qwen3 norms its queries and keys.
    """
    torch.manual_seed(0)
    text = {**TEXT, "model_type": request.param, "head_dim": 8, "num_hidden_layers": 6}
    model = page.GlanceForConditionalGeneration(
        page.GlanceConfig(text, VISION, picture_token=IMAGE)
    ).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    model.generation_config.pad_token_id = PAD
    return model


def test_the_adapter_overrides_the_two_odd_names_alone(page):
    own = {name for name in vars(page.Glance) if not name.startswith("__")}
    assert own == {"architectures", "model_types", "tower", "token_ids"}
    assert ADAPTERS.get("glance") is page.Glance and len(blocks()) == 2


def test_found_by_class_and_by_configuration(family, page):
    assert adapter_for(family) is adapter_for(family.config) is page.Glance
    child = type("MyGlance", (type(family),), {})
    assert adapter_for(object.__new__(child)) is page.Glance


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("levels", [(0.5,), (0.75, 0.3, 0.0)])
def test_generation_with_cache_equals_recomputation(family, padding, levels):
    inputs = without_labels(
        batch(images=(1, 2, 0), text=(9, 7, 6), before=(2, 0, 3), padding=padding)
    )
    config = test_contract.config_for("random", family, levels)
    options = {
        "do_sample": False,
        "max_new_tokens": 5,
        "suppress_tokens": [IMAGE, 2],
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with vispco.apply(family, config) as handle:
        cached = family.generate(**inputs, **options)
        kept = handle.kept()
        again = family.generate(**inputs, **options, use_cache=False)
    assert torch.equal(cached.sequences, again.sequences)
    assert error(torch.stack(cached.logits, 1), torch.stack(again.logits, 1)) <= 1e-4
    visual = (inputs["input_ids"] == IMAGE).sum(1).tolist()
    text = inputs["attention_mask"].sum(1) - torch.tensor(visual)
    for i, mask in kept.items():
        assert (mask.sum(1) - text).tolist() == [config.tokens(n)[i] for n in visual]


def test_search_finds_a_configuration_within_the_budget(family, name):
    first = METHODS.get(name).first_layer
    frontier = vispco.search(
        family,
        [batch(seed=s) for s in range(2)],
        name,
        budgets=[0.6],
        start=vispco.Gradient(steps=3),
    )
    config = frontier.points[0].config
    n_text = int((batch()["labels"][0] == -100).sum()) - PER_IMAGE
    report = vispco.count_flops(family, config, n_visual=PER_IMAGE, n_text=n_text)
    assert config.model_type == "glance" and report.prunable_share <= 0.6
    assert report.tokens[:first] == [PER_IMAGE] * first and report.tokens[-1] < PER_IMAGE


def test_the_configuration_survives_saving(family, tmp_path):
    family.config.save_pretrained(tmp_path)
    again = type(family.config).from_pretrained(tmp_path)
    assert vispco.count_flops(again).total == vispco.count_flops(family).total > 0
