"""Launchers that run kernels on the CPU, for `sstmerge.ops.launch`: in this process, or under the sanitizers."""

from __future__ import annotations

import contextlib
import ctypes
import struct
import subprocess
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sstmerge.ops.launch import Argument, pack

ORDERS = (0, 1, 2)  # forwards, backwards, shuffled


class EmulationError(RuntimeError):
    """What the emulation or a sanitizer has caught."""


class NoStreams:
    """Calls between kernels act at once, and there is one device."""

    device_type = "cpu"

    def stream(self, device: torch.device) -> int:
        return 0

    def guard(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class EmulatedLauncher(NoStreams):
    """Runs every launch on the tensors themselves, in a given order of threads and blocks.

    Attributes:
        order: 0 forwards, 1 backwards, more: shuffled with this seed.
        launched: Names of the kernels that ran.
    """

    def __init__(self, library: Path) -> None:
        self.order = 0
        self.launched: list[str] = []
        self._function = ctypes.CDLL(str(library)).emulated_launch
        self._function.restype = ctypes.c_char_p
        self._function.argtypes = [
            ctypes.c_char_p,
            ctypes.POINTER(ctypes.c_uint),
            ctypes.c_uint,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_size_t,
        ]

    def launch(self, module, kernel, grid, block, shared_bytes, device, arguments: list[Argument]) -> None:
        slots = pack(arguments)
        self.launched.append(kernel)
        sizes = (ctypes.c_uint * 3)(*grid)
        message = self._function(kernel.encode(), sizes, block, shared_bytes, self.order, slots, len(slots) // 8)
        if message:
            raise EmulationError(message.decode())


class SanitizedLauncher(NoStreams):
    """Runs every launch in a process of its own under the sanitizers, on copies that are copied back."""

    def __init__(self, program: Path) -> None:
        self.order = 0
        self.launched: list[str] = []
        self._program = program

    def launch(self, module, kernel, grid, block, shared_bytes, device, arguments: list[Argument]) -> None:
        self.launched.append(kernel)
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        # One buffer per storage: views of one storage stay views of one buffer.
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        index = {pointer: number for number, pointer in enumerate(storages)}
        words = struct.pack("<q", len(kernel)) + kernel.encode()
        words += struct.pack("<7q", *grid, block, shared_bytes, self.order, len(storages))
        for storage in storages.values():
            words += struct.pack("<q", storage.nbytes()) + bytes_of(storage)
        words += struct.pack("<q", len(arguments))
        for argument in arguments:
            if isinstance(argument, Tensor):
                base = argument.untyped_storage().data_ptr()
                words += struct.pack("<qq", index[base], argument.data_ptr() - base)
            else:
                value = np.asarray(0 if argument is None else argument)
                words += struct.pack("<q", -1) + value.tobytes().ljust(8, b"\0")
        done = subprocess.run([self._program], input=words, capture_output=True, check=False)
        if done.returncode != 0:
            raise EmulationError(done.stderr.decode(errors="replace")[:4000])
        position = 0
        for storage in storages.values():
            size = storage.nbytes()
            ctypes.memmove(storage.data_ptr(), done.stdout[position : position + size], size)
            position += size


class PartlyBrokenLauncher(NoStreams):
    """Runs the kernels of one header, or one kernel, from a broken build, and those of other headers from an intact one."""

    def __init__(
        self, broken: EmulatedLauncher | SanitizedLauncher, intact: EmulatedLauncher, module: str, kernel: str | None
    ) -> None:
        self.order = 0
        self._broken, self._intact = broken, intact
        self._module, self._kernel = module, kernel

    def launch(self, module, kernel, grid, block, shared_bytes, device, arguments: list[Argument]) -> None:
        if module == self._module and self._kernel not in {None, kernel}:
            raise ValueError(f"the check launches {kernel}, but only {self._kernel} was compiled")
        chosen = self._broken if module == self._module else self._intact
        chosen.order = self.order
        chosen.launch(module, kernel, grid, block, shared_bytes, device, arguments)


def bytes_of(storage: torch.UntypedStorage) -> bytes:
    """Return the content of a storage."""
    return ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b""
