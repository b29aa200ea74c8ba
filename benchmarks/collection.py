"""Cost of collecting a Fisher against the bare passes and against the peers: time, memory, profiles, in one run.

    python benchmarks/collection.py [--threads 1 2] [--out benchmarks/results/NAME.json]
    python benchmarks/collection.py --base MODEL        the demo's adapters and benign prompts on a model of its shapes

Without --base: random Llamas (hidden 512 with six layers, hidden 1024 with two; `--models 1B`: hidden 2048 with sixteen;
vocabulary 2000), two random adapters of r = 16 on all seven projections, batches of 8 x 128 tokens, all of which enter the
loss. The rows are

    bare                    PeftModel with one of the adapters, gradients of the LoRA weights: what fine-tuning pays
    activations, PEFT/base  the same, and the base model, without any weight's gradient; also with our chunked head
    sstmerge …              `collect_fisher` as a whole, at the base and at one adapter
    peers                   `collection_peers.py`; a row is left out, with the reason, where its package is missing

Everybody takes the labels of the data, except where a row says sampled. Runs are interleaved. A ratio is taken within a
repetition, of process CPU times, so that other work on the machine counts little; medians are reported. The objects differ
and are named in the result: a peer's K-FAC is of lora_A and lora_B apart, in full dimension; ours is of the weight change
in the span of both adapters. EK-FAC of the peers takes two passes, the covariances and the squares in their eigenbasis
(whose computation is not counted); their row is the sum. Peak memory is the growth of the resident set's maximum in a fresh
process, over what the loaded model takes (Linux only). Rows that end in `of the modules` collect in the best modules of a
pilot; what that saves is compared with what the pilot takes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from collection_peers import PEERS
from collection_workload import (
    RANDOM_MODELS,
    Workload,
    activation_gradients,
    activation_gradients_of_responses,
    bare,
    demo_workload,
    random_workload,
)
from measuring import machine, write_results
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sstmerge.fisher import collect_fisher
from sstmerge.merging import module_filter

Call = Callable[[], object]
BARS = ("bare", "activations, base", "activations, base, our head", "activations, PEFT", "dattri LoGra hook")
# Peers' two-pass methods: the row, and the rows it is the sum of.
SUMS = {
    "kronfluence EK-FAC": ("kronfluence K-FAC", "kronfluence EK-FAC, second pass"),
    "bergson EK-FAC": ("bergson K-FAC", "bergson EK-FAC, second pass"),
}
FILTERED = {0.5: "half of the modules", 0.25: "a quarter of the modules"}
# Sequences of each kind in the pilot of a module filter, as `CollectionOptions.pilot` has it.
PILOT = 16


def collection(work: Workload, *, structure: str, reference: str, labels: str = "data") -> Call:
    point = "base" if reference == "base" else work.adapters[0].name
    model, space = work.model, work.space
    return lambda: collect_fisher(model, work.batches, space, structure=structure, labels=labels, reference=point)


def filtered(work: Workload, *, structure: str, modules: float) -> Call:
    """Build a collection in the best modules of a pilot, which is not part of the call."""
    pilot = [
        collect_fisher(work.model, work.batches, work.space, structure="diagonal", labels=labels, reference="base")
        for labels in ("data", "sampled")
    ]
    space = module_filter(*pilot, modules=modules).space
    return lambda: collect_fisher(work.model, work.batches, space, structure=structure, labels="data", reference="base")


def builders() -> dict[str, tuple[str, Callable[[Workload], Call]]]:
    """Return what every row's object is, and what builds its call."""
    rows: dict[str, tuple[str, Callable[[Workload], Call]]] = {
        "bare": ("gradients of the LoRA weights, summed over the batch", bare),
        "activations, base": ("no gradient of any weight", partial(activation_gradients, peft=False)),
        "activations, base, our head": ("no gradient of any weight", activation_gradients_of_responses),
        "activations, PEFT": ("no gradient of any weight", partial(activation_gradients, peft=True)),
    }
    objects = {
        "kfac": "input and gradient covariances of the weight change in the span of both adapters",
        "global": "per-example gradients of the weight change in the span of both adapters: exact",
        "diagonal": "squares of per-example gradients of the weight change in the span of both adapters",
    }
    for structure, what in objects.items():
        for reference in ("base", "adapter"):
            build = partial(collection, structure=structure, reference=reference)
            rows[f"sstmerge {structure} at {reference}"] = (what, build)
    sampled = partial(collection, structure="kfac", reference="base", labels="sampled")
    rows["sstmerge kfac at base, sampled"] = (objects["kfac"] + ", true Fisher", sampled)
    for share, words in FILTERED.items():
        for structure in ("kfac", "global"):
            build = partial(filtered, structure=structure, modules=share)
            rows[f"sstmerge {structure} at base, {words}"] = (objects[structure], build)
    return rows | {name: (what, build) for name, what, build in PEERS}


@dataclass(frozen=True)
class Source:
    """What a run works on: a random model's name or a base's, and how many batches of how many sequences."""

    name: str
    is_base: bool
    batches: int
    sequences: int

    def workload(self) -> Workload:
        """Return the model, the adapters and the data."""
        if self.is_base:
            return demo_workload(self.name, self.sequences * self.batches)
        return random_workload(self.name, self.batches, self.sequences)


def measure(work: Workload, repetitions: int, wanted: list[str]) -> dict[str, object]:
    calls: dict[str, Call] = {}
    skipped = {}
    for name, (_, build) in builders().items():
        if wanted and name not in wanted:
            continue
        try:
            calls[name] = build(work)
            calls[name]()
        except ImportError as error:
            skipped[name] = f"{error.name} is not installed"
        except Exception as error:  # a peer that fails on this machine is a result, not the end of the run
            calls.pop(name, None)
            if name not in {peer for peer, _, _ in PEERS}:
                raise
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    wall: dict[str, list[float]] = {name: [] for name in calls}
    turns = [turn for _ in range(repetitions) for turn in calls.items()]
    for name, call in track(turns, description=f"{work.name}, {torch.get_num_threads()} threads"):
        start, start_wall = time.process_time(), time.perf_counter()
        call()
        cpu[name].append(time.process_time() - start)
        wall[name].append(time.perf_counter() - start_wall)
    for name, parts in SUMS.items():
        if all(part in cpu for part in parts):
            for times in (cpu, wall):
                times[name] = [sum(values) for values in zip(*(times[part] for part in parts), strict=True)]
    objects = {name: what for name, (what, _) in builders().items()}
    sequences = sum(len(batch.index) for batch in work.batches)
    return {
        "model": work.name,
        "threads": torch.get_num_threads(),
        "tokens": work.tokens,
        "rows": {
            name: {
                "object": objects.get(name, "both passes"),
                "cpu_seconds": times,
                "microseconds_per_token": 1e6 * statistics.median(times) / work.tokens,
                "tokens_per_second": work.tokens / statistics.median(wall[name]),
                "ratios": {bar: ratio(times, cpu[bar]) for bar in BARS if bar in cpu},
            }
            for name, times in cpu.items()
        },
        "module_filter": filter_savings(cpu, sequences),
        "skipped": skipped,
    }


def filter_savings(cpu: dict[str, list[float]], sequences: int) -> dict[str, dict[str, float | None]]:
    """Return what a module filter saves of a collection, and how many sequences pay for its pilot, by row.

    The pilot is `diagonal`, in all modules, over `PILOT` sequences of each kind.
    """
    if "sstmerge diagonal at base" not in cpu:
        return {}
    pilot = 2 * PILOT * statistics.median(cpu["sstmerge diagonal at base"]) / sequences
    savings = {}
    for words in FILTERED.values():
        for structure in ("kfac", "global"):
            name = f"sstmerge {structure} at base"
            if f"{name}, {words}" in cpu:
                share = ratio(cpu[f"{name}, {words}"], cpu[name])
                saved = (1 - share) * statistics.median(cpu[name]) / sequences
                savings[f"{name}, {words}"] = {
                    "pilot_cpu_s": pilot,
                    "saves": 1 - share,
                    "pays_from_sequences": pilot / saved if saved > 0 else None,
                }
    return savings


def ratio(times: list[float], bar: list[float]) -> float:
    return statistics.median(own / other for own, other in zip(times, bar, strict=True))


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak_memory(source: Source, row: str) -> float | None:
    """Return the growth of the resident set's maximum in a fresh process, in MiB; None where the row failed."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(source, row, torch.get_num_threads(), queue))
    process.start()
    process.join()
    return None if queue.empty() else queue.get() / 1024


def _peak(source: Source, row: str, threads: int, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(threads)
    work = source.workload()
    _ = work.model if "base" in row or "sstmerge" in row or "dattri" in row else work.peft_model
    # ru_maxrss survives exec, so it would show the parent's maximum; the kernel's high-water mark can be reset.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    builders()[row][1](work)()
    queue.put(_status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1])


# ---- output ----------------------------------------------------------------------------------------------------------


def print_run(run: dict, memory: dict[str, float | None], console: Console) -> None:
    bars = [bar for bar in BARS if bar in run["rows"]]
    table = Table(
        "row", "µs/token", *(f"/ {bar}" for bar in bars), "MiB", title=f"{run['model']}, {run['threads']} threads"
    )
    for name, row in run["rows"].items():
        ratios = (f"{row['ratios'][bar]:.3f}" for bar in bars)
        used = memory.get(name)
        table.add_row(name, f"{row['microseconds_per_token']:.0f}", *ratios, "" if used is None else f"{used:.0f}")
    console.print(table)
    for name, found in run["module_filter"].items():
        after = (
            "never pays"
            if found["pays_from_sequences"] is None
            else f"pays from {found['pays_from_sequences']:.0f} sequences on"
        )
        console.print(
            f"{name}: saves {found['saves']:.1%}; a pilot of {PILOT} + {PILOT} sequences "
            f"({found['pilot_cpu_s']:.1f} s) {after}",
            highlight=False,
        )
    for name, reason in run["skipped"].items():
        console.print(f"left out: {name}: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="directory or hub id of the demo's model instead of random ones")
    parser.add_argument("--models", nargs="*", default=["hidden 512", "hidden 1024"], choices=list(RANDOM_MODELS))
    parser.add_argument("--batches", type=int, default=1, help="batches of so many sequences as --sequences says")
    parser.add_argument("--sequences", type=int, default=8, help="sequences of a batch; 2 are enough for 1B parameters")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--rows", nargs="*", default=[], metavar="ROW", help="only these rows, by their full names")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    console = Console()
    content: dict = {"machine": machine(torch.device("cpu")), "runs": []}
    for name in [arguments.base] if arguments.base else arguments.models:
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            source = Source(name, bool(arguments.base), arguments.batches, arguments.sequences)
            # Nothing holds the models any more when memory is measured.
            run = measure(source.workload(), arguments.repetitions, arguments.rows)
            memory = {}
            if not arguments.no_memory and threads == arguments.threads[0]:
                measured = [row for row in run["rows"] if row not in SUMS]
                memory = {row: peak_memory(source, row) for row in measured}
                run["peak_memory_mib"] = memory
            content["runs"].append(run)
            print_run(run, memory, console)
            if arguments.out:
                write_results(arguments.out, content)
    if not arguments.out:
        console.print_json(json.dumps(content))


if __name__ == "__main__":
    main()
