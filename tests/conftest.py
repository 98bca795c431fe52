"""Shared fixtures: one thread, derandomised hypothesis, tiny models with random weights."""

import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings
from torch.utils.flop_counter import FlopCounterMode

import vispco
from tiny import FAMILIES, make
from vispco.utils.version import versions

# MKL reads it when it first computes. Without it, MKL rounds by where an array lies in memory, and
# equal inputs may differ in a bit.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
torch.set_num_threads(1)
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
# Mutation testing needs no smallest example: it leaves out shrinking.
phases = [Phase.explicit, Phase.generate]
settings.register_profile("mutation", settings.get_profile("ci"), phases=phases)
settings.load_profile("ci")


def pytest_addoption(parser):
    """`pytest --every`: the whole product of methods and families, minutes more."""
    parser.addoption("--every", action="store_true", help="run every method on every model family")
    parser.addoption(
        "--table", metavar="FILE", help="write a page of what passed, method by family"
    )


def pytest_configure(config):
    """`pytest tests/test_contract.py --every --table docs/contract.md`."""
    if config.getoption("table"):
        config.pluginmanager.register(Table(Path(config.getoption("table"))))


def pytest_collection_modifyitems(config, items):
    """By default, LLaVA runs all methods, and the other families run PDrop and VisionZip.

    Methods and families meet in one context only, so the whole product adds little. These two
    methods ask most of a family: PDrop for projections, norms, rotary embedding and mask, at layer
    0 already; VisionZip for the vision tower.
    """

    def wanted(item):
        params = getattr(getattr(item, "callspec", None), "params", {})
        both = {"family", "name"} <= params.keys()
        return not both or params["family"] == "llava" or params["name"] in ("pdrop", "visionzip")

    if not config.getoption("every"):
        config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
        items[:] = filter(wanted, items)


@pytest.fixture(scope="session", params=vispco.list_adapters())
def family(request):
    """Each registered family's tiny model (session-wide; tests must leave it as it was)."""
    if request.param not in FAMILIES:
        pytest.fail(
            f"adapter {request.param!r} is registered but has no tiny model: "
            "add one to FAMILIES in tests/tiny.py"
        )
    return make(request.param)


@pytest.fixture(scope="session")
def llava():
    """The tiny LLaVA."""
    return make("llava")


# ---- a page of what was checked ------------------------------------------------------------------
class Table:
    """Collects the outcomes of tests that have a method and a family.

    At the end, it writes them as Markdown.
    """

    def __init__(self, path):
        self.path = path
        # {(method, family): {check: {outcome or reason}}}
        self.cells = defaultdict(lambda: defaultdict(set))
        self.checks, self.cases = {}, 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        """The outcome of one case; of a skipped one, the reason."""
        report = yield
        params = getattr(getattr(item, "callspec", None), "params", {})
        if {"family", "name"} <= params.keys() and (report.when == "call" or not report.passed):
            outcome = (
                report.longrepr[2].removeprefix("Skipped: ") if report.skipped else report.outcome
            )
            self.cells[params["name"], params["family"]][item.originalname].add(outcome)
            self.checks[item.originalname] = (item.function.__doc__ or "").split("\n")[0]
            self.cases += report.passed
        return report

    def pytest_sessionfinish(self):
        """Write the page."""
        if self.cells:
            self.path.write_text(self.page(), encoding="utf-8")

    def page(self):
        """The table, the reasons for what does not apply, the checks."""
        methods, families = (sorted({cell[i] for cell in self.cells}) for i in (0, 1))
        reasons = []
        rows = [
            [f"`{m}`", *(self.cell(self.cells.get((m, f), {}), reasons) for f in families)]
            for m in methods
        ]
        table = [["method", *(f"`{f}`" for f in families)], ["---"] * (len(families) + 1), *rows]
        found = ", ".join(f"{package} {number}" for package, number in versions().items())
        command = "pytest tests/test_contract.py --every --table docs/contract.md"
        parts = [
            "# What the contract suite checked",
            f"Made by `{command}` with {found}.",
            f"A number counts the checks, of the {len(self.checks)} below, that passed for a "
            f"method on a family, in every case: {self.cases:,} cases passed in all.",
            "\n".join(f"| {' | '.join(row)} |" for row in table),
            "\n".join(f"[{i}] n/a: {reason}  " for i, reason in enumerate(reasons, 1)),
            "## The checks",
            "\n".join(
                f"- {plain(name)}{': ' + text if text else ''}"
                for name, text in self.checks.items()
            ),
        ]
        return "\n\n".join(filter(None, parts)) + "\n"

    @staticmethod
    def cell(outcomes, reasons):
        """Checks passed, failed, and not applicable (with the numbers of the reasons)."""
        counts, why = {"passed": 0, "failed": 0, "n/a": 0}, set()
        for found in outcomes.values():
            skipped = found - {"passed", "failed"}
            counts["failed" if "failed" in found else "passed" if "passed" in found else "n/a"] += 1
            reasons.extend(skipped - {*reasons})
            why |= {reasons.index(reason) + 1 for reason in skipped}
        notes = [f"{counts[kind]} {kind}" for kind in ("failed", "n/a") if counts[kind]]
        notes += [f"[{number}]" for number in sorted(why)]
        return " ".join([str(counts["passed"] or ""), *notes]).strip()


def plain(name):
    """`test_a_b` as "a b"."""
    return name.removeprefix("test_").replace("_", " ")


# ---- older releases of transformers --------------------------------------------------------------
def without_rotary(counter):
    """Total of a FLOP counter, less what was spent inside rotary embeddings."""
    counts = {name: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    rotary = sum(n for name, n in counts.items() if name.split(".")[-1].startswith("rotary"))
    return counts.get("Global", 0) - rotary


if tuple(map(int, versions()["transformers"].split(".")[:2])) < (5, 20):
    # They make the angles by a matrix product, which the counter sees; no convention counts it.
    FlopCounterMode.get_total_flops = without_rotary
