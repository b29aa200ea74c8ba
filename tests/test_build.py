"""What the extension is made of, and that it builds where something is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sstmerge
from sstmerge import _C
from sstmerge.ops import SolveStatus

ROOT = Path(__file__).resolve().parents[1]


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    assert sstmerge.__version__ == _C.VERSION == project["version"]


def test_status_codes_agree():
    assert {status.name: int(status) for status in SolveStatus} == {
        name: getattr(_C, name) for name in ("CONVERGED", "NOT_POSITIVE_DEFINITE", "NOT_CONVERGED", "NON_FINITE_INPUT")
    }


def test_the_stubs_describe_the_extension():
    stubs = (ROOT / "sstmerge" / "_C.pyi").read_text(encoding="utf-8")
    described = set(re.findall(r"^(?:def )?(\w+)(?:\(|: Final)", stubs, re.MULTILINE))

    assert described == {name for name in dir(_C) if not name.startswith("__")}


def test_the_extension_holds_no_torch():
    binary = Path(_C.__file__).read_bytes()

    # Mangled names of at:: and c10::, torch's C interface, its Python objects and its libraries.
    for word in (b"_ZN2at", b"_ZN3c10", b"_ZN5torch", b"aoti_torch", b"THPVariable", b"libtorch", b"libc10"):
        assert word not in binary


def test_the_sources_include_no_torch():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    includes = {line for path in sources for line in re.findall(r"#include\s+\S+", path.read_text(encoding="utf-8"))}

    assert len(includes) > 10
    assert not [include for include in includes if re.search(r"torch/|ATen|c10|caffe2", include)]


def test_only_the_binding_knows_python():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file() and path.name != "module.cpp"]

    assert not [
        path.name for path in sources if re.search(r"pybind11|Python\.h|py::", path.read_text(encoding="utf-8"))
    ]


def test_cuda_answers_on_any_machine():
    devices, reason = _C.cuda_device_count()

    assert devices >= 0
    assert bool(reason) == (devices == 0)
    if _C.cuda_build_reason():
        assert devices == 0
        assert _C.cuda_build_reason() in reason


def fake_nvcc(toolkit: Path, last_words: str) -> None:
    """An nvcc that says where its toolkit is and cannot compile."""
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f'#!/bin/sh\ncase "$*" in *--dryrun*) echo "#\\$ TOP={toolkit}" >&2 ;; *) echo "{last_words}"; exit 1 ;; esac\n'
    )
    nvcc.chmod(0o755)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["switched off", "nvcc fails"])
def test_builds_without_cuda_and_says_why(case, tmp_path):
    environment = os.environ | {"CXXFLAGS": "-O0"}
    if case == "switched off":
        environment["SSTMERGE_NO_CUDA"] = "1"
        reason = "it was switched off by SSTMERGE_NO_CUDA"
    else:
        fake_nvcc(tmp_path / "toolkit", "fatal error: out of coffee")
        (tmp_path / "toolkit" / "lib64").mkdir()
        (tmp_path / "toolkit" / "lib64" / "libcudart_static.a").touch()
        environment["CUDA_HOME"] = str(tmp_path / "toolkit")
        environment.pop("SSTMERGE_NO_CUDA", None)
        reason = "nvcc failed: fatal error: out of coffee"
    build = [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path / 'temp'}"]

    subprocess.run(build, cwd=ROOT, env=environment, check=True, capture_output=True)

    script = "import _C; print(_C.cuda_build_reason()); print(_C.cuda_device_count()[0])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "sstmerge", check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [reason, "0"]
