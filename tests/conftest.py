"""Shared fixtures: one thread, derandomised hypothesis, tiny models with random weights."""

import pytest
import torch
from hypothesis import settings

from tiny import FAMILIES, make

torch.set_num_threads(1)
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("ci")


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def family(request):
    """Each registered family's tiny model (session-wide; tests must leave it as it was)."""
    return make(request.param)


@pytest.fixture(scope="session")
def llava():
    """The tiny LLaVA."""
    return make("llava")
