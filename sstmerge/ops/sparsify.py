"""Sparse and merged weight changes: magnitude pruning, DARE and TIES on many tensors at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from sstmerge import reference
from sstmerge.errors import BackendError, InputError
from sstmerge.ops import sparsify_kernels
from sstmerge.ops.backends import BackendName, choose_backend
from sstmerge.ops.extension import load_extension
from sstmerge.ops.validation import as_tensor
from sstmerge.reference.sparsify import (
    BatchType,
    MajoritySign,
    Rounding,
    compute_dtype,
    dare_scale,
    keep_below,
    kept_count,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Problems:
    """Tensors of one dtype and device, one problem each.

    Attributes:
        tensors: Contiguous tensors.
        stacked: The tensor whose rows they are; None where they were given as a list.
    """

    tensors: list[Tensor]
    stacked: Tensor | None

    @property
    def form(self) -> Any:
        """The problems in the form in which they were given."""
        return self.tensors if self.stacked is None else self.stacked

    @property
    def sizes(self) -> list[int]:
        return [tensor.numel() for tensor in self.tensors]

    def empty_outputs(self) -> _Problems:
        """Return memory of the same form."""
        if self.stacked is None:
            return _Problems([torch.empty_like(tensor) for tensor in self.tensors], None)
        stacked = torch.empty_like(self.stacked)
        return _Problems(list(stacked.unbind()), stacked)


def magnitude_prune(
    values: BatchType,
    density: float,
    *,
    rounding: Rounding = "nearest",
    backend: BackendName = "auto",
    num_threads: int | None = None,
) -> BatchType:
    """Keep the entries of largest magnitude of every tensor and set the others to zero.

    Of equal magnitudes at the border those of the lowest index are kept, so that the number of kept entries is exact and
    the result the same on every backend. NaN counts as larger than any number: it is kept and seen.

    Args:
        values: Tensors of one shape as (batch, ...), or a list of tensors of any shapes; every tensor is a problem of its
            own. float32, float64, bfloat16 or float16; any strides.
        density: Share of entries that is kept, in (0, 1].
        rounding: "nearest" keeps `round(density * numel)` entries, and at least one; "down" keeps
            `int(density * numel)`, as PEFT's `magnitude_based_pruning` does, which may be none.
        backend: A name that `backends` lists; "auto" takes the kernels on a GPU, the compiled code on a CPU, and the
            reference elsewhere.
        num_threads: Threads of the compiled backend; the default is `torch.get_num_threads()`.

    Returns:
        New tensors in the form of `values`. On a GPU those of a list share one allocation.

    Raises:
        InputError: Dtypes or devices do not fit, the density is out of range, or a name is unknown.
        BackendError: The backend asked for is not available.
    """
    problems = _read_batch("values", values)
    _check_density(density)
    _check_choice("rounding", rounding, Rounding)
    threads = _check_threads(num_threads)
    if not problems.tensors:
        return values
    chosen = choose_backend("magnitude_prune", backend, problems.tensors[0].device)
    kept = [kept_count(size, density, rounding) for size in problems.sizes]
    pruned: BatchType
    if chosen == "reference":
        pruned = reference.magnitude_prune(problems.form, density, rounding=rounding)
    elif chosen == "cpu_compiled":
        outputs = problems.empty_outputs()
        _extension().magnitude_prune(*_addresses(problems.tensors, outputs), problems.sizes, kept, threads)
        pruned = outputs.form
    else:
        flat = sparsify_kernels.flatten([problems.tensors], problems.stacked)
        pruned = _split(sparsify_kernels.magnitude_prune(chosen, flat, problems.sizes, kept), problems)
    return pruned


def dare(
    values: BatchType,
    density: float,
    seed: int,
    *,
    rescale: bool = True,
    first_stream: int = 0,
    backend: BackendName = "auto",
    num_threads: int | None = None,
) -> BatchType:
    """Keep entries at random, each with probability `density`, and divide them by it, which leaves the mean as it is.

    DARE (Yu et al. 2024, https://arxiv.org/abs/2311.03099). The random numbers come from a counter (Philox4x32-10): entry
    e of the tensor with stream i depends on (seed, i, e) alone. So a seed keeps the same entries on every backend, and
    batches may be split as one likes: tensors from the k-th on are given `first_stream=k`. Adapters of L tensors each
    take `first_stream=t * L`.

    Args:
        values: As in `magnitude_prune`.
        density: Probability that an entry is kept, in (0, 1]; taken to the nearest multiple of 2⁻³² (at least that).
        seed: From 0 to 2⁶⁴ − 1.
        rescale: Whether to divide what is kept by `density`.
        first_stream: Stream of the first tensor, from 0 to 2⁶⁴ − 1; the following tensors have the following streams.
        backend: As in `magnitude_prune`.
        num_threads: As in `magnitude_prune`.

    Returns:
        New tensors in the form of `values`. On a GPU those of a list share one allocation.

    Raises:
        InputError: Dtypes or devices do not fit, a number is out of range, or a name is unknown.
        BackendError: The backend asked for is not available.
    """
    problems = _read_batch("values", values)
    _check_density(density)
    _check_64_bits("seed", seed)
    _check_64_bits("first_stream", first_stream)
    _check_64_bits("first_stream plus the number of tensors", first_stream + len(problems.tensors))
    threads = _check_threads(num_threads)
    if not problems.tensors:
        return values
    chosen = choose_backend("dare", backend, problems.tensors[0].device)
    bound, scale = keep_below(density), dare_scale(density, rescale)
    dropped: BatchType
    if chosen == "reference":
        dropped = reference.dare(problems.form, density, seed, rescale=rescale, first_stream=first_stream)
    elif chosen == "cpu_compiled":
        outputs = problems.empty_outputs()
        addresses = _addresses(problems.tensors, outputs)
        _extension().dare(*addresses, problems.sizes, seed, first_stream, bound, scale, threads)
        dropped = outputs.form
    else:
        flat = sparsify_kernels.flatten([problems.tensors], problems.stacked)
        sizes = problems.sizes
        dropped = _split(sparsify_kernels.dare(chosen, flat, sizes, seed, first_stream, bound, scale), problems)
    return dropped


def ties(
    values: Sequence[BatchType] | Tensor,
    weights: Sequence[float] | Tensor,
    density: float,
    *,
    majority_sign_method: MajoritySign = "total",
    rounding: Rounding = "nearest",
    backend: BackendName = "auto",
    num_threads: int | None = None,
) -> BatchType:
    """Trim the tensors of every task, elect a sign for every entry, and average the entries that have it.

    TIES (Yadav et al. 2023, https://arxiv.org/abs/2306.01708) as PEFT defines it: trimmed tensor by tensor, the sign is
    elected before the weights are applied and is positive where it is a draw, and the weighted entries of that sign are
    divided by their number. Entries are added in float32 (float64 for float64), task by task in order, and rounded once;
    the results have the dtype of `values` (PEFT returns float32 for half precision). An entry that is NaN in a task
    is NaN in the result.

    Args:
        values: One batch per task, as in `magnitude_prune` and all of the same shapes; or a tensor (T, batch, ...).
        weights: One weight per task, shape (T,).
        density: Share of entries of every tensor that is kept, in (0, 1].
        majority_sign_method: "total" elects the sign of the sum of the entries, "frequency" the sign that more of them
            have.
        rounding: As in `magnitude_prune`.
        backend: As in `magnitude_prune`.
        num_threads: As in `magnitude_prune`.

    Returns:
        The merged tensors in the form of one batch. On a GPU those of a list share one allocation.

    Raises:
        InputError: Shapes, dtypes or devices do not fit, a number is out of range, or a name is unknown.
        BackendError: The backend asked for is not available.
    """
    batches, stacked = _read_tasks(values)
    numbers = _read_weights(weights, len(batches))
    _check_density(density)
    _check_choice("rounding", rounding, Rounding)
    _check_choice("majority_sign_method", majority_sign_method, MajoritySign)
    threads = _check_threads(num_threads)
    first = batches[0]
    merged: BatchType = first.form
    if not first.tensors:
        return merged
    chosen = choose_backend("ties", backend, first.tensors[0].device)
    kept = [kept_count(size, density, rounding) for size in first.sizes]
    by_frequency = majority_sign_method == "frequency"
    if chosen == "reference":
        forms = [batch.form for batch in batches]
        merged = reference.ties(forms, numbers, density, majority_sign_method=majority_sign_method, rounding=rounding)
    elif chosen == "cpu_compiled":
        outputs = first.empty_outputs()
        addresses = _addresses([tensor for batch in batches for tensor in batch.tensors], outputs)
        _extension().ties(*addresses, first.sizes, kept, numbers, by_frequency, threads)
        merged = outputs.form
    else:
        flat = sparsify_kernels.flatten([batch.tensors for batch in batches], stacked)
        in_dtype = torch.tensor(numbers, dtype=compute_dtype(flat.dtype))
        merged = _split(sparsify_kernels.ties(chosen, flat, first.sizes, kept, in_dtype, by_frequency), first)
    return merged


def _read_batch(name: str, values: Any) -> _Problems:
    if isinstance(values, Tensor) or hasattr(values, "__dlpack__"):
        stacked = as_tensor(name, values)
        if stacked.ndim < 2:
            raise InputError(
                f"{name} must be a list of tensors or a tensor of shape (batch, ...), not {tuple(stacked.shape)}: "
                f"give a single tensor as [tensor]"
            )
        stacked = stacked.contiguous()
        problems = _Problems(list(stacked.unbind()), stacked)
        _check_dtype(name, stacked)
        return problems
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise InputError(f"{name} must be a tensor or a list of tensors, not {type(values).__name__}")
    tensors = [as_tensor(f"{name}[{i}]", value) for i, value in enumerate(values)]
    for i, tensor in enumerate(tensors):
        _check_dtype(f"{name}[{i}]", tensor)
        if (tensor.dtype, tensor.device) != (tensors[0].dtype, tensors[0].device):
            raise InputError(
                f"{name}[{i}] ({tensor.dtype} on {tensor.device}) must have the dtype and device of {name}[0] "
                f"({tensors[0].dtype} on {tensors[0].device})"
            )
    return _Problems([tensor.contiguous() for tensor in tensors], None)


def _read_tasks(values: Any) -> tuple[list[_Problems], Tensor | None]:
    """Return one batch per task and, where there is one, the tensor that holds all of them."""
    stacked = None
    if isinstance(values, Tensor) or hasattr(values, "__dlpack__"):
        stacked = as_tensor("values", values)
        if stacked.ndim < 3:
            raise InputError(f"values must have the shape (tasks, batch, ...), not {tuple(stacked.shape)}")
        stacked = stacked.contiguous()
        values = list(stacked.unbind())
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise InputError(f"values must hold one batch of tensors per task, not be of type {type(values).__name__}")
    batches = [_read_batch(f"values[{task}]", batch) for task, batch in enumerate(values)]
    if not batches:
        raise InputError("values must hold at least one task")
    first = batches[0]
    for task, batch in enumerate(batches):
        shapes, expected = [t.shape for t in batch.tensors], [t.shape for t in first.tensors]
        if shapes != expected or (batch.stacked is None) != (first.stacked is None):
            different = [i for i, (a, b) in enumerate(zip(shapes, expected, strict=False)) if a != b]
            where = (
                f"tensor {different[0]} has the shape {tuple(shapes[different[0]])}, not {tuple(expected[different[0]])}"
                if different
                else f"it has {len(shapes)} tensors, not {len(expected)}, or comes in another form"
            )
            raise InputError(f"values[{task}] must hold tensors of the shapes of values[0]: {where}")
        if batch.tensors and (
            batch.tensors[0].dtype != first.tensors[0].dtype or batch.tensors[0].device != first.tensors[0].device
        ):
            raise InputError(
                f"values[{task}] ({batch.tensors[0].dtype} on {batch.tensors[0].device}) must have the dtype and device "
                f"of values[0] ({first.tensors[0].dtype} on {first.tensors[0].device})"
            )
    return batches, stacked


def _read_weights(weights: Sequence[float] | Tensor, tasks: int) -> list[float]:
    if isinstance(weights, Tensor) and weights.device.type != "cpu":
        raise InputError(f"weights must be numbers or a CPU tensor, not on {weights.device}: that would wait for it")
    try:
        numbers = torch.as_tensor(weights, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"weights must be a list of numbers: {error}") from error
    if tuple(numbers.shape) != (tasks,):
        raise InputError(f"weights must be one number per task, shape ({tasks},), not {tuple(numbers.shape)}")
    if not bool(numbers.isfinite().all()):
        raise InputError(f"weights must be finite, not {numbers.tolist()}")
    return numbers.tolist()


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise InputError(f"{name} must be float32, float64, bfloat16 or float16, not {tensor.dtype}")


def _check_density(density: float) -> None:
    if not isinstance(density, int | float) or not 0.0 < density <= 1.0 or math.isnan(density):
        raise InputError(f"density must lie in (0, 1], not be {density!r}: it is the share of entries that is kept")


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise InputError(f"unknown {name} {value!r}: choose {' or '.join(get_args(choices))}")


def _check_64_bits(name: str, number: int) -> None:
    if not isinstance(number, int) or not 0 <= number < 2**64:
        raise InputError(f"{name} must be an integer from 0 to 2**64 - 1, not {number!r}")


def _check_threads(num_threads: int | None) -> int:
    if num_threads is None:
        return torch.get_num_threads()
    if num_threads < 1:
        raise InputError(f"num_threads must be at least 1, not {num_threads}")
    return num_threads


def _extension() -> Any:
    extension, words = load_extension()
    if extension is None:
        raise BackendError(f"backend 'cpu_compiled' is not available: {words}")
    return extension


def _addresses(tensors: Sequence[Tensor], outputs: _Problems) -> tuple[str, list[int], list[int]]:
    """Return what the compiled functions begin with: the dtype, the addresses of the tensors and of the outputs."""
    dtype = str(tensors[0].dtype).removeprefix("torch.")
    return dtype, [tensor.data_ptr() for tensor in tensors], [tensor.data_ptr() for tensor in outputs.tensors]


def _split(flat: Tensor, problems: _Problems) -> Any:
    """Return flat results in the form of the problems."""
    if problems.stacked is not None:
        return flat.view(problems.stacked.shape)
    parts = flat.split(problems.sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, problems.tensors, strict=True)]
