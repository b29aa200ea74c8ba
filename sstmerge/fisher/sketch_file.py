"""Sketches as files: safetensors with JSON metadata, written atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sstmerge.atomic import atomic_file
from sstmerge.errors import FisherError
from sstmerge.fisher.fisher import Counts
from sstmerge.fisher.sketch import INPUT, OUTPUT, Sketch, SketchedLayer, layer_entries, layers_from
from sstmerge.fisher.sketch_sums import RandomSigns, score_rank
from sstmerge.fisher.tensor_file import is_unaltered, save_hashed
from sstmerge.untrusted import parse_json

_SKETCH_KEY = "sstmerge_sketch"
_FORMAT = 1


def is_sketch(path: str | Path) -> bool:
    """Say whether a file is a sketch, by its metadata; False for any other file, readable or not."""
    try:
        with safe_open(path, framework="pt") as file:
            return _SKETCH_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def save_sketch(sketch: Sketch, path: str | Path) -> None:
    """Write a sketch as a safetensors file.

    Args:
        sketch: The sketch.
        path: File to write; an existing one is replaced.
    """
    header = {
        "format": _FORMAT,
        "rank": sketch.signs.rank,
        "seed": sketch.signs.seed,
        "layers": layer_entries(sketch.layers),
        "metadata": dict(sketch.metadata),
    }
    counts = {f"counts.{name}": getattr(sketch.counts, name) for name in Counts.__dataclass_fields__}
    with atomic_file(path) as temporary:
        save_hashed({**sketch.tensors, **counts}, temporary, {_SKETCH_KEY: json.dumps(header)})


def load_sketch(path: str | Path) -> Sketch:
    """Read a sketch. Its tensors are read once, for their hash, and stay on the disk until they are used.

    Args:
        path: File that `save_sketch` wrote.

    Returns:
        The sketch.

    Raises:
        FisherError: If the file is damaged or something else.
    """
    header, tensors = _read(path)
    counts = _take_counts(tensors, path)
    layers = _checked_layers(header, tensors, path)
    return Sketch(layers, RandomSigns(header["rank"], header["seed"]), tensors, counts, header["metadata"])


def _checked_layers(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str | Path
) -> dict[str, SketchedLayer]:
    """Return the layers that a header names, after checking that every one has its tensors in their shapes."""
    entries, metadata = header.get("layers"), header.get("metadata")
    whole = all(type(header.get(key)) is int for key in ("rank", "seed")) and isinstance(metadata, dict)
    if not whole or header["rank"] < 1 or not isinstance(entries, dict) or not all(map(_is_layer, entries.values())):
        raise FisherError(f"'{path}' is damaged: its description cannot be read; collect this sketch again.")
    layers = layers_from(entries)
    for name, layer in layers.items():
        sides = ((OUTPUT, name, layer.outputs), (INPUT, layer.input_of, layer.inputs))
        expected: dict[str, tuple[int, ...]] = {
            f"{side}_factor.{owner}": (2, size, min(size, header["rank"])) for side, owner, size in sides
        }
        expected |= {f"{side}_residual.{owner}": (2, size) for side, owner, size in sides} | {
            f"input_count.{name}": (2,)
        }
        if f"score_left.{name}" in tensors:
            signs = RandomSigns(header["rank"], header["seed"])
            left, right = signs.columns(layer.inputs, score_rank(signs.rank)), signs.columns(layer.outputs)
            expected |= {f"score_left.{name}": (layer.outputs, left), f"score_right.{name}": (layer.inputs, right)}
            if left < layer.inputs and right < layer.outputs:
                expected[f"score_core.{name}"] = (left, right)
        for tensor, shape in expected.items():
            found = tuple(tensors[tensor].shape) if tensor in tensors else None
            if found != shape:
                raise FisherError(
                    f"'{path}' is damaged: expected '{tensor}' of shape {shape}, but found {found or 'none'}; collect this "
                    "sketch again."
                )
    return layers


def _is_layer(entry: Any) -> bool:
    return isinstance(entry, list) and [type(value) for value in entry] == [int, int, str] and min(entry[:2]) > 0


def sketch_header(path: str | Path) -> dict[str, Any]:
    """Read what a sketch file says about itself.

    Args:
        path: File that `save_sketch` wrote.

    Returns:
        Rank, seed, layers, metadata, counts and tensor shapes.
    """
    header, tensors = _read(path)
    counts = _take_counts(tensors, path)
    _checked_layers(header, tensors, path)
    return {
        **header,
        "counts": {name: getattr(counts, name).tolist() for name in Counts.__dataclass_fields__},
        "tensors": {name: {"shape": list(t.shape), "dtype": str(t.dtype)} for name, t in tensors.items()},
    }


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise FisherError(f"'{path}' is not a readable safetensors file: {error}.") from error
    if _SKETCH_KEY not in metadata:
        raise FisherError(f"'{path}' is a safetensors file, but not a sketch that sstmerge wrote.")
    header = parse_json(metadata[_SKETCH_KEY], f"The description of '{path}'", FisherError)
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        found = header.get("format") if isinstance(header, dict) else header
        raise FisherError(f"'{path}' has sketch format {found!r:.40}; this version reads format {_FORMAT}.")
    if not is_unaltered(tensors, metadata, _SKETCH_KEY):
        raise FisherError(
            f"'{path}' was altered or damaged: its contents do not match its hash; collect this sketch again."
        )
    return header, tensors


def _take_counts(tensors: dict[str, Tensor], path: str | Path) -> Counts:
    missing = [name for name in Counts.__dataclass_fields__ if f"counts.{name}" not in tensors]
    if missing:
        raise FisherError(f"'{path}' is damaged: it lacks its counts {missing}; collect it again.")
    return Counts(**{name: tensors.pop(f"counts.{name}") for name in Counts.__dataclass_fields__})
