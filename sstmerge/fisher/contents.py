"""What a Fisher file must hold, checked from its headers before a tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sstmerge.errors import FisherError
from sstmerge.fisher.structures import Structure, parse_structure
from sstmerge.untrusted import TensorHeader, parse_json

COUNTS = ("sequences", "tokens", "positions", "squared_weights")


def parse_header(text: str, where: str, format_version: int) -> dict[str, Any]:
    """Parse and check what a Fisher file says about itself.

    Args:
        text: JSON.
        where: The file, to begin a sentence with.
        format_version: The version that can be read.

    Returns:
        `format`, `structure` and `metadata`.

    Raises:
        FisherError: If it is of another format or damaged.
    """
    header = parse_json(text, f"The header of {where}", FisherError)
    if not isinstance(header, dict) or header.get("format") != format_version:
        found = header.get("format") if isinstance(header, dict) else header
        raise FisherError(f"{where} has Fisher format {found!r:.40}; this version reads format {format_version}.")
    if header.get("structure") not in list(Structure) or not isinstance(header.get("metadata"), dict):
        raise FisherError(f"{where} is damaged: it names no structure and no metadata; collect this Fisher again.")
    return header


def parse_space(text: str, where: str) -> dict[str, Any]:
    """Parse and check the description of a Fisher file's core space.

    Args:
        text: JSON, as `CoreSpace.basis_description` writes it.
        where: The file, to begin a sentence with.

    Returns:
        `adapters` and `groups`.

    Raises:
        FisherError: If it is damaged.
    """
    space = parse_json(text, f"The space of {where}", FisherError)
    adapters, groups = (space.get(key) if isinstance(space, dict) else None for key in ("adapters", "groups"))
    if not (
        isinstance(adapters, list)
        and all(isinstance(a, dict) and _texts([a.get("name"), a.get("fingerprint")]) for a in adapters)
        and isinstance(groups, list)
        and groups
        and all(isinstance(group, dict) and _is_group(group, len(adapters)) for group in groups)
    ):
        raise FisherError(f"The space of {where} is damaged: adapters or layers cannot be read; collect it again.")
    names = [name for group in groups for name in group["names"]]
    if len(set(names)) != len(names):
        raise FisherError(f"The space of {where} is damaged: it names a layer twice; collect it again.")
    return {"adapters": adapters, "groups": groups}


def check_tensors(structure: str, space: Mapping[str, Any], tensors: Mapping[str, TensorHeader], where: str) -> None:
    """Check that a file holds exactly the tensors of its structure and space, in the right shapes.

    Args:
        structure: Structure of the Fisher.
        space: What `parse_space` returned.
        tensors: The file's tensors.
        where: The file, to begin a sentence with.

    Raises:
        FisherError: If a tensor is missing, needless, or of another shape or dtype.
    """
    expected: dict[str, tuple[int | None, ...]] = {f"counts.{name}": (2,) for name in COUNTS}
    size = 0
    for i, group in enumerate(space["groups"]):
        layers, stacked = len(group["names"]), sum(rank for _, rank in group["members"])
        rows, columns = _core_shape(tensors, i, where)
        if max(rows, columns) > stacked:
            raise FisherError(f"{where} is damaged: the basis of group {i} is larger than the adapters' ranks.")
        expected |= {f"basis.output.{i}": (layers, stacked, rows), f"basis.input.{i}": (layers, stacked, columns)}
        expected |= {
            f"{name}.{i}": shape for name, shape in _statistics(parse_structure(structure), layers, rows, columns)
        }
        size += layers * rows * columns
    if structure == Structure.GLOBAL:
        expected |= {"scores": (None, size), "score_half": (None,)}
    _compare(expected, tensors, where)
    if structure == Structure.GLOBAL and tensors["scores"].shape[0] != tensors["score_half"].shape[0]:
        raise FisherError(f"{where} is damaged: it has as many scores as halves no longer; collect it again.")


def _statistics(structure: Structure, layers: int, rows: int, columns: int) -> list[tuple[str, tuple[int, ...]]]:
    """Return names and shapes of the statistics of a group (`sstmerge.fisher.structures`)."""
    halves = (2, layers)
    shapes: list[tuple[str, tuple[int, ...]]] = [("score_sum", (*halves, rows, columns))]
    if structure is Structure.DIAGONAL:
        shapes.append(("square_sum", (*halves, rows, columns)))
    elif structure is Structure.BLOCK:
        shapes.append(("outer_sum", (*halves, rows * columns, rows * columns)))
    elif structure in (Structure.KFAC, Structure.EKFAC):
        shapes += [
            ("input_covariance", (*halves, columns, columns)),
            ("output_covariance", (*halves, rows, rows)),
            ("input_count", halves),
        ]
    if structure is Structure.EKFAC:
        shapes += [
            ("rotated_square_sum", (*halves, rows, columns)),
            ("kronecker_input_basis", (layers, columns, columns)),
            ("kronecker_output_basis", (layers, rows, rows)),
        ]
    return shapes


def _core_shape(tensors: Mapping[str, TensorHeader], group: int, where: str) -> tuple[int, int]:
    found = [tensors.get(f"basis.{side}.{group}") for side in ("output", "input")]
    if any(basis is None or len(basis.shape) != 3 for basis in found):
        raise FisherError(f"{where} is damaged: it lacks the basis of group {group}; collect this Fisher again.")
    rows, columns = (basis.shape[2] for basis in found if basis is not None)
    return rows, columns


def _compare(expected: Mapping[str, tuple[int | None, ...]], tensors: Mapping[str, TensorHeader], where: str) -> None:
    missing, needless = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected)
    if missing:
        raise FisherError(f"{where} is damaged: it lacks {', '.join(missing[:5])}; collect this Fisher again.")
    if needless:
        raise FisherError(f"{where} holds '{needless[0]}', which is no part of a Fisher; collect this Fisher again.")
    for name, shape in expected.items():
        found = tensors[name]
        fits = len(found.shape) == len(shape) and all(n in (None, m) for n, m in zip(shape, found.shape, strict=True))
        dtypes = ("I8",) if name == "score_half" else ("F64", "F32")
        if not fits or found.dtype not in dtypes:
            raise FisherError(
                f"'{name}' of {where} has shape {found.shape} and dtype {found.dtype}; expected "
                f"{tuple('n' if n is None else n for n in shape)} and {' or '.join(dtypes)}: the file is damaged."
            )


def _is_group(group: Mapping[str, Any], adapters: int) -> bool:
    names, members = group.get("names"), group.get("members")
    return (
        isinstance(names, list)
        and bool(names)
        and _texts(names)
        and isinstance(members, list)
        and bool(members)
        and all(
            isinstance(pair, list)
            and len(pair) == 2
            and all(type(n) is int for n in pair)
            and 0 <= pair[0] < adapters
            and 0 < pair[1] < 2**31
            for pair in members
        )
    )


def _texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)
