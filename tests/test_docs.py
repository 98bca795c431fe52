"""The README's and the documentation's Python runs, top to bottom, offline; so do the docstrings' examples."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import vispco

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_page(page, tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links(page):
    """Links to files in the repository exist."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert target.startswith(("http:", "https:")) or (page.parent / target).exists(), target


def modules():
    names = [m.name for m in pkgutil.walk_packages(vispco.__path__, "vispco.")]
    return ["vispco", *(n for n in names if not n.endswith(("__main__", ".train")))]


@pytest.mark.parametrize("name", modules())
def test_docstrings(name):
    if name == "vispco.integrations.lmms_eval":
        pytest.importorskip("lmms_eval", reason='needs lmms-eval: pip install "vispco[eval]"')
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0
