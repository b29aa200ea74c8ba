"""Tests of two models on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from sstmerge.errors import DataError, InputError

Array = npt.NDArray[np.float64]
EXACT_UP_TO = 14
"""Clusters up to which all sign changes are tried (2^14 of them) instead of random ones."""


@dataclass(frozen=True)
class McNemar:
    """McNemar's exact test (1947).

    Attributes:
        only_first: Prompts of which the first model is right and the second wrong.
        only_second: The other way round.
        p_value: Two-sided, of a fair coin over those prompts; 1 where there are none.
    """

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Compare two models by the prompts of which only one is right.

    Args:
        first: Whether the first model is right, for each prompt.
        second: The same of the second, in the same order. One prompt may appear once only: several seeds of one prompt are
            not independent (use `paired_permutation` with clusters).

    Returns:
        The counts and the exact binomial p-value.

    Raises:
        DataError: If there are no prompts, different numbers of them, or something is neither right (1) nor wrong (0).
    """
    one, other = _paired(first, second)
    for value in (*one, *other):
        if value not in (0, 1):
            raise DataError(
                f"Each prompt is right (True or 1) or wrong (False or 0), got {value}; leave it out of both."
            )
    only_first, only_second = int((one > other).sum()), int((other > one).sum())
    different = only_first + only_second
    p_value = float(stats.binomtest(only_first, different).pvalue) if different else 1.0
    return McNemar(only_first, only_second, p_value)


def paired_permutation(
    first: Sequence[float],
    second: Sequence[float],
    *,
    clusters: Sequence[Any] | None = None,
    permutations: int = 10_000,
    seed: int = 0,
) -> float:
    """Test whether the mean paired difference is zero, by swapping the two models (Fisher 1935).

    Args:
        first: Outcomes of the first model.
        second: Outcomes of the second, in the same order.
        clusters: What each outcome belongs to, such as its prompt where there are several seeds; outcomes of a cluster are
            swapped together. None: every outcome is its own cluster.
        permutations: Random swaps, where there are more than 14 clusters; with fewer all swaps are tried.
        seed: Seed of the swaps.

    Returns:
        The two-sided p-value; of random swaps (1 + as extreme ones) / (1 + permutations), which is never 0.

    Raises:
        DataError: If there are no outcomes, different numbers of them, or one is not finite.
        InputError: If `permutations` is below 1.
    """
    one, other = _paired(first, second)
    if permutations < 1:
        raise InputError(f"permutations must be at least 1, got {permutations}.")
    differences = one - other
    if not np.isfinite(differences).all():
        raise DataError("An outcome is not finite; leave the prompt out of both models.")
    if clusters is not None and len(clusters) != len(differences):
        raise DataError(f"There are {len(clusters)} clusters for {len(differences)} outcomes; give one for each.")
    names = range(len(differences)) if clusters is None else clusters
    sums: dict[Any, float] = {}
    for name, difference in zip(names, differences, strict=True):
        sums[name] = sums.get(name, 0.0) + float(difference)
    totals = np.array(list(sums.values()))
    # Rounding must not make a swap of equal size look smaller.
    observed = abs(totals.sum()) - 1e-12 * (1 + np.abs(totals).sum())
    if len(totals) <= EXACT_UP_TO:
        return float((np.abs(_all_signs(len(totals)) @ totals) >= observed).mean())
    rng = np.random.default_rng(seed)
    extreme = sum(
        abs(float((1 - 2 * rng.integers(2, size=len(totals))) @ totals)) >= observed for _ in range(permutations)
    )
    return (1 + int(extreme)) / (1 + permutations)


def _all_signs(count: int) -> npt.NDArray[np.int64]:
    """Return every choice of signs, (2^count, count)."""
    return 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)


def _paired(first: Sequence[float], second: Sequence[float]) -> tuple[Array, Array]:
    """Return the outcomes of both models, each (outcomes,) float64."""
    one, other = np.asarray(first, float), np.asarray(second, float)
    if one.ndim != 1 or one.shape != other.shape or not one.size:
        raise DataError(
            f"A paired test needs the same prompts for both, each in one row, got the shapes {one.shape} and "
            f"{other.shape}; put several seeds into one row, and each outcome's prompt into the `clusters` of "
            "paired_permutation."
        )
    return one, other
