"""All or nothing: what is left on disk after success, errors and interruptions."""

from __future__ import annotations

import errno
import os
import stat

import pytest
import torch
from builders import LLAMA_TARGETS, random_adapter
from safetensors import SafetensorError

from sstmerge.adapters import files, save_adapter
from sstmerge.atomic import atomic_directory, atomic_file, refuse_existing
from sstmerge.errors import OutputError


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


def fail_in(context, error):
    """Write a part inside an atomic file or directory, then fail."""
    with context as temporary:
        (temporary / "part" if temporary.is_dir() else temporary).write_text("half")
        raise error


def test_file_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "new folder" / "f.txt"
    with atomic_file(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert target.read_text() == "whole"
    assert os.listdir(target.parent) == ["f.txt"]


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "f") as temporary:
            temporary.write_text("x")
        with atomic_directory(tmp_path / "d"):
            pass
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o750


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file(tmp_path, error):
    (tmp_path / "f").write_text("old")
    with pytest.raises(error):
        fail_in(atomic_file(tmp_path / "f"), error)
    assert (tmp_path / "f").read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")])
def test_a_full_disk_is_an_output_error(tmp_path, error):
    with pytest.raises(OutputError, match=r"f' could not be written: No space left.*Nothing was left behind"):
        fail_in(atomic_file(tmp_path / "f"), error)
    with pytest.raises(OutputError, match=r"d' could not be written: No space left"):
        fail_in(atomic_directory(tmp_path / "d"), error)
    assert os.listdir(tmp_path) == []


def test_existing_files(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(OutputError, match=r"f' exists already"), atomic_file(tmp_path / "f", overwrite=False):
        pytest.fail("the block must not run")
    with atomic_file(tmp_path / "f") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "f").read_text() == "new"
    (tmp_path / "d").mkdir()
    with pytest.raises(OutputError, match=r"d' exists already"), atomic_file(tmp_path / "d"):
        pytest.fail("the block must not run")


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "f").write_text("a file")
    with pytest.raises(OutputError, match="could not be written"), atomic_file(tmp_path / "f" / "g"):
        pytest.fail("the block must not run")
    with pytest.raises(OutputError, match="could not be written"), atomic_directory(tmp_path / "f" / "g"):
        pytest.fail("the block must not run")


def test_directory_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "a" / "b"
    with atomic_directory(target) as temporary:
        (temporary / "f").write_text("x")
        assert not target.exists()
    assert os.listdir(target) == ["f"]
    assert os.listdir(target.parent) == ["b"]


def test_existing_directories(tmp_path):
    target = tmp_path / "d"
    target.mkdir()
    with atomic_directory(target) as temporary:  # an empty one is accepted
        (temporary / "one").write_text("1")
    with pytest.raises(OutputError, match=r"d' exists and is not empty.*--overwrite"), atomic_directory(target):
        pytest.fail("the block must not run")
    with atomic_directory(target, overwrite=True) as temporary:
        (temporary / "two").write_text("2")
    assert os.listdir(target) == ["two"]
    with pytest.raises(ValueError, match="stop"):
        fail_in(atomic_directory(target, overwrite=True), ValueError("stop"))
    assert os.listdir(target) == ["two"]
    assert os.listdir(tmp_path) == ["d"]


def test_refusal_before_long_work(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(OutputError, match=r"f' is a file, but the result is a directory"):
        refuse_existing(tmp_path / "f", overwrite=True)
    with pytest.raises(OutputError, match="not empty"):
        refuse_existing(tmp_path, overwrite=False)
    refuse_existing(tmp_path, overwrite=True)
    refuse_existing(tmp_path / "nowhere", overwrite=False)


# ---- adapters, the directories that matter ----------------------------------------------------------------------------


@pytest.fixture
def adapter(pico_llama):
    return random_adapter(pico_llama(), targets=LLAMA_TARGETS, scaling=1.0, dtype=torch.float32)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")])
def test_adapter_on_a_full_disk(adapter, tmp_path, monkeypatch, error):
    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OutputError, match=r"out' could not be written: No space left"):
        save_adapter(adapter, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_adapter_whose_configuration_does_not_fit_on_the_disk(adapter, tmp_path, monkeypatch):
    save_adapter(adapter, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    monkeypatch.setattr("pathlib.Path.write_text", lambda *_, **__: full_disk())
    with pytest.raises(OutputError, match="No space left"):
        save_adapter(adapter, tmp_path / "out", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]


def test_adapter_into_a_file(adapter, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match=r"out' is a file"):
        save_adapter(adapter, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"
