"""The testbed's scores against closed forms and brute force."""

from functools import cache
from itertools import combinations

import pytest
from hypothesis import given, strategies as st

from tests.reproduction.metrics import (
    anls,
    exact_match,
    levenshtein,
    multiple_choice,
    relaxed_accuracy,
    vqa_accuracy,
    vqa_normalised,
)

WORDS = st.text("abcdef", min_size=1, max_size=6)
METRICS = {
    "exact_match": exact_match,
    "vqa_accuracy": lambda answer, truth: vqa_accuracy(answer, [truth] * 10),
    "anls": lambda answer, truth: anls(answer, [truth]),
    "relaxed_accuracy": relaxed_accuracy,
    "multiple_choice": lambda answer, truth: multiple_choice(answer, "C", ["x y", "y z", truth]),
}


@pytest.mark.parametrize("name", METRICS)
@given(truth=st.text("bcdef 0123%.", max_size=6), blank=st.sampled_from(["", " ", "\n\t "]))
def test_an_empty_answer_scores_nothing_even_where_the_truth_is_empty(name, truth, blank):
    assert METRICS[name](blank, truth) == 0


@pytest.mark.parametrize("name", METRICS)
@given(truth=st.text("xyz 0123456789", min_size=2).filter(lambda t: t.strip()))
def test_the_truth_itself_scores_one(name, truth):
    assert METRICS[name](f" {truth.upper()}\n", truth) == 1


@pytest.mark.parametrize("name", METRICS)
@given(answer=st.text(max_size=8), truth=st.text(max_size=8))
def test_scores_lie_between_zero_and_one(name, answer, truth):
    assert 0 <= METRICS[name](answer, truth) <= 1


@given(truths=st.lists(st.sampled_from(["red", "blue", "green"]), min_size=2, max_size=10))
def test_vqa_accuracy_is_the_mean_over_all_subsets_that_leave_one_annotator_out(truths):
    subsets = list(combinations(truths, len(truths) - 1))
    wanted = sum(min(subset.count("red") / 3, 1) for subset in subsets) / len(subsets)
    assert vqa_accuracy("red", truths) == pytest.approx(wanted)


def test_vqa_accuracy_of_ten_annotators_has_its_known_values():
    scores = [vqa_accuracy("yes", ["yes"] * n + ["no"] * (10 - n)) for n in range(11)]
    assert scores == pytest.approx([0, 0.3, 0.6, 0.9, *[1.0] * 7])
    assert vqa_accuracy("The two dogs!", ["2 dogs"] * 10) == 1


@given(
    truths=st.lists(
        st.sampled_from(["red", "The red.", "RED", "blue", "a, red"]), min_size=1, max_size=10
    ),
    data=st.data(),
)
def test_vqa_accuracy_does_not_know_the_annotators_order(truths, data):
    assert vqa_accuracy("red", truths) == vqa_accuracy("Red!", data.draw(st.permutations(truths)))


@pytest.mark.parametrize(
    ("said", "wanted"),
    {
        "Yes.": "yes",
        " No \n": "no",
        "THE END": "end",
        "a": "",
        "An apple a day": "apple day",
        "one": "1",
        "Ten": "10",
        "none": "0",
        "twenty": "twenty",
        "someone": "someone",
        "dont": "don't",
        "Don't": "don't",
        "cant": "can't",
        "couldntve": "couldn't've",
        "couldn'tve": "couldn't've",
        "it's": "it's",
        "its": "its",
        "well": "well",
        "oclock": "o'clock",
        "isnt": "isn't",
        "im": "i'm",
        "100,978": "100978",
        "1,2,3": "123",
        "a,b": "b",
        "1, 2": "1 2",
        "2.5": "2.5",
        ".5": ".5",
        "u.s.": "us",
        "3.": "3",
        "1..5": "1.5",
        "red/white": "red white",
        "t-shirt": "t shirt",
        "(left)": "left",
        "what?!": "what",
        "2:50 pm": "2:50 pm",
        "girl's": "girl's",
        "50%": "50%",
        "$5": "$5",
        "black & white": "black & white",
        "one-two": "1 2",
        '[the] cat; "dog"': "cat dog",
        "a/an": "",
    }.items(),
)
def test_vqa_normalisation_by_hand(said, wanted):
    assert vqa_normalised(said) == wanted


@given(text=st.text(st.sampled_from("aAnthe onew'dv.,-:%01 \n")) | st.text())
def test_vqa_normalisation_of_what_is_normalised_already_changes_nothing(text):
    once = vqa_normalised(text)
    assert (
        vqa_normalised(once) == once
        and once == " ".join(once.split())
        and not set(once) & set(';/[]"{}()=+\\_-><@`,?!')
    )


@cache
def distance(a, b):
    """Levenshtein's own recursion."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0])
    )


@given(answer=WORDS, truths=st.lists(WORDS, min_size=1, max_size=4))
def test_anls_is_the_best_similarity_over_the_threshold_by_the_recursive_distance(answer, truths):
    assert all(levenshtein(answer, truth) == distance(answer, truth) for truth in truths)
    lengths = [distance(answer, truth) / max(len(answer), len(truth)) for truth in truths]
    assert anls(answer, truths) == pytest.approx(max(1 - nl if nl < 0.5 else 0 for nl in lengths))


@given(
    truth=st.integers(-(10**6), 10**6),
    error=st.floats(-0.2, 0.2).filter(lambda e: abs(abs(e) - 0.05) > 1e-6),
)
def test_relaxed_accuracy_takes_numbers_within_five_percent(truth, error):
    assert relaxed_accuracy(repr(truth * (1 + error)), str(truth)) == (
        truth == 0 or abs(error) < 0.05
    )


def test_relaxed_accuracy_reads_percent_and_leaves_words_alone():
    assert relaxed_accuracy("12%", "0.12") == 1 and relaxed_accuracy("12", "0.12") == 0
    assert relaxed_accuracy("0.01", "0") == 0 and relaxed_accuracy("nan", "5") == 0
    assert relaxed_accuracy("colour", "color") == 0


def test_a_choice_is_its_letter_or_its_text_and_no_other():
    choices = ["a cat", "a dog"]
    for answer, wanted in {
        "A": 1,
        "a)": 1,
        "(A) a cat": 1,
        "A: it is": 1,
        "a cat": 1,
        "a dog": 0,
        "B": 0,
        "an apple": 0,
        "C": 0,
        "cat": 0,
    }.items():
        assert multiple_choice(answer, "A", choices) == wanted, answer


@pytest.mark.parametrize("metric", [anls, vqa_accuracy])
@pytest.mark.parametrize("truths", [[], "red"])
def test_truths_are_a_list_of_at_least_one(metric, truths):
    with pytest.raises(ValueError, match="truths must be a list"):
        metric("red", truths)
