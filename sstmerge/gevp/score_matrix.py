"""The score matrix of a `global` Fisher, multiplied in float64 without a float64 copy of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sstmerge.fisher import Fisher
from sstmerge.gevp.damping_metric import KroneckerMetric, layer_chunks

# Entries that are converted to float64 at once: 2 MiB, what a core's second-level cache holds.
ENTRIES_PER_CHUNK = 2**18
# Rows of a symmetric product that are formed at once; what lies below the diagonal of these blocks is never formed.
_ROWS_PER_BLOCK = 64


class ScoreMatrix:
    """The scores G (n, D) of a `global` Fisher, F = GᵀG, a few columns at a time in one float64 buffer."""

    def __init__(self, fisher: Fisher) -> None:
        self._fisher = fisher
        self._sums = fisher.statistics["scores"]
        self._root = math.sqrt(fisher.tokens)

    def grams(self, other: ScoreMatrix, metric: KroneckerMetric | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return G K⁻¹ Gᵀ (n, n), G K⁻¹ Hᵀ (n, m) and H K⁻¹ Hᵀ (m, m), float64, in one pass over both; K is I for None."""
        n, rows = len(self._sums), len(self._sums) + len(other._sums)
        total = self._sums.new_zeros(rows, rows, dtype=torch.float64)
        for chunk in self._both(other, metric):
            for start in range(0, rows, _ROWS_PER_BLOCK):
                block = slice(start, start + _ROWS_PER_BLOCK)
                total[block, start:].addmm_(chunk[block], chunk[start:].mT)
        upper = total.triu_()
        whole = upper + upper.mT
        whole.diagonal().mul_(0.5)
        return (
            whole[:n, :n] / self._root**2,
            whole[:n, n:] / (self._root * other._root),
            whole[n:, n:] / other._root**2,
        )

    def _both(self, other: ScoreMatrix, metric: KroneckerMetric | None) -> Iterator[Tensor]:
        if metric is None:
            yield from _chunks(self._sums, other._sums)
            return
        rows = len(self._sums) + len(other._sums)
        for part in layer_chunks(self._fisher, rows, ENTRIES_PER_CHUNK):
            parts = (matrix[:, part.columns].double() for matrix in (self._sums, other._sums))
            yield metric.whiten(torch.cat(tuple(parts)), part)

    def times(self, vector: Tensor) -> Tensor:
        """Return G φ (n,), float64, for φ of shape (D,)."""
        total = self._sums.new_zeros(len(self._sums), dtype=torch.float64)
        offset = 0
        for chunk in _chunks(self._sums):
            total.addmv_(chunk, vector[offset : offset + chunk.shape[1]].double())
            offset += chunk.shape[1]
        return total / self._root

    def transposed_times(self, weights: Tensor) -> Tensor:
        """Return Gᵀ w (D,), float64, for w of shape (n,)."""
        result = self._sums.new_empty(self._sums.shape[1], dtype=torch.float64)
        offset = 0
        for chunk in _chunks(self._sums):
            torch.mv(chunk.mT, weights / self._root, out=result[offset : offset + chunk.shape[1]])
            offset += chunk.shape[1]
        return result


def _chunks(*matrices: Tensor) -> Iterator[Tensor]:
    """Yield the same columns of matrices (n, D), one below the other in float64; the next chunk overwrites the last."""
    rows = sum(len(matrix) for matrix in matrices)
    width = matrices[0].shape[1]
    columns = min(width, max(1, ENTRIES_PER_CHUNK // max(rows, 1)))
    buffer = matrices[0].new_empty(rows * columns, dtype=torch.float64)
    for parts in zip(*(matrix.split(columns, dim=1) for matrix in matrices), strict=True):
        chunk = buffer[: rows * parts[0].shape[1]].view(rows, -1)
        offset = 0
        for part in parts:
            chunk[offset : offset + len(part)].copy_(part)
            offset += len(part)
        yield chunk
