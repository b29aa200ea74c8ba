"""Every native op against torch, PEFT, scipy and cupy, and against a copy of the bytes that it must move.

    python benchmarks/native_ops.py [--device cuda] [--quick] [--only OP] [--out FILE] [--driver-table FILE]

On a GPU everything runs there; on a CPU the problems are smaller, and every one runs with one thread and with two.
Variants of a case run in turn; "×" in the tables is how many times longer the other takes than ours, the median of the
ratios within each repetition. "torch" is the best composition of torch's functions that we know, "naive" what is usually
written, "copy" a device copy of as many bytes: the bound of everything limited by memory. Every result is checked first.

From torch 2.12 on, `torch.linalg.eigh` solves a batch on the GPU at once; before, it looped for n > 32.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from measuring import Case, device_name, machine, measure, print_results, write_results
from native_op_cases import CASES, eigen_problems
from rich.console import Console

from sstmerge import ops
from sstmerge.errors import SSTMergeError

TABLE_SHAPES = [(n, batch) for n in (8, 16, 32, 64, 96, 128, 256, 512) for batch in (1, 8, 64, 448, 2048)]


def run(device: torch.device, arguments: argparse.Namespace, console: Console) -> tuple[list[dict], list[str]]:
    """Measure all cases; what is there so far is written after every one.

    Returns:
        The results, and sentences about the cases that failed.
    """
    results: list[dict] = []
    failures: list[str] = []
    threads = [None] if device.type == "cuda" else sorted({1, min(2, os.cpu_count() or 1)})
    repetitions, seconds = (5, 1.0) if arguments.quick else (15, 3.0)
    start = time.perf_counter()
    chosen = {op: cases for op, cases in CASES.items() if arguments.only in {None, op}}
    for number_of_op, (op, cases) in enumerate(chosen.items(), start=1):
        end = start + arguments.seconds * number_of_op / len(chosen)  # every op gets its share
        for case in cases(device, arguments.quick):
            if time.perf_counter() > end:
                console.print(f"{op}: its time is over; {case.shape} and what follows is left out")
                break
            for number in threads:
                if number is not None:
                    torch.set_num_threads(number)
                try:
                    results.append(measure(case, device, repetitions=repetitions, seconds=seconds))
                except (SSTMergeError, RuntimeError) as error:
                    failures.append(f"{case.op}, {case.shape}: {type(error).__name__}: {error}")
                    console.print(failures[-1], style="red", markup=False)
            if arguments.out:
                content = {"machine": machine(device), "results": results, "failures": failures}
                write_results(arguments.out, content)
    return results, failures


def driver_rows(device: torch.device, quick: bool) -> list[dict]:
    """Time the drivers of generalized_eigh that this GPU has, as rows of sstmerge/ops/driver_table.json."""
    backend = next(info.name for info in ops.backends() if info.available)
    rows = []
    for dtype in (torch.float32, torch.float64):
        for n, batch in TABLE_SHAPES[:: 4 if quick else 1]:
            if batch * n**3 > 3e9:
                continue
            a, b = eigen_problems(batch, n, dtype, device)
            drivers = [d for d in ops.available_drivers(backend, n, dtype) if d != "sygvd" or batch <= 8]
            calls = {
                driver: lambda driver=driver, a=a, b=b: ops.generalized_eigh(a, b, driver=driver) for driver in drivers
            }
            case = Case("generalized_eigh", f"{batch} × {n}²", 0, 0, calls, lambda: 0.0, 0.0)
            times = measure(case, device, repetitions=5, seconds=0.5)["milliseconds"]
            name = str(dtype).removeprefix("torch.")
            medians = {driver: float(f"{spread['median']:.4g}") for driver, spread in times.items()}
            rows.append({"dtype": name, "n": n, "batch": batch, "milliseconds": medians})
    return rows


def write_driver_table(path: Path, device: torch.device, rows: list[dict]) -> None:
    """Put the rows into a driver table, in the place of those of the same device."""
    content = json.loads(path.read_text(encoding="utf-8"))
    name = device_name(device)
    source = [f"benchmarks/native_ops.py --driver-table, torch {torch.__version__}, CUDA {torch.version.cuda}"]
    tables = [table for table in content["tables"] if table["device"] != name]
    tables.append({"device": name, "source": source, "rows": rows})
    write_results(path, {**content, "tables": tables})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer problems and repetitions: about a minute")
    parser.add_argument("--only", choices=CASES, help="one group of ops")
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="time limit, shared by the ops: no case is begun after it"
    )
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument(
        "--driver-table", type=Path, help="driver table to put this GPU's times into; nothing else runs"
    )
    arguments = parser.parse_args()
    if "OPENBLAS_NUM_THREADS" not in os.environ:
        # The fair setting for scipy, whose threads would wait for each other inside every small problem; read at import.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OPENBLAS_NUM_THREADS": "1"})
    device, console = torch.device(arguments.device), Console(width=160)
    console.print(f"{device_name(device)}, torch {torch.__version__}")
    for info in ops.backends():
        console.print(f"{info.name}: {info.reason}", markup=False)
    if arguments.driver_table:
        if device.type != "cuda":
            parser.error("--driver-table times the drivers of a GPU")
        write_driver_table(arguments.driver_table, device, driver_rows(device, arguments.quick))
        return 0
    results, failures = run(device, arguments, console)
    print_results(results, console)
    return 0 if results and not failures and all(result["right"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
