"""Which releases of torch and transformers are supported, and what users of others are told."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import vispco
from vispco.utils import version

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "package, found",
    [
        ("transformers", "5.0.0"),
        ("transformers", "5.24.0.dev0"),
        ("transformers", "6.0rc1"),
        ("torch", "2.6.0"),
        ("torch", "2.13.0+cpu"),
    ],
)
def test_new_enough(monkeypatch, package, found):
    monkeypatch.setattr(version, "version", lambda name: found)
    version.require({package: version.OLDEST[package]})


@pytest.mark.parametrize(
    "package, found",
    [
        ("transformers", "4.57.6"),
        ("transformers", "4.9.2"),
        ("torch", "2.5.1+cu124"),
        ("torch", "1.13.1"),
    ],
)
def test_too_old(monkeypatch, package, found):
    monkeypatch.setattr(version, "version", lambda name: found)
    least = version.OLDEST[package]
    said = (
        f"vispco needs {package} >= {least}, but {found} is installed: "
        f'pip install --upgrade "{package}>='
    )
    with pytest.raises(ImportError, match=f"^{re.escape(said)}"):
        version.require({package: least})


def test_missing():
    with pytest.raises(
        ImportError, match="needs nonesuch >= 1.0, but it is not installed: pip install --up"
    ):
        version.require({"nonesuch": "1.0"})


def test_importing_vispco_says_so(tmp_path):
    """Before anything of an old release is touched."""
    metadata = tmp_path / "transformers-4.40.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.40.0\n")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import vispco"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ImportError: vispco needs transformers >= 5.0, but 4.40.0 is installed: pip"
    )


def test_the_project_declares_the_same():
    declared = re.search(
        r"^dependencies = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )[1]
    for package, least in version.OLDEST.items():
        assert f'"{package}>={least}"' in declared
    oldest = (ROOT / "constraints-oldest.txt").read_text()
    assert re.search(
        rf"^transformers=={re.escape(version.OLDEST['transformers'])}\.", oldest, re.MULTILINE
    )


def test_versions_are_recorded():
    assert version.versions().keys() == {"vispco", "torch", "transformers"}
    assert version.versions()["vispco"] == vispco.__version__
