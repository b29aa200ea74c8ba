"""The ops that may run natively: validation, allocation and the choice of a backend.

This is the only module that imports the compiled extension. Where a backend is missing, `backends` says why.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from sstmerge import __version__, reference
from sstmerge.errors import BackendError, InputError
from sstmerge.reference import GeneralizedEigh, SolveStatus

__all__ = [
    "BackendInfo",
    "BackendName",
    "DriverName",
    "GeneralizedEigh",
    "SolveStatus",
    "backends",
    "filter_cores",
    "generalized_eigh",
]

BackendName = Literal["auto", "cuda_compiled", "cuda_cupy", "cpu_compiled", "reference"]
DriverName = Literal["auto", "sygvd", "cholesky"]

# The one driver that each backend has for generalized_eigh: LAPACK's generalized solver, or Cholesky, two triangular
# solves and a standard eigensolver.
_DRIVERS = {"cpu_compiled": "sygvd", "reference": "cholesky"}
_NO_CUDA_KERNELS = "this version of sstmerge has no CUDA kernels yet; CUDA tensors take the reference, on their GPU"
_REBUILD = "rebuild it with `pip install .` in a checkout of sstmerge, where g++ or clang++ is installed"


@dataclass(frozen=True)
class BackendInfo:
    """One way to run the ops.

    Attributes:
        name: The name that the `backend` argument of an op takes.
        available: Whether it can run here.
        reason: Why it is missing; where it is available, what it is.
        ops: Names of the ops that it can run here.
    """

    name: BackendName
    available: bool
    reason: str
    ops: tuple[str, ...]


def backends() -> tuple[BackendInfo, ...]:
    """Describe every backend, fastest first, and why those that are missing are missing."""
    return (
        BackendInfo("cuda_compiled", False, _why_no_compiled_cuda(), ()),
        BackendInfo("cuda_cupy", False, _why_no_cupy(), ()),
        _cpu_compiled_info(),
        BackendInfo("reference", True, f"torch {torch.__version__}", ("generalized_eigh", "filter_cores")),
    )


def generalized_eigh(
    a: Tensor,
    b: Tensor,
    *,
    driver: DriverName = "auto",
    backend: BackendName = "auto",
    num_threads: int | None = None,
) -> GeneralizedEigh:
    """Solve the symmetric-definite generalized eigenproblems `a v = λ b v` of a batch.

    Like `scipy.linalg.eigh(a, b, lower=True)` of every problem: ascending λ, eigenvectors as columns with `Vᵀ b V = I`,
    and only the lower triangles of `a` and `b` are read. A problem that cannot be solved gets NaN and a status; it does
    not disturb the others. The arguments are not modified, and no gradient flows through. On the compiled backend the
    bits of a solution depend neither on `num_threads` nor on the rest of the batch.

    Args:
        a: Symmetric matrices, shape (..., n, n), float32 or float64; any strides.
        b: Symmetric positive definite matrices; shape, dtype and device of `a`.
        driver: "sygvd" (compiled backend), "cholesky" (reference), or "auto" for the one that the backend has.
        backend: A name that `backends` lists; "auto" takes the compiled one for CPU tensors where it is available, and
            the reference otherwise.
        num_threads: Threads over the batch in the compiled backend; the default is `torch.get_num_threads()`.

    Returns:
        Eigenvalues (..., n), eigenvectors (..., n, n) and int32 status (...,), on the device of `a`. Call
        `raise_on_failure` on it, or look at the status.

    Raises:
        InputError: Shapes, dtypes or devices do not fit, `num_threads` is not positive, or a name is unknown.
        BackendError: The backend or driver asked for is not available; the message says why and what to do.
    """
    _check_matrices(a, b)
    if num_threads is None:
        num_threads = torch.get_num_threads()
    if num_threads < 1:
        raise InputError(f"num_threads must be at least 1, not {num_threads}")
    if driver not in {"auto", *_DRIVERS.values()}:
        raise InputError(f"unknown driver {driver!r}: choose auto, {' or '.join(_DRIVERS.values())}")
    if backend == "auto" and driver != "auto":
        backend = "cpu_compiled" if driver == "sygvd" else "reference"
    chosen = _choose_backend("generalized_eigh", backend, a.device)
    if driver not in {"auto", _DRIVERS[chosen]}:
        raise BackendError(
            f"backend {chosen!r} has no driver {driver!r} for generalized_eigh: take {_DRIVERS[chosen]!r} or 'auto'"
        )
    if chosen == "cpu_compiled":
        return _compiled_generalized_eigh(a.detach(), b.detach(), num_threads)
    return reference.generalized_eigh(a, b)


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
        backend: A name that `backends` lists; only the reference has this op so far.

    Returns:
        The filtered cores, shape (..., R_o, R_i), dtype and device of `cores`.

    Raises:
        InputError: Shapes, dtypes or devices do not fit, or the backend's name is unknown.
        BackendError: The backend asked for is not available or lacks this op.
    """
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
    for name, (tensor, matrix_shape) in expected.items():
        _check_tensor(name, tensor, (*batch, *matrix_shape), "cores", cores)
    _choose_backend("filter_cores", backend, cores.device)
    return reference.filter_cores(cores, eigenvectors_out, metric_out, eigenvectors_in, metric_in, weights)


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], like_name: str, like: Tensor) -> None:
    """Compare a tensor with the shape expected and with the dtype and device of another; raises InputError."""
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name} must have the shape {shape}, not {tuple(tensor.shape)}")
    if tensor.dtype not in {torch.float32, torch.float64}:
        raise InputError(
            f"{name} must be float32 or float64, not {tensor.dtype}: convert it with .float() or .double()"
        )
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise InputError(
            f"{name} ({tensor.dtype} on {tensor.device}) must have the dtype and device of {like_name} "
            f"({like.dtype} on {like.device})"
        )


def _check_matrices(a: Tensor, b: Tensor) -> None:
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise InputError(f"a must hold square matrices, shape (..., n, n), not {tuple(a.shape)}")
    _check_tensor("a", a, tuple(a.shape), "a", a)
    _check_tensor("b", b, tuple(a.shape), "a", a)


def _choose_backend(op: str, backend: BackendName, device: torch.device) -> str:
    """Return the name of the backend that runs `op` on tensors of `device`; raises InputError or BackendError."""
    if backend == "auto":
        return "cpu_compiled" if device.type == "cpu" and op in _cpu_compiled_info().ops else "reference"
    known = {info.name: info for info in backends()}
    if backend not in known:
        raise InputError(f"unknown backend {backend!r}: choose auto, {', '.join(known)}")
    info = known[backend]
    if not info.available:
        raise BackendError(f"backend {backend!r} is not available: {info.reason}")
    if op not in info.ops:
        raise BackendError(f"backend {backend!r} has no {op}, it has {', '.join(info.ops)}: take 'reference' or 'auto'")
    if backend == "cpu_compiled" and device.type != "cpu":
        raise BackendError(f"backend 'cpu_compiled' takes CPU tensors, not {device}: move them or take 'auto'")
    return backend


@cache
def _load_compiled() -> tuple[ModuleType | None, str]:
    """Import the extension and hand it scipy's LAPACK; without it, the second value is the reason and the fix."""
    try:
        compiled = importlib.import_module("sstmerge._C")
    except ImportError as error:
        return None, f"the extension sstmerge._C cannot be imported ({error}): {_REBUILD}"
    if __version__ != compiled.VERSION:
        return None, f"the extension is of version {compiled.VERSION} and sstmerge of {__version__}: {_REBUILD}"
    try:
        lapack = importlib.import_module("scipy.linalg.cython_lapack").__pyx_capi__
        compiled.bind_lapack(lapack["ssygvd"], lapack["dsygvd"])
    except (ImportError, AttributeError, KeyError, ValueError) as error:
        return None, f"scipy's LAPACK cannot be used ({error}): install scipy from a wheel of PyPI"
    return compiled, f"LAPACK of scipy, {'OpenMP' if compiled.HAS_OPENMP else 'one thread (built without OpenMP)'}"


@cache
def _cpu_compiled_info() -> BackendInfo:
    compiled, words = _load_compiled()
    return BackendInfo("cpu_compiled", compiled is not None, words, ("generalized_eigh",) if compiled else ())


def _why_no_compiled_cuda() -> str:
    compiled, words = _load_compiled()
    if compiled is None:
        return words
    reason = compiled.cuda_build_reason()
    if reason:
        return f"it was not built: {reason}"
    devices, reason = compiled.cuda_device_count()
    return _NO_CUDA_KERNELS if devices else f"it was built, but there is no usable GPU: {reason}"


def _why_no_cupy() -> str:
    return _NO_CUDA_KERNELS if importlib.util.find_spec("cupy") else "cupy is not installed"


def _compiled_generalized_eigh(a: Tensor, b: Tensor, num_threads: int) -> GeneralizedEigh:
    from sstmerge import _C  # only reached once _load_compiled has imported it

    batch_shape, n = a.shape[:-2], a.shape[-1]
    a, b = _with_contiguous_rows(a), _with_contiguous_rows(b)
    batch = a.shape[0]
    eigenvalues = torch.empty(batch, n, dtype=a.dtype)
    eigenvectors = torch.empty(batch, n, n, dtype=a.dtype)
    status = torch.zeros(batch, dtype=torch.int32)
    solve = _C.generalized_eigh_float64 if a.dtype == torch.float64 else _C.generalized_eigh_float32
    solve(
        a.data_ptr(),
        a.stride(0),
        a.stride(1),
        b.data_ptr(),
        b.stride(0),
        b.stride(1),
        eigenvalues.data_ptr(),
        eigenvectors.data_ptr(),
        status.data_ptr(),
        batch,
        n,
        num_threads,
    )
    return GeneralizedEigh(
        eigenvalues.reshape(*batch_shape, n), eigenvectors.reshape(*batch_shape, n, n), status.reshape(batch_shape)
    )


def _with_contiguous_rows(matrices: Tensor) -> Tensor:
    """Return the matrices as (batch, n, n) with neighbouring elements in a row, copied only where they are not."""
    n = matrices.shape[-1]
    matrices = matrices.reshape(matrices.shape[:-2].numel(), n, n)
    return matrices if matrices.stride(-1) == 1 else matrices.contiguous()
