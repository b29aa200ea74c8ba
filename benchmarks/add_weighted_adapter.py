"""`add_weighted_adapter`: processor time and memory against PEFT's own function, on the same adapters.

    python benchmarks/add_weighted_adapter.py [--output FILE] [--setting small|block] [--types T …] [--adapters N …]

Two settings, each with the seven targets of a Llama block and r = 16: `small` (hidden 1024, 8 layers) and `block` (one block
of Llama-7B). Every measurement is a child process with one thread, which merges once with a small model to warm up, and then
merges: processor seconds of the call, and how far its high-water mark of memory rises above what was
resident before. PEFT takes minutes for some of the dense types on `block`. Prints a table, writes JSON, and judges nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "add_weighted_adapter.json"
SETTINGS = {"small": (1024, 2816, 8), "block": (4096, 11008, 1)}
RANK = 16
FACTOR_TYPES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
DENSE_TYPES = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
PEFT_TYPES = (*FACTOR_TYPES, "cat", "svd", *DENSE_TYPES)
OURS_ALONE = ("linear_exact", "core_ties", "core_dare_linear", "core_dare_ties", "core_magnitude_prune")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build(hidden: int, inner: int, layers: int, adapters: int):
    """Return a PEFT model with random adapters; the base weights are never read, and lie in one shared block of memory."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    shared = torch.zeros(hidden * inner)

    def linear(d_in: int, d_out: int) -> nn.Linear:
        module = nn.Linear(d_in, d_out, bias=False, device="meta")
        module.weight = nn.Parameter(shared[: d_in * d_out].view(d_out, d_in), requires_grad=False)
        return module

    def block() -> nn.Module:
        module = nn.Module()
        for name in TARGETS:
            d_in = inner if name == "down_proj" else hidden
            module.add_module(name, linear(d_in, inner if name in ("gate_proj", "up_proj") else hidden))
        return module

    base = nn.Module()
    base.add_module("layers", nn.ModuleList([block() for _ in range(layers)]))
    torch.manual_seed(0)
    model = None
    for number in range(adapters):
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS), init_lora_weights=False)
        if model is None:
            model = get_peft_model(base, config, adapter_name="a0")
        else:
            model.add_adapter(f"a{number}", config)
    return model


def resident() -> int:
    """Return the resident memory of this process, bytes."""
    pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def high_water() -> int:
    """Return the largest resident memory there was since it was last cleared, bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def clear_high_water() -> None:
    with contextlib.suppress(OSError):  # then the mark also holds what building the model took
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def measure(function: str, kind: str, adapters: int, setting: str, repetitions: int) -> dict[str, float]:
    """Merge in this process, each time in a new model, and return the least that it took."""
    import torch
    from peft.tuners.lora import LoraModel

    import sstmerge

    torch.set_num_threads(1)
    call = sstmerge.add_weighted_adapter if function == "sstmerge" else LoraModel.add_weighted_adapter
    names, weights = [f"a{n}" for n in range(adapters)], [1.0 / adapters] * adapters
    call(build(64, 96, 1, adapters).base_model, names, weights, "merged", kind, density=0.5)
    seconds, mebibytes = [], []
    for _ in range(repetitions):
        model = build(*SETTINGS[setting], adapters).base_model
        clear_high_water()
        before = resident()
        start = time.process_time()
        call(model, names, weights, "merged", kind, density=0.5)
        seconds.append(time.process_time() - start)
        mebibytes.append(max(high_water() - before, 0) / 2**20)
    # The first run grows the heap; later ones find memory that it has freed.
    return {"seconds": min(seconds), "mebibytes": mebibytes[0]}


def in_child(*arguments: str) -> dict[str, float]:
    environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")}
    command = [sys.executable, __file__, "--child", *arguments]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--setting", choices=SETTINGS, nargs="+", default=list(SETTINGS))
    parser.add_argument("--types", nargs="+", default=[*PEFT_TYPES, *OURS_ALONE])
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--repetitions", type=int, default=1, help="merges per child; the fastest counts")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        function, kind, adapters, setting, repetitions = arguments.child
        print(json.dumps(measure(function, kind, int(adapters), setting, int(repetitions))))
        return

    import peft
    import torch
    from measuring import machine, write_results
    from rich.console import Console
    from rich.table import Table

    previous = json.loads(arguments.output.read_text())["results"] if arguments.output.exists() else []
    asked = {(s, n, k) for s in arguments.setting for n in arguments.adapters for k in arguments.types}
    results = [row for row in previous if (row["setting"], row["adapters"], row["type"]) not in asked]
    content = {"machine": machine(torch.device("cpu")), "peft": peft.__version__, "threads": 1, "results": results}
    for setting in arguments.setting:
        for adapters in arguments.adapters:
            for kind in arguments.types:
                row = {"setting": setting, "adapters": adapters, "type": kind}
                functions = ("sstmerge",) if kind in OURS_ALONE else ("sstmerge", "peft")
                for function in functions:
                    row[function] = in_child(function, kind, str(adapters), setting, str(arguments.repetitions))
                results.append(row)
                write_results(arguments.output, content)
    table = Table("setting", "n", "type", "CPU s", "PEFT s", "faster ×", "MiB", "PEFT MiB", "less memory ×")
    for row in results:
        ours, theirs = row["sstmerge"], row.get("peft")
        cells = [row["setting"], str(row["adapters"]), row["type"], f"{ours['seconds']:.3f}"]
        cells += [f"{theirs['seconds']:.2f}", f"{theirs['seconds'] / ours['seconds']:.1f}"] if theirs else ["", ""]
        cells += [f"{ours['mebibytes']:.1f}"]
        cells += (
            [f"{theirs['mebibytes']:.0f}", f"{theirs['mebibytes'] / max(ours['mebibytes'], 0.1):.1f}"]
            if theirs
            else ["", ""]
        )
        table.add_row(*cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
