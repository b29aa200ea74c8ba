"""How calibration and merge grow: log-log slopes over tokens, rank, experts, depth and width, every phase and the sum.

    python benchmarks/scaling.py [--out benchmarks/results/NAME.json] [--structures kfac …] [--axes tokens …]

Random Llamas (vocabulary 2000) with random adapters on all seven projections of every block, full sequences of 128 tokens.
From one setting (hidden 512, four layers, two adapters of r = 16, 1024 tokens per Fisher) one quantity grows at a time:

    tokens      per Fisher
    rank        r of every adapter; all R = r T directions of a layer take part
    experts     number of adapters T
    layers      LoRA parameters by depth
    hidden      LoRA parameters by width; the model itself grows with its square

Phases, in processor seconds: `bare` is the pass without any weight's gradient, for comparison; `calibration` collects
both Fishers (gain: labels of the data, cost: sampled); `space` forms bases and cores; `solve`, `select` and `write_back` are
the merge. `merge` = space + solve + select + write_back, `sum` = calibration + merge. A slope is fitted over all points of
an axis, and once more over its last two, where constants count least. Merges at the shapes of real models are in
`merge_phase.py`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from collection_workload import Workload, activation_gradients, sized_workload
from matplotlib.figure import Figure
from measuring import machine, slope, write_results
from rich.console import Console
from rich.table import Table

from sstmerge.adapters import CoreSpace
from sstmerge.fisher import collect_fisher
from sstmerge.gevp import solve
from sstmerge.merging import Selection, merge_cores

STRUCTURES = ("kfac", "diagonal", "global")
PHASES = ("calibration", "space", "solve", "select", "write_back", "merge", "sum")
TOKENS_PER_BATCH = 1024


@dataclass(frozen=True)
class Setting:
    """One point of an axis."""

    tokens: int = 1024
    rank: int = 16
    experts: int = 2
    layers: int = 4
    hidden: int = 512


AXES = {
    "tokens": (1024, 2048, 4096, 8192),
    "rank": (4, 16, 64, 128),
    "experts": (2, 4, 8, 20),
    "layers": (2, 4, 8, 16),
    "hidden": (128, 256, 512, 1024),
}


def workload(setting: Setting) -> Workload:
    intermediate = 8 * round(setting.hidden * 8 / 3 / 8)
    return sized_workload(
        str(setting),
        setting.hidden,
        intermediate,
        setting.layers,
        batches=setting.tokens // TOKENS_PER_BATCH,
        rank=setting.rank,
        adapters=setting.experts,
    )


def once(work: Workload, structure: str) -> dict[str, float]:
    """Calibrate and merge once.

    Returns:
        Processor seconds of every phase.
    """
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], object]) -> object:
        start = time.process_time()
        result = call()
        seconds[name] = seconds.get(name, 0.0) + time.process_time() - start
        return result

    names = [adapter.name for adapter in work.adapters]

    def fresh_space() -> tuple[CoreSpace, torch.Tensor, torch.Tensor]:
        space = CoreSpace.of(work.adapters)
        utility = space.combination(dict.fromkeys(names[:-1], 1.0))
        for group in space.groups:  # which calibration would form otherwise
            _ = group.U, group.V
        return space, utility, space.core(names[-1])

    space, utility, safety = timed("space", fresh_space)
    fishers = [
        timed(
            "calibration",
            lambda kind=kind: collect_fisher(
                work.model, work.batches, space, structure=structure, labels=kind, reference="base"
            ),
        )
        for kind in ("data", "sampled")
    ]
    spectrum = timed("solve", lambda: solve(*fishers))
    merged = timed("select", lambda: merge_cores(spectrum, utility, safety, selection=Selection(top=8)))
    timed("write_back", lambda: space.to_adapter(merged.core, name="merged"))
    seconds["merge"] = sum(seconds[phase] for phase in ("space", "solve", "select", "write_back"))
    seconds["sum"] = seconds["calibration"] + seconds["merge"]
    return seconds


def measure(setting: Setting, structures: list[str], repetitions: int) -> dict:
    work = workload(setting)
    bare = activation_gradients(work, peft=False)
    calls: dict[str, Callable[[], dict[str, float]]] = {s: lambda s=s: once(work, s) for s in structures}
    for call in calls.values():
        call()
    bare()
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    bare_seconds = []
    for _ in range(repetitions):
        start = time.process_time()
        bare()
        bare_seconds.append(2 * (time.process_time() - start))  # two Fishers
        for name, call in calls.items():
            rounds[name].append(call())
    return {
        **asdict(setting),
        "parameters": work.adapters[0].parameter_count,
        "core_entries": work.space.size,
        "bare": statistics.median(bare_seconds),
        "structures": {
            name: {phase: statistics.median(one[phase] for one in of) for phase in PHASES}
            for name, of in rounds.items()
        },
    }


def slopes(axis: str, rows: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the slopes of every phase, by structure: over all points, and over the last two."""
    sizes = [row["parameters"] if axis in ("layers", "hidden") else row[axis] for row in rows]

    def both(times: list[float]) -> dict[str, float]:
        points = list(zip(sizes, times, strict=True))
        return {"all": slope(points), "last_two": slope(points[-2:])}

    found = {
        name: {phase: both([row["structures"][name][phase] for row in rows]) for phase in PHASES}
        for name in rows[0]["structures"]
    }
    return {"bare pass": {"calibration": both([row["bare"] for row in rows])}, **found}


def print_axis(axis: str, rows: list[dict], found: dict, console: Console) -> None:
    title = f"{axis}: processor seconds at {', '.join(str(row[axis]) for row in rows)}; slope of all points, of the last two"
    table = Table("structure", "phase", *(str(row[axis]) for row in rows), "slope", "last two", title=title)
    for name, phases in found.items():
        for phase, fitted in phases.items():
            times = [row["bare"] if name == "bare pass" else row["structures"][name][phase] for row in rows]
            table.add_row(
                name, phase, *(f"{t:.3f}" for t in times), f"{fitted['all']:.2f}", f"{fitted['last_two']:.2f}"
            )
    console.print(table)


def draw(axes: dict[str, dict]) -> Figure:
    """Draw calibration and merge over every axis."""
    figure = Figure(figsize=(4.2 * len(axes), 4.2), constrained_layout=True)
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for panel, (axis, found) in zip(panels, axes.items(), strict=True):
        rows = found["points"]
        sizes = [row[axis] for row in rows]
        panel.plot(sizes, [row["bare"] for row in rows], color="black", linewidth=1, label="bare pass")
        for color, name in enumerate(rows[0]["structures"]):
            for phase, line in (("calibration", "-"), ("merge", "--")):
                times = [row["structures"][name][phase] for row in rows]
                panel.plot(sizes, times, line, color=f"C{color}", marker="o", label=f"{name}, {phase}")
        panel.set(xscale="log", yscale="log", xlabel=axis)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("processor seconds")
    panels[0].legend(fontsize=7)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=list(STRUCTURES))
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--points", type=int, default=4, help="points of every axis, the first so many")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=150)
    content: dict = {"machine": machine(torch.device("cpu")), "threads": arguments.threads}
    content |= {"load_average": os.getloadavg()[0], "repetitions": arguments.repetitions, "axes": {}}
    for axis in arguments.axes:
        points = [replace(Setting(), **{axis: value}) for value in AXES[axis][: arguments.points]]
        rows = [measure(point, arguments.structures, arguments.repetitions) for point in points]
        found = slopes(axis, rows)
        content["axes"][axis] = {"points": rows, "slopes": found}
        print_axis(axis, rows, found, console)
        if arguments.out:
            write_results(arguments.out, content)
    if arguments.out:
        draw(content["axes"]).savefig(arguments.out.with_suffix(".png"), dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
