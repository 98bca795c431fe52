"""Pages of what the contract suites checked, written by `pytest --table FILE`.

`python tests/tables.py --write` copies the list of models from docs/contract.md into the README.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import zoo
from vispco.reading.support import candidates, not_applicable
from vispco.utils.version import versions

ROOT = Path(__file__).parent.parent
START, END = "<!-- models: python tests/tables.py --write -->", "<!-- /models -->"


class Page:
    """Collects the outcomes of the cases of one suite, and writes them as Markdown at the end.

    key: of a case's parameters, the row it belongs to; None if it is of another suite.
    text: of the page, made from {row: {check: {outcome or reason}}}, {check: what it says} and the
        number of cases that passed.
    """

    def __init__(self, path, key, text):
        self.path, self.key, self.text = path, key, text
        self.cells = defaultdict(lambda: defaultdict(set))
        self.checks, self.passed = {}, 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        """The outcome of one case; of a skipped one, the reason."""
        report = yield
        params = getattr(getattr(item, "callspec", None), "params", {})
        row = self.key(item, params)
        if row is not None and (report.when == "call" or not report.passed):
            skipped = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else None
            self.cells[row][item.originalname].add(skipped or report.outcome)
            self.checks[item.originalname] = (item.function.__doc__ or "").split("\n")[0]
            self.passed += report.passed
        return report

    def pytest_sessionfinish(self):
        """Write the page, if any case was of this suite."""
        if self.cells:
            page = self.text(self.cells, self.checks, self.passed)
            self.path.write_text(page, encoding="utf-8")


def cell(outcomes, reasons):
    """Checks passed, failed, and not applicable (with the numbers of the reasons)."""
    counts, why = {"passed": 0, "failed": 0, "n/a": 0}, set()
    for found in outcomes.values():
        skipped = found - {"passed", "failed"}
        counts["failed" if "failed" in found else "passed" if "passed" in found else "n/a"] += 1
        reasons.extend(sorted(skipped - {*reasons}))
        why |= {reasons.index(reason) + 1 for reason in skipped}
    notes = [f"{counts[kind]} {kind}" for kind in ("failed", "n/a") if counts[kind]]
    notes += [f"[{number}]" for number in sorted(why)]
    return " ".join([str(counts["passed"] or ""), *notes]).strip()


def plain(name):
    """`test_a_b` as "a b"."""
    return name.removeprefix("test_").replace("_", " ")


def lines(table):
    """Rows of cells as a Markdown table."""
    head, *rows = table
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def made(command):
    """What made a page, with the versions of all packages."""
    found = ", ".join(f"{package} {number}" for package, number in versions().items())
    return f"Made by `{command}` with {found}."


def notes(reasons):
    """The numbered reasons."""
    return "\n".join(f"[{i}] n/a: {reason}  " for i, reason in enumerate(reasons, 1))


def described(checks):
    """A list of the checks, with what each says of itself."""
    texts = (f": {text}" if text else "" for text in checks.values())
    return "\n".join(f"- {plain(name)}{text}" for name, text in zip(checks, texts, strict=True))


# ---- every method on the families with an adapter of their own -----------------------------------
def of_method(item, params):
    """(method, family) of a case of `test_contract.py`."""
    return (params["name"], params["family"]) if {"family", "name"} <= params.keys() else None


def methods_page(cells, checks, passed):
    """Methods by families."""
    methods, families = (sorted({each[i] for each in cells}) for i in (0, 1))
    reasons = []
    rows = [[f"`{m}`", *(cell(cells.get((m, f), {}), reasons) for f in families)] for m in methods]
    parts = [
        "# Every method on the families with an adapter of their own",
        made("pytest tests/test_contract.py --every --table docs/contract-methods.md"),
        f"A number counts the checks, of the {len(checks)} below, that passed for a method on a "
        f"family, in every case: {passed:,} cases passed in all.",
        lines([["method", *(f"`{f}`" for f in families)], *rows]),
        notes(reasons),
        "## The checks",
        described(checks),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


#: Checks that need not apply to a class that works.
ASIDE = (
    "test_bfloat16_is_finite_and_counts_exactly",
    "test_gradients_reach_the_ratios_through_attention",
)


# ---- every model of transformers -----------------------------------------------------------------
def of_model(item, params):
    """The model class of a case of `test_any_model.py`."""
    if item.module.__name__ != "test_any_model" or "name" not in params:
        return None
    return zoo.FAMILIES[params["name"]].cls


def models_page(cells, checks, passed):
    """Architectures by checks: all of them that transformers lists, applicable or not."""
    reasons, rows, working = [], [], 0
    for kind, name in candidates().items():
        outcomes = [mark(cells[name][check], reasons) if name in cells else "" for check in checks]
        needed = [x for x, check in zip(outcomes, checks, strict=True) if check not in ASIDE]
        works = all(outcome.startswith("yes") for outcome in needed) and "failed" not in outcomes
        working += works
        result = "works" if works else "in part" if any(outcomes) else "not checked"
        rows.append([f"`{kind}`", f"`{name}`", *outcomes, result])
    refused = [f"- `{kind}`: {reason}" for kind, reason in not_applicable().items()]
    short = [plain(check) for check in checks]
    parts = [
        "# Every vision-language model of transformers",
        made("pytest tests/test_any_model.py --every --table docs/contract.md"),
        f"{working} of the {len(rows) + len(refused)} classes that transformers lists for images "
        "and text work: one adapter reads the loaded model. Each was built tiny, with random "
        f"weights, and run through the checks below. {passed:,} cases passed, with pictures, with "
        "films where the class takes them, and with variants of its configuration. A class "
        f"works if it passes all of them; {' and '.join(map(plain, ASIDE))} may be not applicable.",
        lines([["model type", "class", *short, "result"], *rows]),
        notes(reasons),
        "## Not applicable",
        "These are refused from their `config.json`, before any weights are loaded.",
        "\n".join(refused),
        "## The checks",
        described(checks),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def mark(outcomes, reasons):
    """One check of one architecture."""
    if not outcomes:
        return ""
    skipped = sorted(outcomes - {"passed", "failed"})
    reasons.extend(reason for reason in skipped if reason not in reasons)
    why = "".join(f" [{reasons.index(reason) + 1}]" for reason in skipped)
    if "failed" in outcomes:
        return "failed"
    return ("yes" if "passed" in outcomes else "n/a") + why


MODELS = of_model, models_page
METHODS_BY_FAMILY = of_method, methods_page


# ---- the README ----------------------------------------------------------------------------------
def model_list(page):
    """The README's paragraph, from docs/contract.md."""
    count = re.search(r"^(\d+ of the \d+ classes)", page, re.M)[1]
    working = re.findall(r"^\| (`[^`]+`) .*\| works \|$", page, re.M)
    return (
        f"{START}\n{count} of transformers' image-text-to-text mapping "
        f"([what was checked](docs/contract.md)): {', '.join(working)}.\n{END}"
    )


def renewed(readme, page):
    """The README with the list that the page gives."""
    start, stop = readme.index(START), readme.index(END) + len(END)
    return readme[:start] + model_list(page) + readme[stop:]


if __name__ == "__main__":
    readme, page = ROOT / "README.md", ROOT / "docs" / "contract.md"
    before = readme.read_text(encoding="utf-8")
    after = renewed(before, page.read_text(encoding="utf-8"))
    if "--write" in sys.argv:
        readme.write_text(after, encoding="utf-8")
    sys.exit(after != before and "--write" not in sys.argv)
