"""Compiling the kernels' own sources for the CPU: as a library, or as a program under the sanitizers."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "csrc" / "cuda"
FLAGS = ["-std=c++17", "-DSSTMERGE_EMULATION", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter"]
# Fused multiply-add is left to the sources: contraction would make the bits depend on the optimiser.
FLAGS += ["-ffp-contract=off"]
SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def compiler() -> str | None:
    """Return the C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def kernel_lists(header: Path) -> list[str]:
    """Return the names of the lists of kernels that a header ends with."""
    return re.findall(r"#define (SSTMERGE_\w+_KERNELS)\(", header.read_text(encoding="utf-8"))


def headers(kernels: Path = KERNELS) -> list[Path]:
    """Return the headers that define kernels."""
    return [path for path in sorted(kernels.glob("*.cuh")) if kernel_lists(path)]


def build(
    cache: Path,
    *,
    sanitized: bool = False,
    kernels: Path = KERNELS,
    only: str | None = None,
    kernel: str | None = None,
) -> Path:
    """Compile the kernels of a folder, unless the same sources were compiled before.

    Args:
        cache: Folder of everything that was compiled.
        sanitized: A program that runs one launch under the address and undefined-behaviour sanitizers, instead of a
            shared library.
        kernels: Folder of the kernels' sources.
        only: Name of the one header to compile, without its suffix; all of them by default.
        kernel: Name of the one kernel of that header to compile; all of them by default.

    Returns:
        The library or program.

    Raises:
        RuntimeError: It does not compile.
    """
    chosen = [path for path in headers(kernels) if only in (None, path.stem)]
    lists = "".join(f"{name}(EMULATION_ENTRY)\n" for path in chosen for name in kernel_lists(path))
    entries = lists if kernel is None else f"EMULATION_ENTRY({kernel})\n"
    table = "".join(f'#include "{path.name}"\n' for path in chosen) + (
        '#include "launch.h"\n'
        "const std::map<std::string, emulation::Launch>& emulation::launches() {\n"
        f"static const std::map<std::string, Launch> all = {{\n{entries}}};\nreturn all;\n}}\n"
    )
    frame = HERE / ("sanitized.cpp" if sanitized else "library.cpp")
    # What runs once, a broken kernel, is compiled fast; what every test runs is compiled to run fast.
    optimization = "-O2" if only is None else "-O1"
    flags = [*FLAGS, *(SANITIZERS if sanitized else [optimization, "-shared", "-fPIC"])]
    digest = hashlib.sha256("\n".join([table, *flags]).encode())
    for path in (*sorted(kernels.glob("*.cuh")), *sorted(HERE.glob("*.h")), frame):
        digest.update(path.read_bytes())
    product = cache / f"{'sanitized' if sanitized else 'library'}-{only or 'all'}-{digest.hexdigest()[:16]}"
    with FileLock(f"{product}.lock"):  # several processes may run tests
        if not product.exists():
            _compile(product, table + f'#include "{frame.name}"\n', flags, kernels)
    return product


def _compile(product: Path, text: str, flags: list[str], kernels: Path) -> None:
    source = product.with_suffix(".cpp")
    source.write_text(text, encoding="utf-8")
    unfinished = product.with_suffix(f".{os.getpid()}")
    command = [str(compiler()), *flags, f"-I{HERE}", f"-I{kernels}", str(source), "-o", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the emulated kernels do not compile:\n{done.stderr}")
    unfinished.rename(product)
