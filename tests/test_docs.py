"""The documentation runs, top to bottom, offline, and prints what it says.

Its links lead somewhere, and the examples of docstrings run.
"""

import doctest
import importlib
import importlib.util
import json
import pkgutil
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import vispco
from vispco.commands.main import build_parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKING = [
    *PAGES,
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "vispco" / "testbed" / "README.md",
]

spec = importlib.util.spec_from_file_location("docs_run", ROOT / "docs" / "run.py")
docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs)


def name(page):
    return page.relative_to(ROOT).as_posix()


def marked(page):
    """The page, slow if it searches as a user would."""
    marks = pytest.mark.slow if page.name == "qwen-in-ten-minutes.md" else ()
    return pytest.param(page, marks=marks, id=name(page))


@pytest.mark.parametrize("page", [marked(page) for page in PAGES])
def test_a_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        pages = docs.run(page)
    finally:
        # A page may choose its own.
        torch.set_printoptions(profile="default")
    for printed, record in zip(pages, docs.recorded(page), strict=True):
        if record:
            assert not docs.differences(record[0], printed, varies=record[1]), (
                f"python docs/run.py {name(page)} --write"
            )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_for_the_shell_exist_with_their_options(page):
    for block in docs.SHELL.findall(page.read_text(encoding="utf-8")):
        for command in docs.commands(block):
            build_parser().parse_args(command)


def test_a_page_runs_its_shell_and_a_command_that_fails_fails_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```shell\nvispco list \\\n    kernels\n```\n\n```output\n```\n")
    docs.write(page, docs.run(page))
    assert "multi_step" in docs.recorded(page)[0][0]
    page.write_text("```shell\nvispco list kernel\n```\n")
    with pytest.raises(RuntimeError, match="vispco list kernel ended with 2"):
        docs.run(page)
    page.write_text("```sh\nvispco list kernel\n```\n")
    assert docs.run(page) == []


def test_outputs_differ_where_words_or_numbers_do():
    assert doctest.testmod(docs).failed == 0
    assert docs.differences("a 1.00", "a 1.30") and not docs.differences("a 1.00", "a 1.10")
    assert not docs.differences("[3, -1]", "[2, +1]", varies=True)
    assert docs.differences("[3, 1]", "[3, 1, 1]", varies=True)
    assert not docs.differences("in  2x64 48 5x12", "in  8x9", varies=True)
    assert docs.differences("in  2x64 48 5x12", "of  2x64 48 5x12", varies=True)


def test_writing_a_page_records_what_its_blocks_print(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```python\nx = 2\nprint(x)\n```\n\n```output\n```\n\n"
        "```python\nprint(x + 1)\n```\n\nEnd.\n"
    )
    docs.write(page, docs.run(page))
    assert docs.recorded(page) == [("2\n", False), None]
    once = page.read_text()
    docs.write(page, docs.run(page))
    assert page.read_text() == once and once.endswith("```\n\nEnd.\n")


def test_a_traceback_names_the_line_of_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n```python\nx = 2\n```\n\ntext\n\n```python\nx / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as error:
        docs.run(page)
    assert error.traceback[-1].lineno + 1 == 10


def prose(page):
    return re.sub(
        r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )


def anchors(page):
    """Anchors of the headings, as GitHub and mkdocs both make them.

    Those that appear twice are made differently, and are left out.
    """
    headings = re.findall(r"^#+ (.*)", prose(page), re.MULTILINE)
    slugs = [
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    ]
    return {slug for slug in slugs if slugs.count(slug) == 1 and "--" not in slug}


@pytest.mark.parametrize("page", LINKING, ids=name)
def test_links_lead_to_files_and_headings_in_the_repository(page):
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", prose(page)):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked), target
        if page.is_relative_to(ROOT / "docs"):
            assert linked.is_relative_to(ROOT / "docs"), f"{target}: the site has nothing but docs/"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_every_page_of_the_tutorial_is_in_its_contents_and_leads_on():
    numbered = sorted(page.name for page in (ROOT / "docs").glob("[0-9]*.md"))
    assert [int(page[:2]) for page in numbered] == list(range(12))
    assert all(f"]({page})" in prose(ROOT / "docs" / "README.md") for page in numbered)
    for page, following in pairwise(numbered):
        assert f"]({following})" in prose(ROOT / "docs" / page)[-300:], (
            f"{page} does not lead to {following}"
        )
    for page in numbered:
        assert re.match(
            rf"# {int(page[:2])}\. ", (ROOT / "docs" / page).read_text(encoding="utf-8")
        ), page


def test_the_reference_has_every_public_name():
    reference = set(
        re.findall(
            r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE
        )
    )
    public = {
        f"{v.__module__}.{k}"
        for k, v in vars(vispco).items()
        if not k.startswith("_") and getattr(v, "__module__", "").startswith("vispco")
    }
    missing = {n for n in public if n not in reference and n.rsplit(".", 1)[0] not in reference}
    assert not missing


def test_the_reference_shows_signatures_and_docstrings():
    """docs/reference.py, which mkdocs calls when it builds the site."""
    spec = importlib.util.spec_from_file_location("docs_reference", ROOT / "docs" / "reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    page = reference.on_page_markdown((ROOT / "docs" / "api.md").read_text(encoding="utf-8"))
    assert ":::" not in page and page.count("```") % 2 == 0
    varies = reference.on_page_markdown("a\n\n```output varies\nKL 0.3\n```\n")
    assert varies == "a\n\n```output\nKL 0.3\n```\n"
    assert "normalise(scores: Tensor, alive: Tensor, how: str = 'rank') -> Tensor" in page
    assert all(
        f"### vispco.{name}" in page for name in ("search", "kernels.MultiStep", "testbed.load")
    )
    # A method of AugmentedLagrangian.
    assert ".update(self, slack: Tensor | float | Sequence[float])" in page


def test_the_table_of_methods_is_that_of_the_results():
    text = (ROOT / "docs" / "which-method.md").read_text(encoding="utf-8")
    written = re.findall(r"^\| `([\w ]+)` \|(( \**\d+\.\d\** \|){8})$", text, re.M)
    figures = {name: [float(x) for x in re.findall(r"[\d.]+", row)] for name, row, _ in written}
    found: dict = {}
    result = json.loads((ROOT / "docs" / "results" / "winner.json").read_text(encoding="utf-8"))
    for row in result["rows"]:
        if row["testbed"] != "testbed-smollm" and "budget" in row["points"][0]:
            means = [round(100 * point["accuracy"]["mean"], 1) for point in row["points"]]
            found.setdefault(row["method"], []).extend(means)
    assert figures == found and len(figures) > 15


def result(name):
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_readmes_figures_are_those_of_the_results():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    files = "speedup-llava-1.5-7b-float32", "speedup-qwen2.5-vl-3b-2880"
    for name, model in zip(files, ("LLaVA-1.5-7B", "Qwen2.5-VL-3B"), strict=True):
        rows = {row["schedule"]: row for row in result(f"benchmarks/{name}")["figures"]}
        kept = [rows[share] for share in ("50%", "25%", "10%")]
        cells = [f"{row['speedup']:.2f} ({row['flops_ratio']:.2f})" for row in kept]
        assert f"| {model} | {kept[0]['n_visual']:,} | {' | '.join(cells)} |" in text
    best: dict = {}
    for name in ("winner", "deep/winner"):
        said = r"(testbed-\w+): auto has ([\d.]+) times that of \w+, the best"
        best |= re.findall(said, result(name)["measured"])
    low, high = (
        f"{bound:.2f}" for bound in (min(map(float, best.values())), max(map(float, best.values())))
    )
    assert len(best) == 3 and f"{low} to {high} times its hypervolume on three testbeds" in text
    steps = re.search(
        r"better at (\d+), equal at (\d+), worse at 0 of", result("kernels")["measured"]
    )
    total = sum(map(int, steps.groups()))
    points = re.search(r"accuracy (\+[\d.]+) points", result("kernels")["measured"])[1]
    assert f"equal or better at {total} of {total} budgets, {points} points" in text
    moved = re.findall(r"between tasks: -([\d.]+)", result("transfer")["measured"])
    lost = sorted(round(float(points)) for points in moved)
    assert f"another task costs {lost[0]} to {lost[-1]} points" in text
    deep = result("yardstick/testbed-smollm-fastv")["rows"]

    def mean(contender, key, budget):
        rows = [r for r in deep if (r["contender"], r["budget"]) == (contender, budget)]
        return sum(row[key] for row in rows) / len(rows)

    key = "held_out_accuracy"
    gains = [
        round(100 * (mean("profile", key, b) - mean("gradient", key, b)))
        for b in (0.12, 0.2, 0.3, 0.5, 0.7)
    ]
    share = round(100 * mean("profile", "passes", 0.2) / mean("gradient", "passes", 0.2))
    level = [gain for gain in gains if abs(gain) < 3]
    better = [gain for gain in gains if gain >= 3]
    assert (len(better), len(level)) == (3, 2)
    assert f"by {min(better)} to {max(better)} points at three of five" in text
    assert f"level at two, for {share} % of its passes" in text


def modules():
    names = [m.name for m in pkgutil.walk_packages(vispco.__path__, "vispco.")]
    return ["vispco", *(n for n in names if not n.endswith(("__main__", ".train")))]


@pytest.mark.parametrize("name", modules())
def test_docstrings(name):
    if name == "vispco.integrations.lmms_eval":
        pytest.importorskip("lmms_eval", reason='needs lmms-eval: pip install "vispco[eval]"')
    if name.startswith("vispco.integrations.vllm."):
        pytest.importorskip("vllm", reason='needs vLLM: pip install "vispco[vllm]"')
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0
