"""Filtering cores in a Kronecker generalized eigenbasis."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sstmerge import reference
from sstmerge.errors import BackendError, InputError
from sstmerge.ops.backends import BackendName, choose_backend
from sstmerge.ops.launch import launcher
from sstmerge.ops.validation import as_tensor, check_tensor

# Shared memory that a block can have on every GPU from compute capability 8.0, without what CUDA keeps for itself.
SHARED_BYTES = 99 * 1024


def filter_cores(
    cores: Tensor,
    eigenvectors_out: Tensor,
    metric_out: Tensor,
    eigenvectors_in: Tensor,
    metric_in: Tensor,
    weights: Tensor,
    *,
    backend: BackendName = "auto",
) -> Tensor:
    """Weight the coordinates of cores in a Kronecker generalized eigenbasis: `Q (w ∘ (Qᵀ D C X P)) Pᵀ`.

    With `Qᵀ D Q = I` and `Pᵀ X P = I`, the bracket holds the coordinates of the core C, and weights of one give C back.

    Args:
        cores: C, shape (..., R_o, R_i), float32 or float64; the leading dimensions are those of every argument.
        eigenvectors_out: Q, shape (..., R_o, R_o).
        metric_out: D, the cost of the output side, shape (..., R_o, R_o).
        eigenvectors_in: P, shape (..., R_i, R_i).
        metric_in: X, the cost of the input side, shape (..., R_i, R_i).
        weights: w, shape (..., R_o, R_i).
        backend: A name that `backends` lists; "auto" takes the kernels on a GPU, and the reference elsewhere
            and where a core is too large for shared memory.

    Returns:
        The filtered cores, shape (..., R_o, R_i), dtype and device of `cores`.

    Raises:
        InputError: Shapes, dtypes or devices do not fit, or the backend's name is unknown.
        BackendError: The backend asked for is not available, lacks this op, or has no room for cores of this size.
    """
    cores = as_tensor("cores", cores)
    if cores.ndim < 2:
        raise InputError(f"cores must have the shape (..., R_o, R_i), not {tuple(cores.shape)}")
    *batch, rows, columns = cores.shape
    expected = {
        "cores": (cores, (rows, columns)),
        "eigenvectors_out": (eigenvectors_out, (rows, rows)),
        "metric_out": (metric_out, (rows, rows)),
        "eigenvectors_in": (eigenvectors_in, (columns, columns)),
        "metric_in": (metric_in, (columns, columns)),
        "weights": (weights, (rows, columns)),
    }
    arguments = []
    for name, (value, matrix_shape) in expected.items():
        tensor = as_tensor(name, value)
        check_tensor(name, tensor, (*batch, *matrix_shape), "cores", cores)
        arguments.append(tensor)
    shared_bytes = 2 * rows * columns * cores.element_size()
    if backend == "auto" and shared_bytes > SHARED_BYTES:
        backend = "reference"
    chosen = choose_backend("filter_cores", backend, cores.device)
    if chosen == "reference":
        return reference.filter_cores(*arguments)
    if shared_bytes > SHARED_BYTES:
        raise BackendError(
            f"filter_cores of {rows} x {columns} cores in {cores.dtype} needs {shared_bytes} bytes of shared memory, and "
            f"backend {chosen!r} has {SHARED_BYTES}: take backend='auto' or 'reference'"
        )
    return _launch(chosen, arguments, shared_bytes)


def _launch(backend: str, arguments: list[Tensor], shared_bytes: int) -> Tensor:
    cores = arguments[0]
    rows, columns = cores.shape[-2:]
    filtered = torch.empty(cores.shape, dtype=cores.dtype, device=cores.device)
    batch = cores.shape[:-2].numel()
    if batch == 0 or rows == 0 or columns == 0:
        return filtered
    launcher(backend).launch(
        "filter_cores",
        f"filter_cores_{str(cores.dtype).removeprefix('torch.')}",
        (batch, 1, 1),
        256,
        shared_bytes,
        cores.device,
        [*(argument.contiguous() for argument in arguments), filtered, np.int32(rows), np.int32(columns)],
    )
    return filtered
