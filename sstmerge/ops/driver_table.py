"""The times of generalized_eigh's drivers on GPUs, which its driver "auto" chooses by; the file says what it holds."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PATH = Path(__file__).with_suffix(".json")
ASSUMED = "assumed"
DRIVERS = ("jacobi", "batched", "sygvd")


@dataclass(frozen=True)
class Timing:
    """The times of one batch of problems.

    Attributes:
        dtype: Dtype of the matrices, without "torch.".
        n: Their size.
        batch: Their number.
        milliseconds: By driver; one that is not there was not timed.
    """

    dtype: str
    n: int
    batch: int
    milliseconds: dict[str, float]


@cache
def tables(path: Path = PATH) -> dict[str, tuple[Timing, ...]]:
    """Read the timings of every device.

    Args:
        path: The file.

    Returns:
        Timings by the device's name.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    return {table["device"]: tuple(Timing(**row) for row in table["rows"]) for table in content["tables"]}


def fastest_first(device: str, dtype: str, n: int, batch: int) -> tuple[str, ...]:
    """Sort the drivers by their times on the most similar batch that was timed on a device.

    Args:
        device: Name of the device; one that is not in the file gets the assumed times.
        dtype: Dtype of the matrices, without "torch.".
        n: Their size, at least 1.
        batch: Their number, at least 1.

    Returns:
        All drivers, the fastest first.
    """
    known = tables()
    timings = [timing for timing in known.get(device, known[ASSUMED]) if timing.dtype == dtype]
    nearest = min(timings, key=lambda row: math.hypot(math.log(row.n / n), math.log(row.batch / batch)))
    return tuple(sorted(DRIVERS, key=lambda driver: nearest.milliseconds.get(driver, math.inf)))
