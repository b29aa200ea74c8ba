"""Where libcusolver is looked for, and what is said where it is not."""

from __future__ import annotations

import sys

import pytest
import torch

from sstmerge.errors import BackendError
from sstmerge.ops import cusolver

WHEELS_OF_CUDA_12 = [
    "nvjitlink/lib/libnvJitLink.so.12",
    "cublas/lib/libcublasLt.so.12",
    "cublas/lib/libcublas.so.12",
    "cusparse/lib/libcusparse.so.12",
    "cusolver/lib/libcusolver.so.11",
]


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder of NVIDIA's packages with the files of both layouts, and a toolkit."""
    folder = tmp_path / "nvidia"
    toolkit = tmp_path / "toolkit"
    for path in (
        folder / "__init__.py",  # some of NVIDIA's packages have one, and it wins over a folder without
        *(folder / name for name in WHEELS_OF_CUDA_12),
        folder / "cu13/lib/libcusolver.so.12",
        folder / "cu13/lib/libcusolverMg.so.12",
        toolkit / "lib64/libcusolver.so",
        toolkit / "lib64/libcusolver.so.9.1",
        toolkit / "lib64/libcusolver.so.10",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    return tmp_path


@pytest.mark.parametrize(("version", "first"), [("13.0", "cu13"), ("12.8", "cu12"), (None, "cu13")])
def test_wheels_of_torch_s_cuda_come_first_then_the_toolkit_then_the_loader(wheels, monkeypatch, version, first):
    monkeypatch.setattr(torch.version, "cuda", version)
    newer = [str(wheels / "nvidia/cu13/lib/libcusolver.so.12")]
    older = [str(wheels / "nvidia" / name) for name in WHEELS_OF_CUDA_12]

    found = list(cusolver.candidates())

    ours = [candidate for candidate in found if candidate[-1].startswith(str(wheels))]
    assert ours[:2] == ([newer, older] if first == "cu13" else [older, newer])
    assert ours[2:] == [[str(wheels / "toolkit/lib64" / f"libcusolver.so.{version}")] for version in ("10", "9.1")]
    assert found[-2:] == [["libcusolver.so.12"], ["libcusolver.so.11"]]


def test_all_that_was_tried_is_named(wheels, monkeypatch):
    empty = [candidate for candidate in cusolver.candidates() if candidate[-1].startswith(str(wheels))]
    monkeypatch.setattr(cusolver, "candidates", lambda: empty)  # without what this machine really has
    monkeypatch.delenv(cusolver.VARIABLE, raising=False)
    cusolver._open.cache_clear()
    try:
        with pytest.raises(BackendError, match="libcusolver cannot be loaded, tried: ") as error:
            cusolver.open_cusolver()
    finally:
        cusolver._open.cache_clear()

    for words in ("cu13/lib/libcusolver.so.12", "libnvJitLink.so.12", "lib64/libcusolver.so.10", "SSTMERGE_CUSOLVER"):
        assert words in str(error.value)


def test_the_user_s_choice_is_the_only_one(monkeypatch):
    monkeypatch.setenv(cusolver.VARIABLE, "/nowhere/libcusolver.so.12")

    with pytest.raises(
        BackendError, match=r"tried: /nowhere/libcusolver.so.12: [^;]*: correct the path in SSTMERGE_CUS"
    ):
        cusolver.open_cusolver()


def test_another_library_is_refused_with_what_it_lacks(monkeypatch):
    monkeypatch.setenv(cusolver.VARIABLE, "libm.so.6")

    with pytest.raises(BackendError, match=r"libm.so.6 has no cusolverDnCreate, .*cublasDtrsmBatched"):
        cusolver.open_cusolver()
