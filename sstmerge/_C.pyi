"""The compiled extension: C++ behind `sstmerge.ops`, which is its only importer. Addresses and strides, no tensors."""

from typing import Final

VERSION: Final[str]
HAS_OPENMP: Final[bool]

# Status codes of a solved problem, equal to those of sstmerge.reference.SolveStatus.
CONVERGED: Final[int]
NOT_POSITIVE_DEFINITE: Final[int]
NOT_CONVERGED: Final[int]
NON_FINITE_INPUT: Final[int]

def cuda_build_reason() -> str:
    """Return why this build has no CUDA; empty where it has."""

def cuda_device_count() -> tuple[int, str]:
    """Return the number of usable CUDA devices and, where it is zero, the reason."""

def cuda_kernel_names() -> list[str]:
    """Return the names of all CUDA kernels in this build; empty where it has no CUDA."""

def cuda_kernel_attributes(name: str, device: int) -> tuple[int, int, int]:
    """Return registers per thread, bytes of local memory per thread and the largest number of threads per block.

    Raises:
        ValueError: There is no such kernel.
        RuntimeError: CUDA refuses; the message holds its words.
    """

def cuda_launch(
    name: str,
    grid: tuple[int, int, int],
    block: int,
    shared_bytes: int,
    device: int,
    stream: int,
    arguments: bytes,
) -> None:
    """Put a kernel on a stream; one 8-byte slot per parameter, each with the parameter's bytes at its start.

    Raises:
        ValueError: There is no such kernel, or it takes another number of arguments.
        RuntimeError: CUDA refuses the launch; the message holds its words.
    """

def bind_lapack(ssygvd: object, dsygvd: object) -> None:
    """Take over scipy's LAPACK routines, given as the capsules of `scipy.linalg.cython_lapack.__pyx_capi__`.

    Raises:
        ValueError: A capsule's C signature is not the one expected.
    """

def generalized_eigh_float32(
    a: int,
    a_batch_stride: int,
    a_row_stride: int,
    b: int,
    b_batch_stride: int,
    b_row_stride: int,
    eigenvalues: int,
    eigenvectors: int,
    status: int,
    batch: int,
    n: int,
    num_threads: int,
) -> None:
    """Solve `batch` float32 problems of size `n`; addresses of memory that the caller owns, strides in elements.

    `eigenvalues` (batch, n), `eigenvectors` (batch, n, n) and the int32 `status` (batch,) are contiguous and written.

    Raises:
        ValueError: `n` is larger than LAPACK can address.
    """

def generalized_eigh_float64(
    a: int,
    a_batch_stride: int,
    a_row_stride: int,
    b: int,
    b_batch_stride: int,
    b_row_stride: int,
    eigenvalues: int,
    eigenvectors: int,
    status: int,
    batch: int,
    n: int,
    num_threads: int,
) -> None:
    """Solve `batch` float64 problems of size `n`; as `generalized_eigh_float32`."""
