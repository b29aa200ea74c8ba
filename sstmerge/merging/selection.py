"""Choosing directions of a spectrum, across all layers at once: λ has one unit everywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sstmerge.errors import InputError

# Values per row in the search for the largest.
_ROW = 1024


@dataclass(frozen=True)
class Selection:
    """Which directions of the safety adapter are kept; at most one of `top`, `fraction` and `energy`.

    Attributes:
        top: Number of directions of largest λ.
        fraction: Share of all directions of the space, of largest λ, in (0, 1].
        energy: Share of the safety adapter's gain energy Σ λ_i c_i² that the kept directions must hold, in (0, 1].
        mu: Shrinkage μ >= 0 of the `wiener` and `joint` rules, in units of λ.
        exponent: Power β > 0 of the weights of `wiener`, (λ / (λ + μ))^β, the parametric Wiener filter (Lim and Oppenheim
            1979, https://doi.org/10.1109/PROC.1979.11540). Above 1 it leaves less of directions of small λ: on prompts that
            no Fisher has seen, the gain per cost rises, and the scale has to rise with it.
        budget: Predicted KL divergence on benign data, in nats per response token, that the merge spends; that of
            `MergeReport.predicted_kl`, with all that it leaves out.
    """

    top: int | None = None
    fraction: float | None = None
    energy: float | None = None
    mu: float | None = None
    budget: float | None = None
    exponent: float = 1.0

    def __post_init__(self) -> None:
        given = [name for name in ("top", "fraction", "energy") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"Give one of top, fraction and energy; got {' and '.join(given)}.")
        if self.top is not None and self.top < 1:
            raise InputError(f"top must be at least 1, but is {self.top}.")
        for name in ("fraction", "energy"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise InputError(f"{name} must lie in (0, 1], but is {value}.")
        if self.mu is not None and not 0.0 <= self.mu < math.inf:
            raise InputError(f"mu must be a finite number >= 0, but is {self.mu}.")
        if not 0.0 < self.exponent < math.inf:
            raise InputError(f"exponent must be a positive finite number, but is {self.exponent}.")
        if self.budget is not None and not 0.0 < self.budget < math.inf:
            raise InputError(f"budget must be a positive number of nats per token, but is {self.budget}.")

    @property
    def counts_directions(self) -> bool:
        """Whether a number of directions is asked for, in one way or another."""
        return self.top is not None or self.fraction is not None or self.energy is not None


def efficiency_order(eigenvalues: Tensor) -> Tensor:
    """Return the indices of the directions by falling λ, shape (m,); ties keep their order."""
    return torch.argsort(eigenvalues, descending=True, stable=True)


def select(selection: Selection, eigenvalues: Tensor, coordinates: Tensor, dimension: int) -> Tensor:
    """Return which directions are kept.

    Args:
        selection: The user's choice; without top, fraction or energy every direction is kept.
        eigenvalues: λ, shape (m,).
        coordinates: The safety adapter's coordinates c, shape (m,).
        dimension: Dimension D of the space, which `fraction` refers to.

    Returns:
        1 for kept directions and 0 for others, shape (m,), float64.

    Raises:
        InputError: If more directions are asked for than there are, or the gain energy is zero.
    """
    count = len(eigenvalues)
    if selection.top is not None:
        if selection.top > count:
            raise InputError(
                f"top asks for {selection.top} directions, but these Fishers have {count} with a λ; give at most that."
            )
        kept = selection.top
    elif selection.fraction is not None:
        # `global` lists at most as many directions as there are gain samples; the others have λ = 0.
        kept = min(count, math.ceil(selection.fraction * dimension))
    elif selection.energy is not None:
        cumulative = (eigenvalues * coordinates.square())[efficiency_order(eigenvalues)].cumsum(0)
        if not len(cumulative) or not float(cumulative[-1]) > 0:
            raise InputError("The safety adapter has no gain energy: no direction with λ > 0 has a part in it.")
        reached = cumulative >= selection.energy * cumulative[-1] * (1 - 1e-12)
        kept = int(reached.to(torch.int8).argmax()) + 1
    else:
        kept = count
    return most_efficient(eigenvalues, kept)


def largest(values: Tensor, count: int) -> Tensor:
    """Return the `count` largest of many values, shape (n,), falling, shape (count,)."""
    return _among_the_largest(values, count).topk(count).values


def _among_the_largest(values: Tensor, count: int) -> Tensor:
    """Return values (n,) without most of those that are not among the `count` largest, where few are asked for.

    In rows, they lie in the `count` rows of the largest maxima: one quick pass instead of a search among all.
    """
    rows = len(values) // _ROW
    if rows <= 2 * count:
        return values
    table = values[: rows * _ROW].view(rows, _ROW)
    best = table[table.amax(dim=1).topk(count).indices]
    return torch.cat([best.flatten(), values[rows * _ROW :]])


def most_efficient(eigenvalues: Tensor, kept: int) -> Tensor:
    """Return 1 for the `kept` largest λ, of equal ones the first, and 0 for others, without sorting all of them.

    Args:
        eigenvalues: λ, shape (m,).
        kept: Number of directions, at most m.

    Returns:
        The weights, shape (m,), of the eigenvalues' dtype.
    """
    if kept in (0, len(eigenvalues)):
        return torch.full_like(eigenvalues, float(kept > 0))
    smallest = _among_the_largest(eigenvalues, kept).topk(kept, sorted=False).values.min()
    mask = (eigenvalues > smallest).to(eigenvalues.dtype)
    ties = (eigenvalues == smallest).nonzero().squeeze(1)
    mask[ties[: kept - int(mask.sum())]] = 1.0
    return mask


def shrinkage(eigenvalues: Tensor, mu: float, exponent: float = 1.0) -> Tensor:
    """Return the weights (λ / (λ + μ))^β of the parametric Wiener filter, shape (m,); 1 for μ = 0."""
    if mu == 0.0:
        return torch.ones_like(eigenvalues)
    weights = eigenvalues / (eigenvalues + mu)
    return weights if exponent == 1.0 else weights.pow(exponent)
