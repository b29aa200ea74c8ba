"""The trim of TIES over a whole adapter, as in the paper, without ever holding the adapter's dense weight change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from sstmerge.merging.methods.registry import CoreBatch, DeltaLayer, Layers

TrimOver = Literal["model", "tensor"]
# Entries that are looked at together; bounds the memory where a layer is dense.
BLOCK = 1 << 22
# Smallest magnitude that the trim keeps, by adapter.
Thresholds = Mapping[str, float]


def deltas_of(layer: DeltaLayer) -> Tensor:
    """Return the entries that TIES trims, shape (T, 1, d_out, d_in)."""
    return layer.deltas[:, None]


def cores_of(batch: CoreBatch) -> Tensor:
    """Return the entries that TIES trims in the cores, shape (T, L, R_o, R_i)."""
    return batch.cores


def whole_adapter_thresholds(layers: Layers, entries: Callable[[Any], Tensor], density: float) -> dict[str, float]:
    """Return, for every adapter, the magnitude of its k-th largest entry over all layers, k = round(density · entries).

    Nothing is kept of a layer but two histograms of the bits of its magnitudes: the upper half of the float32 is
    selected in a first pass and the lower half in a second one, so the result is exact.

    Args:
        layers: All layers.
        entries: Returns the tensors of a batch, shape (T, L, …).
        density: Share of entries that is kept, at least one.

    Returns:
        Thresholds by adapter; entries of exactly this magnitude are kept too. Layers that an adapter leaves unchanged
        are no part of its vector.
    """
    upper: dict[str, Tensor] = {}
    for batch in layers:
        for name, bits in _magnitude_bits(batch, entries):
            counts = torch.bincount(bits >> 16, minlength=1 << 15)
            upper[name] = upper[name] + counts if name in upper else counts
    chosen, rest = {}, {}
    for name, counts in upper.items():
        wanted = max(1, round(density * int(counts.sum())))
        chosen[name], rest[name] = _select(counts, wanted)
    lower: dict[str, Tensor] = {name: torch.zeros(1 << 16, dtype=torch.int64) for name in upper}
    for batch in layers:
        for name, bits in _magnitude_bits(batch, entries):
            lower[name] += torch.bincount(bits[bits >> 16 == chosen[name]] & 0xFFFF, minlength=1 << 16)
    thresholds = {}
    for name in upper:
        smallest = chosen[name] << 16 | _select(lower[name], rest[name])[0]
        thresholds[name] = float(torch.tensor(smallest, dtype=torch.int32).view(torch.float32))
    return thresholds


def prepare_ties(entries: Callable[[Any], Tensor]) -> Callable[..., Mapping[str, Any]]:
    """Return the preparation of a TIES method whose entries may compete within the whole adapter.

    Args:
        entries: Returns the tensors of a batch that are trimmed, shape (T, L, …).

    Returns:
        The function, for `Method.prepare`.
    """

    def prepare(layers: Layers, *, density: float, trim_over: TrimOver, **_: Any) -> Mapping[str, Any]:
        if trim_over == "tensor" or density == 1.0:
            return {}
        return {"thresholds": whole_adapter_thresholds(layers, entries, density)}

    return prepare


def _magnitude_bits(batch: Any, entries: Callable[[Any], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the bits of the magnitudes of every adapter in the layers that it changes, float32 without the sign bit."""
    for name, layers in zip(batch.adapters, entries(batch), strict=True):
        for tensor in layers:
            if bool(tensor.any()):
                for block in tensor.reshape(-1).split(BLOCK):
                    yield name, block.float().view(torch.int32) & 0x7FFFFFFF


def _select(counts: Tensor, wanted: int) -> tuple[int, int]:
    """Return the bin of the `wanted`-th largest entry, and which of the bin's entries, from the top, it is."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, wanted))
    above = int(from_top[position - 1]) if position else 0
    return counts.numel() - 1 - position, wanted - above
