"""The backends: which there are, which run here, why others do not, and which one an op takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from sstmerge.errors import BackendError, InputError
from sstmerge.ops import launch
from sstmerge.ops.extension import load_extension

BackendName = Literal["auto", "cuda_compiled", "cuda_cupy", "cpu_compiled", "reference"]

CPU_COMPILED_OPS = ("generalized_eigh", "dare", "magnitude_prune", "ties", "torch_dare")
KERNEL_OPS = (
    "generalized_eigh",
    "filter_cores",
    "project_accumulate",
    "sequence_scores",
    "dare",
    "magnitude_prune",
    "ties",
)
REFERENCE_OPS = (*KERNEL_OPS, "torch_dare")


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
    compiled, words = load_extension()
    return (
        _launched("cuda_compiled"),
        _launched("cuda_cupy"),
        BackendInfo("cpu_compiled", compiled is not None, words, CPU_COMPILED_OPS if compiled else ()),
        BackendInfo("reference", True, f"torch {torch.__version__}", REFERENCE_OPS),
    )


def _launched(name: Literal["cuda_compiled", "cuda_cupy"]) -> BackendInfo:
    found, words = launch.LAUNCHERS[name]()
    return BackendInfo(name, found is not None, words, KERNEL_OPS if found else ())


def choose_backend(op: str, backend: str, device: torch.device) -> str:
    """Return the name of the backend that runs an op on tensors of a device.

    Args:
        op: Name of the op.
        backend: The user's choice; "auto" takes the first that is available: on a GPU the compiled kernels, cupy's, the
            reference; on a CPU the compiled C++, the reference.
        device: Device of the tensors.

    Returns:
        The name of the backend, never "auto".

    Raises:
        InputError: The name is unknown.
        BackendError: The backend is not available, lacks the op, or takes tensors of another device.
    """
    if backend == "auto":
        candidates = [*launch.LAUNCHERS] if device.type == "cuda" else ["cpu_compiled"] if device.type == "cpu" else []
        return next((name for name in candidates if op in _ops_of(name)), "reference")
    known = {info.name: info for info in backends()}
    if backend in launch.LAUNCHERS:
        kernels = launch.launcher(backend)
        if op not in KERNEL_OPS:
            raise BackendError(f"backend {backend!r} has no {op}, it has {', '.join(KERNEL_OPS)}: take 'auto'")
        if device.type != kernels.device_type:
            raise BackendError(
                f"backend {backend!r} takes tensors of type {kernels.device_type}, not {device}: move them or take 'auto'"
            )
        return backend
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


def _ops_of(backend: str) -> tuple[str, ...]:
    if backend == "cpu_compiled":
        return CPU_COMPILED_OPS if load_extension()[0] is not None else ()
    return KERNEL_OPS if launch.LAUNCHERS[backend]()[0] is not None else ()
