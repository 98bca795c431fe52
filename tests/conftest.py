"""Shared fixtures: one thread, derandomised hypothesis, tiny models with random weights."""

import pytest
import torch
from hypothesis import settings

import vispco
from tiny import FAMILIES, make

torch.set_num_threads(1)
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("ci")


def pytest_addoption(parser):
    """`pytest --every`: the whole product of methods and families, minutes more."""
    parser.addoption("--every", action="store_true", help="run every method on every model family")


def pytest_collection_modifyitems(config, items):
    """Methods and families meet in one context only, so by default LLaVA runs all methods, others PDrop.

    PDrop asks most of a family: projections, norms, rotary embedding and mask, at layer 0 already.
    """
    def wanted(item):
        params = getattr(getattr(item, "callspec", None), "params", {})
        both = {"family", "name"} <= params.keys()
        return not both or params["family"] == "llava" or params["name"] == "pdrop"

    if not config.getoption("every"):
        config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
        items[:] = filter(wanted, items)


@pytest.fixture(scope="session", params=vispco.list_adapters())
def family(request):
    """Each registered family's tiny model (session-wide; tests must leave it as it was)."""
    if request.param not in FAMILIES:
        pytest.fail(f"adapter {request.param!r} is registered but has no tiny model: "
                    "add one to FAMILIES in tests/tiny.py")
    return make(request.param)


@pytest.fixture(scope="session")
def llava():
    """The tiny LLaVA."""
    return make("llava")
