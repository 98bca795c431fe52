"""What works while a model is pruned, and what is refused: `docs/compatibility.md`.

Each use is named with the test that shows it.

    PYTHONPATH=tests python tests/compatibility.py > docs/compatibility.md

Tests in `test_stress.py` enrol themselves, by `@works` and `@refused`. Tests in other files are
named there by `also`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@dataclass
class Case:
    """One row. verdict: "works", or how it is refused. test: file::name."""

    section: str
    use: str
    verdict: str
    test: str


CASES: list[Case] = []
SECTIONS: list[str] = []


def section(title):
    """The cases that follow are under this heading."""
    SECTIONS.append(title)


def also(use, test, verdict="works"):
    """Works, as a test in another file shows."""
    CASES.append(Case(SECTIONS[-1], use, verdict, test))


def works(use, verdict="works"):
    """Enrol a test that shows that it works."""

    def enrol(test):
        also(use, f"{Path(test.__code__.co_filename).name}::{test.__name__}", verdict)
        return test

    return enrol


def refused(use, message):
    """Enrol a test that shows that it is refused.

    Inside `refusal()` the test must be refused with this message.
    """

    def enrol(test):
        works(use, f"refused: “{message}”")(test)

        def refusal():
            return pytest.raises(ValueError, match=re.escape(message))

        return pytest.mark.parametrize("refusal", [refusal], ids=[""])(test)

    return enrol


def defined(case):
    """Whether the test that a row names exists."""
    file, name = case.test.split("::")
    return f"\ndef {name}(" in (TESTS / file).read_text(encoding="utf-8")


def page():
    """The page, as Markdown."""
    parts = [HEAD]
    for title in SECTIONS:
        rows = [f"| {c.use} | {c.verdict} | `{c.test}` |" for c in CASES if c.section == title]
        parts.append("\n".join([f"## {title}\n", "| use | | test |", "|---|---|---|", *rows]))
    return "\n\n".join([*parts, TAIL]) + "\n"


HEAD = """# What works while a model is pruned, and what is refused

Made by `PYTHONPATH=tests python tests/compatibility.py > docs/compatibility.md` from the tests that
are named in the last column. "Works" means equal to an oracle: to recomputation without a cache, to
dropping the tokens by hand, or to the plain call. "Refused" means a `ValueError` that says so.
After it the model is exactly as it was: no hooks, no other `forward`, the same outputs bit by
bit."""

TAIL = """## Not tested

- bitsandbytes needs a GPU that these tests do not have. Quantised weights work wherever linear
  layers are modules that are called, as a test with int8 weights shows.
- The offloaded KV cache needs a GPU in transformers: its test runs where there is one.
- Tests of PEFT and accelerate run where they are installed. The page was made with peft 0.21 and
  accelerate 1.15.
- Contrastive search and other strategies that transformers downloads as code (`trust_remote_code`),
  and those that it does not offer for vision-language models (`assistant_early_exit`).
- Changing a model's layers (not their weights or projections) inside the `with` block."""


if __name__ == "__main__":
    import sys

    import test_stress  # noqa: F401 (enrols the cases)

    sys.stdout.write(sys.modules["compatibility"].page())
