"""Finding NVIDIA's cuSOLVER, which also brings cuBLAS, where torch's wheels, a toolkit or the user have it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from sstmerge.errors import BackendError
from sstmerge.ops.extension import load_extension

# Names the libcusolver to take, instead of searching for one.
VARIABLE = "SSTMERGE_CUSOLVER"

# What libcusolver of CUDA 12 needs, in the order in which it can be loaded; each is in a package of its own there.
_NEEDED_BY_CUDA_12 = (
    "nvjitlink/lib/libnvJitLink.so",
    "cublas/lib/libcublasLt.so",
    "cublas/lib/libcublas.so",
    "cusparse/lib/libcusparse.so",
)


@dataclass(frozen=True)
class CuSolver:
    """An open libcusolver.

    Attributes:
        extension: `sstmerge._C`, whose functions `cusolver_...` call it.
        library: Its number there.
        path: Where it was found.
        has_syev_batched: Whether it has the batched eigensolver of CUDA 12.6.2.
    """

    extension: ModuleType
    library: int
    path: str
    has_syev_batched: bool


def open_cusolver() -> CuSolver:
    """Open libcusolver, once per process and setting of `SSTMERGE_CUSOLVER`.

    It is searched for in the wheels that torch depends on (in the layouts of CUDA 13 and CUDA 12), in the toolkit that
    `CUDA_HOME` or `CUDA_PATH` names, in /usr/local/cuda, and where the dynamic loader looks. The environment variable
    `SSTMERGE_CUSOLVER` names the one to take instead.

    Returns:
        The library.

    Raises:
        BackendError: It is not there, or cannot be loaded; the message names everything that was tried.
    """
    return _open(os.environ.get(VARIABLE))


@cache
def _open(path: str | None) -> CuSolver:
    extension, words = load_extension()
    if extension is None:
        raise BackendError(f"cuSOLVER cannot be called: {words}")
    try:
        library = extension.cusolver_open([[path]] if path else list(candidates()))
    except RuntimeError as error:
        fix = f"correct the path in {VARIABLE}" if path else f"install it, or set {VARIABLE} to the path of libcusolver"
        raise BackendError(f"{error}: {fix}") from error
    return CuSolver(extension, library, extension.cusolver_path(library), extension.cusolver_has_syev_batched(library))


def candidates() -> Iterator[list[str]]:
    """Yield what may be libcusolver, each after the libraries it needs; the CUDA version of torch comes first.

    Yields:
        Paths, or names for the dynamic loader, of libraries to load in this order.
    """
    layouts = [_wheels_of_cuda_13, _wheels_of_cuda_12]
    if (torch.version.cuda or "").startswith("12."):
        layouts.reverse()
    spec = importlib.util.find_spec("nvidia")  # the folder that NVIDIA's wheels share
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    for layout in layouts:
        for folder in folders:
            yield from layout(folder)
    for home in filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")):
        for library in ("lib64", "lib", "targets/*/lib"):
            yield from ([str(path)] for path in _versions(Path(home), f"{library}/libcusolver.so"))
    yield ["libcusolver.so.12"]
    yield ["libcusolver.so.11"]


def _wheels_of_cuda_13(folder: Path) -> Iterator[list[str]]:
    """Yield libraries that lie together with all they need, and know it."""
    yield from ([str(path)] for path in _versions(folder, "cu[1-9][0-9]/lib/libcusolver.so"))


def _wheels_of_cuda_12(folder: Path) -> Iterator[list[str]]:
    needed = [str(path) for name in _NEEDED_BY_CUDA_12 for path in _versions(folder, name)[:1]]
    yield from ([*needed, str(path)] for path in _versions(folder, "cusolver/lib/libcusolver.so"))


def _versions(folder: Path, library: str) -> list[Path]:
    """Return the versions of a library, the newest first."""

    def number(path: Path) -> tuple[int, ...]:
        return tuple(int(part) for part in path.name.partition(".so.")[2].split(".") if part.isdigit())

    return sorted(folder.glob(f"{library}.[0-9]*"), key=number, reverse=True)
