"""The pages that `--table` writes, and the README's list of models."""

import subprocess
import sys

from tables import ROOT, cell, mark, model_list, renewed


def test_cells_count_checks_and_number_reasons():
    reasons = []
    one = {
        "test_a": {"passed"},
        "test_b": {"passed", "failed"},
        "test_c": {"no grid"},
        "test_d": {"passed", "no grid"},
    }
    assert cell(one, reasons) == "2 1 failed 1 n/a [1]"
    assert cell({"test_a": {"one layer"}, "test_c": {"no grid"}}, reasons) == "2 n/a [1] [2]"
    assert cell({"test_a": {"passed"}}, reasons) == "1" and cell({}, reasons) == ""
    assert reasons == ["no grid", "one layer"]


def test_marks_of_one_check():
    reasons = []
    assert mark({"passed"}, reasons) == "yes" and mark(set(), reasons) == ""
    assert mark({"passed", "no cache"}, reasons) == "yes [1]"
    assert mark({"passed", "failed"}, reasons) == "failed"
    assert mark({"no cache"}, reasons) == "n/a [1]" and reasons == ["no cache"]


def page_of(tmp_path, suite, chosen):
    """What a run with `--table` writes."""
    page = tmp_path / "page.md"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", suite]
    done = subprocess.run(
        [*command, "--table", page, "-k", chosen],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return page.read_text(encoding="utf-8")


def test_the_page_of_methods(tmp_path):
    text = page_of(tmp_path, "tests/test_contract.py", "llava-pool and bit_identical")
    assert "| method | `llava` |\n| --- | --- |\n| `pool` | 2 |" in text
    assert "6 cases passed" in text and "- keep all is bit identical\n" in text


def test_the_page_of_models_and_the_readme(tmp_path):
    text = page_of(tmp_path, "tests/test_any_model.py", "qwen3_vl_moe and bit_identical")
    assert "| `qwen3_vl_moe` | `Qwen3VLMoeForConditionalGeneration` | yes | works |" in text
    assert "- `mllama`: cross-attention" in text and "2 cases passed" in text
    listed = model_list(text)
    assert listed.count("`") == 2 and "`qwen3_vl_moe`" in listed


def test_the_readme_lists_the_models_of_the_page():
    readme, page = (ROOT / name for name in ("README.md", "docs/contract.md"))
    before = readme.read_text(encoding="utf-8")
    assert renewed(before, page.read_text(encoding="utf-8")) == before, (
        "python tests/tables.py --write"
    )
