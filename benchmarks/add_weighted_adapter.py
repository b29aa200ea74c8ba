"""`add_weighted_adapter`: processor time and memory against PEFT's own function, on the same adapters.

    python benchmarks/add_weighted_adapter.py [--output FILE] [--setting small|block] [--types T …] [--adapters N …]

Two settings, each with the seven targets of a Llama block and r = 16: `small` (hidden 1024, 8 layers) and `block` (one block
of Llama-7B). Every measurement is a child process with one thread, which merges once with a small model to warm up, and then
merges: processor seconds of the call, and how far its high-water mark of memory rises above what was
resident before. PEFT takes minutes for some of the dense types on `block`. Prints tables, writes JSON, and judges nothing.

For `linear` and `dare_linear` there is a second comparison, on adapter files: `sstmerge.merge_adapters` from directories to
a directory, the whole call with hashing and checks, against PEFT's call on a loaded model, and against PEFT's loading of the
adapters into a base model that is there, the call and the saving together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "add_weighted_adapter.json"
SETTINGS = {"small": (1024, 2816, 8), "block": (4096, 11008, 1)}
RANK = 16
FACTOR_TYPES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
DENSE_TYPES = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
PEFT_TYPES = (*FACTOR_TYPES, "cat", "svd", *DENSE_TYPES)
OURS_ALONE = ("linear_exact", "core_ties", "core_dare_linear", "core_dare_ties", "core_magnitude_prune")
# What has the same steps on adapter files, without a model.
FILE_METHODS = {"linear": "peft_linear", "dare_linear": "peft_dare_linear"}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build_base(hidden: int, inner: int, layers: int):
    """Return a base model; its weights are never read, and lie in one shared block of memory."""
    import torch
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
    return base


def build(hidden: int, inner: int, layers: int, adapters: int):
    """Return a PEFT model with random adapters."""
    import torch
    from peft import LoraConfig, get_peft_model

    base = build_base(hidden, inner, layers)
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


def merge_files(function: str, kind: str, shape: tuple[int, int, int], adapters: int, folder: Path) -> float:
    """Merge adapter files into a file, and return the processor seconds."""
    from peft import PeftModel

    import sstmerge

    names, weights, out = [f"a{n}" for n in range(adapters)], [1.0 / adapters] * adapters, folder / "merged"
    if not folder.exists():
        build(*shape, adapters).save_pretrained(folder)
    shutil.rmtree(out, ignore_errors=True)
    directories = [str(folder / name) for name in names]
    base = build_base(*shape)
    start = time.process_time()
    if function == "files":
        options = {"density": 0.5} if kind.startswith("dare") else {}
        sstmerge.merge_adapters(directories, weights, FILE_METHODS[kind], options=options, out=out)
    else:
        model = PeftModel.from_pretrained(base, directories[0], adapter_name=names[0])
        for name, directory in zip(names[1:], directories[1:], strict=True):
            model.load_adapter(directory, adapter_name=name)
        model.base_model.add_weighted_adapter(names, weights, "merged", kind, density=0.5)
        model.save_pretrained(folder, selected_adapters=["merged"])
    seconds = time.process_time() - start
    if not (out / "adapter_model.safetensors").exists():
        raise RuntimeError(f"{function} wrote no adapter to {out}")
    return seconds


def measure_files(function: str, kind: str, adapters: int, setting: str, repetitions: int) -> dict[str, float]:
    """Merge adapter files in this process, and return the least that it took."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        small, folder = Path(temporary) / "small", Path(temporary) / "adapters"
        merge_files(function, kind, (64, 96, 1), adapters, small)
        return {
            "seconds": min(merge_files(function, kind, SETTINGS[setting], adapters, folder) for _ in range(repetitions))
        }


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
        measurement = measure_files if function in ("files", "peft_files") else measure
        print(json.dumps(measurement(function, kind, int(adapters), setting, int(repetitions))))
        return

    import peft
    import torch
    from measuring import machine, write_results

    previous = json.loads(arguments.output.read_text())["results"] if arguments.output.exists() else []
    asked = {(s, n, k) for s in arguments.setting for n in arguments.adapters for k in arguments.types}
    results = [row for row in previous if (row["setting"], row["adapters"], row["type"]) not in asked]
    content = {"machine": machine(torch.device("cpu")), "peft": peft.__version__, "threads": 1, "results": results}
    for setting in arguments.setting:
        for adapters in arguments.adapters:
            for kind in arguments.types:
                row = {"setting": setting, "adapters": adapters, "type": kind}
                functions = ("sstmerge",) if kind in OURS_ALONE else ("sstmerge", "peft")
                functions += ("files", "peft_files") if kind in FILE_METHODS else ()
                for function in functions:
                    row[function] = in_child(function, kind, str(adapters), setting, str(arguments.repetitions))
                results.append(row)
                write_results(arguments.output, content)
    print_tables(results)


def print_tables(results: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=140)
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
    console.print(table)
    table = Table(
        "setting", "n", "type", "files to file: CPU s", "PEFT's call", "PEFT's load, call, save", "faster ×, ×"
    )
    for row in results:
        if "files" in row:
            ours, call, whole = (row[name]["seconds"] for name in ("files", "peft", "peft_files"))
            ratios = f"{call / ours:.1f}, {whole / ours:.1f}"
            table.add_row(
                row["setting"], str(row["adapters"]), row["type"], *(f"{s:.3f}" for s in (ours, call, whole)), ratios
            )
    console.print(table)


if __name__ == "__main__":
    main()
