"""What is to be merged, checked before the first layer is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sstmerge.adapters import Adapter
from sstmerge.adapters.adapter import check_names, check_same_base, common_dtype, natural_order
from sstmerge.adapters.basis import stackable_layers
from sstmerge.errors import InputError
from sstmerge.merging.methods.aligned_pair import AlignedPair
from sstmerge.merging.methods.registry import Method, Need
from sstmerge.merging.methods.statistics import FisherStatistics, GainAndCost

# What each need is met by.
_STATISTICS: dict[Need, type] = {
    "fishers": FisherStatistics,
    "gain": GainAndCost,
    "gain_and_cost": GainAndCost,
    "aligned_pair": AlignedPair,
}


@dataclass(frozen=True)
class Task:
    """What is merged, checked.

    Attributes:
        method: The method.
        adapters: The adapters.
        weights: One weight per adapter.
        options: A value for every option of the method.
        rank: Rank of the result; None where it is what a lossless result takes.
        dtype: Dtype of the result.
        seed: Seed of whatever is random.
        safety: Index of the safety adapter.
        statistics: What the method needs beside the adapters.
    """

    method: Method
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    options: Mapping[str, Any]
    rank: int | None
    dtype: torch.dtype
    seed: int
    safety: int | None = None
    statistics: Any = None

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Module paths of all layers that some adapter has, in natural order."""
        return tuple(sorted({path for adapter in self.adapters for path in adapter.layers}, key=natural_order))


def plan(
    method: Method,
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    safety: str | None = None,
    statistics: Any = None,
    ignore_base_name: bool = False,
) -> Task:
    """Check everything that can be checked before the first layer is merged.

    Args:
        method: The method.
        adapters: The adapters, with distinct names.
        weights: One weight per adapter; 1 by default.
        options: Values of the method's options, by name.
        rank: Rank of the result; the method's default where None.
        dtype: Dtype of the result; the widest among the adapters where None.
        seed: Seed of whatever is random; 0 where None.
        safety: Name of the safety adapter.
        statistics: What the method needs beside the adapters (`sstmerge.merging.methods.statistics`, `aligned_pair`).
        ignore_base_name: Accept adapters whose recorded base models differ by name.

    Returns:
        The task.

    Raises:
        InputError: Something does not fit; the message says what.
    """
    check_names(adapters)
    check_same_base(adapters, ignore_base_name=ignore_base_name)
    weights = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(adapters):
        raise InputError(f"Expected one weight per adapter ({len(adapters)}), but got {len(weights)}: {weights}.")
    if not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"The weights must be finite numbers, but are {weights}.")
    index = _safety_index(method, adapters, safety)
    _check_statistics(method, adapters, statistics)
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(f"The dtype of an adapter must be a floating-point one, but is {dtype}.")
    return Task(
        method=method,
        adapters=tuple(adapters),
        weights=tuple(weights),
        options=_with_seed(method, options or {}, seed),
        rank=_rank(method, adapters, rank),
        dtype=dtype or common_dtype(adapters),
        seed=_checked_seed(seed),
        safety=index,
        statistics=statistics,
    )


def _safety_index(method: Method, adapters: Sequence[Adapter], safety: str | None) -> int | None:
    names = [adapter.name for adapter in adapters]
    if (safety is None) == ("safety" in method.needs):
        wants = "needs to know which adapter is the safety adapter" if safety is None else "knows no safety adapter"
        raise InputError(f"Method '{method.name}' {wants} (safety=, --safety); the adapters are {names}.")
    if safety is not None and safety not in names:
        raise InputError(f"The safety adapter '{safety}' is none of the adapters {names}.")
    return None if safety is None else names.index(safety)


def _check_statistics(method: Method, adapters: Sequence[Adapter], statistics: Any) -> None:
    kinds = [_STATISTICS[need] for need in method.needs if need != "safety"]
    if not kinds and statistics is not None:
        raise InputError(f"Method '{method.name}' needs no statistics, but {type(statistics).__name__} was given.")
    for kind in kinds:
        if not isinstance(statistics, kind):
            given = "none" if statistics is None else type(statistics).__name__
            raise InputError(f"Method '{method.name}' needs statistics of type {kind.__name__}, but got {given}.")
    if isinstance(statistics, FisherStatistics | GainAndCost):
        theirs, names = {a.name for a in statistics.space.adapters}, {a.name for a in adapters}
        if theirs != names:
            raise InputError(
                f"The Fishers were collected for the adapters {sorted(theirs)}, but {sorted(names)} are merged; load them "
                "with exactly these adapters."
            )


def _with_seed(method: Method, options: Mapping[str, Any], seed: int | None) -> dict[str, Any]:
    """Return the options with the seed of the merge, for methods that draw random numbers."""
    if seed is None or "seed" not in {option.name for option in method.options}:
        return method.resolve(options)
    if options.get("seed", seed) != seed:
        raise InputError(f"Two seeds were given, {seed} and the option seed={options['seed']}; give one of them.")
    return method.resolve({**options, "seed": seed})


def _rank(method: Method, adapters: Sequence[Adapter], rank: int | None) -> int | None:
    if method.acts_on == "factors" and rank is not None:
        raise InputError(f"The rank of '{method.name}' is that of its factors; leave it out, or merge by 'svd'.")
    if rank is None:
        largest = max(factors.rank for adapter in adapters for factors in adapter.layers.values())
        return largest if method.rank == "largest" else None
    possible = 1
    for (members, shape), _ in stackable_layers(adapters).items():
        together = sum(r for _, r in members) if method.acts_on == "core" else min(shape)
        possible = max(possible, min(together, *shape))
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= possible:
        raise InputError(
            f"The rank is {rank!r}, but what '{method.name}' makes of these adapters has rank {possible} at most; give a "
            f"rank from 1 to {possible}, or none."
        )
    return rank


def _checked_seed(seed: int | None) -> int:
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise InputError(f"seed must be an integer from 0 to 2**63 - 1, but is {seed!r}.")
    return seed or 0
