"""Putting CUDA kernels on a stream: those compiled into the extension, or the same sources through cupy and NVRTC.

A launcher takes a kernel by name with a grid, a block, bytes of shared memory and arguments. What to launch is decided
once, in the op's module, whichever launcher is there; nothing here waits for the device.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sstmerge.errors import BackendError
from sstmerge.ops.extension import REBUILD, load_extension

# A kernel's parameter: a tensor for its address (None for a null pointer), or a numpy scalar of the parameter's type.
Argument = Tensor | np.generic | None
Grid = tuple[int, int, int]

# Ampere, the first with asynchronous copies to shared memory and matrix instructions for bfloat16.
OLDEST_CAPABILITY = (8, 0)

# Dynamic shared memory that a block may use without a higher limit set for its kernel.
DEFAULT_SHARED_BYTES = 48 * 1024


class Launcher(Protocol):
    """One way to run kernels.

    Attributes:
        device_type: Type of the devices whose tensors its kernels take.
    """

    device_type: str

    def launch(
        self,
        module: str,
        kernel: str,
        grid: Grid,
        block: int,
        shared_bytes: int,
        device: torch.device,
        arguments: Sequence[Argument],
    ) -> None:
        """Put a kernel on the current stream of the device.

        Args:
            module: Name of the source file of the kernel, without its suffix.
            kernel: Name of the kernel.
            grid: Blocks in x, y and z.
            block: Threads per block.
            shared_bytes: Dynamic shared memory per block.
            device: The device of all tensors.
            arguments: One per parameter.
        """

    def stream(self, device: torch.device) -> int:
        """Return the address of the device's current stream, for libraries that are called between kernels.

        Args:
            device: A device.
        """

    def guard(self, device: torch.device) -> AbstractContextManager[object]:
        """Return a context in which a device is CUDA's current one, for libraries that are called between kernels.

        Args:
            device: A device.
        """


def scalars(arguments: Sequence[Argument]) -> list[np.generic]:
    """Return the arguments as numpy scalars, with the addresses of tensors in their place."""
    addressed: list[np.generic] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            addressed.append(np.uint64(argument.data_ptr()))
        else:
            addressed.append(np.uint64(0) if argument is None else argument)
    return addressed


def pack(arguments: Sequence[Argument]) -> bytes:
    """Return the arguments as slots of 8 bytes, each with the value at its start."""
    return b"".join(value.tobytes().ljust(8, b"\0") for value in scalars(arguments))


class TorchStreams:
    """The current stream and device of CUDA as torch has them."""

    device_type = "cuda"

    def stream(self, device: torch.device) -> int:  # noqa: D102 (Launcher)
        return torch.cuda.current_stream(device).cuda_stream

    def guard(self, device: torch.device) -> AbstractContextManager[object]:  # noqa: D102 (Launcher)
        return torch.cuda.device(device)


class CompiledLauncher(TorchStreams):
    """Runs the kernels that nvcc compiled into the extension."""

    def __init__(self, extension: ModuleType) -> None:
        self._launch = extension.cuda_launch

    def launch(  # noqa: D102 (Launcher)
        self,
        module: str,
        kernel: str,
        grid: Grid,
        block: int,
        shared_bytes: int,
        device: torch.device,
        arguments: Sequence[Argument],
    ) -> None:
        stream = self.stream(device)
        try:
            self._launch(kernel, grid, block, shared_bytes, device.index, stream, pack(arguments))
        except ValueError as error:
            raise BackendError(
                f"the extension does not fit this version's Python files ({error}): {REBUILD}"
            ) from error
        except RuntimeError as error:
            raise BackendError(f"backend 'cuda_compiled' failed on {device}: {error}") from error


class CupyLauncher(TorchStreams):
    """Compiles the kernels' sources with NVRTC at their first use, through cupy, which keeps the result on disk."""

    def __init__(self, cupy: ModuleType) -> None:
        self._cupy = cupy
        self._modules: dict[str, Any] = {}
        self._functions: dict[str, Any] = {}
        # CUDA's own are RuntimeErrors; OSError: cupy cannot write the compiled kernel to its cache.
        self._errors = (RuntimeError, OSError, cupy.cuda.compiler.CompileException)

    def launch(  # noqa: D102 (Launcher)
        self,
        module: str,
        kernel: str,
        grid: Grid,
        block: int,
        shared_bytes: int,
        device: torch.device,
        arguments: Sequence[Argument],
    ) -> None:
        stream = self.stream(device)
        try:
            with self._cupy.cuda.Device(device.index), self._on_stream(stream):
                function = self._function(module, kernel)
                # The limit belongs to the kernel on the current device.
                if shared_bytes > DEFAULT_SHARED_BYTES and shared_bytes > function.max_dynamic_shared_size_bytes:
                    function.max_dynamic_shared_size_bytes = shared_bytes
                function(grid, (block, 1, 1), tuple(scalars(arguments)), shared_mem=shared_bytes)
        except self._errors as error:
            raise BackendError(f"backend 'cuda_cupy' failed on {device} in kernel {kernel}: {error}") from error

    def _on_stream(self, address: int) -> Any:
        streams = self._cupy.cuda
        if hasattr(streams.Stream, "from_external"):  # from cupy 14, which deprecates ExternalStream
            return streams.Stream.from_external(_ForeignStream(address))
        return streams.ExternalStream(address)

    def _function(self, module: str, kernel: str) -> Any:
        if module not in self._modules:
            self._modules[module] = self._cupy.RawModule(**raw_module(module))
        if kernel not in self._functions:  # one for all devices: cupy loads the module on each
            self._functions[kernel] = self._modules[module].get_function(kernel)
        return self._functions[kernel]


@dataclass(frozen=True)
class _ForeignStream:
    """A stream in the words of CUDA's stream protocol."""

    address: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address


def raw_module(module: str) -> dict[str, Any]:
    """Return what `cupy.RawModule` takes to compile a module.

    cupy's cache looks at the code and the options, not into included files. So the code names a hash of all sources: an
    upgraded package never runs kernels of the one before.

    Args:
        module: Name of the source file, without its suffix.

    Returns:
        `code` and `options`.

    Raises:
        BackendError: The sources are missing.
    """
    folder = kernel_sources()
    sources = b"".join(path.read_bytes() for path in sorted(folder.glob("*.cuh")))
    code = f'// {hashlib.sha256(sources).hexdigest()}\n#include "{module}.cuh"\n'
    return {"code": code, "options": ("-std=c++17", f"-I{folder}")}


def kernel_sources() -> Path:
    """Return the folder of the kernels' sources: inside the installed package, or in the checkout it is used from.

    Raises:
        BackendError: It is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "kernels", package.parent / "csrc" / "cuda"):
        if folder.is_dir():
            return folder
    raise BackendError(f"the sources of the CUDA kernels are neither in {package} nor beside it: reinstall sstmerge")


@cache
def compiled_launcher() -> tuple[Launcher | None, str]:
    """Return the launcher of compiled kernels, or None and the reason."""
    extension, words = load_extension()
    if extension is None:
        return None, words
    reason = extension.cuda_build_reason()
    if reason:
        return None, f"it was not built: {reason}"
    devices, reason = extension.cuda_device_count()
    if not devices:
        return None, f"it was built, but there is no usable GPU: {reason}"
    reason = _why_torch_has_no_gpu()
    return (None, reason) if reason else (CompiledLauncher(extension), f"{len(extension.cuda_kernel_names())} kernels")


@cache
def cupy_launcher() -> tuple[Launcher | None, str]:
    """Return the launcher through cupy, or None and the reason."""
    if importlib.util.find_spec("cupy") is None:
        return None, "cupy is not installed"
    reason = _why_torch_has_no_gpu()
    if reason:
        return None, f"cupy is installed, but {reason}"
    try:
        cupy = importlib.import_module("cupy")
        devices = cupy.cuda.runtime.getDeviceCount()
        kernel_sources()
    except (ImportError, RuntimeError) as error:  # cupy's errors of the CUDA runtime are RuntimeErrors
        return None, f"cupy cannot be used: {error}"
    return CupyLauncher(cupy), f"cupy {cupy.__version__} with NVRTC, {devices} devices"


def _why_torch_has_no_gpu() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no usable GPU"
    newest = max(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if newest < OLDEST_CAPABILITY:
        return f"the kernels need a GPU of compute capability 8.0 or newer, and this one has {newest[0]}.{newest[1]}"
    return ""


# Backends whose kernels are launched, fastest first.
LAUNCHERS: dict[str, Callable[[], tuple[Launcher | None, str]]] = {
    "cuda_compiled": compiled_launcher,
    "cuda_cupy": cupy_launcher,
}


def launcher(backend: str) -> Launcher:
    """Return the launcher of a backend.

    Args:
        backend: A key of `LAUNCHERS`.

    Returns:
        The launcher.

    Raises:
        BackendError: It is not available.
    """
    found, reason = LAUNCHERS[backend]()
    if found is None:
        raise BackendError(f"backend {backend!r} is not available: {reason}")
    return found
