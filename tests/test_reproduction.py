"""Every claim about the search, run again: `pytest -m reproduction`, within an hour on two cores.

VISPCO_REPRODUCTION_SIZE: smoke, quick (default), standard or full.
VISPCO_REPRODUCTION_CACHE: a folder that keeps the measurements between runs, found by their
content.
VISPCO_REPRODUCTION_FRESH=1 makes all of them again.

A target that is missed fails here, with what was measured.
"""

import os
from pathlib import Path

import pytest

from tests.reproduction.__main__ import reproduce, sized
from tests.reproduction.claims import CLAIMS
from tests.reproduction.claims.base import MEASURED, MET

pytestmark = pytest.mark.reproduction


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{claim: result}, all of one run."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("reproduction")
    cache = Path(os.environ.get("VISPCO_REPRODUCTION_CACHE", folder / "cache"))
    size = sized(os.environ.get("VISPCO_REPRODUCTION_SIZE", "quick"))
    return reproduce(
        folder / "results", cache, size, fresh=os.environ.get("VISPCO_REPRODUCTION_FRESH") == "1"
    )


@pytest.mark.parametrize("name", CLAIMS)
def test_claim(name, results):
    """The target that was stated, not one that was moved to what came out."""
    result = results[name]
    assert result["verdict"] in (MET, MEASURED), (
        f"{result['title']}: {result['verdict']}. {result['measured']}. Target: {result['target']}"
    )


def test_every_budget_is_there(results):
    """No claim may be met by leaving out what would miss it."""
    size = sized(os.environ.get("VISPCO_REPRODUCTION_SIZE", "quick"))
    wanted = {(s.testbed, s.method, b) for s in size.settings for b in s.budgets}
    for name in ("percentile", "cost"):
        assert {(r["testbed"], r["method"], r["budget"]) for r in results[name]["rows"]} == wanted
