"""What is shipped.

The wheel and the source archive hold all they need, and the metadata agree with the code.
"""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import vispco

ROOT = Path(__file__).parent.parent


def build(kind, folder):
    """Build a "wheel" or an "sdist" from a copy of the project.

    So nothing is left in the project.
    """
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip('needs setuptools >= 77: pip install "vispco[test]"')
    listing = ["git", "ls-files", "-z", "-co", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, check=False)
    if files.returncode:
        pytest.skip("needs a git checkout, to know which files are the project's")
    for name in filter(None, files.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    code = f"import setuptools.build_meta as b; b.build_{kind}('built')"
    (folder / "built").mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, check=True)
    (built,) = (folder / "built").iterdir()
    return built


def test_the_wheel_holds_the_code_the_testbeds_and_the_types_and_nothing_else(tmp_path):
    with zipfile.ZipFile(build("wheel", tmp_path)) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("/METADATA"))).decode()
        assert any(n.endswith("licenses/LICENSE") for n in wheel.namelist())
    there = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "vispco").rglob("*")
        if p.is_file() and (p.suffix == ".py" or p.name == "py.typed" or "testbed" in p.parts)
    }
    assert names == {name for name in there if "__pycache__" not in name}
    assert (
        f"\nVersion: {vispco.__version__}\n" in metadata
        and "\nLicense-Expression: Apache-2.0\n" in metadata
    )


def test_the_source_archive_can_run_its_tests_and_build_its_site(tmp_path):
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        "tests/conftest.py",
        "tests/oracles.py",
        "docs/run.py",
        "docs/images/kernels.png",
        "benchmarks/overhead.py",
        "mkdocs.yml",
        "constraints.txt",
        "constraints-oldest.txt",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "CITATION.cff",
        ".ci/run",
        ".github/workflows/tests.yml",
        ".pre-commit-config.yaml",
    }
    assert needed <= names
    assert not any("__pycache__" in name or name.endswith(".pyc") for name in names)


def test_types_are_as_they_say():
    """Of all of vispco, and of what a user gets from it (tests/typed_user.py)."""
    pytest.importorskip("mypy", reason="pip install mypy")
    mypy = [sys.executable, "-m", "mypy"]
    checked = subprocess.run(mypy, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_workflows_run_the_command_and_the_linter_that_the_readme_and_the_constraints_name():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"<!-- test command -->\n```sh\n(.*?)```", readme, re.DOTALL)[1].strip()
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert f"- run: {command}\n" in workflow
    ruff = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert f"rev: v{ruff} " in (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
