"""A sweep of one method as a curve of safety against utility, and what can be read off it.

Safety and utility are shares in which more is better. The points of a curve are in the order of the sweep, and between
two neighbouring points it is taken to be straight: a finer sweep would have found points about there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sstmerge.errors import DataError


@dataclass(frozen=True)
class Curve:
    """The points of a sweep, in its order.

    Attributes:
        safety: Safety of each point, such as the share of harmful prompts refused.
        utility: Utility of each point, such as mean accuracy.
    """

    safety: tuple[float, ...]
    utility: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "safety", tuple(map(float, self.safety)))
        object.__setattr__(self, "utility", tuple(map(float, self.utility)))
        if not self.safety or len(self.safety) != len(self.utility):
            raise DataError(
                "A curve needs at least one point, and one safety for each utility; got "
                f"{len(self.safety)} and {len(self.utility)} values."
            )
        for name in ("safety", "utility"):
            for position, value in enumerate(getattr(self, name)):
                if not math.isfinite(value):
                    raise DataError(f"The {name} of point {position} is {value}; leave out points without a number.")

    @property
    def points(self) -> list[tuple[float, float]]:
        """The points (safety, utility)."""
        return list(zip(self.safety, self.utility, strict=True))

    def segments(self) -> list[tuple[tuple[float, float], tuple[float, float]]]:
        """Return the pairs of neighbouring points; a curve of one point is a segment of no length."""
        points = self.points
        return list(itertools.pairwise(points if len(points) > 1 else [*points, *points]))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other point beats in both, by rising safety; equal points once.

    Args:
        points: Pairs (safety, utility), more is better.

    Returns:
        The front: safety rises and utility falls strictly.
    """
    front: list[tuple[float, float]] = []
    for safety, utility in sorted(set(points), reverse=True):
        if not front or utility > front[-1][1]:
            front.append((safety, utility))
    return front[::-1]


def hypervolume(curve: Curve, *, reference: tuple[float, float] = (0.0, 0.0)) -> float:
    """Return the area that the points of a curve dominate (Zitzler and Thiele 1998), between them and a reference.

    Only measured points count; nothing is interpolated.

    Args:
        curve: The curve.
        reference: The fixed point (safety, utility) that is no better than any other; the same for all methods. Points
            below it in one of the two add nothing.

    Returns:
        The area, (1 − r_s)(1 − r_u) at most where both are shares.

    Raises:
        DataError: If the reference is not finite.
    """
    if not all(map(math.isfinite, reference)):
        raise DataError(f"The reference point must be finite, got {reference}.")
    area, covered = 0.0, reference[0]
    for safety, utility in pareto_front([p for p in curve.points if p[0] > reference[0] and p[1] > reference[1]]):
        area += (safety - covered) * (utility - reference[1])
        covered = safety
    return area


def utility_at_safety(curve: Curve, safety: float) -> float | None:
    """Return the highest utility on a curve at which safety is at least a value.

    Args:
        curve: The curve.
        safety: The safety that must be reached.

    Returns:
        The utility; None where the curve never reaches that safety.

    Raises:
        DataError: If the safety is not finite.
    """
    if not math.isfinite(safety):
        raise DataError(f"The safety to be reached must be finite, got {safety}.")
    return _highest(curve.segments(), safety)


def safety_at_utility(curve: Curve, reference_utility: float, *, share: float = 0.95) -> float | None:
    """Return the highest safety on a curve at which utility is at least a share of a reference's.

    Args:
        curve: The curve.
        reference_utility: Utility of the utility expert.
        share: 0.95 and 0.99 are usual.

    Returns:
        The safety; None where the curve never has that much utility.

    Raises:
        DataError: If the share is not in (0, 1], or the reference utility is not positive.
    """
    if not 0 < share <= 1:
        raise DataError(f"The share of the reference utility must be in (0, 1], got {share}.")
    if not (math.isfinite(reference_utility) and reference_utility > 0):
        raise DataError(f"The reference utility must be positive, got {reference_utility}.")
    swapped = [((u0, s0), (u1, s1)) for (s0, u0), (s1, u1) in curve.segments()]
    return _highest(swapped, share * reference_utility)


def safety_tax(curve: Curve, reference_utility: float, *, safety: float) -> float | None:
    """Return the Safety Tax at matched safety: U(utility expert) − U(method at that safety).

    The name is that of Huang et al. (2503.00555); there it is a loss of reasoning accuracy, here of any utility.

    Args:
        curve: The sweep of a method.
        reference_utility: Utility of the utility expert.
        safety: The safety at which methods are compared.

    Returns:
        The tax in units of utility, negative where the method is more useful than the expert; None where the curve
        never reaches that safety.

    Raises:
        DataError: If the reference utility or the safety is not finite.
    """
    if not math.isfinite(reference_utility):
        raise DataError(f"The reference utility must be finite, got {reference_utility}.")
    utility = utility_at_safety(curve, safety)
    return None if utility is None else reference_utility - utility


def curve_area(curve: Curve, *, safety_range: tuple[float, float] = (0.0, 1.0)) -> float:
    """Return the mean over a range of safety of the highest utility at that safety (0 where it is not reached).

    Unlike the hypervolume it interpolates, so that a coarse sweep of a smooth curve does not lose its steps.

    Args:
        curve: The curve.
        safety_range: The range, the same for all methods.

    Returns:
        (1 / (s₁ − s₀)) ∫ U(s) ds, exactly: U is piecewise linear.

    Raises:
        DataError: If the range is empty or not finite.
    """
    low, high = safety_range
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise DataError(f"The range of safety must rise from a finite value to another, got {safety_range}.")
    # U is linear between its breaks: ends of segments, and where two segments or a segment and a level cross.
    breaks = sorted({low, high, *(s for s in _breaks(curve) if low < s < high)})
    area = 0.0
    for left, right in itertools.pairwise(breaks):
        # Two inner points of a linear piece give its mean, whatever jumps there are at its ends.
        inner = [left + share * (right - left) for share in (0.25, 0.75)]
        values = [utility_at_safety(curve, s) or 0.0 for s in inner]
        area += (right - left) * sum(values) / 2
    return area / (high - low)


def _highest(segments: Sequence[tuple[tuple[float, float], tuple[float, float]]], least: float) -> float | None:
    """Return the largest second coordinate on the segments where the first one is at least `least`."""
    found: list[float] = []
    for (x0, y0), (x1, y1) in segments:
        found += [y for x, y in ((x0, y0), (x1, y1)) if x >= least]
        if min(x0, x1) < least < max(x0, x1):
            found.append(y0 + (least - x0) / (x1 - x0) * (y1 - y0))
    return max(found, default=None)


def _breaks(curve: Curve) -> Iterator[float]:
    segments = curve.segments()
    yield from curve.safety
    for level in curve.utility:
        for (s0, u0), (s1, u1) in segments:
            if min(u0, u1) < level < max(u0, u1):
                yield s0 + (level - u0) / (u1 - u0) * (s1 - s0)
    for ((a0, b0), (a1, b1)), ((c0, d0), (c1, d1)) in itertools.combinations(segments, 2):
        determinant = (a1 - a0) * (d1 - d0) - (b1 - b0) * (c1 - c0)
        if determinant:
            share = ((c0 - a0) * (d1 - d0) - (d0 - b0) * (c1 - c0)) / determinant
            if 0 < share < 1:
                yield a0 + share * (a1 - a0)
