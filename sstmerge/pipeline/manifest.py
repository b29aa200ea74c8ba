"""Run manifests: beside every output, what made it, and the hashes that tell later whether it is still the same.

The manifest of a directory lies in it (`sstmerge_manifest.json`), that of a file beside it (`NAME.manifest.json`).
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import sstmerge
from sstmerge.atomic import atomic_file
from sstmerge.errors import InputError
from sstmerge.untrusted import read_json

DIRECTORY_MANIFEST = "sstmerge_manifest.json"
FILE_SUFFIX = ".manifest.json"
_FORMAT = 1
_PACKAGES = ("torch", "numpy", "scipy", "safetensors", "peft", "transformers", "datasets", "accelerate")
# Inputs above this size are recorded by size alone: reading them twice would take longer than the merge.
LARGEST_HASHED_INPUT = 4 * 2**30
_CHUNK = 2**20

FileRecord = dict[str, Any]  # "bytes" and "sha256" (None: too large)


@dataclass(frozen=True)
class Difference:
    """One file that is not as the manifest says.

    Attributes:
        file: Name of the file, or an input's name and the file in it.
        words: What is different.
    """

    file: str
    words: str


def manifest_path(output: str | Path) -> Path:
    """Return where the manifest of an output lies."""
    path = Path(output)
    return path / DIRECTORY_MANIFEST if path.is_dir() else path.with_name(path.name + FILE_SUFFIX)


def describe(path: str | Path, *, largest: float = float("inf"), deep: bool = True) -> dict[str, FileRecord]:
    """Return size and SHA-256 of a file, or of every file of a directory.

    Args:
        path: File or directory. Hidden files (such as a download's bookkeeping) and manifests are left out.
        largest: Bytes above which a file is not hashed.
        deep: Whether files in folders of the directory belong to it.

    Returns:
        Records by path relative to the directory (of a file: its name), in order.
    """
    root = Path(path)
    files = (
        [root]
        if root.is_file()
        else sorted(file for file in (root.rglob("*") if deep else root.iterdir()) if file.is_file())
    )
    named = {(file.name if file == root else file.relative_to(root).as_posix()): file for file in files}
    return {
        name: _record(file, largest)
        for name, file in named.items()
        if not any(part.startswith(".") for part in name.split("/")) and file.name != DIRECTORY_MANIFEST
    }


def write_manifest(
    output: str | Path,
    *,
    command: list[str],
    parameters: Mapping[str, Any],
    inputs: Mapping[str, Any],
    started: str,
    seconds: float,
) -> Path:
    """Write the manifest of a finished output.

    Args:
        output: File or directory.
        command: The command line.
        parameters: All options with their values, seeds among them.
        inputs: What `describe` said of every input before the run, by its path; or words, for what is no local file.
        started: When the run began, as text.
        seconds: How long it took.

    Returns:
        The manifest's path.
    """
    manifest = {
        "format": _FORMAT,
        "command": command,
        "parameters": dict(parameters),
        "seed": parameters.get("seed"),
        "versions": _versions(),
        "machine": {"platform": platform.platform(), "processor": platform.machine(), "device": _device()},
        "started": started,
        "seconds": round(seconds, 3),
        "inputs": dict(inputs),
        "outputs": describe(output),
    }
    path = manifest_path(output)
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n")
    return path


def read_manifest(output: str | Path) -> dict[str, Any]:
    """Read the manifest of an output.

    Args:
        output: File or directory.

    Returns:
        The manifest.

    Raises:
        InputError: If there is no output, no manifest, or the manifest is damaged.
    """
    if not Path(output).exists():
        raise InputError(f"'{output}' does not exist; give a file or directory that sstmerge wrote.")
    path = manifest_path(output)
    if not path.exists():
        raise InputError(
            f"'{output}' has no manifest: '{path}' does not exist. It was written without one, or moved alone."
        )
    manifest = read_json(path, f"The manifest '{path}'")
    if manifest.get("format") != _FORMAT:
        raise InputError(
            f"The manifest '{path}' has format {manifest.get('format')!r:.20}; this version reads format {_FORMAT}."
        )
    outputs, inputs = manifest.get("outputs"), manifest.get("inputs")
    if not _is_record(outputs) or not isinstance(inputs, dict):
        raise InputError(f"The manifest '{path}' is damaged: it lists no files with their hashes.")
    return manifest


def verify(output: str | Path, *, inputs: bool = False) -> list[Difference]:
    """Compare an output with its manifest.

    Only files that are there are read; names in a manifest are compared, never opened.

    Args:
        output: File or directory.
        inputs: Compare the inputs, too: an input that was changed or is gone counts as a difference.

    Returns:
        What differs; nothing where all is as it was written.
    """
    manifest = read_manifest(output)
    differences = _compare(manifest["outputs"], describe(output), "")
    if inputs:
        for path, recorded in manifest["inputs"].items():
            if _is_record(recorded):
                found = describe(path, largest=LARGEST_HASHED_INPUT, deep=False) if Path(path).exists() else {}
                differences += _compare(recorded, found, f"{path}: ")
    return differences


def _compare(recorded: Mapping[str, FileRecord], found: Mapping[str, FileRecord], prefix: str) -> list[Difference]:
    differences = []
    for name in sorted(recorded.keys() | found.keys()):
        if name not in found:
            words = "is gone"
        elif name not in recorded:
            words = "is not in the manifest"
        elif recorded[name].get("bytes") != found[name]["bytes"]:
            words = f"has {found[name]['bytes']:,} bytes; {recorded[name].get('bytes')!r:.20} were written"
        elif recorded[name].get("sha256") != found[name]["sha256"]:
            words = "has other contents: its SHA-256 differs"
        else:
            continue
        differences.append(Difference(prefix + name, words))
    return differences


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(record, dict) for record in value.values())


def _record(file: Path, largest: float) -> FileRecord:
    size = file.stat().st_size
    return {"bytes": size, "sha256": _sha256(file) if size <= largest else None}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    found = {"sstmerge": sstmerge.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
