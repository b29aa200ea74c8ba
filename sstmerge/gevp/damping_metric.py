"""What `global` damps its cost with: a Kronecker-factored estimate of the same scores, not a multiple of the identity.

A few hundred sequences see a few hundred of D directions. In all others the cost is its damping, so the damping is a
prior, and the identity is a poor one: it says that a step costs the same in every layer and along every basis vector. The
marginals of the scores of a layer, L = E[ΓΓᵀ] (R_o, R_o) and R = E[ΓᵀΓ] (R_i, R_i), are known well from the same few
sequences (n R_i and n R_o samples), and K = R ⊗ L / tr L is the covariance with these marginals (the preconditioner of
Shampoo; Gupta et al. 2018, https://arxiv.org/abs/1802.09568). Shrinking a sample covariance towards a structured target is
Ledoit and Wolf (2004), https://doi.org/10.1016/S0047-259X(03)00096-4. What it gains on held-out prompts is in dev/LOG.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sstmerge.fisher import Fisher

DampingMetric = Literal["kronecker", "identity"]
# Multiple of the mean eigenvalue that is added to either factor: directions that no score has shown are not free.
_FACTOR_FLOOR = 0.1
# Smallest mean diagonal of a layer, as a multiple of that over all layers: layers that no score has shown are not, either.
_LAYER_FLOOR = 0.01


class Layers(NamedTuple):
    """Some consecutive layers of a group, and where their core entries are in a vector (D,)."""

    group: int
    layers: slice
    columns: slice
    shape: tuple[int, int, int]  # (l, R_o, R_i)


@dataclass(frozen=True)
class KroneckerMetric:
    """K, block diagonal over layers, as inverse roots of its factors.

    Attributes:
        left: L^{-1/2} of every group, (L, R_o, R_o), float64.
        right: R^{-1/2} of every group, (L, R_i, R_i), float64; K^{-1/2} Γ = left Γ right.
    """

    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]

    @classmethod
    def of(cls, cost: Fisher, entries: int) -> KroneckerMetric:
        """Estimate K from the scores of a `global` Fisher.

        Args:
            cost: The Fisher.
            entries: Entries that are converted to float64 at once.

        Returns:
            The metric; it has the unit and the trace of the Fisher, layer by layer.
        """
        scores = cost.statistics["scores"]
        lefts, rights = [], []
        for shape in (group.core_shape for group in cost.space.groups):
            lefts.append(scores.new_zeros(shape[0], shape[1], shape[1], dtype=torch.float64))
            rights.append(scores.new_zeros(shape[0], shape[2], shape[2], dtype=torch.float64))
        for part in layer_chunks(cost, len(scores), entries):
            chunk = scores[:, part.columns].double().view(-1, *part.shape)
            by_row, by_column = chunk.permute(1, 2, 0, 3).flatten(2), chunk.permute(1, 3, 0, 2).flatten(2)
            lefts[part.group][part.layers] = by_row @ by_row.mT / cost.tokens
            rights[part.group][part.layers] = by_column @ by_column.mT / cost.tokens
        means = [
            left.diagonal(dim1=1, dim2=2).sum(1) / (left.shape[1] * right.shape[1])
            for left, right in zip(lefts, rights, strict=True)
        ]
        floor = _LAYER_FLOOR * torch.cat(means).mean().clamp_min(torch.finfo(torch.float64).tiny)
        quarters = [mean.clamp_min(floor).pow(-0.25)[:, None, None] for mean in means]
        return cls(
            tuple(_inverse_root(left) * quarter for left, quarter in zip(lefts, quarters, strict=True)),
            tuple(_inverse_root(right) * quarter for right, quarter in zip(rights, quarters, strict=True)),
        )

    def whiten(self, scores: Tensor, part: Layers) -> Tensor:
        """Return K^{-1/2} Γ of scores (n, l R_o R_i), float64, with its entries in an order of its own."""
        rows = len(scores)
        _, outputs, inputs = part.shape
        layers = scores.view(rows, *part.shape).transpose(0, 1)  # (l, n, R_o, R_i)
        right = layers.reshape(-1, rows * outputs, inputs) @ self.right[part.group][part.layers]
        turned = right.view(-1, rows, outputs, inputs).mT.reshape(-1, rows * inputs, outputs)
        whole: Tensor = turned @ self.left[part.group][part.layers]
        return whole.view(-1, rows, inputs * outputs).transpose(0, 1).reshape(rows, -1)

    def inverse(self, vector: Tensor, cost: Fisher) -> Tensor:
        """Return K^{-1} v for v of shape (D,), float64."""
        solved = []
        for core, left, right in zip(cost.space.split(vector), self.left, self.right, strict=True):
            solved.append(left @ (left @ core @ right) @ right)
        return cost.space.join(solved)


def layer_chunks(fisher: Fisher, rows: int, entries: int) -> Iterator[Layers]:
    """Cut a space into pieces of whole layers.

    Args:
        fisher: A Fisher of the space.
        rows: Rows of the matrices that are cut.
        entries: Entries that a piece of them may have; one layer may have more.

    Yields:
        The pieces, in the order of the columns.
    """
    offset = 0
    for number, group in enumerate(fisher.space.groups):
        layers, outputs, inputs = group.core_shape
        size = outputs * inputs
        step = max(1, entries // max(1, rows * size))
        for start in range(0, layers, step):
            count = min(step, layers - start)
            columns = slice(offset + start * size, offset + (start + count) * size)
            yield Layers(number, slice(start, start + count), columns, (count, outputs, inputs))
        offset += layers * size


def _inverse_root(matrices: Tensor) -> Tensor:
    """Return M^{-1/2} for M, (L, n, n), normalised to a mean diagonal of 1 after its floor was added."""
    mean = matrices.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    identity = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)
    normalised = torch.where(mean > 0, matrices / mean.clamp_min(torch.finfo(mean.dtype).tiny), identity)
    values, vectors = torch.linalg.eigh((normalised + _FACTOR_FLOOR * identity) / (1 + _FACTOR_FLOOR))
    root: Tensor = (vectors * values.rsqrt()[:, None, :]) @ vectors.mT
    return root
