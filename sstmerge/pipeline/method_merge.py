"""Merge adapter files by any of the methods, without loading a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import nn

from sstmerge.adapters import Adapter, adapter_from_model, load_adapter, save_adapter
from sstmerge.atomic import refuse_existing
from sstmerge.errors import InputError
from sstmerge.fisher import Fisher
from sstmerge.merging.methods import REGISTRY, Method
from sstmerge.merging.methods.aligned_pair import AlignedPair
from sstmerge.merging.methods.runner import run
from sstmerge.merging.methods.statistics import FisherStatistics, GainAndCost
from sstmerge.merging.methods.task import Task, plan
from sstmerge.pipeline.merge import REPORT_FILE
from sstmerge.pipeline.progress import Progress, no_progress
from sstmerge.pipeline.roles import AdapterSource

SST = "sst"
Statistics = FisherStatistics | GainAndCost | AlignedPair
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class StatisticsFiles:
    """Files of what methods need beside the adapters; only those that the method needs may be given.

    Attributes:
        fishers: Fisher file of every adapter, by the adapter's name (need `fishers`).
        gain: Fisher file of harmful prompts (needs `gain`, `gain_and_cost`).
        cost: Fisher file of benign prompts (need `gain_and_cost`).
        aligned: Directory of an aligned model (need `aligned_pair`).
        base: Directory of the model that it was aligned from (need `aligned_pair`).
    """

    fishers: Mapping[str, str | Path] = field(default_factory=dict)
    gain: str | Path | None = None
    cost: str | Path | None = None
    aligned: str | Path | None = None
    base: str | Path | None = None

    def check(self, method: Method) -> None:
        """Refuse files that the method does not need, and a lack of files that it does need.

        Args:
            method: The method.

        Raises:
            InputError: Something is missing or given for nothing.
        """
        wanted = {name for need in method.needs for name in _FILES_OF.get(need, ())}
        given = {name for name in self.__dataclass_fields__ if getattr(self, name)}
        if wanted != given:
            flags = {name: f"{name} ({_FLAGS[name]})" for name in _FLAGS}
            missing = ", ".join(flags[name] for name in sorted(wanted - given))
            needless = ", ".join(flags[name] for name in sorted(given - wanted))
            parts = [f"needs {missing}"] * bool(missing) + [f"makes no use of {needless}"] * bool(needless)
            raise InputError(f"Method '{method.name}' {' and '.join(parts)}.")

    def load(self, method: Method, adapters: Sequence[Adapter]) -> Statistics | None:
        """Read what a method needs.

        Args:
            method: The method.
            adapters: The adapters of the merge.

        Returns:
            The statistics; None where it needs none.
        """
        self.check(method)
        if self.fishers:
            return FisherStatistics({name: Fisher.load(path, adapters) for name, path in self.fishers.items()})
        if self.gain:
            return GainAndCost(
                Fisher.load(self.gain, adapters), Fisher.load(self.cost, adapters) if self.cost else None
            )
        if self.aligned and self.base:
            return AlignedPair(self.aligned, self.base, adapters)
        return None


_FILES_OF = {
    "fishers": ("fishers",),
    "gain": ("gain",),
    "gain_and_cost": ("gain", "cost"),
    "aligned_pair": ("aligned", "base"),
}
_FLAGS = {
    "fishers": "--fisher NAME=FILE",
    "gain": "--gain",
    "cost": "--cost",
    "aligned": "--aligned",
    "base": "--base",
}


def available_methods() -> dict[str, Method]:
    """Return every method that `merge_adapters` knows, by name: formula, paper, options, and what it needs."""
    return dict(REGISTRY.methods)


def merge_adapters(
    adapters: Sequence[AdapterSource] | Mapping[str, AdapterSource],
    weights: Sequence[float] | None = None,
    method: str = "task_arithmetic",
    *,
    options: Mapping[str, Any] | None = None,
    safety: str | None = None,
    statistics: Statistics | StatisticsFiles | None = None,
    rank: int | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    ignore_base_name: bool = False,
    progress: Progress = no_progress,
) -> Adapter:
    """Merge adapters by a method, without any model; a few layers at a time.

    Args:
        adapters: PEFT directories, hub ids, `Adapter`s or live `PeftModel`s; a mapping gives them names.
        weights: One weight per adapter; 1 by default.
        method: Name of the method; `available_methods` lists them.
        options: Values of the method's options, by name.
        safety: Name of the safety adapter, for methods that need to know.
        statistics: What the method needs beside the adapters: loaded, or as files.
        rank: Rank of the result. By default methods that act on cores or factors lose nothing, and methods that act on
            dense weight changes keep the largest rank among the adapters; `Method.rank` says which.
        dtype: Dtype of the result; the one that the adapters' dtypes promote to by default.
        seed: Seed of whatever is random; 0 by default.
        out: Directory to write the merged PEFT adapter to; None writes nothing.
        overwrite: Replace `out` if it exists.
        ignore_base_name: Accept adapters whose recorded base models differ by name.
        progress: Called with what is being done, how much is done, and how much there is.

    Returns:
        The merged adapter, of one rank and scaling 1.

    Raises:
        InputError: Something does not fit; the message says what. Nothing has been written then.
    """
    if out is not None:
        refuse_existing(out, overwrite=overwrite)
    task = plan_adapters(
        adapters,
        weights,
        method,
        options=options,
        safety=safety,
        statistics=statistics,
        rank=rank,
        dtype=dtype,
        seed=seed,
        ignore_base_name=ignore_base_name,
    )
    merged = run(task, progress)
    if out is not None:
        report = json.dumps({"merge": _report(task), "stability": None}, indent=2) + "\n"
        save_adapter(merged, out, overwrite=overwrite, extra_files={REPORT_FILE: report})
    return merged


def plan_adapters(
    adapters: Sequence[AdapterSource] | Mapping[str, AdapterSource],
    weights: Sequence[float] | None = None,
    method: str = "task_arithmetic",
    *,
    options: Mapping[str, Any] | None = None,
    safety: str | None = None,
    statistics: Statistics | StatisticsFiles | None = None,
    rank: int | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int | None = None,
    ignore_base_name: bool = False,
) -> Task:
    """Load the adapters and statistics of a merge and check everything, without merging.

    Args:
        adapters: As in `merge_adapters`.
        weights: As in `merge_adapters`.
        method: As in `merge_adapters`.
        options: As in `merge_adapters`.
        safety: As in `merge_adapters`.
        statistics: As in `merge_adapters`.
        rank: As in `merge_adapters`.
        dtype: As in `merge_adapters`.
        seed: As in `merge_adapters`.
        ignore_base_name: As in `merge_adapters`.

    Returns:
        What `sstmerge.merging.methods.runner.run` takes.
    """
    row = find_method(method)
    row.resolve(options or {})  # before anything large is read
    if isinstance(statistics, StatisticsFiles):
        statistics.check(row)
    loaded = _load_all(adapters)
    return plan(
        row,
        loaded,
        weights,
        options=options,
        rank=rank,
        dtype=_dtype(dtype),
        seed=seed,
        safety=safety,
        statistics=statistics.load(row, loaded) if isinstance(statistics, StatisticsFiles) else statistics,
        ignore_base_name=ignore_base_name,
    )


def find_method(name: str) -> Method:
    """Return the row of a method.

    Args:
        name: Its name.

    Returns:
        The row.

    Raises:
        InputError: There is none.
    """
    if name == SST:
        raise InputError(
            "'sst' merges a safety adapter into utility adapters by two Fishers: call sstmerge.merge or "
            "sstmerge.merge_from_fishers, or give --safety and --utility instead of --adapter."
        )
    return REGISTRY.find(name)


def plan_table(task: Task, out: str | Path | None) -> Table:
    """Describe a merge that has not been run.

    Args:
        task: The merge.
        out: Where the result would go.

    Returns:
        The table.
    """
    table = Table(title="Plan (nothing is run)", show_header=False)
    table.add_row("method", f"{task.method.name}: {task.method.title}")
    table.add_row("formula", escape(task.method.formula))
    for index, (adapter, weight) in enumerate(zip(task.adapters, task.weights, strict=True)):
        ranks = sorted({factors.rank for factors in adapter.layers.values()})
        role = "safety adapter" if index == task.safety else "adapter"
        words = f"weight {weight:g}, {len(adapter.layers)} layers of rank {', '.join(map(str, ranks))}"
        table.add_row(f"{role} {adapter.name}", f"{adapter.source}: {words}, {_name(adapter.dtype)}")
    for name, value in task.options.items():
        table.add_row(f"option {name}", str(value))
    table.add_row("layers", str(len(task.layer_names)))
    stacked = task.method.acts_on == "factors" and task.method.rank == "lossless"
    lossless = "the sum of the adapters' ranks" if stacked else "what a lossless result takes"
    table.add_row("rank of the result", lossless if task.rank is None else str(task.rank))
    table.add_row("dtype of the result", _name(task.dtype))
    table.add_row("output", str(out))
    return table


def _load_all(adapters: Sequence[AdapterSource] | Mapping[str, AdapterSource]) -> list[Adapter]:
    if isinstance(adapters, str | Path | Adapter | nn.Module):
        raise InputError(f"Expected a list of adapters, but got a single one: {adapters!r}; put it in a list.")
    if isinstance(adapters, Mapping):
        return [_load(source, name) for name, source in adapters.items()]
    return [_load(source, None) for source in adapters]


def _load(source: AdapterSource, name: str | None) -> Adapter:
    if isinstance(source, Adapter):
        source.validate()
        loaded = source
    else:
        loaded = adapter_from_model(source) if isinstance(source, nn.Module) else load_adapter(source, name=name)
    return loaded if name is None else replace(loaded, name=name)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise InputError(f"Unknown dtype '{dtype}'; expected one of {sorted(DTYPES)}.")
    return DTYPES[dtype]


def _report(task: Task) -> dict[str, Any]:
    return {
        "method": task.method.name,
        "rank_limit": task.rank,
        "dtype": _name(task.dtype),
        "seed": task.seed,
        "adapters": [
            {"name": a.name, "source": a.source, "fingerprint": a.fingerprint, "weight": weight}
            for a, weight in zip(task.adapters, task.weights, strict=True)
        ],
        "safety": None if task.safety is None else task.adapters[task.safety].name,
        "options": dict(task.options),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
