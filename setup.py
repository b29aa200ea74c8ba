"""Build sstmerge._C: C++ always, CUDA where nvcc is found. The metadata is in pyproject.toml.

Environment: CXX, CXXFLAGS and LDFLAGS as usual; CUDA_HOME names the toolkit; SSTMERGE_CUDA_ARCH (default "80;90") lists
the GPU architectures; SSTMERGE_NO_CUDA=1 builds without CUDA. Where CUDA cannot be built, the module is built without
it and `sstmerge doctor` tells the reason. Ninja makes rebuilds incremental and is not required.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

SOURCES = Path(__file__).resolve().parent / "csrc"
CPU_SOURCES = tuple(path.name for path in sorted(SOURCES.glob("*.cpp")))
CUDA_SOURCES = tuple(f"cuda/{path.name}" for path in sorted((SOURCES / "cuda").glob("*.cu")))
CUDA_STUBS = ("cuda/runtime_stub.cpp",)


class CudaUnavailableError(Exception):
    """CUDA cannot be built here; the message is the reason that the module will give."""


@dataclass(frozen=True)
class Step:
    """One command that turns inputs into an output."""

    command: list[str]
    inputs: list[Path]
    output: Path


def run_steps(steps: list[Step], ninja_file: Path) -> None:
    """Run the commands in order, or through ninja where it is present, which skips those with unchanged inputs."""
    ninja = shutil.which("ninja")
    if ninja is not None:
        ninja_file.write_text("\n".join(map(ninja_rule, enumerate(steps))), encoding="utf-8")
    for command in (
        [[ninja, "-C", str(ninja_file.parent), "-f", ninja_file.name]] if ninja else [step.command for step in steps]
    ):
        print(shlex.join(command), flush=True)
        subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ninja_rule(numbered: tuple[int, Step]) -> str:
    """Write one step in ninja's language; compilers list the headers they read in `output`.d."""
    number, step = numbered
    paths = [re.sub(r"([$ :])", r"$\1", str(path)) for path in (step.output, *step.inputs)]
    headers = f"  depfile = {step.output}.d\n  deps = gcc\n" if "-MMD" in step.command else ""
    command = shlex.join(step.command).replace("$", "$$")
    return f"rule r{number}\n  command = {command}\n{headers}build {paths[0]}: r{number} {' '.join(paths[1:])}\n"


def find_cuda() -> tuple[str, Path]:
    """Return nvcc and libcudart_static.a.

    Raises:
        CudaUnavailableError: It is switched off, or one of the two is missing.
    """
    if os.environ.get("SSTMERGE_NO_CUDA", "0") not in {"", "0"}:
        raise CudaUnavailableError("it was switched off by SSTMERGE_NO_CUDA")
    homes = [home for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    compilers = [f"{homes[0]}/bin/nvcc", "nvcc"] if len(homes) == 2 else ["nvcc", f"{homes[0]}/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, compilers)), None)
    if nvcc is None:
        raise CudaUnavailableError("nvcc was not found in $CUDA_HOME, on PATH or in /usr/local/cuda at build time")
    # The nvcc on PATH may be a script that lies outside the toolkit, so nvcc itself is asked where its toolkit is.
    command = [nvcc, "-v", "--dryrun", str(SOURCES / CUDA_SOURCES[0])]
    plan = subprocess.run(command, capture_output=True, text=True, check=False)
    roots = re.findall(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
    for root, folder in itertools.product([*roots, *homes], ["lib64", "lib", "targets/*/lib"]):
        for library in Path(root).resolve().glob(f"{folder}/libcudart_static.a"):
            return nvcc, library
    raise CudaUnavailableError(f"{nvcc} was found, but libcudart_static.a was not found in its toolkit")


class BuildPackage(build_py):  # type: ignore[misc]  # setuptools is untyped here
    """Puts the kernels' sources into the package, where NVRTC compiles them on machines without nvcc."""

    def run(self) -> None:
        """Copy the package, then the kernels; an editable install reads them from the checkout."""
        super().run()
        if not self.editable_mode:
            kernels = Path(self.build_lib) / "sstmerge" / "kernels"
            kernels.mkdir(parents=True, exist_ok=True)
            for header in sorted((SOURCES / "cuda").glob("*.cuh")):
                self.copy_file(str(header), str(kernels / header.name))


class BuildExtension(build_ext):  # type: ignore[misc]  # setuptools is untyped here
    """Compiles and links the extension by plain commands, because setuptools knows no nvcc."""

    def build_extension(self, ext: Extension) -> None:
        """Build `ext` with CUDA, or without it and with the reason inside.

        Raises:
            CompileError: There is no C++ compiler, or it failed; the message holds its output.
        """
        self.objects = Path(self.build_temp).resolve()
        self.objects.mkdir(parents=True, exist_ok=True)
        try:
            cuda_objects, cuda_libraries = self.compile_cuda()
            reason, sources = "", [*CPU_SOURCES]
        except CudaUnavailableError as error:
            cuda_objects, cuda_libraries = [], []
            reason, sources = str(error), [*CPU_SOURCES, *CUDA_STUBS]
            print(f"sstmerge is built without CUDA: {reason}")
        self.write_build_info(reason)
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self.compile_and_link(sources, cuda_objects, cuda_libraries, module)
        except subprocess.CalledProcessError as error:
            raise CompileError(f"the C++ part of sstmerge does not build:\n{error.output}") from error

    def compile_cuda(self) -> tuple[list[Path], list[str]]:
        """Return the object files of the .cu sources and what to link with them.

        Raises:
            CudaUnavailableError: There is no toolkit, or nvcc failed.
        """
        nvcc, runtime = find_cuda()
        architectures = os.environ.get("SSTMERGE_CUDA_ARCH", "80;90").split(";")
        targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
        targets.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
        flags = ["-std=c++17", "-O3", f"-I{SOURCES}", "-Xcompiler=-fPIC,-fvisibility=hidden", *targets]
        steps = self.compile_steps(nvcc, flags, [*CUDA_SOURCES])
        try:
            run_steps(steps, self.objects / "cuda.ninja")
        except subprocess.CalledProcessError as error:
            words = " ".join(line for line in error.output.splitlines() if "error" in line or "fatal" in line)
            raise CudaUnavailableError(f"nvcc failed: {words[:500] or error.output[-500:]}") from error
        # Torch loads a CUDA runtime of its own: without exclude-libs the two would bind to each other's symbols.
        return [step.output for step in steps], [str(runtime), "-lrt", "-Wl,--exclude-libs,libcudart_static.a"]

    def compile_steps(self, compiler: str, flags: list[str], sources: list[str]) -> list[Step]:
        """Return one step per source."""
        steps = []
        for source in sources:
            output = self.objects / (source.replace("/", "_") + ".o")
            command = [compiler, "-MMD", "-MF", f"{output}.d", *flags, "-c", str(SOURCES / source), "-o", str(output)]
            steps.append(Step(command, [SOURCES / source], output))
        return steps

    def compile_and_link(self, sources: list[str], objects: list[Path], libraries: list[str], module: Path) -> None:
        """Compile the C++ sources and link them with the CUDA objects into the extension module.

        Raises:
            CompileError: There is no C++ compiler.
            CalledProcessError: It failed; `output` holds its words.
        """
        import pybind11

        compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        compiler = next(filter(None, map(shutil.which, compilers)), None)
        if compiler is None:
            raise CompileError(f"no C++ compiler was found ({', '.join(compilers)}): install g++, or set CXX to one")
        openmp = ["-fopenmp"] if self.links_with_openmp(compiler) else []
        folders = [SOURCES, self.objects, pybind11.get_include(), sysconfig.get_path("include")]
        # Sums and products are rounded one by one, as on every other backend. Nobody catches floating-point exceptions,
        # and loops that may raise them in another order run on vector registers.
        arithmetic = ["-ffp-contract=off", "-fno-trapping-math"]
        flags = ["-std=c++17", "-O3", *arithmetic, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *openmp]
        flags += [f"-I{folder}" for folder in folders] + shlex.split(os.environ.get("CXXFLAGS", ""))
        steps = self.compile_steps(compiler, flags, sources)
        objects = [*(step.output for step in steps), *objects]
        shared = shlex.split(sysconfig.get_config_var("LDCXXSHARED") or "c++ -shared")[1:]
        libraries = [*libraries, *openmp, "-ldl", "-lpthread", *shlex.split(os.environ.get("LDFLAGS", ""))]
        module.parent.mkdir(parents=True, exist_ok=True)
        steps.append(Step([compiler, *shared, *map(str, objects), "-o", str(module), *libraries], objects, module))
        run_steps(steps, self.objects / "cxx.ninja")

    def links_with_openmp(self, compiler: str) -> bool:
        """Whether the compiler can build a shared library with OpenMP (Apple's clang cannot by itself)."""
        probe = self.objects / "openmp_probe.cpp"
        probe.write_text("#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n", encoding="utf-8")
        command = [compiler, "-fopenmp", "-fPIC", "-shared", str(probe), "-o", str(probe.with_suffix(".so"))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def write_build_info(self, reason: str) -> None:
        """Write what the module says about itself; an unchanged file is left alone, so that nothing is recompiled."""
        words = json.dumps(" ".join(reason.encode("ascii", "replace").decode().split()))
        version = json.dumps(self.distribution.get_version())
        text = f"#define SSTMERGE_VERSION {version}\n#define SSTMERGE_CUDA_BUILD_REASON {words}\n"
        header = self.objects / "build_info.h"
        if not header.exists() or header.read_text(encoding="utf-8") != text:
            header.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("sstmerge._C", sources=[])],
        cmdclass={"build_ext": BuildExtension, "build_py": BuildPackage},
    )
