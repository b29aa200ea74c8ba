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

def cusolver_open(candidates: list[list[str]]) -> int:
    """Open libcusolver and return its number; a candidate is a list of libraries to load, libcusolver last.

    Raises:
        RuntimeError: No candidate can be loaded; the message names them all.
    """

def cusolver_path(library: int) -> str:
    """Return the file that was opened.

    Raises:
        ValueError: There is no library of this number.
    """

def cusolver_has_syev_batched(library: int) -> bool:
    """Return whether it has cusolverDnXsyevBatched.

    Raises:
        ValueError: There is no library of this number.
    """

def cusolver_sygvd_workspace(
    library: int, device: int, stream: int, is_float64: bool, a: int, b: int, eigenvalues: int, n: int
) -> int:
    """Return the number of elements of workspace that `cusolver_sygvd` needs.

    This and the functions below act on CUDA's current device, which the caller has made `device`, and are put on the
    stream. Addresses are of contiguous column-major matrices on the device.

    Raises:
        ValueError: There is no library of this number, or a size is below one.
        RuntimeError: The call is refused; the message holds the name of the status.
    """

def cusolver_sygvd(
    library: int,
    device: int,
    stream: int,
    is_float64: bool,
    a: int,
    b: int,
    eigenvalues: int,
    workspace: int,
    workspace_size: int,
    info: int,
    n: int,
    batch: int,
) -> None:
    """Solve a v = λ b v one after another; overwrites `a` with the eigenvectors and `b` with its Cholesky factor."""

def cusolver_potrf_batched(
    library: int, device: int, stream: int, is_float64: bool, matrices: int, info: int, n: int, batch: int
) -> None:
    """Overwrite the matrices whose addresses are at `matrices` with their Cholesky factors L."""

def cusolver_trsm_batched(
    library: int,
    device: int,
    stream: int,
    is_float64: bool,
    solve: str,
    factors: int,
    matrices: int,
    n: int,
    batch: int,
) -> None:
    """Solve with L, "forward" (X ← L⁻¹ X), "from the right" (X ← X L⁻ᵀ) or "backward" (X ← L⁻ᵀ X); arrays of addresses."""

def cusolver_syev_batched_workspace(
    library: int, device: int, stream: int, is_float64: bool, matrices: int, eigenvalues: int, n: int, batch: int
) -> tuple[int, int]:
    """Return the bytes of workspace that `cusolver_syev_batched` needs on the device and on the host."""

def cusolver_syev_batched(
    library: int,
    device: int,
    stream: int,
    is_float64: bool,
    matrices: int,
    eigenvalues: int,
    device_workspace: int,
    device_bytes: int,
    host_workspace: int,
    host_bytes: int,
    info: int,
    n: int,
    batch: int,
) -> None:
    """Overwrite symmetric matrices with their eigenvectors, in ascending order of the eigenvalues."""

def magnitude_prune(
    dtype: str, values: list[int], outputs: list[int], sizes: list[int], kept: list[int], num_threads: int
) -> None:
    """Keep the `kept[i]` largest magnitudes of the contiguous tensor at `values[i]`; lists of addresses, one per tensor.

    Raises:
        ValueError: There is no such dtype, or the lists differ in length.
    """

def dare(
    dtype: str,
    values: list[int],
    outputs: list[int],
    sizes: list[int],
    seed: int,
    first_stream: int,
    keep_below: int,
    scale: float,
    num_threads: int,
) -> None:
    """Keep the entries whose random word is below `keep_below`, times `scale`; lists as in `magnitude_prune`.

    Raises:
        ValueError: There is no such dtype, or the lists differ in length.
    """

def torch_dare(
    dtype: str, values: int, output: int, size: int, probability: float, density: float, generator_state: int
) -> None:
    """Keep entries as torch's CPU generator decides and divide them; `generator_state` is the address of its state's bytes.

    Raises:
        ValueError: There is no such dtype, a number is out of range, or the bytes are no state that is known.
    """

def ties(
    dtype: str,
    values: list[int],
    outputs: list[int],
    sizes: list[int],
    kept: list[int],
    weights: list[float],
    by_frequency: bool,
    num_threads: int,
) -> None:
    """Trim, elect signs and merge; `values` holds the addresses of the first task, then those of the second, and so on.

    Raises:
        ValueError: There is no such dtype, or the lists differ in length.
    """
