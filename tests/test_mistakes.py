"""Every mistake in docs/mistakes.md is made, and told by the words that stand there."""

import pytest
import torch

import mistakes
from mistakes import MISTAKES, PAGE, message_of, row

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def page():
    """The page's text, and its rows."""
    text = PAGE.read_text(encoding="utf-8")
    return text, [
        line
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith(("| what", "| ---"))
    ]


@pytest.fixture(scope="module", autouse=True)
def place():
    """The folder in which they are made."""
    with mistakes.place():
        yield


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.did[:60])
def test_a_mistake_is_told_as_the_documentation_says(mistake, page):
    message = message_of(mistake)
    assert 20 < len(message) < 500 and "Traceback" not in message
    assert row(mistake, message) in page[1], "python tests/mistakes.py --write"


def test_the_page_has_these_mistakes_and_no_others(page):
    text, rows = page
    said = dict(
        zip(
            MISTAKES,
            (line.rsplit(" | ", 1)[1].removesuffix(" |").strip("` ") for line in rows),
            strict=True,
        )
    )
    assert text == mistakes.page(said), "python tests/mistakes.py --write"
    assert len(rows) >= 60 and len({(m.did, m.without) for m in MISTAKES}) == len(MISTAKES)


def test_something_that_is_no_mistake_is_found_out():
    for right in ('PruningConfig("fastv", [1, 0.5])', "vispco list kernels"):
        with pytest.raises(AssertionError):
            message_of(mistakes.Mistake("", right))
