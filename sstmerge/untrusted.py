"""Files that others wrote: sizes are checked before anything is allocated, and JSON is bounded in size and depth.

safetensors checks that tensors fill its file exactly. What it leaves to the caller is done here: how long the header may be,
how many tensors, which dtypes, and that no size is zero, all from the first bytes of the file.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from sstmerge.errors import InputError

# Bytes. The header of 100,000 LoRA tensors takes 15 MB, a configuration of PEFT 2 kB.
LONGEST_HEADER = 64 * 2**20
LONGEST_JSON = 16 * 2**20
LONGEST_NAME = 1024  # characters of a tensor name
FLOATING_POINT = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_WHOLE = {f"{sign}{8 * size}": size for sign in "IU" for size in (1, 2, 4, 8)}
_ITEM_BYTES = FLOATING_POINT | _WHOLE | {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}
_LENGTH_FIELD = 8


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says of one tensor.

    Attributes:
        dtype: As in the file, such as "BF16".
        shape: Sizes.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the tensor's data."""
        return prod(self.shape) * _ITEM_BYTES[self.dtype]


def parse_json(text: str | bytes, what: str, error: type[InputError] = InputError) -> Any:
    """Parse JSON text of any origin.

    Args:
        text: The text.
        what: What it is, to begin a sentence with.
        error: Class of the errors.

    Returns:
        The value.

    Raises:
        InputError: If it is no JSON, nested too deeply, holds a number of thousands of digits, or text that is not Unicode.
    """
    try:
        value = json.loads(text)
        if _may_hold_surrogates(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as reason:
        raise error(
            f"{what} is not valid JSON: {reason.msg} at column {reason.colno} of line {reason.lineno}."
        ) from reason
    except RecursionError as reason:
        raise error(f"{what} is nested too deeply to be read as JSON.") from reason
    except ValueError as reason:  # half of a surrogate pair; a number beyond Python's limit of digits
        raise error(f"{what} cannot be read as JSON: {reason}.") from reason
    return value


def read_json(path: Path, what: str, error: type[InputError] = InputError) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: The file.
        what: What it is, to begin a sentence with.
        error: Class of the errors.

    Returns:
        The object.

    Raises:
        InputError: If it cannot be read, is too large, or holds something else.
    """
    size = _regular_size(path, what, error)
    if size > LONGEST_JSON:
        raise error(f"{what} has {size:,} bytes; at most {LONGEST_JSON:,} are read.")
    try:
        value = parse_json(path.read_bytes(), what, error)
    except OSError as reason:
        raise error(f"{what} cannot be read: {reason}.") from reason
    if not isinstance(value, dict):
        raise error(f"{what} must hold a JSON object, but holds a {type(value).__name__}.")
    return value


def read_tensor_headers(
    path: Path,
    what: str,
    error: type[InputError] = InputError,
    *,
    dtypes: Collection[str] = tuple(_ITEM_BYTES),
    may_be_empty: bool = False,
) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """Read the header of a safetensors file, and nothing of its tensors.

    Args:
        path: The file.
        what: What it is, to begin a sentence with.
        error: Class of the errors.
        dtypes: Dtypes that are accepted, in the names of the format.
        may_be_empty: Accept tensors without entries.

    Returns:
        The tensors by name, and the file's metadata.

    Raises:
        InputError: If the file is no safetensors file, is cut short, or declares what it does not hold.
    """
    size = _regular_size(path, what, error)
    header = parse_json(_header_bytes(path, what, size, error), f"The header of {what}", error)
    if not isinstance(header, dict):
        raise error(f"The header of {what} must be a JSON object.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise error(f"The metadata of {what} must be texts by name.")
    tensors = {name: _tensor_header(name, entry, what, error, dtypes) for name, entry in header.items()}
    declared = sum(tensor.bytes for tensor in tensors.values())
    empty = next((name for name, tensor in tensors.items() if 0 in tensor.shape), None)
    if empty is not None and not may_be_empty:
        raise error(f"'{empty}' of {what} has shape {tensors[empty].shape}: it is empty.")
    if declared >= size:
        raise error(f"{what} has {size:,} bytes, but declares tensors of {declared:,}: it is cut short or damaged.")
    return tensors, metadata


def _header_bytes(path: Path, what: str, size: int, error: type[InputError]) -> bytes:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_FIELD), "little")
            if size < _LENGTH_FIELD or length > size - _LENGTH_FIELD:
                raise error(f"{what} is not a readable safetensors file: it has {size:,} bytes and is cut short.")
            if length > LONGEST_HEADER:
                raise error(f"{what} declares a header of {length:,} bytes; at most {LONGEST_HEADER:,} are read.")
            return file.read(length)
    except OSError as reason:
        raise error(f"{what} cannot be read: {reason}.") from reason


def _tensor_header(name: str, entry: Any, what: str, error: type[InputError], dtypes: Collection[str]) -> TensorHeader:
    if len(name) > LONGEST_NAME:
        raise error(f"{what} has a tensor whose name is {len(name):,} characters long: '{name[:60]}…'.")
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(dtype, str) or not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise error(f"The header of {what} gives no dtype and shape for '{name}'.")
    if dtype not in dtypes:
        raise error(f"'{name}' of {what} has dtype {dtype[:20]}; expected one of {', '.join(dtypes)}.")
    return TensorHeader(dtype, tuple(shape))


def _regular_size(path: Path, what: str, error: type[InputError]) -> int:
    try:
        status = path.stat()
    except (OSError, ValueError) as reason:  # ValueError: a null byte in the name
        raise error(f"{what} cannot be read: {getattr(reason, 'strerror', None) or reason}.") from reason
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{what} is no regular file.")
    if not os.access(path, os.R_OK):
        raise error(f"{what} cannot be read: permission denied.")
    return status.st_size


def _may_hold_surrogates(text: str | bytes) -> bool:
    """Whether an escape in the text may stand for half of a surrogate pair."""
    return "\\ud" in text.lower() if isinstance(text, str) else b"\\ud" in text.lower()
