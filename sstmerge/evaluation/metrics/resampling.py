"""Bootstrap intervals over prompts and seeds, paired across everything that saw the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sstmerge.errors import DataError, InputError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Interval:
    """An estimate with a percentile bootstrap interval (Efron 1979).

    Attributes:
        estimate: The statistic of the data themselves.
        low: Lower end.
        high: Upper end.
        level: Share of resamples between the ends.
        undefined: Resamples in which the statistic had no value (None or NaN); they are left out of the ends.
        resamples: Number of resamples drawn.
    """

    estimate: float
    low: float
    high: float
    level: float
    undefined: int
    resamples: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero is outside the interval; of a difference: whether it is significant at 1 − level."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        """Return the interval as "0.62 [0.52, 0.71]"."""
        return f"{self.estimate:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def to_json(self) -> dict[str, Any]:
        """Return the interval as plain JSON values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def bootstrap(
    statistic: Callable[[Mapping[str, Array]], float | None],
    samples: Mapping[str, Array],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Bootstrap a statistic over prompts and, where there are several, over seeds.

    Prompts of a set and seeds are drawn with replacement, independently of each other (crossed clusters: a prompt that is
    drawn is drawn for all seeds, points and methods, and a seed with all its prompts). Comparisons of methods are thereby
    paired. One seed only: the interval then speaks of prompts, not of training.

    Few seeds: where seeds differ more than prompts do, the interval is too narrow; look at the seeds one by one as well.
    In simulations of three seeds and 48 prompts, whose share in the standard deviation of the mean was .043, an interval
    of 95 % covered .92 to .99 at a standard deviation of .05 between seeds (the less, the more the seeds have the prompts'
    difficulty in common), .83 to .90 at .15, and .75 where seeds dominate: it then spans the lowest to the highest seed.

    Args:
        statistic: Of arrays by name to a number; None or NaN where it has no value.
        samples: Outcomes by prompt set, each of shape (..., seeds, prompts), such as (methods, scales, seeds, prompts);
            the number of seeds is the same in all.
        resamples: Number of resamples.
        level: Level of the interval.
        seed: Seed of the draws.

    Returns:
        The estimate and its interval.

    Raises:
        InputError: If `resamples` or `level` is out of range.
        DataError: If there are no data, a number is not finite, the numbers of seeds differ, or the statistic has no
            value on the data or on more than half of the resamples.
    """
    if resamples < 1 or not 0 < level < 1:
        raise InputError(f"resamples must be at least 1 and the level in (0, 1), got {resamples} and {level}.")
    arrays = {name: np.asarray(values) for name, values in samples.items()}
    seeds = _number_of_seeds(arrays)
    estimate = _number(statistic(arrays))
    if np.isnan(estimate):
        raise DataError(
            "The statistic has no value on the data themselves; there is nothing to put an interval around."
        )
    rng = np.random.default_rng(seed)
    values = np.array([_number(statistic(_resampled(arrays, seeds, rng))) for _ in range(resamples)])
    undefined = int(np.isnan(values).sum())
    if 2 * undefined > resamples:
        raise DataError(
            f"The statistic has no value on {undefined} of {resamples} resamples; an interval would mislead."
        )
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), level, undefined, resamples)


def _resampled(arrays: Mapping[str, Array], seeds: int, rng: np.random.Generator) -> dict[str, Array]:
    drawn = rng.integers(seeds, size=seeds)
    found = {}
    for name, array in arrays.items():
        prompts = rng.integers(array.shape[-1], size=array.shape[-1])
        found[name] = array[..., drawn, :][..., prompts]
    return found


def _number_of_seeds(arrays: Mapping[str, Array]) -> int:
    if not arrays:
        raise DataError("There are no samples to draw from.")
    for name, array in arrays.items():
        if array.ndim < 2 or not array.size:
            raise DataError(f"The sample '{name}' must have the shape (..., seeds, prompts), got {array.shape}.")
        if not np.isfinite(array.astype(float)).all():
            raise DataError(f"The sample '{name}' holds a number that is not finite; leave such prompts out of all.")
    seeds = {int(array.shape[-2]) for array in arrays.values()}
    if len(seeds) > 1:
        raise DataError(f"All samples need the same seeds, got {sorted(seeds)} of them.")
    return seeds.pop()


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def difference_of_means(first: Sequence[float] | Array, second: Sequence[float] | Array, **options: Any) -> Interval:
    """Bootstrap the mean paired difference of two models on the same prompts (and seeds).

    Args:
        first: Outcomes of one model, shape (prompts,) or (seeds, prompts).
        second: Outcomes of the other, in the same order.
        options: `resamples`, `level` and `seed` of `bootstrap`.

    Returns:
        The interval of mean(first − second).

    Raises:
        DataError: If the shapes differ.
    """
    one, other = np.atleast_2d(np.asarray(first, float)), np.atleast_2d(np.asarray(second, float))
    if one.shape != other.shape:
        raise DataError(f"A paired difference needs the same prompts for both, got {one.shape} and {other.shape}.")
    return bootstrap(lambda arrays: float(arrays["difference"].mean()), {"difference": one - other}, **options)
