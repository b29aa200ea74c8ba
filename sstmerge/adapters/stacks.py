"""Passes over the stacked factors of a group of layers, a few layers at a time.

Making a space needs A and B once, for their small Gram matrices, and a merge once more, for the factors it writes. Both
passes convert a few layers to float64 (or float32) in a buffer that is used again: no such copy of the adapters exists, and
few new pages are touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Entries of a buffer. On a CPU 16 MiB in float64: several layers at once, one per thread (threads that share a matrix of few
# columns cost twice the time), and still memory that the allocator keeps. Elsewhere 512 MiB, to launch few kernels. A single
# layer may be larger.
_ENTRIES_PER_CHUNK = {"cpu": 2**21}
_ENTRIES_ELSEWHERE = 2**26


@dataclass(frozen=True)
class FactorStack:
    """One side of a group of layers, S = [B_1 … B_T] (L, d_out, Σr) or S = [A_1ᵀ … A_Tᵀ] (L, d_in, Σr).

    Attributes:
        factors: For every adapter its factors of all layers: B, each (d_out, r_t), or A, each (r_t, d_in).
        transposed: Whether the factors are A, which enter S transposed.
    """

    factors: tuple[tuple[Tensor, ...], ...]
    transposed: bool

    @property
    def width(self) -> int:
        """Features d of the layers."""
        return self.factors[0][0].shape[1 if self.transposed else 0]

    @property
    def ranks(self) -> list[int]:
        """Rank r_t of every adapter."""
        return [own[0].shape[0 if self.transposed else 1] for own in self.factors]

    @cached_property
    def gram(self) -> Tensor:
        """SᵀS, shape (L, Σr, Σr), float64."""
        layers, stacked = len(self.factors[0]), sum(self.ranks)
        gram = torch.empty(layers, stacked, stacked, dtype=torch.float64, device=self.factors[0][0].device)
        for chosen, stack in self._chunks(torch.float64):
            torch.matmul(stack.mT, stack, out=gram[chosen])
        return gram

    def combine(
        self, weights: Tensor, dtype: torch.dtype, *, rows: bool = False, working: torch.dtype = torch.float64
    ) -> Tensor:
        """Return S W, rounded once to its dtype.

        Args:
            weights: W, shape (L, Σr, k), float64.
            dtype: Dtype of the result.
            rows: Return Wᵀ Sᵀ instead.
            working: Dtype of the computation.

        Returns:
            Shape (L, d, k), or (L, k, d) for rows; contiguous.
        """
        layers, _, columns = weights.shape
        shape = (columns, self.width) if rows else (self.width, columns)
        result = torch.empty(layers, *shape, dtype=dtype, device=weights.device)
        weights, product = weights.to(working), None
        for chosen, stack in self._chunks(working):
            if product is None:
                product = torch.empty(stack.shape[0], *shape, dtype=working, device=weights.device)
            out = product[: stack.shape[0]]
            left, right = (weights[chosen].mT, stack.mT) if rows else (stack, weights[chosen])
            result[chosen] = torch.matmul(left, right, out=out)
        return result

    def of_layers(self, chosen: Sequence[int]) -> FactorStack:
        """Return the stack of some of the layers; the same object if these are all."""
        if list(chosen) == list(range(len(self.factors[0]))):
            return self
        return FactorStack(tuple(tuple(own[i] for i in chosen) for own in self.factors), self.transposed)

    def _chunks(self, working: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield S a few layers at a time, in one buffer: a chunk is gone when the next one is asked for."""
        layers, ranks = len(self.factors[0]), self.ranks
        stacked = sum(ranks)
        device = self.factors[0][0].device
        step = _ENTRIES_PER_CHUNK.get(device.type, _ENTRIES_ELSEWHERE) // (self.width * stacked)
        step = min(layers, max(1, step))
        shape = (stacked, self.width) if self.transposed else (self.width, stacked)
        buffer = torch.empty(step, *shape, dtype=working, device=device)
        for start in range(0, layers, step):
            chosen = slice(start, min(start + step, layers))
            chunk = buffer[: chosen.stop - start]
            parts = chunk.split(ranks, dim=1 if self.transposed else 2)
            for part, own in zip(parts, self.factors, strict=True):
                part.copy_(torch.stack(own[chosen]))
            yield chosen, chunk.mT if self.transposed else chunk
