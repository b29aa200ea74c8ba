"""Balance, drift reduction, correlation and normalised accuracy against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from sstmerge.errors import DataError
from sstmerge.evaluation.metrics import (
    balance,
    correlation,
    drift_reduction,
    normalised,
    normalised_average_accuracy,
)


def test_normalised():
    assert normalised(0.5, worst=0.2, best=0.8) == pytest.approx(0.5)
    assert normalised(0.9, worst=0.2, best=0.8) > 1
    # Where less is better, the references say so.
    assert normalised(0.1, worst=0.5, best=0.0) == pytest.approx(0.8)
    with pytest.raises(DataError, match="equal"):
        normalised(0.5, worst=0.2, best=0.2)
    with pytest.raises(DataError, match="value is nan"):
        normalised(math.nan, worst=0.2, best=0.3)


def test_balance():
    point = balance(0.6, 0.6)
    assert point.angle == pytest.approx(45)
    assert point.distance == pytest.approx(0.4 * math.sqrt(2))
    # The angle knows nothing of quality: a bad model is on the diagonal, too, and farther from the ideal.
    bad = balance(0.1, 0.1)
    assert bad.angle == pytest.approx(45)
    assert bad.distance > point.distance
    assert balance(1.0, 1.0).distance == 0
    assert balance(1.0, 0.0).angle == 0
    assert balance(0.0, 0.0).angle is None


def test_drift_reduction():
    assert drift_reduction(0.1, 0.4) == pytest.approx(0.75)
    assert drift_reduction(0.4, 0.4) == 0
    assert drift_reduction(0.6, 0.4) == pytest.approx(-0.5)
    for drift, reference in ((0.1, 0.0), (-0.1, 0.4)):
        with pytest.raises(DataError, match="must drift"):
            drift_reduction(drift, reference)


def test_correlation():
    # Deviations (−1, 0, 1) and (1, 1, −2)/3 … r = −3/2 / sqrt(2 · 3/2) = −√3/2.
    coefficient, _ = correlation((0.0, 1.0, 2.0), (1.0, 1.0, -0.5))
    assert coefficient == pytest.approx(-math.sqrt(3) / 2)
    # Any rising curve has rank correlation 1.
    assert correlation((0.1, 0.2, 0.9, 1.0), (1.0, 1.1, 1.2, 9.0), kind="spearman")[0] == pytest.approx(1)
    assert correlation((0.1, 0.2, 0.9, 1.0), (1.0, 1.1, 1.2, 9.0))[0] < 0.9


def test_correlation_of_nothing():
    with pytest.raises(DataError, match="three points"):
        correlation((0.1, 0.2), (0.1, 0.2))
    with pytest.raises(DataError, match="at every point"):
        correlation((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    with pytest.raises(DataError, match="safety of point 1"):
        correlation((0.1, math.nan, 0.3), (0.5, 0.4, 0.5))


def test_normalised_average_accuracy():
    merged, experts = {"sst2": 0.8, "trec": 0.3}, {"sst2": 0.8, "trec": 0.6}
    assert normalised_average_accuracy(merged, experts) == pytest.approx(0.75)
    with pytest.raises(DataError, match="same tasks"):
        normalised_average_accuracy({"sst2": 0.8}, experts)
    with pytest.raises(DataError, match="never right"):
        normalised_average_accuracy({"sst2": 0.8}, {"sst2": 0.0})
