"""What `sstmerge.ops.sparsify` launches on a GPU: tables of tensors, selection by digits, and one pass at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from sstmerge.ops.launch import Argument, launcher

# Entries that a block takes; tests take fewer.
CHUNK = 65536

# Threads of the blocks that count, and of those that write.
COUNT_THREADS = 512
WRITE_THREADS = 256

# The digits of csrc/cuda/selection.cuh.
_DIGIT_BITS = 11
_DIGITS = 1 << _DIGIT_BITS
_COUNTER_BYTES = 4
_SELECTION_THREADS = 256
_SUM_BYTES = 8

_MODULE = "sparsify"


@dataclass(frozen=True)
class _Table:
    """Tensors that lie one after another, as the kernels see them.

    Attributes:
        offsets: Where they begin and end, shape (tensors + 1,), int64.
        chunk_offsets: Where their chunks begin and end, shape (tensors + 1,), int64.
        remaining: Rank of the entry that is looked for, shape (tensors + 1,), int64, the last unused.
        prefixes: Digits of its magnitude that are known, shape (tensors + 1,), int64, the last unused.
        tensors: Number of tensors.
        chunks: Number of chunks of the first task's tensors, and of all.
    """

    offsets: Tensor
    chunk_offsets: Tensor
    remaining: Tensor
    prefixes: Tensor
    tensors: int
    chunks: tuple[int, int]

    def arguments(self, tensors: int) -> list[Argument]:
        """Return the parameters of a table of the first `tensors` tensors."""
        return [self.offsets, self.chunk_offsets, np.int32(tensors), np.int32(CHUNK)]


def flatten(tasks: Sequence[Sequence[Tensor]], stacked: Tensor | None) -> Tensor:
    """Return the tensors of all tasks one after another, shape (tasks, entries).

    Args:
        tasks: Contiguous tensors of every task, of the same shapes.
        stacked: The contiguous tensor that holds all of them in this order, if there is one.

    Returns:
        A view of `stacked` where it begins at a multiple of 16 bytes, and a copy otherwise.
    """
    if stacked is not None:
        flat = stacked.reshape(len(tasks), stacked.numel() // len(tasks))
        return flat if flat.data_ptr() % 16 == 0 else flat.clone()
    return torch.cat([tensor.reshape(-1) for tensors in tasks for tensor in tensors]).view(len(tasks), -1)


def magnitude_prune(backend: str, flat: Tensor, sizes: Sequence[int], kept: Sequence[int]) -> Tensor:
    """Launch `sstmerge.ops.magnitude_prune`.

    Args:
        backend: Name of a backend with kernels.
        flat: The tensors, shape (1, entries).
        sizes: Entries of every tensor.
        kept: How many of them are kept.

    Returns:
        The pruned tensors, shape (entries,).
    """
    outputs = torch.empty_like(flat[0])
    if not outputs.numel():
        return outputs
    table, last_equal = _select(backend, flat, sizes, kept)
    arguments = [flat, outputs, *table.arguments(table.tensors), table.prefixes, last_equal]
    _launch(backend, f"magnitude_prune_{_bits(flat)}", table.chunks[0], WRITE_THREADS, flat, arguments)
    return outputs


def dare(
    backend: str, flat: Tensor, sizes: Sequence[int], seed: int, first_stream: int, keep_below: int, scale: float
) -> Tensor:
    """Launch `sstmerge.ops.dare`.

    Args:
        backend: Name of a backend with kernels.
        flat: The tensors, shape (1, entries).
        sizes: Entries of every tensor.
        seed: Key of the random numbers.
        first_stream: Stream of the first tensor.
        keep_below: Bound of the random words that keep their entry.
        scale: Factor of what is kept.

    Returns:
        The sparse tensors, shape (entries,).
    """
    outputs = torch.empty_like(flat[0])
    if not outputs.numel():
        return outputs
    table = _table(sizes, [0] * len(sizes), 1, flat.device)
    numbers = [np.uint64(seed), np.uint64(first_stream), np.uint64(keep_below), _real(flat)(scale)]
    arguments = [flat, outputs, *table.arguments(table.tensors), *numbers]
    _launch(backend, f"dare_{_dtype(flat)}", table.chunks[0], WRITE_THREADS, flat, arguments)
    return outputs


def ties(
    backend: str, flat: Tensor, sizes: Sequence[int], kept: Sequence[int], weights: Tensor, by_frequency: bool
) -> Tensor:
    """Launch `sstmerge.ops.ties`.

    Args:
        backend: Name of a backend with kernels.
        flat: The tensors of every task, shape (tasks, entries).
        sizes: Entries of every tensor of a task.
        kept: How many of them are kept.
        weights: One per task, shape (tasks,), on the CPU, float64 for float64 tensors and else float32.
        by_frequency: Whether the sign that more entries have is elected.

    Returns:
        The merged tensors, shape (entries,).
    """
    outputs = torch.empty_like(flat[0])
    if not outputs.numel():
        return outputs
    tasks, stride = flat.shape
    table, last_equal = _select(backend, flat, sizes, kept)
    arguments = [flat, outputs, *table.arguments(len(sizes)), table.prefixes, last_equal]
    arguments += [_to_device(weights, flat.device), np.int32(tasks), np.int64(stride), np.int32(by_frequency)]
    _launch(backend, f"ties_{_dtype(flat)}", table.chunks[0], WRITE_THREADS, flat, arguments)
    return outputs


def _select(backend: str, flat: Tensor, sizes: Sequence[int], kept: Sequence[int]) -> tuple[_Table, Tensor]:
    """Return a table whose prefixes are the smallest magnitudes kept, and the index of the last entry that has it."""
    tasks = len(flat)
    table = _table(sizes, kept, tasks, flat.device)
    parameters = table.arguments(table.tensors)
    counts = torch.empty(table.chunks[1], _DIGITS, dtype=torch.int32, device=flat.device)
    last_equal = torch.empty(table.tensors, dtype=torch.int64, device=flat.device)
    bits = _bits(flat)
    shift = bits - 1
    width = 0
    while shift > 0:
        width = min(_DIGIT_BITS, shift)
        shift -= width
        digits = [np.int32(shift), np.int32(width)]
        arguments = [flat, *parameters, table.prefixes, *digits, counts]
        name = f"count_digits_{bits}"
        _launch(backend, name, table.chunks[1], COUNT_THREADS, flat, arguments, _DIGITS * _COUNTER_BYTES)
        arguments = [counts, *parameters, np.int32(width), table.prefixes, table.remaining]
        _launch(
            backend, "pick_digit", table.tensors, _SELECTION_THREADS, flat, arguments, _SELECTION_THREADS * _SUM_BYTES
        )
    arguments = [flat, *parameters, counts, np.int32(width), table.prefixes, table.remaining, last_equal]
    name = f"find_last_equal_{bits}"
    _launch(backend, name, table.tensors, _SELECTION_THREADS, flat, arguments, _SELECTION_THREADS * _SUM_BYTES)
    return table, last_equal


def _table(sizes: Sequence[int], kept: Sequence[int], tasks: int, device: torch.device) -> _Table:
    all_sizes = list(sizes) * tasks
    offsets = list(accumulate(all_sizes, initial=0))
    chunk_offsets = list(accumulate((-(-size // CHUNK) for size in all_sizes), initial=0))
    rows = torch.tensor([offsets, chunk_offsets, [*kept] * tasks + [0], [0] * len(offsets)])
    on_device = _to_device(rows, device)
    return _Table(
        on_device[0],
        on_device[1],
        on_device[2],
        on_device[3],
        tensors=len(all_sizes),
        chunks=(chunk_offsets[len(sizes)], chunk_offsets[-1]),
    )


def _launch(
    backend: str,
    kernel: str,
    blocks: int,
    threads: int,
    like: Tensor,
    arguments: Sequence[Argument],
    shared_bytes: int = 0,
) -> None:
    launcher(backend).launch(_MODULE, kernel, (blocks, 1, 1), threads, shared_bytes, like.device, arguments)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor without waiting for the device."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _bits(flat: Tensor) -> int:
    return 8 * flat.element_size()


def _dtype(flat: Tensor) -> str:
    return str(flat.dtype).removeprefix("torch.")


def _real(flat: Tensor) -> type[np.float32] | type[np.float64]:
    return np.float64 if flat.dtype == torch.float64 else np.float32
