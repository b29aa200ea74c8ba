"""Safetensors files that carry a hash of their contents, and are the same bytes whenever their contents are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sstmerge.fisher.fingerprints import content_hash

HASH_KEY = "sha256"
_METADATA = "__metadata__"


def save_hashed(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors and texts with their hash.

    Args:
        tensors: Tensors by name.
        path: File to write.
        metadata: Texts by name; their order is that of the hash.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, metadata={**metadata, HASH_KEY: content_hash(whole, *metadata.values())})
    _sort_metadata(path)


def load_hashed(path: Path, *names: str) -> tuple[dict[str, Tensor], list[str]]:
    """Read what `save_hashed` wrote.

    Args:
        path: The file.
        names: Names of all texts, in the order in which they were given.

    Returns:
        Tensors by name, and the texts.

    Raises:
        ValueError: If the file is damaged; the message says in what way.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(str(error)) from error
    if not {*names, HASH_KEY} <= set(metadata):
        raise ValueError("it has no description")
    texts = [metadata[name] for name in names]
    if not is_unaltered(tensors, metadata, *names):
        raise ValueError("its contents do not match its hash")
    return tensors, texts


def is_unaltered(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *names: str) -> bool:
    """Return whether a file's tensors and texts match its hash; files of versions before 0.1.0 have none, and pass.

    Args:
        tensors: All of the file's tensors.
        metadata: Its metadata.
        names: Names of all texts, in the order in which they were given.
    """
    return HASH_KEY not in metadata or metadata[HASH_KEY] == content_hash(tensors, *(metadata[name] for name in names))


def _sort_metadata(path: Path) -> None:
    """Put a file's texts in order: safetensors writes them in that of a hash table, another one in every process."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header[_METADATA] = dict(sorted(header[_METADATA].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:  # it is the same text in another order; if not, the file is good as it is
            file.seek(8)
            file.write(text.ljust(length))
