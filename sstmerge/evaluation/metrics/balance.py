"""Single numbers of one model or sweep: balance in the plane of safety and performance, drift, correlation, accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from sstmerge.errors import DataError


@dataclass(frozen=True)
class Balance:
    """A point of the plane of normalised performance (across) and safety (up).

    Attributes:
        performance: 0 at the worst, 1 at the best reference.
        safety: The same for safety.
        distance: Euclidean distance to the ideal point (1, 1). This is the number to compare by.
        angle: arctan(safety / performance) in degrees; 45 where both are equal. A guide only: (0.1, 0.1) is at 45°, too.
            None at the origin.
    """

    performance: float
    safety: float
    distance: float
    angle: float | None


def normalised(value: float, *, worst: float, best: float) -> float:
    """Return (value − worst) / (best − worst); outside [0, 1] where the value is outside the references.

    Args:
        value: What was measured.
        worst: Value of the reference that counts as 0, such as the base model's refusal.
        best: Value of the reference that counts as 1, such as the safety expert's refusal.

    Returns:
        The normalised value.

    Raises:
        DataError: If a number is not finite, or both references are equal.
    """
    _refuse_not_finite({"value": value, "worst": worst, "best": best})
    if worst == best:
        raise DataError(f"The two references are equal ({worst}): between them nothing can be told apart.")
    return (value - worst) / (best - worst)


def balance(performance: float, safety: float) -> Balance:
    """Place a model in the plane whose diagonal is the "45° line".

    Args:
        performance: Normalised performance.
        safety: Normalised safety.

    Returns:
        The point, its distance to (1, 1) and its angle.

    Raises:
        DataError: If a number is not finite.
    """
    _refuse_not_finite({"performance": performance, "safety": safety})
    angle = None if performance == safety == 0 else math.degrees(math.atan2(safety, performance))
    return Balance(performance, safety, math.hypot(1 - performance, 1 - safety), angle)


def drift_reduction(drift: float, reference_drift: float) -> float:
    """Return 1 − drift / drift_ref: 1 where nothing drifts, 0 where as much does as in the reference, negative for more.

    Args:
        drift: Alignment drift of a method (`sstmerge.evaluation.drift`).
        reference_drift: Alignment drift of the reference, such as plain LoRA fine-tuning or task arithmetic.

    Returns:
        The reduction.

    Raises:
        DataError: If a drift is not finite or negative, or the reference does not drift.
    """
    _refuse_not_finite({"drift": drift, "reference drift": reference_drift})
    if drift < 0 or reference_drift <= 0:
        raise DataError(
            f"Drifts are not negative, and the reference must drift to be compared with; got {drift} and {reference_drift}."
        )
    return 1 - drift / reference_drift


def correlation(
    safety: Sequence[float], utility: Sequence[float], *, kind: Literal["pearson", "spearman"] = "pearson"
) -> tuple[float, float]:
    """Return the correlation of safety and utility over the points of a sweep, and its two-sided p-value.

    Points of one sweep share prompts and neighbours, so the p-value is a description, not a test.

    Args:
        safety: Safety of each point.
        utility: Utility of each point.
        kind: "pearson" (straight line) or "spearman" (ranks).

    Returns:
        Coefficient and p-value.

    Raises:
        DataError: If there are fewer than three points, a number is not finite, or all safeties or utilities are equal.
    """
    if len(safety) != len(utility) or len(safety) < 3:
        raise DataError(f"A correlation needs three points or more, got {len(safety)} and {len(utility)} values.")
    for name, values in (("safety", safety), ("utility", utility)):
        _refuse_not_finite({f"{name} of point {position}": value for position, value in enumerate(values)})
        if len(set(values)) == 1:
            raise DataError(f"The {name} is {values[0]} at every point: there is nothing to correlate.")
    if kind not in ("pearson", "spearman"):
        raise DataError(f"The correlation is 'pearson' or 'spearman', not '{kind}'.")
    result = stats.pearsonr(safety, utility) if kind == "pearson" else stats.spearmanr(safety, utility)
    return float(result.statistic), float(result.pvalue)


def normalised_average_accuracy(merged: Mapping[str, float], experts: Mapping[str, float]) -> float:
    """Return the mean over tasks of accuracy(merged) / accuracy(expert of the task) (Ilharco et al., 2212.04089).

    Args:
        merged: Accuracy of the merged model by task.
        experts: Accuracy of each task's own expert.

    Returns:
        The mean ratio; 1 where merging costs nothing.

    Raises:
        DataError: If the tasks differ or there are none, a number is not finite, or an expert has accuracy 0.
    """
    if not merged or merged.keys() != experts.keys():
        raise DataError(f"Both need the same tasks, at least one; got {sorted(merged)} and {sorted(experts)}.")
    _refuse_not_finite({f"accuracy on {task}": value for task, value in (*merged.items(), *experts.items())})
    if failed := sorted(task for task, accuracy in experts.items() if accuracy <= 0):
        raise DataError(f"The experts of {failed} are never right; a share of that cannot be taken.")
    return sum(merged[task] / experts[task] for task in merged) / len(merged)


def _refuse_not_finite(numbers: Mapping[str, float]) -> None:
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise DataError(f"The {name} is {value}; expected a finite number.")
