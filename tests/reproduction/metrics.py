"""The five usual scores of one answer, each in [0, 1]; an empty answer scores 0 in all of them.

For real benchmarks use lmms-eval's own scores (see docs/lmms-eval.md): published figures depend on
details of each benchmark.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Iterator, Sequence

_ARTICLES = {"a", "an", "the"}
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(i) for i, word in enumerate(_NUMBERS.split())} | {"none": "0"}
_MARKS = str.maketrans(dict.fromkeys(';/[]"{}()=+\\_-><@`,?!', " "))
_CONTRACTIONS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's i'd've i'm i've isn't it'd
    it'd've it'll let's ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't shan't she'd've she's should've shouldn't shouldn't've somebody'd
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def exact_match(answer: str, truth: str) -> float:
    """1 if the strings are equal but for case and outer blanks.

    (SQuAD, Rajpurkar et al. 2016, without its normalisation.)

    >>> exact_match(" Red", "red"), exact_match("red circle", "red")
    (1.0, 0.0)
    """
    return float(bool(_plain(answer)) and _plain(answer) == _plain(truth))


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Agreement with N annotators (VQA, Antol et al. 2015, and its code).

    The mean over all N - 1 of the N `truths` of min(matches / 3, 1). Answers are compared as
    `vqa_normalised`. Of one truth no annotator would be left; it is compared as it is. Raises
    ValueError without truths.

    >>> vqa_accuracy("two", ["2"] * 3 + ["3"] * 7)
    0.9
    """
    said = vqa_normalised(answer)
    matches = sum(vqa_normalised(truth) == said for truth in _given(truths))
    n = len(truths)
    if not said or n == 1:
        return float(bool(said) and matches == 1)
    # One of the matches is left out in `matches` of the n subsets, another answer in the others.
    without_match, without_other = min((matches - 1) / 3, 1), min(matches / 3, 1)
    return (matches * without_match + (n - matches) * without_other) / n


def vqa_normalised(text: str) -> str:
    """An answer as VQA compares it, by the published rules of its evaluation (Goyal et al. 2017).

    Small letters. No comma between digits; blanks for other marks, but apostrophes, colons and
    signs such as % and $ stay. No period but a decimal point. Numbers up to ten, and none, in
    digits. No articles. Contractions with their apostrophes.
    The authors' code differs in three ways: it leaves no blank for a mark that also stands beside
    one, nor for any if a comma stands between digits; and it knows some contractions only with one
    of two apostrophes, "i'm" not at all.

    >>> vqa_normalised("The two dogs don't; they  arent at 1,000.50 m.")
    "2 dogs don't they aren't at 1000.50 m"
    >>> vqa_normalised("10:30 a.m."), vqa_normalised("a girls' ball")
    ('10:30 am', "girls' ball")
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower()).translate(_MARKS)
    words = [_DIGITS.get(word, word) for word in re.sub(r"\.(?!\d)", "", text).split()]
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def _without(form: str) -> Iterator[str]:
    """A contraction with some or all of its apostrophes missing."""
    first, *rest = form.split("'")
    for joints in itertools.product(("", "'"), repeat=len(rest)):
        yield first + "".join(joint + part for joint, part in zip(joints, rest, strict=True))


_APOSTROPHES = {short: form for form in _CONTRACTIONS.split() for short in _without(form)}


def anls(answer: str, truths: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity, 1 - distance / longer length, to the best of `truths`.

    It is 0 if not over `threshold` (ST-VQA, Biten et al. 2019, eq. 1). Case and outer blanks do not
    count. Raises ValueError without truths.

    >>> anls("Color", ["colour"]), anls("blue", ["red"])
    (0.8333333333333334, 0.0)
    """
    answer = _plain(answer)
    scores = []
    for truth in map(_plain, _given(truths)):
        longer = max(len(answer), len(truth), 1)
        scores.append(1 - levenshtein(answer, truth) / longer)
    return max(scores) if answer and max(scores) > threshold else 0.0


def relaxed_accuracy(answer: str, truth: str, tolerance: float = 0.05) -> float:
    """1 if a number is within `tolerance` of the true one, relatively.

    Answers that are no numbers are compared as in `exact_match`. (PlotQA, Methani et al. 2020;
    ChartQA, Masry et al. 2022.) "12 %" is the number 0.12. A true 0 must be hit exactly.

    >>> relaxed_accuracy("104", "100"), relaxed_accuracy("106", "100")
    (1.0, 0.0)
    >>> relaxed_accuracy("Red", "red")
    1.0
    """
    got, wanted = _number(answer), _number(truth)
    if got is None or wanted is None:
        return exact_match(answer, truth)
    return float(abs(got - wanted) <= tolerance * abs(wanted))


def multiple_choice(answer: str, truth: str, choices: Sequence[str] = ()) -> float:
    """1 if the answer is the letter `truth`, alone or before a mark, or the text of that choice.

    (A-OKVQA, Schwenk et al. 2022; the first step of MMBench, Liu et al. 2023: no guessing, no
    language model.)

    >>> answers = ("B", "(b)", "B. a dog", "A dog", "A", "")
    >>> [multiple_choice(answer, "B", ["a cat", "a dog"]) for answer in answers]
    [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    """
    letter = re.match(r"\(?([a-z])(?:[).:,]|$)", _plain(answer))
    if letter:
        return exact_match(letter[1], truth)
    by_letter = dict(zip(string.ascii_lowercase, choices, strict=False))
    return exact_match(answer, by_letter.get(_plain(truth), ""))


def levenshtein(a: str, b: str) -> int:
    """The least number of insertions, deletions and substitutions that turn `a` into `b`.

    >>> levenshtein("kitten", "sitting")
    3
    """
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _plain(text: str) -> str:
    return text.strip().lower()


def _number(text: str) -> float | None:
    text = _plain(text)
    try:
        return float(text.rstrip("% ")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _given(truths: Sequence[str]) -> Sequence[str]:
    if isinstance(truths, str) or not truths:
        raise ValueError(f"truths must be a list of at least one right answer, got {truths!r}")
    return truths
