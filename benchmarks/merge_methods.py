"""One setting of the merge-latency benchmark in this process: every method in turn, several times.

python benchmarks/merge_methods.py '{"model": "SmolLM2-135M", "rank": 16, "adapters": 2, …}'
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from merge_rivals import FACTOR_TYPES, PeftMerge, mergekit_dare, plain_torch
from merge_shapes import MODELS, SEQUENCES, ModelShape, random_adapter, random_fisher

from sstmerge.adapters import Adapter, CoreSpace
from sstmerge.fisher import Fisher
from sstmerge.gevp import solve
from sstmerge.merging import Selection, merge_cores

STRUCTURES = ("kfac", "diagonal", "global")
# Seconds that the rounds of a method may take before it is not repeated. The first round counts only if it is the only one.
ENOUGH, REPETITIONS = 4.0, 5
# Entries of the score matrix of `global`, 512 MiB; where a setting needs more, the structure is left out.
LARGEST_SCORES = 2**27

Times = dict[str, tuple[float, float]]


class Clock:
    """Processor and wall seconds of named steps, finished work on a GPU included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: Times = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        self._wait()
        cpu, wall = time.process_time(), time.perf_counter()
        with torch.profiler.record_function(name):  # a span of its own where somebody profiles
            yield
            self._wait()
        self.times[name] = (time.process_time() - cpu, time.perf_counter() - wall)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Ours:
    """Our merge of one structure, in steps."""

    def __init__(self, adapters: list[Adapter], structure: str, device: torch.device) -> None:
        self.adapters, self.device = adapters, device
        space = CoreSpace.of(adapters)
        self.basis = space.basis_description(), space.basis_tensors()
        self.gain, self.cost = (random_fisher(space, structure, seed) for seed in (1, 2))

    def __call__(self) -> Times:
        """Merge once."""
        clock = Clock(self.device)
        names = [adapter.name for adapter in self.adapters]
        with clock.step("space"):
            fresh = CoreSpace.of(self.adapters)
            self._roles(fresh, names)
        del fresh
        with clock.step("cores"):
            space = CoreSpace.from_basis(self.adapters, *self.basis)
            utility, safety = self._roles(space, names)
        gain, cost = (Fisher(f.structure, space, f.statistics, f.counts, f.metadata) for f in (self.gain, self.cost))
        with clock.step("solve"):
            spectrum = solve(gain, cost)
        with clock.step("select"):
            merged = merge_cores(spectrum, utility, safety, selection=Selection(top=16))
        with clock.step("write_back"):
            adapter = space.to_adapter(merged.core, name="merged")
        if len(adapter.layers) != len(self.adapters[0].layers):
            raise SystemExit("The merged adapter lacks layers.")
        parts = ("cores", "solve", "select", "write_back")
        clock.times["merge"] = tuple(sum(clock.times[part][i] for part in parts) for i in (0, 1))
        return clock.times

    @staticmethod
    def _roles(space: CoreSpace, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return space.combination(dict.fromkeys(names[:-1], 1.0)), space.core(names[-1])


def measured(call: Callable[[], object], device: torch.device, after: Callable[[], None] | None) -> Times:
    clock = Clock(device)
    with clock.step("merge"):
        result = call()
    del result
    if after is not None:
        after()
    return clock.times


def peak_mebibytes(call: Callable[[], Times], device: torch.device) -> tuple[Times, float]:
    """Return what a call returns, and how far memory rises above what was resident before."""
    gc.collect()
    with contextlib.suppress(
        OSError, AttributeError
    ):  # glibc: what earlier methods freed must not look like memory at hand
        ctypes.CDLL(None).malloc_trim(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return call(), (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with contextlib.suppress(OSError):  # then the mark also holds what came before
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    times = call()
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    high = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return times, max(high - before, 0) / 2**20


def summary(rounds: list[Times], peak: float) -> dict:
    """Return the medians of all steps; those of `merge` at the top."""
    middle = {
        step: {clock: statistics.median(r[step][i] for r in rounds) for i, clock in enumerate(("cpu_s", "wall_s"))}
        for step in rounds[0]
    }
    whole = middle.pop("merge")
    return {**whole, "peak_mib": peak, "rounds": len(rounds), **({"steps": middle} if middle else {})}


def dense(
    shape: ModelShape, adapters: list[Adapter], rank: int, device: torch.device, kinds: list[str]
) -> dict[str, dict]:
    """Measure the methods that form dense weight changes on one block, times the number of blocks."""
    first = [
        Adapter(a.name, {path: f for path, f in a.layers.items() if path.startswith("model.layers.0.")})
        for a in adapters
    ]
    peft = PeftMerge(shape, first, rank)
    calls = {f"peft {kind}": peft.whole(kind) for kind in kinds} | {"mergekit dare_linear": mergekit_dare(first)}
    results = {}
    for name, call in calls.items():
        cpu, wall = measured(call, device, peft.clear)["merge"]
        what = "one block" if name.startswith("mergekit") else "SVDs of one block"
        results[name] = {
            "cpu_s": cpu * shape.blocks,
            "wall_s": wall * shape.blocks,
            "extrapolated": f"{what} of {shape.blocks}, times the number of blocks",
        }
    return results


def run(setting: dict) -> dict:
    """Measure one setting.

    Args:
        setting: model, rank, adapters, dtype, device, threads, dense (PEFT's dense types to measure on one block).

    Returns:
        The setting and, by method, its times and its memory.
    """
    torch.set_num_threads(setting["threads"])
    device, dtype = torch.device(setting["device"]), getattr(torch, setting["dtype"])
    shape, rank, count = MODELS[setting["model"]], setting["rank"], setting["adapters"]
    adapters = [random_adapter(f"a{i}", shape, rank, dtype=dtype, device=device) for i in range(count)]
    clock = Clock(device)
    with clock.step("identify"):
        for adapter in adapters:
            _ = adapter.fingerprint
    peft = PeftMerge(shape, adapters, rank)
    scores = len(adapters[0].layers) * (rank * count) ** 2 * SEQUENCES
    calls: dict[str, Callable[[], Times]] = {
        f"sst {structure}": Ours(adapters, structure, device)
        for structure in STRUCTURES
        if structure != "global" or scores <= LARGEST_SCORES
    }
    for kind in FACTOR_TYPES:
        calls[f"peft {kind}"] = _timed(peft.whole(kind), device, peft.clear)
    calls["peft dare_linear, formula"] = _timed(peft.formula("dare_linear"), device, None)
    calls["torch dare_linear"] = _timed(plain_torch(adapters), device, None)
    peaks, seconds = {}, {}
    rounds: dict[str, list[Times]] = {name: [] for name in calls}
    for name, call in calls.items():
        start = time.perf_counter()
        first, peaks[name] = peak_mebibytes(call, device)
        rounds[name].append(first)
        seconds[name] = time.perf_counter() - start
    for repetition in range(1, REPETITIONS + 1):
        for name, call in calls.items():
            if seconds[name] * repetition < ENOUGH:
                rounds[name].append(call())
    methods = {name: summary(of[1:] or of, peaks[name]) for name, of in rounds.items()}
    if setting.get("dense"):
        methods |= dense(shape, adapters, rank, device, setting["dense"])
    return {
        **{key: setting[key] for key in ("model", "rank", "adapters", "dtype", "device")},
        "parameters": adapters[0].parameter_count,
        "layers": len(adapters[0].layers),
        "load_average": os.getloadavg()[0],  # above the number of threads: wall times and threads were disturbed
        "identify": dict(zip(("cpu_s", "wall_s"), clock.times["identify"], strict=True)),
        "methods": methods,
    }


def _timed(call: Callable[[], object], device: torch.device, after: Callable[[], None] | None) -> Callable[[], Times]:
    return lambda: measured(call, device, after)


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
