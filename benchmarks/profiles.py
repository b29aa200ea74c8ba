"""Where the time goes inside every phase: a table of operations and a trace of calibration and merge, by torch.profiler.

    python benchmarks/profiles.py [--out benchmarks/results/profiles] [--only NAME …]

Per profile NAME.txt (the operations that take the most time themselves) and NAME.json.gz (a trace; ui.perfetto.dev shows it
as a flame graph over time, with the phases of the merge as spans of their own). Calibration: a random Llama of hidden size
1024 with two layers, one batch of 8 x 128 tokens, two adapters of r = 16 (`collection_workload.py`). Merge: Fishers at hand,
adapters of the shapes of SmolLM2-135M and Llama-3.2-1B, r = 16 (`merge_phase.py`). The profiler itself takes time, mostly
where operations are many and small: timings are in the other benchmarks.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from collection_workload import activation_gradients, random_workload
from measuring import machine
from merge_methods import Ours
from merge_shapes import MODELS, random_adapter
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from sstmerge.atomic import atomic_file
from sstmerge.fisher import collect_fisher

HIDDEN = "hidden 1024"
OPERATIONS = 20
Call = Callable[[], object]


def bare_pass() -> Call:
    return activation_gradients(random_workload(HIDDEN, 1), peft=False)


def calibration(structure: str) -> Call:
    work = random_workload(HIDDEN, 1)
    return lambda: collect_fisher(
        work.model, work.batches, work.space, structure=structure, labels="sampled", reference="base"
    )


def merge(structure: str, model: str) -> Call:
    device = torch.device("cpu")
    adapters = [random_adapter(n, MODELS[model], 16, dtype=torch.bfloat16, device=device) for n in ("a", "b")]
    return Ours(adapters, structure, device)


PROFILES: dict[str, Callable[[], Call]] = {
    "calibration-bare-pass": bare_pass,
    **{f"calibration-{kind}": partial(calibration, kind) for kind in ("diagonal", "kfac", "global")},
    **{
        f"merge-{kind}-{model.lower()}": partial(merge, kind, model)
        for model in ("SmolLM2-135M", "Llama-3.2-1B")
        for kind in ("diagonal", "kfac", "global")
    },
}


def write_profile(name: str, call: Call, folder: Path) -> None:
    """Profile the second call."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    table = recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=OPERATIONS, max_name_column_width=48)
    words = ", ".join(f"{key} {value}" for key, value in machine(torch.device("cpu")).items())
    with atomic_file(folder / f"{name}.txt") as unfinished:
        lines = [line.rstrip() for line in table.splitlines()]
        header = f"{name}, {torch.get_num_threads()} threads: {words}"
        unfinished.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as place:
        raw = Path(place) / "trace.json"
        recorded.export_chrome_trace(str(raw))
        trace = json.loads(raw.read_text(encoding="utf-8"))
    events = [event for event in trace["traceEvents"] if event.get("ph") in ("X", "M")]
    for event in events:
        event.pop("args", None) if event["ph"] == "X" else None
    start = min(event["ts"] for event in events if event["ph"] == "X")
    for event in events:
        event["ts"] = round(event.get("ts", start) - start, 1)
    with atomic_file(folder / f"{name}.json.gz") as unfinished, gzip.GzipFile(unfinished, "wb", 9, mtime=0) as file:
        file.write(json.dumps({"traceEvents": events}, separators=(",", ":")).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "profiles")
    parser.add_argument("--only", nargs="+", choices=PROFILES, default=list(PROFILES))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    for name in arguments.only:
        write_profile(name, PROFILES[name](), arguments.out)
        console.print(f"{name}: {(arguments.out / f'{name}.json.gz').stat().st_size / 1e3:.0f} kB", highlight=False)


if __name__ == "__main__":
    main()
