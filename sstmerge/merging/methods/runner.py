"""Run a method over all layers of some adapters, a few layers at a time, and gather the result as one adapter.

Beside the adapters (memory-mapped, if they come from files) and the result, only the layers at hand are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sstmerge.adapters import Adapter, CoreSpace, LoraFactors
from sstmerge.adapters.adapter import merged_config, natural_order
from sstmerge.adapters.basis import RANK_TOLERANCE, LayerGroup, build_groups, stackable_layers
from sstmerge.errors import InputError
from sstmerge.merging.low_rank import compress
from sstmerge.merging.methods.registry import ActsOn, CoreBatch, DeltaLayer, FactorLayer, Layers, LowRank, RebasedCores
from sstmerge.merging.methods.task import Task
from sstmerge.merging.truncated_svd import truncated_svd

# Bytes of the float64 copies of the layers that are merged together.
_BATCH_BYTES = 128 * 1024**2
# Singular values up to this share of the largest are rounding: bases are float32.
_ROUNDING = 1e-7

Progress = Callable[[str, int, int], None]
Triplets = tuple[Tensor, Tensor, Tensor]


def run(task: Task, progress: Progress) -> Adapter:
    """Merge.

    Args:
        task: What `plan` returned.
        progress: Called with what is being done, how much is done, and how much there is.

    Returns:
        The merged adapter, of one rank and scaling 1.

    Raises:
        InputError: The result holds NaN or Inf, or is zero everywhere.
    """
    kinds: dict[ActsOn, Callable[[Task], Layers]] = {
        "core": _CoreLayers,
        "delta": _DeltaLayers,
        "factors": _FactorLayers,
    }
    layers = kinds[task.method.acts_on](task)
    prepared = task.method.prepare(layers, **task.options) if task.method.prepare else {}
    extra = () if task.statistics is None else (task.statistics,)
    merged: dict[str, LoraFactors] = {}
    total = len(layers.names)
    what = f"merging layers ({task.method.name})"
    for batch in layers:
        result = task.method.function(batch, *extra, **task.options, **prepared)
        for path, factors in _factors(task, batch, result):
            merged[path] = factors
        progress(what, len(merged), total)
    progress(what, total, total)
    return _assemble(task, merged)


class _CoreLayers:
    """The layers as core batches: the groups of the statistics' space, or a few layers of one shape at a time."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.space: CoreSpace | None = getattr(task.statistics, "space", None)
        self.names = task.layer_names if self.space is None else self.space.layer_names

    def __iter__(self) -> Iterator[CoreBatch]:
        # A Fisher's space may hold the adapters in another order.
        adapters = self.task.adapters if self.space is None else self.space.adapters
        weight_of = {a.name: w for a, w in zip(self.task.adapters, self.task.weights, strict=True)}
        names = tuple(adapter.name for adapter in adapters)
        weights = torch.tensor([weight_of[name] for name in names], dtype=torch.float64)
        safety = None if self.task.safety is None else names.index(self.task.adapters[self.task.safety].name)
        for index, group in enumerate(self._groups()):
            space = CoreSpace(adapters, [group])
            cores = torch.stack([space.split(space.core(name))[0] for name in names])
            yield CoreBatch(group.names, group.U, group.V, cores, weights, names, index, safety)

    def _groups(self) -> Iterator[LayerGroup]:
        if self.space is not None:
            yield from self.space.groups
            return
        adapters = self.task.adapters
        for (members, (rows, columns)), names in stackable_layers(adapters).items():
            stacked_rank = sum(rank for _, rank in members)
            # Factors, their stack, bases and, for KnOTS, one matrix (R, d_in) per adapter.
            layer_bytes = 8 * (rows + columns) * stacked_rank * (4 + len(adapters))
            count = max(1, _BATCH_BYTES // layer_bytes)
            for start in range(0, len(names), count):
                yield from build_groups(adapters, members, names[start : start + count], RANK_TOLERANCE)


class _DeltaLayers:
    """The layers as dense weight changes, one at a time."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.names = task.layer_names

    def __iter__(self) -> Iterator[DeltaLayer]:
        for index, path in enumerate(self.names):
            members, weights = _members(self.task, path)
            deltas = torch.empty(len(members), *members[0].layers[path].shape)
            for delta, adapter in zip(deltas, members, strict=True):
                factors = adapter.layers[path]
                torch.mm(factors.scaling * factors.B.float(), factors.A.float(), out=delta)
            yield DeltaLayer(path, deltas, weights.float(), tuple(a.name for a in members), index)


class _FactorLayers:
    """The layers as factors, one at a time."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.names = task.layer_names

    def __iter__(self) -> Iterator[FactorLayer]:
        for path in self.names:
            members, weights = _members(self.task, path)
            factors = [adapter.layers[path] for adapter in members]
            yield FactorLayer(
                name=path,
                A=tuple(f.A for f in factors),
                B=tuple(f.B for f in factors),
                scalings=tuple(f.scaling for f in factors),
                weights=weights,
                adapters=tuple(adapter.name for adapter in members),
            )


def _members(task: Task, path: str) -> tuple[list[Adapter], Tensor]:
    """Return the adapters that have a layer, and their weights."""
    pairs = [(a, w) for a, w in zip(task.adapters, task.weights, strict=True) if path in a.layers]
    return [adapter for adapter, _ in pairs], torch.tensor([weight for _, weight in pairs], dtype=torch.float64)


def _factors(task: Task, batch: Any, result: Any) -> Iterable[tuple[str, LoraFactors]]:
    """Turn what a method returned for a batch into factors of every layer, cut to the rank."""
    if isinstance(batch, FactorLayer):
        return [(batch.name, LoraFactors(A=result.A.to(task.dtype), B=result.B.to(task.dtype), scaling=1.0))]
    if isinstance(batch, DeltaLayer):
        _check_finite(batch.name, result)
        rank = min(task.rank or min(result.shape), *result.shape)
        rows = torch.cat([adapter.layers[batch.name].A for adapter in _members(task, batch.name)[0]])
        triplets = truncated_svd(result, rank, rows.mT)
        return _split([batch.name], [part[None] for part in triplets], task)
    return _split(batch.names, _triplets(batch, result), task)


def _triplets(batch: CoreBatch, result: Tensor | RebasedCores | LowRank) -> Triplets:
    """Return the singular value decompositions of merged weight changes, float64, batched over layers."""
    if isinstance(result, LowRank):
        _check_finite(batch.names[0], result.B, result.A)
        return compress(result.B, result.A)
    basis, cores = (result.U, result.cores) if isinstance(result, RebasedCores) else (batch.U, result)
    _check_finite(batch.names[0], basis, cores)
    left, values, right = torch.linalg.svd(cores.double(), full_matrices=False)
    return basis.double() @ left, values, batch.V.double() @ right.mT


def _split(names: Sequence[str], triplets: Sequence[Tensor], task: Task) -> list[tuple[str, LoraFactors]]:
    """Split U diag(σ) Vᵀ evenly into B = U √σ and A = √σ Vᵀ, without what is rounding."""
    left, values, right = triplets
    rank = int((values > _ROUNDING * values[:, :1]).sum(dim=1).max())
    rank = max(1, min(rank, task.rank or rank))
    root = values[:, :rank].sqrt()
    B = (left[:, :, :rank] * root[:, None, :]).to(task.dtype)
    A = (root[:, :, None] * right[:, :, :rank].mT).to(task.dtype)
    # Clones, because views would keep a whole batch alive.
    return [(path, LoraFactors(A=A[i].clone(), B=B[i].clone(), scaling=1.0)) for i, path in enumerate(names)]


def _assemble(task: Task, merged: dict[str, LoraFactors]) -> Adapter:
    """Bring all layers to one rank with rows and columns of zeros, and make them an adapter."""
    rank = max((factors.rank for factors in merged.values()), default=0)
    if not any(bool(f.A.count_nonzero()) and bool(f.B.count_nonzero()) for f in merged.values()):
        raise InputError(
            f"The merge by '{task.method.name}' with the weights {list(task.weights)} changes nothing: the result is "
            "zero in every layer, so there is no adapter to write."
        )
    for path, factors in merged.items():
        _check_finite(path, factors.A, factors.B)
        missing = rank - factors.rank
        if missing:
            A = torch.nn.functional.pad(factors.A, (0, 0, 0, missing))
            B = torch.nn.functional.pad(factors.B, (0, missing))
            merged[path] = LoraFactors(A=A, B=B, scaling=1.0)
    bases = [adapter.base_model for adapter in task.adapters if adapter.base_model]
    return Adapter(
        name="merged",
        layers={path: merged[path] for path in sorted(merged, key=natural_order)},
        base_model=bases[0] if bases else None,
        config=merged_config(task.adapters, tuple(merged)),
        source="a merge by sstmerge",
    )


def _check_finite(path: str, *tensors: Tensor) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise InputError(
            f"The merge of layer '{path}' (or one merged with it) gives NaN or Inf; nothing was written. "
            "Smaller weights, or a wider dtype, may help."
        )
