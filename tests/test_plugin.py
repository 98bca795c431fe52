"""A package installed by pip brings a method, a kernel and an adapter.

The core sees them by name alone.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vispco

PLUGIN = Path(__file__).parent / "plugin"
ROOT = Path(vispco.__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs Python with the plug-in installed, in a folder of its own; returns what it printed."""
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("plugin")
    # Building leaves files there.
    shutil.copytree(PLUGIN, folder / "source")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (folder / "site", ROOT))),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "OMP_NUM_THREADS": "1",
    }

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    run(
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        "site",
        "./source",
    )
    return run


def test_the_command_line_lists_it(run):
    lists = json.loads(run("-m", "vispco", "list", "--json"))
    assert lists["methods"]["border"].endswith(": Keep the tokens at both ends of the image.")
    assert lists["kernels"]["line"] == "Ratios on a line from 1 to r = sigmoid(theta)."
    assert lists["adapters"]["border_vl"] == "A family that is LLaVA by another name."
    assert "fastv" in lists["methods"]


USE = """
import json, sys, types, torch, vispco
from vispco import testbed
from vispco.registry import adapter_for

unknown = "vispco_border" not in sys.modules
config = vispco.PruningConfig("border", [0.5] * 8, {"start": False})
config.save("config.json")
assert vispco.PruningConfig.load("config.json") == config
model, _ = testbed.load("testbed-llava")
batches = testbed.batches("calibration", n=8, batch_size=8)
with vispco.apply(model, config) as handle, torch.no_grad():
    model(**batches[0])
ids = batches[0]["input_ids"][0]
kept = handle.kept()[0][0][ids == model.config.image_token_id]
start = {"name": "gradient", "steps": 2}
frontier = vispco.search(model, batches, "border", kernel="line", budgets=[0.6], start=start)
print(json.dumps({
    "unknown": unknown,
    "kept": kept.nonzero().flatten().tolist(), "of": len(kept), "n": int(kept.sum()),
    "method": frontier.points[0].config.method, "share": frontier.points[0].share,
    "kernel": frontier.meta["kernel"],
    "adapter": adapter_for(types.SimpleNamespace(model_type="border_vl")).__name__}))
"""


def test_configurations_apply_and_search_take_it(run):
    """By name alone: nothing imports the package before it is asked for."""
    result = json.loads(run("-c", USE))
    assert result["unknown"] and result["adapter"] == "BorderVL"
    assert (result["of"], result["n"]) == (64, 32)
    assert result["kept"] == [*range(16), *range(48, 64)]
    assert (
        result["method"] == "border" and result["kernel"] == "line" and 0 < result["share"] <= 0.6
    )


def test_without_it_the_core_has_never_heard_of_it():
    assert "border" not in vispco.list_methods() and "line" not in vispco.list_kernels()
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "vispco").rglob("*.py"))
    assert not any("vispco_border" in text for text in texts)
