"""What the benchmarks share: interleaved timing, the machine in words, tables and JSON.

Ratios within one run are the result: every repetition times all variants one after another, a ratio is taken within the
repetition, and the median over the repetitions is reported with the quartiles.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import scipy
import torch
from rich.console import Console
from rich.table import Table

from sstmerge.atomic import atomic_file

Call = Callable[[], object]
COPY = "copy"

# Seconds: what a timing of repeated calls should take, and what a call may take to be timed more than once.
TIMING, SLOW = 5e-3, 1.0


@dataclass(frozen=True)
class Case:
    """One problem and the ways to solve it.

    Attributes:
        op: Name of the op.
        shape: The problem in words.
        bytes: Least memory traffic: every input read once, every output written once; 0 where it is no bound.
        flops: Floating-point operations of the straightforward method; 0 where the number says nothing.
        variants: Calls by name; the first is ours.
        deviation: Largest relative difference between our result and an independent one.
        tolerance: What the deviation may be.
        facts: More of the problem, for programs that read the JSON.
    """

    op: str
    shape: str
    bytes: int
    flops: int
    variants: dict[str, Call]
    deviation: Callable[[], float]
    tolerance: float
    facts: dict[str, object] = field(default_factory=dict)


def machine(device: torch.device) -> dict[str, object]:
    """Describe the machine: what decides about speed, and nothing that identifies it."""
    words: dict[str, object] = {
        "device": device_name(device),
        "cpu": _cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        words |= {
            "driver": _driver_version(),
            "cuda": torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30),
        }
    return words


def device_name(device: torch.device) -> str:
    """Return the GPU's name as torch gives it, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _driver_version() -> str:
    version = Path("/proc/driver/nvidia/version")
    if not version.exists():
        return "unknown"
    words = version.read_text(encoding="utf-8").split()
    return next((word for word in words if word.count(".") == 2 and word.replace(".", "").isdigit()), "unknown")


def measure(case: Case, device: torch.device, *, repetitions: int, seconds: float) -> dict[str, object]:
    """Check a case's result, then time its variants in turn.

    Args:
        case: The problem.
        device: Where it lives.
        repetitions: Rounds over all variants, fewer where `seconds` are over; at least three. A variant of others that
            takes seconds is timed once.
        seconds: Time limit of the rounds.

    Returns:
        A plain dictionary for JSON.
    """
    deviation = case.deviation()
    calls = dict(case.variants)
    if case.bytes and device.type == "cuda":
        calls[COPY] = copy_of(case.bytes, device)
    loops, slow = {}, {}
    for name, call in calls.items():
        once = _time(call, 1, device)
        if once > SLOW and name != next(iter(calls)):
            slow[name] = once
        else:
            loops[name] = max(1, min(50, int(TIMING / max(_time(call, 1, device), 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for repetition in range(repetitions):
        for name, call in calls.items():
            times[name].append(slow[name] if name in slow else _time(call, loops[name], device))
        if time.perf_counter() > end and repetition >= 2:
            break
    ours = times[next(iter(calls))]
    median = statistics.median(ours)
    result: dict[str, object] = {
        "op": case.op,
        "shape": case.shape,
        **case.facts,
        "threads": torch.get_num_threads(),
        "bytes": case.bytes,
        "flops": case.flops,
        "deviation": deviation if math.isfinite(deviation) else None,
        "right": deviation <= case.tolerance,
        "timed_once": [*slow],
        "milliseconds": {name: _spread([1e3 * t for t in values]) for name, values in times.items()},
        "ratios": {
            name: statistics.median(other / own for other, own in zip(values, ours, strict=True))
            for name, values in times.items()
        },
        "gigabytes_per_second": case.bytes / median / 1e9,
        "tera_flops": case.flops / median / 1e12,
    }
    if COPY in times:
        result["share_of_copy_bandwidth"] = result["ratios"][COPY]
    return result


def slope(points: list[tuple[float, float]]) -> float:
    """Return the least-squares slope of log y over log x."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)


def copy_of(traffic: int, device: torch.device) -> Call:
    """Return a copy that reads and writes `traffic` bytes in all."""
    source = torch.ones(max(traffic // 8, 1), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _time(call: Call, calls: int, device: torch.device) -> float:
    """Return seconds per call."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3 / calls


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": median, "lower_quartile": low, "upper_quartile": high, "min": min(values)}


def write_results(path: Path, content: dict[str, object]) -> None:
    """Write JSON, also in the middle of a run: a run that is cut off keeps what it measured."""
    with atomic_file(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def print_results(results: list[dict], console: Console) -> None:
    """Print one table per op: our time, and how many times longer the others take."""
    for op in dict.fromkeys(result["op"] for result in results):
        rows = [result for result in results if result["op"] == op]
        others = list(dict.fromkeys(name for row in rows for name in [*row["ratios"]][1:]))
        table = Table(
            "problem", "threads", "ms", *(f"{name} ×" for name in others), "GB/s", "TFLOP/s", "deviation", title=op
        )
        for row in rows:
            ours = next(iter(row["milliseconds"].values()))
            ratios = (f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "" for name in others)
            speed = (f"{row['gigabytes_per_second']:.1f}", f"{row['tera_flops']:.2f}")
            deviation = f"{row['deviation']:.0e}" if row["right"] else f"WRONG: {row['deviation']}"
            table.add_row(row["shape"], str(row["threads"]), f"{ours['median']:.3f}", *ratios, *speed, deviation)
        console.print(table)
