"""Data-free rivals in core coordinates, as pure functions of cores.

All of them act on exact weight changes, so that results do not depend on how a weight change is split into factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sstmerge import ops
from sstmerge.adapters import CoreSpace
from sstmerge.errors import InputError


def task_arithmetic(cores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Σ w_t φ_t, shape (D,) (Ilharco et al. 2023, https://arxiv.org/abs/2212.04089)."""
    return sum((w * core for w, core in zip(weights, cores, strict=True)), torch.zeros_like(cores[0]))


def dare(cores: Sequence[Tensor], weights: Sequence[float], *, drop_rate: float, seed: int) -> Tensor:
    """Drop core entries at random, rescale the others by 1 / (1 − p), and add.

    DARE (Yu et al. 2024, https://arxiv.org/abs/2311.03099) on core entries instead of weight entries; unbiased all the same.
    Which entries are kept depends on the seed, the adapter's place and the entry alone, on every device.

    Args:
        cores: Coordinates of the adapters, each (D,).
        weights: Weight of each.
        drop_rate: Probability p of dropping an entry, in [0, 1).
        seed: Seed of the random numbers, from 0 to 2⁶⁴ − 1.

    Returns:
        Coordinates, shape (D,).

    Raises:
        InputError: If the drop rate or the seed is out of range.
    """
    if not 0.0 <= drop_rate < 1.0:
        raise InputError(f"drop_rate must lie in [0, 1), but is {drop_rate}.")
    dropped = ops.dare(list(cores), 1.0 - drop_rate, seed)
    return task_arithmetic(dropped, weights)


def ties(space: CoreSpace, cores: Sequence[Tensor], weights: Sequence[float], *, density: float) -> Tensor:
    """Trim each core to its largest entries, elect signs, and average the entries that agree.

    TIES (Yadav et al. 2023, https://arxiv.org/abs/2306.01708) on core entries, trimmed per layer. Unlike in PEFT, weights
    are applied before signs are elected, so that a negative weight turns its adapter's votes; where the weighted
    entries cancel exactly, the positive ones win, as there.

    Args:
        space: The space of the cores.
        cores: Coordinates of the adapters, each (D,).
        weights: Weight of each.
        density: Share of entries of every layer that is kept, in (0, 1].

    Returns:
        Coordinates, shape (D,).

    Raises:
        InputError: If the density is out of range.
    """
    if not 0.0 < density <= 1.0:
        raise InputError(f"density must lie in (0, 1], but is {density}.")
    tasks = [_layers(space, w * core) for w, core in zip(weights, cores, strict=True)]
    merged = ops.ties(tasks, [1.0] * len(tasks), density)
    return torch.cat([layer.flatten() for layer in merged])


def _layers(space: CoreSpace, core: Tensor) -> list[Tensor]:
    return [layer for part in space.split(core) for layer in part]
