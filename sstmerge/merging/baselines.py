"""Data-free rivals in core coordinates, as pure functions of cores.

All of them act on exact weight changes, so that results do not depend on how a weight change is split into factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sstmerge.adapters import CoreSpace
from sstmerge.errors import InputError


def task_arithmetic(cores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Σ w_t φ_t, shape (D,) (Ilharco et al. 2023, https://arxiv.org/abs/2212.04089)."""
    return sum((w * core for w, core in zip(weights, cores, strict=True)), torch.zeros_like(cores[0]))


def dare(cores: Sequence[Tensor], weights: Sequence[float], *, drop_rate: float, seed: int) -> Tensor:
    """Drop core entries at random, rescale the others by 1 / (1 − p), and add.

    DARE (Yu et al. 2024, https://arxiv.org/abs/2311.03099) on core entries instead of weight entries; unbiased all the same.

    Args:
        cores: Coordinates of the adapters, each (D,).
        weights: Weight of each.
        drop_rate: Probability p of dropping an entry, in [0, 1).
        seed: Seed of the random numbers.

    Returns:
        Coordinates, shape (D,).

    Raises:
        InputError: If the drop rate is out of range.
    """
    if not 0.0 <= drop_rate < 1.0:
        raise InputError(f"drop_rate must lie in [0, 1), but is {drop_rate}.")
    generator = torch.Generator().manual_seed(seed)
    dropped = []
    for core in cores:
        kept = torch.rand(core.shape, generator=generator) >= drop_rate
        dropped.append(core * kept / (1.0 - drop_rate))
    return task_arithmetic(dropped, weights)


def ties(space: CoreSpace, cores: Sequence[Tensor], weights: Sequence[float], *, density: float) -> Tensor:
    """Trim each core to its largest entries, elect signs, and average the entries that agree.

    TIES (Yadav et al. 2023, https://arxiv.org/abs/2306.01708) on core entries; trimmed per layer, signs elected by the
    sum of weighted entries, as in PEFT.

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
    weighted = torch.stack([w * _trim(space, core, density) for w, core in zip(weights, cores, strict=True)])
    sign = weighted.sum(dim=0).sign()
    agrees = (weighted.sign() == sign) & (weighted != 0)
    return (weighted * agrees).sum(dim=0) / agrees.sum(dim=0).clamp_min(1)


def _trim(space: CoreSpace, core: Tensor, density: float) -> Tensor:
    parts = []
    for part in space.split(core):
        flat = part.flatten(1)
        kept = max(1, round(density * flat.shape[1]))
        threshold = flat.abs().kthvalue(flat.shape[1] - kept + 1, dim=1, keepdim=True).values
        parts.append(torch.where(flat.abs() >= threshold, flat, 0.0).unflatten(1, part.shape[1:]))
    return space.join(parts)
