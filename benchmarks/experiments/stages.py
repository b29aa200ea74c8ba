"""Stages whose results are kept by the hash of what they depend on, so that an experiment can be interrupted."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import sstmerge
from sstmerge.atomic import atomic_directory
from sstmerge.pipeline.evaluate import write_json

PACKAGES = ("sstmerge", "torch", "transformers", "peft", "numpy", "scipy")
RECORD = "stage.json"


def versions() -> dict[str, str]:
    """Return the versions of what decides the results."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def digest(content: Any) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def source_digest() -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the package's and the experiments' source files."""
    folders = (Path(sstmerge.__file__).parent, Path(__file__).parent)
    files = [path for folder in folders for path in sorted(folder.rglob("*.py")) + sorted(folder.glob("*.so"))]
    return digest([[path.name, file_digest(path)] for path in files])


class Stages:
    """A folder of finished stages.

    Attributes:
        folder: Where they are.
        records: What every stage that was asked for depends on, by the name of its folder.
        of_other_source: Those of them that other source code than today's has computed.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.records: dict[str, dict[str, Any]] = {}
        self.of_other_source: list[str] = []
        self._say = say
        self._common = {"versions": versions(), "threads": torch.get_num_threads()}
        # Not part of the hash: any comment would cost hours. Whoever reads the result is told instead.
        self._source = source_digest()

    def run(self, name: str, inputs: dict[str, Any], compute: Callable[[Path], None]) -> Path:
        """Return the folder of a stage; compute it if it is not there.

        Args:
            name: Name of the stage.
            inputs: Everything that its result depends on, in plain values; other stages by the names of their folders.
            compute: Writes the result into the folder given.

        Returns:
            The folder, whose name is the stage's and the hash of its inputs.
        """
        key = digest({"stage": name, "inputs": inputs, **self._common})
        folder = self.folder / f"{name}-{key}"
        if not (folder / RECORD).is_file():
            self._say(f"{name} …")
            started = time.perf_counter()
            with atomic_directory(folder, overwrite=True) as temporary:
                compute(temporary)
                record = {"stage": name, "inputs": inputs, "seconds": round(time.perf_counter() - started, 2)}
                write_json(record | self._common | {"source": self._source}, temporary / RECORD)
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if folder.name not in self.records and record.get("source") != self._source:
            self.of_other_source.append(folder.name)
        self.records[folder.name] = record
        return folder
