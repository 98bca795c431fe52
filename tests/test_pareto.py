"""Pareto frontier and hypervolume against brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from vispco.pareto import hypervolume, interpolate, is_non_dominated

torch.set_num_threads(1)


@st.composite
def grids(draw, max_points=8, top=4, objectives=(1, 4)):
    """A few points with small whole coordinates (many ties and duplicates), and directions."""
    m = draw(st.integers(*objectives))
    row = st.tuples(*[st.integers(0, top)] * m)
    points = draw(st.lists(row, max_size=max_points))
    return points, draw(st.lists(st.booleans(), min_size=m, max_size=m)), m


def oracle_non_dominated(points, maximize):
    def beats(a, b):
        a, b = ([-v if up else v for v, up in zip(p, maximize, strict=True)] for p in (a, b))
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    return [not any(beats(q, p) for q in points) for p in points]


def oracle_hypervolume(points, reference):
    """Unit cells of the integer grid that some point dominates (all minimised)."""
    cells = itertools.product(*[range(r) for r in reference])
    return sum(
        any(all(v <= c for v, c in zip(p, cell, strict=True)) for p in points) for cell in cells
    )


def inclusion_exclusion(points, reference):
    total = 0.0
    for k in range(1, len(points) + 1):
        for subset in itertools.combinations(points, k):
            corner = [max(column) for column in zip(*subset, strict=True)]
            total -= (-1) ** k * math.prod(
                max(0, r - c) for r, c in zip(reference, corner, strict=True)
            )
    return total


# ---- the frontier --------------------------------------------------------------------------------
@given(grids(max_points=14))
@settings(max_examples=200)
def test_frontier_equals_brute_force(drawn):
    points, maximize, m = drawn
    got = is_non_dominated(np.array(points).reshape(-1, m), maximize)
    assert got.dtype == torch.bool and got.tolist() == oracle_non_dominated(points, maximize)
    assert got.any() or not points


@given(grids(max_points=14), st.randoms(use_true_random=False))
def test_frontier_follows_permutations(drawn, random):
    points, maximize, _ = drawn
    order = list(range(len(points)))
    random.shuffle(order)
    mask = is_non_dominated(points, maximize)
    assert is_non_dominated([points[i] for i in order], maximize).tolist() == mask[order].tolist()


def test_frontier_of_flops_and_accuracy():
    points = [(10, 0.5), (20, 0.7), (20, 0.6), (30, 0.7), (5, 0.1), (40, 0.9)]
    assert is_non_dominated(points, (False, True)).tolist() == [
        True,
        True,
        False,
        False,
        True,
        True,
    ]
    assert is_non_dominated([(a, -b) for a, b in points]).tolist() == [
        True,
        True,
        False,
        False,
        True,
        True,
    ]
    assert is_non_dominated(points, True).tolist() == [False] * 5 + [True]


def test_duplicates_are_all_kept():
    mask = is_non_dominated([(1, 2), (1, 2), (2, 1), (2, 2), (1, 2)])
    assert mask.tolist() == [True, True, True, False, True]


def test_infinities_are_ordered():
    mask = is_non_dominated([(1, math.inf), (2, -math.inf), (math.inf, math.inf)])
    assert mask.tolist() == [True, True, False]


@pytest.mark.parametrize(
    "make",
    [
        list,
        np.array,
        torch.tensor,
        lambda p: torch.tensor(p, dtype=torch.float64),
        lambda p: torch.tensor(p).half(),
        lambda p: np.array(p, dtype=np.int32),
        lambda p: torch.tensor(p).float().requires_grad_(),
    ],
)
def test_lists_arrays_and_tensors_of_any_dtype(make):
    points = make([[1, 3], [2, 2], [3, 3]])
    assert is_non_dominated(points).tolist() == [True, True, False]
    assert hypervolume(points, make([[4, 4]])[0]) == 5
    assert interpolate(points, 2).item() == 3


def test_differences_below_float32_are_seen():
    assert is_non_dominated([(1 + 1e-12, 0), (1, 0)]).tolist() == [False, True]
    assert hypervolume([(1 + 1e-12, 0.0)], (2.0, 1.0)) < 1
    # Nor is the reference rounded.
    assert hypervolume([(0.0, 0.0)], (0.1, 0.1)) == 0.1 * 0.1
    # Nor is the cost rounded.
    assert interpolate([(0.1, 1.0), (0.1 + 1e-12, 2.0)], 0.1).item() == 1


@pytest.mark.parametrize("empty", [[], np.empty((0, 2)), torch.empty(0, 2)])
def test_empty(empty):
    assert is_non_dominated(empty).shape == (0,) and is_non_dominated(
        empty, (False, True)
    ).shape == (0,)
    assert hypervolume(empty, (1, 1)) == 0
    assert interpolate(empty, [1, 2]).tolist() == [-math.inf] * 2


# ---- hypervolume ---------------------------------------------------------------------------------
@given(grids())
@settings(max_examples=200)
def test_hypervolume_counts_grid_cells(drawn):
    points, _, m = drawn
    # Some points are on it or beyond.
    reference = (3, 4, 4, 3)[:m]
    got = hypervolume(points, reference)
    assert isinstance(got, float) and got == oracle_hypervolume(points, reference)


@given(
    st.integers(1, 4).flatmap(lambda m: st.lists(st.tuples(*[st.floats(0, 1.2)] * m), max_size=6))
)
@settings(max_examples=200)
def test_hypervolume_equals_inclusion_exclusion(points):
    reference = [1.0] * (len(points[0]) if points else 2)
    inside = [p for p in points if max(p) < 1]
    assert hypervolume(points, reference) == pytest.approx(
        inclusion_exclusion(inside, reference), abs=1e-12
    )


@given(grids(), st.randoms(use_true_random=False))
def test_hypervolume_invariances(drawn, random):
    points, maximize, m = drawn
    reference = [-1 if up else 5 for up in maximize]
    value = hypervolume(points, reference, maximize)
    signs = [-1 if up else 1 for up in maximize]

    def flip(p):
        return [s * v for s, v in zip(signs, p, strict=True)]

    assert hypervolume([flip(p) for p in points], flip(reference)) == value
    # Duplicates add nothing.
    shuffled = points + points[:2]
    random.shuffle(shuffled)
    assert hypervolume(shuffled, reference, maximize) == value
    axes = random.sample(range(m), m)
    assert (
        hypervolume(
            [[p[a] for a in axes] for p in points],
            [reference[a] for a in axes],
            [maximize[a] for a in axes],
        )
        == value
    )
    if points:
        front = is_non_dominated(points, maximize)
        assert hypervolume(torch.tensor(points)[front], reference, maximize) == value
        assert hypervolume(points[1:], reference, maximize) <= value


def test_hypervolume_by_hand():
    assert hypervolume([(1,), (3,)], (4,)) == 3
    assert hypervolume([(1, 3), (2, 2), (3, 1)], (4, 4)) == 6
    assert hypervolume([(0, 0, 0)], (2, 3, 4)) == 24
    assert hypervolume([(0, 1, 1), (1, 0, 1), (1, 1, 0)], (2, 2, 2)) == 4
    assert hypervolume([(1.0, 0.5), (2.0, 0.75)], (4.0, 0.0), (False, True)) == 2
    # On the edge of the reference.
    assert hypervolume([(4, 0)], (4, 4)) == 0
    # Though the other objective is infinitely good.
    assert hypervolume([(4, -math.inf), (2, 2)], (4, 4)) == 4


def test_hypervolume_of_a_frontier_of_700_configurations_is_quick():
    x = torch.linspace(0, 1, 700, dtype=torch.float64)
    points = torch.stack([x, 1 - x], -1)
    assert hypervolume(points, (1, 1)) == pytest.approx(0.5 * 698 / 699, rel=1e-9)


# ---- what a frontier offers ----------------------------------------------------------------------
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=10), st.integers(-1, 10))
def test_interpolate_is_the_best_affordable_quality(points, cost):
    expected = max([q for c, q in points if c <= cost], default=-math.inf)
    assert interpolate(points, cost).item() == expected
    front = torch.tensor(points).reshape(-1, 2)[is_non_dominated(points, (False, True))]
    # Dominated points change nothing.
    assert interpolate(front, cost).item() == expected


def test_interpolate_many_costs():
    got = interpolate([(1, 0.5), (2, 0.7), (3, 0.6)], torch.tensor([[0.9, 1.0], [2.5, 99.0]]))
    assert got.dtype == torch.float64 and got.tolist() == [[-math.inf, 0.5], [0.7, 0.7]]


# ---- errors --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: is_non_dominated([(1, 2), (math.nan, 1)]),
            "^points contain NaN in row 1: drop failed evaluations first, NaN has no order$",
        ),
        (lambda: is_non_dominated([1.0, 2.0]), r"shape \(N, M\), one row per point, got \(2,\)"),
        (lambda: is_non_dominated(torch.zeros(2, 0)), r"shape \(N, M\)"),
        (
            lambda: is_non_dominated([(1, 2)], (True,)),
            r"one bool or one per objective \(2\), got 1",
        ),
        (lambda: hypervolume([(1, 2)], (3,)), r"shape \(N, 1\), one row per point, got \(1, 2\)"),
        (lambda: hypervolume([(math.nan, 1)], (3, 3)), "points contain NaN in row 0"),
        (lambda: hypervolume([(1, 1)], (3, math.nan)), "the reference must be finite, got"),
        (
            lambda: hypervolume([(-math.inf, 1)], (3, 3)),
            "^points must be finite: an infinitely good one has no finite volume$",
        ),
        (lambda: hypervolume([(1, 1)], (3, math.inf)), "the reference must be finite"),
        (lambda: interpolate([(1, 2, 3)], 1), r"shape \(N, 2\)"),
        (lambda: interpolate([(1, math.nan)], 1), "points contain NaN in row 0"),
        (
            lambda: interpolate([(1, 1)], math.nan),
            "^cost is NaN: expected numbers in the units of the points' first column$",
        ),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
