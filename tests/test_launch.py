"""Launchers without a GPU: what they hand to CUDA and to cupy, and why they are missing where they are."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sstmerge import ops
from sstmerge.errors import BackendError
from sstmerge.ops import launch

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda", 1)
STREAM = 0x5EED


@pytest.fixture(autouse=True)
def on_a_stream(monkeypatch):
    """Torch as it is on a machine with GPUs, with a stream of the user's own."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM + device.index))


def test_arguments_are_packed_into_slots():
    tensor = torch.arange(4.0)

    packed = launch.pack([tensor, None, np.int32(-3), np.float32(1.5), np.int64(-(2**40)), np.float64(0.1)])

    assert packed == struct.pack("<QQi4xf4xqd", tensor.data_ptr(), 0, -3, 1.5, -(2**40), 0.1)


def test_a_view_is_packed_as_the_address_of_its_first_element():
    tensor = torch.arange(6.0).reshape(2, 3)

    assert launch.pack([tensor[1, 1:]]) == struct.pack("<Q", tensor.data_ptr() + 16)


def test_the_compiled_launcher_hands_everything_to_the_extension():
    calls = []
    launcher = launch.CompiledLauncher(SimpleNamespace(cuda_launch=lambda *arguments: calls.append(arguments)))
    tensor = torch.ones(2)

    launcher.launch("module", "kernel", (3, 2, 1), 256, 1024, DEVICE, [tensor, np.int32(7)])

    assert calls == [
        ("kernel", (3, 2, 1), 256, 1024, 1, STREAM + 1, struct.pack("<Qi4x", tensor.data_ptr(), 7)),
    ]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("kernel k cannot be launched: out of memory"),
            "'cuda_compiled' failed on cuda:1: kernel k cannot",
        ),
        (ValueError("there is no CUDA kernel 'k'"), "there is no CUDA kernel 'k'.*rebuild it"),
    ],
)
def test_the_compiled_launcher_repeats_what_the_extension_says(error, words):
    def cuda_launch(*arguments):
        raise error

    launcher = launch.CompiledLauncher(SimpleNamespace(cuda_launch=cuda_launch))

    with pytest.raises(BackendError, match=words):
        launcher.launch("module", "k", (1, 1, 1), 32, 0, DEVICE, [])


class FakeFunction:
    """cupy.RawKernel: the limit of shared memory is kept per device, like everything of a loaded module."""

    def __init__(self, cupy: FakeCupy, name: str) -> None:
        self._cupy = cupy
        self._name = name

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._cupy.limits.get((self._name, self._cupy.current_device), 48 * 1024)

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, limit: int) -> None:
        if limit > 227 * 1024:
            raise self._cupy.cuda.driver.CUDADriverError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        self._cupy.limits[self._name, self._cupy.current_device] = limit

    def __call__(self, grid: tuple, block: tuple, arguments: tuple, *, shared_mem: int) -> None:
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise self._cupy.cuda.driver.CUDADriverError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        # What cupy's own argument parsing takes beside its arrays.
        assert all(isinstance(argument, np.generic) for argument in arguments)
        where = (self._cupy.current_device, self._cupy.current_stream)
        self._cupy.launched.append((self._name, grid, block, shared_mem, where, arguments))


class FakeCupy:
    """The part of cupy 14 (or 13) that CupyLauncher uses, with the same names and exceptions."""

    def __init__(self, version: int = 14) -> None:
        self.current_device = 0
        self.current_stream = 0
        self.compiled: list[dict] = []
        self.launched: list[tuple] = []
        self.limits: dict[tuple[str, int], int] = {}
        driver = SimpleNamespace(CUDADriverError=type("CUDADriverError", (RuntimeError,), {}))
        compiler = SimpleNamespace(CompileException=type("CompileException", (Exception,), {}))
        streams = {"Stream": SimpleNamespace(from_external=lambda stream: self._stream(stream.__cuda_stream__()[1]))}
        if version < 14:
            streams = {"Stream": SimpleNamespace(), "ExternalStream": self._stream}
        self.cuda = SimpleNamespace(driver=driver, compiler=compiler, Device=self._device, **streams)

    @contextmanager
    def _device(self, index: int):
        self.current_device, previous = index, self.current_device
        yield
        self.current_device = previous

    @contextmanager
    def _stream(self, address: int):
        self.current_stream, previous = address, self.current_stream
        yield
        self.current_stream = previous

    def RawModule(self, *, code: str, options: tuple[str, ...]) -> SimpleNamespace:
        self.compiled.append({"code": code, "options": options})

        def get_function(name: str) -> FakeFunction:
            if "missing" in name:
                raise self.cuda.driver.CUDADriverError("CUDA_ERROR_NOT_FOUND: named symbol not found")
            if "broken" in code:
                raise self.cuda.compiler.CompileException("error: expected a ';'")
            return FakeFunction(self, name)

        return SimpleNamespace(get_function=get_function)


@pytest.mark.parametrize("version", [13, 14])
def test_the_cupy_launcher_launches_on_torchs_stream_and_device(version):
    cupy = FakeCupy(version)
    tensor = torch.ones(2)

    launch.CupyLauncher(cupy).launch(
        "filter_cores", "kernel", (3, 2, 1), 64, 100, DEVICE, [tensor, None, np.float32(2)]
    )

    [(name, grid, block, shared_bytes, where, arguments)] = cupy.launched
    assert (name, grid, block, shared_bytes, where) == ("kernel", (3, 2, 1), (64, 1, 1), 100, (1, STREAM + 1))
    assert arguments == (tensor.data_ptr(), 0, 2.0)
    assert [argument.dtype for argument in arguments] == [np.uint64, np.uint64, np.float32]
    assert (cupy.current_device, cupy.current_stream) == (0, 0)


def test_the_cupy_launcher_compiles_a_module_once():
    cupy = FakeCupy()
    launcher = launch.CupyLauncher(cupy)

    for kernel in ("filter_cores_float32", "filter_cores_float64", "filter_cores_float32"):
        launcher.launch("filter_cores", kernel, (1, 1, 1), 64, 0, DEVICE, [])

    assert len(cupy.compiled) == 1
    assert [launched[0] for launched in cupy.launched] == [
        "filter_cores_float32",
        "filter_cores_float64",
        "filter_cores_float32",
    ]


def test_the_cupy_launcher_raises_the_limit_of_shared_memory_on_every_device():
    cupy = FakeCupy()
    launcher = launch.CupyLauncher(cupy)

    for index in (0, 1):
        launcher.launch("filter_cores", "k", (1, 1, 1), 64, 200_000, torch.device("cuda", index), [])
    launcher.launch("filter_cores", "small", (1, 1, 1), 64, 48 * 1024, DEVICE, [])

    assert cupy.limits == {("k", 0): 200_000, ("k", 1): 200_000}


@pytest.mark.parametrize(
    ("module", "kernel", "shared_bytes", "words"),
    [
        ("filter_cores", "missing", 0, "named symbol not found"),
        ("filter_cores", "k", 10**6, "invalid argument"),
        ("broken", "k", 0, "expected a ';'"),
    ],
)
def test_the_cupy_launcher_repeats_what_cupy_says(module, kernel, shared_bytes, words):
    with pytest.raises(BackendError, match=f"'cuda_cupy' failed on cuda:1 in kernel {kernel}: .*{words}"):
        launch.CupyLauncher(FakeCupy()).launch(module, kernel, (1, 1, 1), 64, shared_bytes, DEVICE, [])


def test_changed_sources_are_compiled_again(monkeypatch, tmp_path):
    """The code's text is all that cupy's cache on disk knows of a kernel."""
    (tmp_path / "kernel.cuh").write_text('#include "part.cuh"')
    (tmp_path / "part.cuh").write_text("1")
    monkeypatch.setattr(launch, "kernel_sources", lambda: tmp_path)
    before, again = launch.raw_module("kernel"), launch.raw_module("kernel")
    (tmp_path / "part.cuh").write_text("2")
    after = launch.raw_module("kernel")

    assert before == again != after
    assert before["code"].splitlines()[1] == '#include "kernel.cuh"'
    assert before["options"] == ("-std=c++17", f"-I{tmp_path}")


@pytest.fixture
def why_missing(monkeypatch) -> Callable[..., str]:
    """`why_missing(backend, **machine)`: why `backends` says that it is missing; "" if it is not."""

    def reason(
        backend: str,
        *,
        build: str = "",
        devices: tuple[int, str] = (1, ""),
        torch_cuda: str | None = "13.0",
        torch_has_gpu: bool = True,
        capability: tuple[int, int] = (9, 0),
        cupy: FakeCupy | None = None,
    ) -> str:
        extension = SimpleNamespace(
            cuda_build_reason=lambda: build,
            cuda_device_count=lambda: devices,
            cuda_kernel_names=lambda: ["kernel"],
            cuda_launch=None,
        )
        monkeypatch.setattr(launch, "load_extension", lambda: (extension, "it is there"))
        monkeypatch.setitem(sys.modules, "cupy", cupy)  # None: as if it were not installed
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_has_gpu)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setitem(launch.LAUNCHERS, "cuda_compiled", launch.compiled_launcher.__wrapped__)
        monkeypatch.setitem(launch.LAUNCHERS, "cuda_cupy", launch.cupy_launcher.__wrapped__)
        info = next(info for info in ops.backends() if info.name == backend)
        assert bool(info.ops) == info.available
        return "" if info.available else info.reason

    return reason


def usable_cupy(devices: Callable[[], int] = lambda: 1) -> FakeCupy:
    cupy = FakeCupy()
    cupy.__version__, cupy.__spec__ = "14.0", "installed"
    cupy.cuda.runtime = SimpleNamespace(getDeviceCount=devices)
    return cupy


def test_nothing_is_missing_on_a_machine_with_everything(why_missing):
    assert why_missing("cuda_compiled") == ""
    assert why_missing("cuda_cupy", cupy=usable_cupy()) == ""


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ({"build": "nvcc was not found"}, "it was not built: nvcc was not found"),
        ({"devices": (0, "CUDA driver version is insufficient")}, "no usable GPU: CUDA driver version is insufficient"),
        ({"torch_cuda": None}, "was built without CUDA"),
        ({"torch_has_gpu": False}, "finds no usable GPU"),
        ({"capability": (7, 5)}, "compute capability 8.0 or newer, and this one has 7.5"),
    ],
)
def test_the_reason_for_missing_compiled_kernels(why_missing, machine, words):
    assert words in why_missing("cuda_compiled", **machine)


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ({}, "cupy is not installed"),
        ({"cupy": usable_cupy(), "torch_cuda": None}, "cupy is installed, but torch .* was built without CUDA"),
        ({"cupy": usable_cupy(), "torch_has_gpu": False}, "finds no usable GPU"),
        ({"cupy": usable_cupy(), "capability": (7, 0)}, "and this one has 7.0"),
    ],
)
def test_the_reason_for_missing_cupy_kernels(why_missing, machine, words):
    assert re.search(words, why_missing("cuda_cupy", **machine))


def test_a_driver_too_old_for_cupy_is_a_reason(why_missing):
    def get_device_count():
        raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")

    reason = why_missing("cuda_cupy", cupy=usable_cupy(get_device_count))

    assert reason == "cupy cannot be used: cudaErrorInsufficientDriver: CUDA driver version is insufficient"


def test_the_sources_are_those_of_the_checkout():
    assert launch.kernel_sources() == ROOT / "csrc" / "cuda"


def test_missing_sources_are_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "sstmerge" / "ops" / "launch.py"))
    with pytest.raises(BackendError, match="reinstall sstmerge"):
        launch.kernel_sources()

    (tmp_path / "sstmerge" / "kernels").mkdir(parents=True)
    assert launch.kernel_sources() == tmp_path / "sstmerge" / "kernels"


def test_the_package_imports_where_no_cuda_library_is_found():
    script = (
        "import ctypes, ctypes.util, sys\n"
        "import sstmerge, sstmerge.ops as ops\n"
        "reasons = {info.name: info.reason for info in ops.backends() if not info.available}\n"
        "print(sorted(reasons), all(reasons.values()))\n"
        "print('cupy' in sys.modules, torch_is_initialised())\n"
    ).replace("torch_is_initialised()", "sys.modules['torch'].cuda.is_initialized()")
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}

    done = subprocess.run([sys.executable, "-c", script], env=hidden, capture_output=True, text=True, check=True)

    assert done.stdout.splitlines() == ["['cuda_compiled', 'cuda_cupy'] True", "False False"]


def test_a_built_package_holds_the_kernels_sources(tmp_path):
    build = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]

    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)

    packed = {path.name: path.read_bytes() for path in (tmp_path / "sstmerge" / "kernels").iterdir()}
    assert packed == {path.name: path.read_bytes() for path in (ROOT / "csrc" / "cuda").glob("*.cuh")}
    assert (tmp_path / "sstmerge" / "ops" / "launch.py").exists()
