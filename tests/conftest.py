"""Shared fixtures: one thread, derandomised hypothesis, tiny models with random weights."""

import pytest
import torch
from hypothesis import settings

import vispco
from tiny import FAMILIES, make

torch.set_num_threads(1)
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("ci")


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
