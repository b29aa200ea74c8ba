"""Merge latency: sstmerge with Fishers at hand against PEFT, mergekit and a plain line of torch, on the same adapters.

    python benchmarks/merge_phase.py [--output FILE] [--models M …] [--ranks R …] [--counts T …] [--reuse]
    pytest benchmarks/ --benchmark-only        # a quick part of it, in benchmarks/test_merge_phase.py

Adapters of the true shapes of five models with random factors; no model is loaded. Every setting is a child process in which
all methods take turns, so that ratios are of one run. Reported are processor seconds, wall seconds, and how far the
high-water mark of memory rises above what was resident before. Ours is taken apart:

    space       (only where no Fisher exists yet) Gram matrices, bases, cores
    cores       Fisher at hand: Gram matrices and cores
    solve       the generalized eigenproblems
    select      directions, filter, report
    write_back  the factors of the merged adapter, lossless

`merge` is cores + solve + select + write_back, what PEFT's call does. Checking that a Fisher belongs to the adapters
(`identify`, SHA-256) is shown apart; `files` merges a 70B-shaped pair of adapters from files to a file in a process of its
own. PEFT's dense types and mergekit, which forms dense weight changes too, are measured on one block where that takes
seconds, and extrapolated elsewhere; the JSON says from what. `global` keeps 128 scores of size D.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "merge-latency-cpu.json"
MODELS = ("SmolLM2-135M", "Llama-3.2-1B", "Llama-2-7B", "Llama-2-13B", "Llama-2-70B")
SCALING = ("Llama-3.2-1B", "Llama-2-7B", "Llama-2-13B", "Llama-2-70B")
SWEEP_MODEL = "Llama-3.2-1B"
RANK, COUNT = 16, 2
FROM_ANOTHER = ", by "
SETTING = ("model", "rank", "adapters", "dtype", "device")
DENSE_TYPES = ("svd", "dare_linear_svd", "ties_svd")
SCALED = "peft dare_linear_svd"


def settings(arguments: argparse.Namespace) -> list[dict]:
    """Return what is measured: every model once, then ranks and numbers of adapters at one model."""
    base = {"dtype": arguments.dtype, "device": arguments.device, "threads": arguments.threads, "dense": []}
    chosen = [{**base, "model": model, "rank": RANK, "adapters": COUNT} for model in arguments.models]
    for setting in chosen:
        if setting["model"] in arguments.dense_models:
            first = setting["model"] == arguments.dense_models[0]
            setting["dense"] = list(DENSE_TYPES) if first else ["dare_linear_svd"]
    sweeps = [(rank, COUNT) for rank in arguments.ranks if rank != RANK]
    sweeps += [(RANK, count) for count in arguments.counts if count != COUNT]
    return chosen + [{**base, "model": SWEEP_MODEL, "rank": r, "adapters": t} for r, t in sweeps]


def in_child(script: str, argument: str, threads: int) -> dict:
    """Run one setting in a process of its own, with so many threads that sleep while they wait."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).parent / script), argument],
        env={**os.environ, **counts, "OMP_WAIT_POLICY": "PASSIVE"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(finished.stdout.splitlines()[-1])


def slopes(rows: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Return log-log slopes by axis, by method (and by step of ours), and by clock.

    The axes are the LoRA parameters from 1B to 70B shapes, and rank and number of adapters at one model.
    """
    from measuring import slope

    def axis(chosen: list[dict], size: str) -> dict[str, dict[str, float]]:
        timed: dict[str, list[tuple[int, dict]]] = {}
        for row in chosen:
            for method, result in row["methods"].items():
                if "extrapolated" not in result:
                    timed.setdefault(method, []).append((row[size], result))
                    for step, times in result.get("steps", {}).items():
                        timed.setdefault(f"{method}, {step}", []).append((row[size], times))
        return {
            name: {clock: slope([(x, times[clock]) for x, times in points]) for clock in ("cpu_s", "wall_s")}
            for name, points in timed.items()
            if len({x for x, _ in points}) > 2
        }

    wide = [row for row in rows if row["model"] in SCALING and (row["rank"], row["adapters"]) == (RANK, COUNT)]
    sweep = [row for row in rows if row["model"] == SWEEP_MODEL]
    return {
        "parameters": axis(wide, "parameters"),
        "rank": axis([row for row in sweep if row["adapters"] == COUNT], "rank"),
        "adapters": axis([row for row in sweep if row["rank"] == RANK], "adapters"),
    }


def extrapolate(rows: list[dict]) -> None:
    """Give models whose dense merges were not measured the time of the largest measured block, by m n min(m, n)."""
    from merge_shapes import MODELS as SHAPES

    def work(model: str) -> int:
        block = SHAPES[model].block().values()
        return sum(m * n * min(m, n) for m, n in block)

    reference = [row for row in rows if (row["rank"], row["adapters"]) == (RANK, COUNT)]
    measured = [row for row in reference if SCALED in row["methods"]]
    if not measured:
        return
    source = max(measured, key=lambda row: work(row["model"]))
    for row in reference:
        if row not in measured:
            blocks = SHAPES[row["model"]].blocks / SHAPES[source["model"]].blocks
            factor = blocks * work(row["model"]) / work(source["model"])
            words = f"one block of {source['model']}{FROM_ANOTHER}m n min(m, n) and the number of blocks"
            row["methods"][SCALED] = _scaled(source["methods"][SCALED], factor, words)
    for name in (f"peft {kind}" for kind in DENSE_TYPES if f"peft {kind}" != SCALED):
        own = [row for row in reference if name in row["methods"]]
        for row in reference:
            if own and row not in own:
                factor = row["methods"][SCALED]["cpu_s"] / own[-1]["methods"][SCALED]["cpu_s"]
                words = f"{SCALED} of this model{FROM_ANOTHER}their ratio at {own[-1]['model']}"
                row["methods"][name] = _scaled(own[-1]["methods"][name], factor, words)


def without_other_models(methods: dict[str, dict]) -> dict[str, dict]:
    """Leave out what was extrapolated from another model; `extrapolate` does it anew."""
    return {name: result for name, result in methods.items() if FROM_ANOTHER not in result.get("extrapolated", "")}


def _scaled(result: dict, factor: float, words: str) -> dict:
    return {"cpu_s": factor * result["cpu_s"], "wall_s": factor * result["wall_s"], "extrapolated": words}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dense-models", nargs="*", choices=MODELS, default=["SmolLM2-135M", "Llama-3.2-1B"])
    parser.add_argument("--ranks", nargs="*", type=int, default=[4, 64, 128], help=f"more ranks, at {SWEEP_MODEL}")
    parser.add_argument("--counts", nargs="*", type=int, default=[4, 8, 20], help=f"more adapters, at {SWEEP_MODEL}")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reuse", action="store_true", help="keep what FILE holds already (of the same machine)")
    parser.add_argument("--no-files", action="store_true", help="leave out the merge from files to a file")
    parser.add_argument(
        "--no-dense", action="store_const", const=[], dest="dense_models", help="no PEFT types with SVDs"
    )
    arguments = parser.parse_args()

    import peft
    import torch
    from measuring import machine, write_results
    from merge_report import plot, print_tables
    from rich.console import Console

    console = Console(width=150)
    content: dict = {
        "machine": machine(torch.device(arguments.device)),
        "peft": peft.__version__,
        "threads": arguments.threads,
        "dtype": arguments.dtype,
        "results": [],
    }
    rows = content["results"]
    if arguments.reuse and arguments.output.exists():
        kept = json.loads(arguments.output.read_text(encoding="utf-8"))
        rows += [{**row, "methods": without_other_models(row["methods"])} for row in kept["results"]]
        content |= {key: kept[key] for key in ("files",) if key in kept}
    for setting in settings(arguments):
        if any(all(row[key] == setting[key] for key in SETTING) for row in rows):
            continue
        console.print(f"{setting['model']}, r = {setting['rank']}, {setting['adapters']} adapters …", highlight=False)
        rows.append(in_child("merge_methods.py", json.dumps(setting), arguments.threads))
        write_results(arguments.output, content)
    rows.sort(key=lambda row: ((row["rank"], row["adapters"]) != (RANK, COUNT), MODELS.index(row["model"])))
    extrapolate(rows)
    content["slopes"] = slopes(rows)
    if not arguments.no_files and "files" not in content:
        console.print("70B-shaped adapters from files to a file …")
        with tempfile.TemporaryDirectory(prefix="sstmerge-benchmark-") as folder:
            prepared = json.dumps({"step": "prepare", "folder": folder, "model": "Llama-2-70B"})
            in_child("merge_files.py", prepared, arguments.threads)
            merged = json.dumps({"step": "merge", "folder": folder})
            content["files"] = in_child("merge_files.py", merged, arguments.threads)
    write_results(arguments.output, content)
    plot(content, arguments.output.with_suffix(".png"))
    print_tables(content, console)


if __name__ == "__main__":
    main()
