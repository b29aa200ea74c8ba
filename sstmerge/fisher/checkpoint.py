"""Checkpoints of a collection: what every process has added up so far, so that a killed run can go on, bit for bit.

A checkpoint is a folder. Every process writes one file per start of the program and replaces it as it goes on; files of
earlier starts are left alone and read again at the end. A file holds partial sums with their places in the tree of
additions (`sstmerge.fisher.partial_sums`), so that any number of processes can go on where another number stopped.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sstmerge.atomic import atomic_file
from sstmerge.errors import FisherError
from sstmerge.fisher.distributed import Ranks
from sstmerge.fisher.partial_sums import Node, Part, leaves_of
from sstmerge.fisher.tensor_file import load_hashed, save_hashed
from sstmerge.fisher.work import Collected

_METADATA_KEY = "sstmerge_checkpoint"
_FILE_NAME = re.compile(r"start-(?P<start>\d{4,})-process-\d{4,}\.safetensors")
DEFAULT_MINUTES = 5.0


@dataclass(frozen=True)
class _Contents:
    """What a file says about itself.

    Attributes:
        path: The file.
        start: Number of the start of the program that wrote it.
        nodes: Places of its complete parts.
        unfinished: The leaf that was being collected and how many of its batches are in; None between leaves.
    """

    path: Path
    start: int
    nodes: tuple[Node, ...]
    unfinished: tuple[int, int] | None


class Checkpoint:
    """The checkpoint of one collection.

    Args:
        folder: Where it lies; it must belong to this collection alone.
        minutes: Minutes between two savings; None saves by batches alone.
        batches: Batches between two savings; None saves by time alone.
    """

    def __init__(
        self, folder: str | Path, *, minutes: float | None = DEFAULT_MINUTES, batches: int | None = None
    ) -> None:
        self.folder = Path(folder)
        self._seconds = None if minutes is None else 60.0 * minutes
        self._every = batches
        self._saved_at = time.monotonic()
        self._batches = 0
        self._configuration: dict[str, Any] = {}
        self._path = self.folder
        self._own_earlier: list[Path] = []
        self._begun: dict[int, tuple[int, Path]] = {}
        self.done: frozenset[int] = frozenset()

    def begin(self, configuration: Mapping[str, Any], ranks: Ranks) -> None:
        """Look what earlier starts have left, and set `done`, the leaves that are complete.

        Args:
            configuration: All that decides the result, by name; JSON.
            ranks: The processes of this start; they need not see the same folder.

        Raises:
            FisherError: If a file is damaged, or belongs to another collection.
        """
        self._configuration = json.loads(json.dumps(dict(configuration)))
        self.folder.mkdir(parents=True, exist_ok=True)
        found = [self._contents(path) for path in sorted(self.folder.iterdir()) if _FILE_NAME.fullmatch(path.name)]
        for contents in found:
            if contents.unfinished is not None:
                leaf, batches = contents.unfinished
                if batches > self._begun.get(leaf, (0, self.folder))[0]:
                    self._begun[leaf] = (batches, contents.path)
        listed = [
            json.loads(text) for text in ranks.exchange(json.dumps([[c.path.name, c.start, c.nodes] for c in found]))
        ]
        owners: dict[str, int] = {}
        for rank, files in enumerate(listed):
            for name, _, _ in files:
                owners.setdefault(name, rank)
        self._own_earlier = [c.path for c in found if owners[c.path.name] == ranks.rank]
        self.done = frozenset(leaves_of((level, i) for files in listed for _, _, nodes in files for level, i in nodes))
        start = 1 + max((start for files in listed for _, start, _ in files), default=0)
        self._path = self.folder / f"start-{start:04d}-process-{ranks.rank:04d}.safetensors"
        self._saved_at = time.monotonic()

    def begun(self, leaf: int) -> int:
        """Return how many batches of a leaf are in, 0 if it was not begun."""
        return self._begun.get(leaf, (0, self.folder))[0]

    def unfinished(self, leaf: int) -> Part:
        """Return the sum over the first batches of a leaf that was begun."""
        tensors = _tensors(self._begun[leaf][1])
        return Part.from_tensors(tensors, "unfinished/")

    def earlier(self) -> dict[Node, Part]:
        """Return all complete parts of earlier starts that this process is to bring in."""
        parts: dict[Node, Part] = {}
        for path in self._own_earlier:
            tensors, nodes = _tensors(path), self._contents(path).nodes
            parts |= {(level, index): Part.from_tensors(tensors, f"{level}.{index}/") for level, index in nodes}
        return parts

    def due(self) -> bool:
        """Count a batch, and return whether it is time to save."""
        self._batches += 1
        by_time = self._seconds is not None and time.monotonic() - self._saved_at >= self._seconds
        return by_time or (self._every is not None and self._batches >= self._every)

    def save(self, collected: Collected[Any]) -> None:
        """Replace this process's file by what it has collected since it started.

        Args:
            collected: That.
        """
        tensors: dict[str, Tensor] = {}
        for (level, index), part in collected.sum.nodes.items():
            tensors |= part.to_tensors(f"{level}.{index}/")
        rest = collected.unfinished()
        if rest is not None:
            tensors |= rest[2].to_tensors("unfinished/")
        header = json.dumps(
            {
                "configuration": self._configuration,
                "nodes": list(collected.sum.nodes),
                "unfinished": None if rest is None else rest[:2],
            }
        )
        with atomic_file(self._path) as temporary:
            save_hashed(tensors, temporary, {_METADATA_KEY: header})
            _flush_to_disk(temporary)
        self._saved_at, self._batches = time.monotonic(), 0

    def _contents(self, path: Path) -> _Contents:
        match = _FILE_NAME.fullmatch(path.name)
        try:
            header = json.loads(_description(path))
            recorded = dict(header["configuration"])
            nodes = tuple((int(level), int(index)) for level, index in header["nodes"])
            rest = None if header["unfinished"] is None else tuple(map(int, header["unfinished"]))
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path, "its description cannot be read") from error
        differing = [k for k in {**self._configuration, **recorded} if recorded.get(k) != self._configuration.get(k)]
        if differing or match is None:
            words = "; ".join(
                f"{k} is {_short(recorded.get(k))}, now {_short(self._configuration.get(k))}" for k in differing
            )
            raise FisherError(
                f"The checkpoint '{path}' belongs to another collection: {words}. Start with the former settings to go on "
                "with it, or with --restart to throw it away."
            )
        return _Contents(path, int(match["start"]), nodes, None if rest is None else (rest[0], rest[1]))


def _description(path: Path) -> str:
    """Return what a file says about itself, without reading its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from error
    if _METADATA_KEY not in metadata:
        raise _damaged(path, "it has no description")
    return metadata[_METADATA_KEY]


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_hashed(path, _METADATA_KEY)[0]
    except ValueError as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, reason: str) -> FisherError:
    return FisherError(f"The checkpoint '{path}' is damaged: {reason}. Start anew with --restart.")


def _short(value: object) -> str:
    text = json.dumps(value)
    return f"{text[:12]}…" if isinstance(value, str) and re.fullmatch(r'"[0-9a-f]{64}"', text) else text


def _flush_to_disk(path: Path) -> None:
    """Make sure that the file's bytes are on the disk before it gets its name; a machine may lose its power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
