"""Memory that this process holds, and that it can still take."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> float | None:
    """Return how much memory this process can still take, within the machine and its control group; None if unknown."""
    found = [size for size in (_meminfo_available(), _cgroup_available()) if size is not None]
    return min(found) if found else None


def resident_bytes() -> int:
    """Return the memory this process holds now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):  # not Linux
        return peak_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """Return the most memory this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _meminfo_available() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kilobytes is None else 1024.0 * int(kilobytes)


def _cgroup_available() -> float | None:
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    return None if limit is None or used is None else max(0.0, limit - used + _reclaimable())


def _reclaimable() -> float:
    """Return the bytes of cached files, which the group's use includes."""
    try:
        entries = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0.0
    return float(entries.get("inactive_file", 0))


def _number(file: Path) -> float | None:
    try:
        return float(file.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None
