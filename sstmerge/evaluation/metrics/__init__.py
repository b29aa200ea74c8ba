"""Metrics of a trade-off, their intervals and paired tests; every formula is in docs/EVALUATION.md."""

from sstmerge.evaluation.metrics.balance import (
    Balance,
    balance,
    correlation,
    drift_reduction,
    normalised,
    normalised_average_accuracy,
)
from sstmerge.evaluation.metrics.paired_tests import McNemar, mcnemar, paired_permutation
from sstmerge.evaluation.metrics.resampling import Interval, bootstrap, difference_of_means
from sstmerge.evaluation.metrics.trade_off import (
    Curve,
    curve_area,
    hypervolume,
    pareto_front,
    safety_at_utility,
    safety_tax,
    utility_at_safety,
)

__all__ = [
    "Balance",
    "Curve",
    "Interval",
    "McNemar",
    "balance",
    "bootstrap",
    "correlation",
    "curve_area",
    "difference_of_means",
    "drift_reduction",
    "hypervolume",
    "mcnemar",
    "normalised",
    "normalised_average_accuracy",
    "paired_permutation",
    "pareto_front",
    "safety_at_utility",
    "safety_tax",
    "utility_at_safety",
]
