"""Metrics of a trade-off curve against numbers worked out by hand."""

from __future__ import annotations

import math
import random

import pytest

from sstmerge.errors import DataError
from sstmerge.evaluation.metrics import (
    Curve,
    curve_area,
    hypervolume,
    pareto_front,
    safety_at_utility,
    safety_tax,
    utility_at_safety,
)

# Safety rises and utility falls along the sweep, but for one point that overshoots.
SWEEP = Curve((0.0, 0.5, 0.7, 1.0), (0.9, 0.8, 0.6, 0.2))


def test_pareto_front_keeps_what_nothing_beats():
    points = [(0.5, 0.5), (0.5, 0.4), (0.2, 0.9), (0.6, 0.5), (0.1, 0.9), (0.6, 0.5)]
    assert pareto_front(points) == [(0.2, 0.9), (0.6, 0.5)]


def test_hypervolume_by_hand():
    # Steps of width .5, .2 and .3 with heights .8, .6 and .2; the point of safety 0 adds nothing.
    assert hypervolume(SWEEP) == pytest.approx(0.5 * 0.8 + 0.2 * 0.6 + 0.3 * 0.2)
    assert hypervolume(SWEEP, reference=(0.5, 0.5)) == pytest.approx(0.2 * 0.1)
    assert hypervolume(Curve((1.0,), (1.0,))) == 1.0
    assert hypervolume(Curve((0.3,), (0.4,)), reference=(0.5, 0.0)) == 0.0


def test_hypervolume_forgets_order_and_dominated_points():
    rng = random.Random(0)
    points = [(rng.random(), rng.random()) for _ in range(20)]
    whole = hypervolume(Curve(*zip(*points, strict=True)))
    shuffled = rng.sample(points, len(points))
    assert hypervolume(Curve(*zip(*shuffled, strict=True))) == pytest.approx(whole, abs=1e-15)
    assert hypervolume(Curve(*zip(*pareto_front(points), strict=True))) == pytest.approx(whole, abs=1e-15)
    # Counted on a grid: the share of points of the unit square that some point dominates.
    grid = [(i + 0.5) / 200 for i in range(200)]
    counted = sum(any(s >= a and u >= b for s, u in points) for a in grid for b in grid) / 200**2
    assert whole == pytest.approx(counted, abs=0.01)


def test_hypervolume_of_swapped_axes_is_the_same():
    assert hypervolume(Curve(SWEEP.utility, SWEEP.safety)) == pytest.approx(hypervolume(SWEEP))


def test_values_at_matched_safety_are_interpolated_along_the_sweep():
    assert utility_at_safety(SWEEP, 0.6) == pytest.approx(0.7)
    assert utility_at_safety(SWEEP, 0.5) == 0.8
    assert utility_at_safety(SWEEP, 0.0) == 0.9
    assert utility_at_safety(SWEEP, 1.0) == 0.2
    assert utility_at_safety(Curve((0.2, 0.4), (0.5, 0.3)), 0.41) is None
    assert safety_tax(SWEEP, 0.9, safety=0.6) == pytest.approx(0.2)
    assert safety_tax(Curve((0.2,), (0.5,)), 0.9, safety=0.3) is None


def test_a_sweep_that_falls_back_counts_at_its_best():
    # Safety rises to .8 and falls again while utility falls: at safety .6 the first crossing is the better one.
    assert utility_at_safety(Curve((0.4, 0.8, 0.2), (0.9, 0.7, 0.1)), 0.6) == pytest.approx(0.8)


def test_safety_at_a_share_of_the_utility():
    # 95 % of .8 is .76: between the points (.5, .8) and (.7, .6), a fifth of the way.
    assert safety_at_utility(SWEEP, 0.8, share=0.95) == pytest.approx(0.54)
    assert safety_at_utility(SWEEP, 0.8, share=0.99) == pytest.approx(0.508)
    assert safety_at_utility(SWEEP, 1.0, share=0.95) is None
    assert safety_at_utility(Curve((0.3,), (0.8,)), 0.8, share=1.0) == 0.3


def test_area_by_hand():
    # Trapezoids: .5 × .85 + .2 × .7 + .3 × .4.
    assert curve_area(SWEEP) == pytest.approx(0.425 + 0.14 + 0.12)
    # Only the upper half of safety: (.14 + .12) / .5.
    assert curve_area(SWEEP, safety_range=(0.5, 1.0)) == pytest.approx(0.52)
    # Not reached counts 0, less safety than asked for is not a loss.
    assert curve_area(Curve((0.25,), (0.8,))) == pytest.approx(0.2)


def test_area_is_the_mean_of_the_utility_at_a_safety():
    crooked = Curve((0.1, 0.6, 0.4, 0.9, 0.3), (0.9, 0.3, 0.7, 0.2, 0.5))
    steps = 20_000
    mean = math.fsum(utility_at_safety(crooked, (i + 0.5) / steps) or 0.0 for i in range(steps)) / steps
    assert curve_area(crooked) == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize(
    ("safety", "utility", "words"),
    [
        ((), (), "at least one point"),
        ((0.1, 0.2), (0.1,), "one safety for each utility"),
        ((0.1, math.nan), (0.1, 0.2), "safety of point 1 is nan"),
        ((0.1,), (math.inf,), "utility of point 0 is inf"),
    ],
)
def test_curves_that_are_none(safety, utility, words):
    with pytest.raises(DataError, match=words):
        Curve(safety, utility)


def test_arguments_out_of_range():
    with pytest.raises(DataError, match="share"):
        safety_at_utility(SWEEP, 0.8, share=1.2)
    with pytest.raises(DataError, match="reference utility must be positive"):
        safety_at_utility(SWEEP, 0.0)
    with pytest.raises(DataError, match="reference utility must be finite"):
        safety_tax(SWEEP, math.nan, safety=0.5)
    with pytest.raises(DataError, match="safety to be reached must be finite, got nan"):
        utility_at_safety(SWEEP, math.nan)
    with pytest.raises(DataError, match="safety to be reached must be finite, got nan"):
        safety_tax(SWEEP, 0.9, safety=math.nan)
    with pytest.raises(DataError, match="reference point"):
        hypervolume(SWEEP, reference=(math.nan, 0.0))
    with pytest.raises(DataError, match="range of safety"):
        curve_area(SWEEP, safety_range=(1.0, 0.5))
