"""Shared fixtures: one thread, derandomised hypothesis, tiny models with random weights."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings
from torch.utils.flop_counter import FlopCounterMode

from tables import METHODS_BY_FAMILY, MODELS, Page
from tiny import FAMILIES, make
from vispco.utils.version import versions

# MKL reads it when it first computes. Without it, MKL rounds by where an array lies in memory, and
# equal inputs may differ in a bit.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
torch.set_num_threads(1)
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
# Mutation testing needs no smallest example: it leaves out shrinking.
phases = [Phase.explicit, Phase.generate]
settings.register_profile("mutation", settings.get_profile("ci"), phases=phases)
settings.load_profile("ci")


#: Checks of the contract whose outcome a method's own rule hardly touches, and methods that run
#: them: one that reads attention, one that merges, a composite, and a user's.
AROUND = {
    "test_keep_all_is_bit_identical",
    "test_afterwards_the_model_is_bit_identical_and_unhooked",
    "test_an_exception_in_the_block_leaves_the_model_as_it_was",
    "test_an_exception_in_a_forward_leaves_no_trace",
    "test_search_equals_deploy_float32",
    "test_search_equals_deploy_where_it_matters",
    "test_dropped_tokens_have_zero_hidden_states",
    "test_exact_numbers_nested_sets_and_all_text",
    "test_no_gradient_without_images",
}
A_FEW = ("fastv", "pool", "vispruner+fastv@3", "user-key-norm")


def pytest_addoption(parser):
    """`pytest --every`: the whole product of methods and families, minutes more."""
    parser.addoption("--every", action="store_true", help="run every method on every model family")
    parser.addoption(
        "--table", metavar="FILE", help="write a page of what passed, for models or for methods"
    )


def pytest_configure(config):
    """`--table FILE`: the page of whichever of the two suites runs."""
    if config.getoption("table"):
        for kind in (MODELS, METHODS_BY_FAMILY):
            config.pluginmanager.register(Page(Path(config.getoption("table")), *kind))


def pytest_collection_modifyitems(config, items):
    """By default, LLaVA runs all methods, and the other families run PDrop and VisionZip.

    Methods and families meet in one context only, so the whole product adds little. These two
    methods ask most of a family: PDrop for projections, norms, rotary embedding and mask, at layer
    0 already; VisionZip for the vision tower. Some checks are of what happens around a method:
    there, LLaVA runs a few methods, and the other families PDrop.
    """

    def wanted(item):
        params = getattr(getattr(item, "callspec", None), "params", {})
        if not {"family", "name"} <= params.keys():
            return True
        # One prompt with one picture, several with several.
        both = {"size", "images"} <= params.keys()
        if both and (params["size"] == 1) != (params["images"] == 1):
            return False
        around = item.originalname in AROUND
        if params["family"] == "llava":
            return params["name"] in A_FEW or not around
        return params["name"] == "pdrop" or (params["name"] == "visionzip" and not around)

    if not config.getoption("every"):
        config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
        items[:] = filter(wanted, items)


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def family(request):
    """Each family's tiny model (session-wide; tests must leave it as it was)."""
    return make(request.param)


@pytest.fixture(scope="session")
def llava():
    """The tiny LLaVA."""
    return make("llava")


# ---- older releases of transformers --------------------------------------------------------------
def without_rotary(counter):
    """Total of a FLOP counter, less what was spent inside rotary embeddings."""
    counts = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    rotary = sum(n for name, n in counts.items() if name.split(".")[-1].startswith("rotary"))
    return counts.get("Global", 0) - rotary


if tuple(map(int, versions()["transformers"].split(".")[:2])) < (5, 20):
    # They make the angles by a matrix product, which the counter sees; no convention counts it.
    FlopCounterMode.get_total_flops = without_rotary
