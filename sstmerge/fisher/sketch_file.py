"""Sketches and unfinished collections as files: safetensors with JSON metadata, written atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sstmerge.atomic import atomic_file
from sstmerge.errors import FisherError
from sstmerge.fisher.fisher import Counts
from sstmerge.fisher.sketch import INPUT, OUTPUT, Sketch, SketchedLayer, layer_entries, layers_from
from sstmerge.fisher.sketch_sums import RandomSigns, score_rank
from sstmerge.untrusted import parse_json

_SKETCH_KEY, _CHECKPOINT_KEY = "sstmerge_sketch", "sstmerge_sketch_checkpoint"
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
    _write(path, {**sketch.tensors, **_count_tensors(sketch.counts)}, _SKETCH_KEY, header)


def load_sketch(path: str | Path) -> Sketch:
    """Read a sketch. Its tensors stay on the disk until they are used.

    Args:
        path: File that `save_sketch` wrote.

    Returns:
        The sketch.

    Raises:
        FisherError: If the file is damaged or something else.
    """
    header, tensors = _read(path, _SKETCH_KEY, "a sketch that sstmerge wrote")
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
    header, tensors = _read(path, _SKETCH_KEY, "a sketch that sstmerge wrote")
    counts = _take_counts(tensors, path)
    _checked_layers(header, tensors, path)
    return {
        **header,
        "counts": {name: getattr(counts, name).tolist() for name in Counts.__dataclass_fields__},
        "tensors": {name: {"shape": list(t.shape), "dtype": str(t.dtype)} for name, t in tensors.items()},
    }


def write_checkpoint(
    path: str | Path, identity: Mapping[str, Any], sums: Mapping[str, Tensor], counts: Counts, batches: int
) -> None:
    """Write an unfinished collection.

    Args:
        path: File to write; an existing one is replaced.
        identity: What the collection is of; one of another identity will be refused.
        sums: The sums so far.
        counts: What was seen.
        batches: Number of batches done.
    """
    header = {"format": _FORMAT, "identity": dict(identity), "batches": batches}
    on_cpu = {name: tensor.cpu() for name, tensor in sums.items()}
    _write(path, {**on_cpu, **_count_tensors(counts)}, _CHECKPOINT_KEY, header)


def read_checkpoint(path: str | Path, identity: Mapping[str, Any], sums: Mapping[str, Tensor]) -> tuple[int, Counts]:
    """Take up an unfinished collection.

    Args:
        path: File that `write_checkpoint` wrote.
        identity: What the collection is of.
        sums: Tensors that its sums are copied into.

    Returns:
        Number of batches done, and what was seen in them.

    Raises:
        FisherError: If the file is damaged, or of another collection.
    """
    header, tensors = _read(path, _CHECKPOINT_KEY, "an unfinished sketch")
    # As JSON would give it back: tuples are lists there.
    wanted = json.loads(json.dumps(dict(identity)))
    different = sorted(key for key in wanted if header["identity"].get(key) != wanted[key])
    if different:
        raise FisherError(
            f"'{path}' is the beginning of another sketch (it differs in {', '.join(different)}); finish that one with "
            "the options and data it was begun with, or delete the file to begin anew."
        )
    counts = _take_counts(tensors, path)
    wrong = [name for name, t in sums.items() if name not in tensors or tensors[name].shape != t.shape]
    if wrong:
        raise FisherError(f"'{path}' is damaged: it lacks '{wrong[0]}' in its shape; delete it to begin anew.")
    with torch.no_grad():
        for name, tensor in sums.items():
            tensor.copy_(tensors[name])
    return int(header["batches"]), counts


def _write(path: str | Path, tensors: Mapping[str, Tensor], key: str, header: Mapping[str, Any]) -> None:
    with atomic_file(path) as temporary:
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, metadata={key: json.dumps(header)})


def _read(path: str | Path, key: str, what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise FisherError(f"'{path}' is not a readable safetensors file: {error}.") from error
    if key not in metadata:
        raise FisherError(f"'{path}' is a safetensors file, but not {what}.")
    header = parse_json(metadata[key], f"The description of '{path}'", FisherError)
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        found = header.get("format") if isinstance(header, dict) else header
        raise FisherError(f"'{path}' has sketch format {found!r:.40}; this version reads format {_FORMAT}.")
    return header, tensors


def _count_tensors(counts: Counts) -> dict[str, Tensor]:
    return {f"counts.{name}": getattr(counts, name) for name in Counts.__dataclass_fields__}


def _take_counts(tensors: dict[str, Tensor], path: str | Path) -> Counts:
    missing = [name for name in Counts.__dataclass_fields__ if f"counts.{name}" not in tensors]
    if missing:
        raise FisherError(f"'{path}' is damaged: it lacks its counts {missing}; collect it again.")
    return Counts(**{name: tensors.pop(f"counts.{name}") for name in Counts.__dataclass_fields__})
