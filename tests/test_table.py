"""The page that `--table` writes."""

import subprocess
import sys
from pathlib import Path

from conftest import Table

ROOT = Path(__file__).parent.parent


def test_cells_count_checks_and_number_reasons():
    reasons = []
    one = {
        "test_a": {"passed"},
        "test_b": {"passed", "failed"},
        "test_c": {"no grid"},
        "test_d": {"passed", "no grid"},
    }
    assert Table.cell(one, reasons) == "2 1 failed 1 n/a [1]"
    assert Table.cell({"test_a": {"one layer"}, "test_c": {"no grid"}}, reasons) == "2 n/a [1] [2]"
    assert Table.cell({"test_a": {"passed"}}, reasons) == "1" and Table.cell({}, reasons) == ""
    assert reasons == ["no grid", "one layer"]


def test_the_page_of_a_run(tmp_path):
    page = tmp_path / "contract.md"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "tests/test_contract.py",
            "--table",
            page,
            "-k",
            "llava-strided and bit_identical",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    text = page.read_text(encoding="utf-8")
    assert (
        "| method | `llava` |\n| --- | --- |\n| `strided` | 2 |" in text
        and "6 cases passed" in text
    )
    assert "- keep all is bit identical\n" in text
