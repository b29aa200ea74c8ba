"""What nvcc and NVRTC make of the kernels, without a GPU: registers, spills, and the instructions that are meant.

Every `csrc/cuda/*.cu` is compiled for three architectures. What was compiled is kept in pytest's cache, by the hash of
the sources.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from sstmerge.ops import launch

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "cuda"
ARCHITECTURES = ("80", "90", "100")
MODULES = tuple(path.stem for path in sorted(KERNELS.glob("*.cu")) if path.stem != "runtime")

# Registers of a multiprocessor, and the granularity in which a thread gets them.
REGISTERS, REGISTER_UNIT = 65536, 8
# What a block may use on every GPU without asking for more, dynamic shared memory aside.
STATIC_SHARED_BYTES = 48 * 1024

# Bytes of stack that a kernel may use, with the reason; none for all others.
STACK_BYTES: dict[str, tuple[int, str]] = {}

# Kernels that feed the tensor cores, with the type of their multiplications; the name says the type of the tokens.
TENSOR_CORES = re.compile(r"(?:project|fused_scores)_(bfloat16|float16)_\w+")
PTX_TYPES = {"bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture.

    Attributes:
        kernel: Its name.
        module: Name of its source file, without the suffix.
        architecture: Number after sm_.
        ptx: Its text.
        registers: Per thread.
        threads: Per block, from its launch bounds; 0 without.
        blocks: Blocks per multiprocessor that the launch bounds promise, at least 1.
        shared_bytes: Static shared memory.
        stack_bytes: Per thread.
        spilled_bytes: Stored and loaded, per thread.
    """

    kernel: str
    module: str
    architecture: str
    ptx: str
    registers: int
    threads: int
    blocks: int
    shared_bytes: int
    stack_bytes: int
    spilled_bytes: int

    def __str__(self) -> str:
        return f"{self.kernel} for sm_{self.architecture}"


def find_nvcc() -> str:
    """Return nvcc from where setup.py takes it, or skip with setup.py's reason."""
    specification = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(specification)
    sys.modules["setup"] = setup  # its dataclass looks itself up there
    specification.loader.exec_module(setup)
    try:
        return setup.find_cuda()[0]
    except setup.CudaUnavailableError as error:
        pytest.skip(f"nvcc does not run here: {error}")


def find_tool(name: str) -> str | None:
    """Return a program of the CUDA toolkit from PATH or from NVIDIA's wheels."""
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia"
    places = [os.environ.get("PATH", ""), *map(str, sorted(wheels.glob("cu*/bin")))]
    return shutil.which(name, path=os.pathsep.join(places))


def compile_module(nvcc: str, module: str, folder: Path) -> None:
    """Compile a module for all architectures; `folder` gets the PTX, the cubins and ptxas' words."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES]
    command = [nvcc, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", *targets, "-Xptxas", "-v", "--keep", "--keep-dir", "."]
    command += ["-c", str(KERNELS / f"{module}.cu"), "-o", f"{module}.o"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"nvcc does not compile {module}.cu:\n{done.stdout}{done.stderr}"
    for path in folder.iterdir():
        if path.suffix not in {".ptx", ".cubin"}:
            path.unlink()
    (folder / "ptxas.txt").write_text(done.stdout + done.stderr, encoding="utf-8")


@pytest.fixture(scope="module")
def compiled_folder(request) -> Path:
    """A folder with one subfolder per module."""
    nvcc = find_nvcc()
    digest = hashlib.sha256("".join(ARCHITECTURES).encode())
    for path in sorted(KERNELS.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    folder = request.config.cache.mkdir("cuda_build") / digest.hexdigest()[:16]
    missing = [module for module in MODULES if not (folder / module / "ptxas.txt").exists()]
    for outdated in folder.parent.iterdir():
        if outdated != folder:
            shutil.rmtree(outdated)
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda module: compile_module(nvcc, module, folder / module), missing))
    return folder


@pytest.fixture(scope="module")
def compiled(compiled_folder) -> list[Compiled]:
    """Every kernel for every architecture."""
    return [kernel for module in MODULES for kernel in read_module(compiled_folder / module)]


def read_module(folder: Path) -> Iterator[Compiled]:
    """Yield what ptxas and the PTX say about each kernel of a module, for each architecture."""
    words = (folder / "ptxas.txt").read_text(encoding="utf-8")
    for architecture in ARCHITECTURES:
        ptx = ptx_by_kernel(next(folder.glob(f"*compute_{architecture}.ptx")).read_text(encoding="utf-8"))
        for kernel, text in ptx.items():
            heading = re.escape(f"Compiling entry function '{kernel}' for 'sm_{architecture}'")
            report = re.search(f"{heading}(.*?)Used (\\d+) registers([^\n]*)", words, re.DOTALL)
            assert report is not None, f"ptxas says nothing about {kernel} for sm_{architecture}"
            properties, registers, rest = report.groups()
            stack, stores, loads = re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", properties
            ).groups()
            threads = [int(size) for size in re.findall(r"\.maxntid (\d+)", text)]
            blocks = [int(number) for number in re.findall(r"\.minnctapersm (\d+)", text)]
            shared = re.search(r"(\d+) bytes smem", rest)
            yield Compiled(
                kernel=kernel,
                module=folder.name,
                architecture=architecture,
                ptx=text,
                registers=int(registers),
                threads=max(threads, default=0),
                blocks=max(blocks, default=1),
                shared_bytes=int(shared[1]) if shared else 0,
                stack_bytes=int(stack),
                spilled_bytes=int(stores) + int(loads),
            )


def ptx_by_kernel(text: str) -> dict[str, str]:
    """Split PTX into its kernels."""
    starts = [*re.finditer(r"\.entry (\w+)\(", text)]
    ends = [start.start() for start in starts[1:]] + [len(text)]
    return {start[1]: text[start.start() : end] for start, end in zip(starts, ends, strict=True)}


def test_every_module_has_kernels_for_every_architecture(compiled):
    modules = {(kernel.module, kernel.architecture) for kernel in compiled}

    assert modules == {(module, architecture) for module in MODULES for architecture in ARCHITECTURES}


def test_nothing_spills(compiled):
    assert not [str(kernel) for kernel in compiled if kernel.spilled_bytes]


def test_no_kernel_has_a_stack_that_is_not_accounted_for(compiled):
    allowed = {name: size for name, (size, _) in STACK_BYTES.items()}

    assert not [
        (str(kernel), kernel.stack_bytes) for kernel in compiled if kernel.stack_bytes > allowed.get(kernel.kernel, 0)
    ]
    assert set(allowed) <= {kernel.kernel for kernel in compiled if kernel.stack_bytes}


def test_every_block_fits_into_a_multiprocessor(compiled):
    """A kernel without launch bounds, or with too many registers for them, fails only when it is launched."""
    assert not [str(kernel) for kernel in compiled if not 0 < kernel.threads <= 1024]
    rounded = {kernel: -(-kernel.registers // REGISTER_UNIT) * REGISTER_UNIT for kernel in compiled}
    assert not [str(k) for k, registers in rounded.items() if registers * k.threads * k.blocks > REGISTERS]
    assert not [str(kernel) for kernel in compiled if kernel.shared_bytes > STATIC_SHARED_BYTES]


def test_no_kernel_uses_local_memory(compiled):
    allowed = set(STACK_BYTES)

    assert not [str(kernel) for kernel in compiled if ".local" in kernel.ptx and kernel.kernel not in allowed]


def test_no_floating_point_number_is_added_atomically(compiled):
    """Atomic additions come in any order, so that sums of floating-point numbers would differ from run to run."""
    atomic = re.compile(r"\b(?:atom|red)\.[\w.:]*?(?:f16|f32|f64)")

    assert not [str(kernel) for kernel in compiled if atomic.search(kernel.ptx)]


def test_tensor_cores_are_fed_as_meant(compiled):
    """Half-precision tokens: asynchronous copies, matrix loads (also transposed) and matrix multiplications."""
    chosen = [kernel for kernel in compiled if TENSOR_CORES.fullmatch(kernel.kernel)]
    assert chosen, "no kernel is named like one for tensor cores"
    for kernel in chosen:
        element = PTX_TYPES[TENSOR_CORES.fullmatch(kernel.kernel)[1]]
        for instruction in (
            "cp.async.cg.shared.global",
            "cp.async.wait_group",
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
            f"mma.sync.aligned.m16n8k16.row.col.f32.{element}.{element}.f32",
        ):
            assert instruction in kernel.ptx, f"{kernel} has no {instruction}"


@pytest.fixture(scope="module")
def machine_code(compiled_folder) -> dict[str, dict[str, str]]:
    """SASS for sm_90: by module, then by kernel."""
    disassembler = find_tool("nvdisasm")
    dump = find_tool("cuobjdump")
    if disassembler is None or dump is None:
        pytest.skip("cuobjdump and nvdisasm are not here: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    environment = os.environ | {"PATH": f"{Path(disassembler).parent}{os.pathsep}{os.environ.get('PATH', '')}"}

    def read(module: str) -> dict[str, str]:
        cubin = next((compiled_folder / module).glob("*compute_90*.cubin"))
        done = subprocess.run([dump, "-sass", cubin], env=environment, capture_output=True, text=True, check=True)
        starts = [*re.finditer(r"Function : (\w+)", done.stdout)]
        ends = [start.start() for start in starts[1:]] + [len(done.stdout)]
        return {start[1]: done.stdout[start.end() : end] for start, end in zip(starts, ends, strict=True)}

    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(MODULES, pool.map(read, MODULES), strict=True))


def test_machine_code_has_the_instructions_meant(machine_code):
    kernels = {kernel: text for module in machine_code.values() for kernel, text in module.items()}
    chosen = [kernel for kernel in kernels if TENSOR_CORES.fullmatch(kernel)]
    assert chosen
    for kernel in chosen:
        for instruction in ("LDGSTS", "LDSM", "HMMA"):
            assert re.search(rf"\b{instruction}\b", kernels[kernel]), f"{kernel} has no {instruction}"
    local = [kernel for kernel, text in kernels.items() if re.search(r"\b(?:LDL|STL)\b", text)]
    assert set(local) <= set(STACK_BYTES)


def load_nvrtc() -> ctypes.CDLL:
    """Load NVRTC from NVIDIA's wheel or the system, or skip."""
    folders = [
        path
        for path in sorted((Path(sysconfig.get_path("purelib")) / "nvidia").glob("*/lib"))
        if [*path.glob("libnvrtc.so*")]
    ]
    if folders:
        # The wheel's library does not find its neighbour by itself.
        for name in ("libnvrtc-builtins.so.*", "libnvrtc.so.*"):
            library = ctypes.CDLL(str(next(folders[-1].glob(name))), mode=ctypes.RTLD_GLOBAL)
        return library
    for name in ("libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    pytest.skip("NVRTC is not here: pip install nvidia-cuda-nvrtc")


@pytest.mark.parametrize("module", MODULES)
def test_nvrtc_compiles_what_cupy_would_give_it(module, compiled):
    """To PTX; turning that into machine code is the work of the same ptxas that nvcc has."""
    nvrtc = load_nvrtc()
    source = launch.raw_module(module)
    # cupy adds these: the device's architecture, flushing of subnormal numbers, and functions for both sides.
    options = [*source["options"], "-arch=compute_90", "-ftz=true", "--device-as-default-execution-space"]
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source["code"].encode(), b"kernels.cu", 0, None, None) == 0

    status = nvrtc.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    )

    assert status == 0, nvrtc_text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
    ptx = nvrtc_text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    assert set(ptx_by_kernel(ptx)) == {kernel.kernel for kernel in compiled if kernel.module == module}


def nvrtc_text(get_size: Callable, get_text: Callable, program: ctypes.c_void_p) -> str:
    """Return a text that NVRTC hands out in two calls."""
    size = ctypes.c_size_t()
    get_size(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    get_text(program, text)
    return text.value.decode()
