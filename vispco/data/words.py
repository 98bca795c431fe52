"""Texts of a row in the file's own words: 007 stays 007, and 3.10 stays 3.10."""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class Whole(int):
    """A whole number that remembers how the file writes it."""

    words: str

    @classmethod
    def of(cls, words: str) -> Whole:
        number = cls(words)
        number.words = words
        return number


class Real(float):
    """Another number that remembers how the file writes it.

    >>> Real.of("3.10") + 1, Real.of("3.10").words
    (4.1, '3.10')
    """

    words: str

    @classmethod
    def of(cls, words: str) -> Real:
        number = cls(words)
        number.words = words
        return number


@dataclass(frozen=True)
class Parsed:
    """A value that another library has made of a file's words, which are not known any more."""

    value: Any

    def __float__(self) -> float:
        return float(self.value)

    def __repr__(self) -> str:
        return repr(self.value)


def parsed(value: Any, *kinds: type) -> Any:
    """The same, with every value of these kinds as `Parsed`, however deep it lies.

    >>> parsed({"answer": [3.1, "a", {"score": 2}]}, float)["answer"][0].value
    3.1
    """
    if isinstance(value, dict):
        return {key: parsed(inner, *kinds) for key, inner in value.items()}
    if isinstance(value, list):
        return [parsed(inner, *kinds) for inner in value]
    return Parsed(value) if isinstance(value, kinds) and not is_missing(value) else value


#: Reads JSON; its numbers remember how they are written.
DECODER = json.JSONDecoder(parse_int=Whole.of, parse_float=Real.of, parse_constant=Real.of)


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: null, an empty text or list, or not-a-number."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or isinstance(value, (str, list)) and not value


def text(value: Any, key: str) -> str:
    """Stripped text under `key`; numbers and dates become the text that the file has.

    Raises ValueError if the value is missing, or is no text, or if the file's words are not known.
    """
    if isinstance(value, Parsed):
        raise ValueError(
            f"expected a text under {key!r}, got {value}, which the datasets library has made of "
            "other words (3.10 becomes 3.1): give the CSV, TSV or JSON file itself, or save this "
            "column as text"
        )
    if isinstance(value, (Whole, Real)):
        missing, value = is_missing(value), value.words
    else:
        missing = is_missing(value)
    if not isinstance(value, bool) and isinstance(value, (int, float, decimal.Decimal)):
        value = str(value)
    elif isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        value = value.isoformat()
    if missing or isinstance(value, str) and not value.strip():
        raise ValueError(f"expected a text under {key!r}, but its value is missing: {short(value)}")
    if isinstance(value, bool):
        raise ValueError(
            f"expected a text under {key!r}, got {value}: write the words of the answer, such as "
            '"yes"'
        )
    if not isinstance(value, str):
        raise ValueError(f"expected a text under {key!r}, got {short(value)}")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(
            f"expected a text under {key!r}, got one with half of a character (a lone surrogate): "
            f"{short(value)}"
        )
    return value.strip()


def most_frequent(answers: Any, key: str) -> Any:
    """Of a list of annotators' answers the one given most often, of ties the first.

    An answer may be a text, a number, or VQA's `{"answer": text, ...}`.
    """
    if not isinstance(answers, list) or not answers:
        return answers
    given = [one.get("answer") if isinstance(one, Mapping) else one for one in answers]
    return Counter(text(one, key) for one in given).most_common(1)[0][0]


def short(value: Any) -> str:
    """A value as Python shows it, on one line of at most 80 characters."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
