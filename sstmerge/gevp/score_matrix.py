"""The score matrix of a `global` Fisher, multiplied in float64 without a float64 copy of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sstmerge.fisher import Fisher

# Entries that are converted to float64 at once: 2 MiB, what a core's second-level cache holds.
_ENTRIES_PER_CHUNK = 2**18


class ScoreMatrix:
    """The scores G (n, D) of a `global` Fisher, F = GᵀG, a few columns at a time in one float64 buffer."""

    def __init__(self, fisher: Fisher) -> None:
        self._sums = fisher.statistics["scores"]
        self._root = math.sqrt(fisher.tokens)

    def grams(self, other: ScoreMatrix) -> tuple[Tensor, Tensor, Tensor]:
        """Return G Gᵀ (n, n), G Hᵀ (n, m) and H Hᵀ (m, m), float64, in one pass over both."""
        n, m = len(self._sums), len(other._sums)
        totals = [self._sums.new_zeros(shape, dtype=torch.float64) for shape in ((n, n), (n, m), (m, m))]
        for left, right in zip(self._chunks(max(n, m)), other._chunks(max(n, m)), strict=True):
            for total, (a, b) in zip(totals, ((left, left), (left, right), (right, right)), strict=True):
                total.addmm_(a, b.mT)
        return totals[0], totals[1], totals[2]

    def times(self, vector: Tensor) -> Tensor:
        """Return G φ (n,), float64, for φ of shape (D,)."""
        total = self._sums.new_zeros(len(self._sums), dtype=torch.float64)
        offset = 0
        for chunk in self._chunks(len(self._sums)):
            total.addmv_(chunk, vector[offset : offset + chunk.shape[1]].double())
            offset += chunk.shape[1]
        return total

    def transposed_times(self, weights: Tensor) -> Tensor:
        """Return Gᵀ w (D,), float64, for w of shape (n,)."""
        result = self._sums.new_empty(self._sums.shape[1], dtype=torch.float64)
        offset = 0
        for chunk in self._chunks(len(self._sums)):
            torch.mv(chunk.mT, weights, out=result[offset : offset + chunk.shape[1]])
            offset += chunk.shape[1]
        return result

    def _chunks(self, rows: int) -> Iterator[Tensor]:
        """Yield G in float64, so many columns that `rows` rows fill the buffer; the next chunk overwrites the last."""
        columns = min(self._sums.shape[1], max(1, _ENTRIES_PER_CHUNK // max(rows, 1)))
        buffer = self._sums.new_empty(len(self._sums) * columns, dtype=torch.float64)
        for part in self._sums.split(columns, dim=1):
            # Divided in float32, as `Fisher.scores` does.
            yield buffer[: part.numel()].view(part.shape).copy_(part / self._root)
