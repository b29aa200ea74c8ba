"""Looking into a Fisher file, an adapter or a merge report, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from sstmerge.adapters import load_adapter
from sstmerge.errors import FisherError, InputError
from sstmerge.fisher.convergence import convergence_sentence
from sstmerge.fisher.fisher import read_header
from sstmerge.fisher.sketch_file import is_sketch, sketch_header
from sstmerge.pipeline.merge import REPORT_FILE
from sstmerge.untrusted import read_json


def inspect(path: str | Path) -> list[Table]:
    """Describe a Fisher file, a sketch, or an adapter directory (with the merge report beside it, if there is one).

    Args:
        path: The file or directory.

    Returns:
        Tables to print.

    Raises:
        InputError: If there is nothing at the path.
    """
    location = Path(path)
    if location.is_file():
        return [_sketch_table(location) if is_sketch(location) else _fisher_table(location)]
    if location.is_dir():
        tables = [_adapter_table(location)]
        report = location / REPORT_FILE
        return [*tables, _report_table(report)] if report.is_file() else tables
    raise InputError(f"'{path}' does not exist; give a Fisher file or an adapter directory.")


def file_header(path: str | Path) -> dict[str, Any]:
    """Return what a Fisher file or a sketch says about itself, as plain data for JSON."""
    return sketch_header(path) if is_sketch(path) else read_header(path)


def _sketch_table(path: Path) -> Table:
    header = sketch_header(path)
    counts, metadata, layers = header["counts"], header["metadata"], header["layers"]
    table = _table(f"Sketch {path.name}")
    table.add_row("rank", str(header["rank"]))
    for key in ("labels", "reference", "draws", "response_tokens", "seed", "model", "data", "left_out", "versions"):
        table.add_row(key, escape(str(metadata.get(key))))
    table.add_row("sequences (even, odd)", " + ".join(f"{value:g}" for value in counts["sequences"]))
    table.add_row("response tokens (even, odd)", " + ".join(f"{value:g}" for value in counts["tokens"]))
    table.add_row("layers", f"{len(layers)}: {escape(', '.join(sorted({name.rsplit('.', 1)[-1] for name in layers})))}")
    table.add_row("size", f"{path.stat().st_size / 1e6:,.2f} MB")
    return table


def _fisher_table(path: Path) -> Table:
    header = read_header(path)
    counts, metadata = header["counts"], header["metadata"]
    table = _table(f"Fisher {path.name}")
    table.add_row("structure", header["structure"])
    for key in (
        "labels",
        "reference",
        "draws",
        "weight_sharing",
        "response_tokens",
        "seed",
        "model",
        "data",
        "versions",
    ):
        table.add_row(key, escape(str(metadata.get(key))))
    if "penalty" in metadata:
        table.add_row("penalty", escape(f"counts as cost, too: {metadata['penalty']}"))
    if (stopped := _convergence(metadata, path)) is not None:
        table.add_row("convergence", escape(stopped))
    table.add_row("sequences (even, odd)", " + ".join(f"{value:g}" for value in counts["sequences"]))
    table.add_row("response tokens (even, odd)", " + ".join(f"{value:g}" for value in counts["tokens"]))
    for adapter in header["adapters"]:
        table.add_row(escape(f"adapter {adapter['name']}"), escape(adapter["fingerprint"]))
    table.add_row("layers", escape(f"{len(header['layers'])}: {header['layers'][0]} … {header['layers'][-1]}"))
    for name, tensor in sorted(header["tensors"].items()):
        if not name.startswith(("basis.", "counts.")):
            table.add_row(name, f"{tensor['dtype'].removeprefix('torch.')} {tensor['shape']}")
    table.add_row("size", f"{path.stat().st_size / 1e6:,.2f} MB")
    return table


def _adapter_table(path: Path) -> Table:
    adapter = load_adapter(path)
    table = _table(f"Adapter {path.name}")
    ranks = sorted({factors.rank for factors in adapter.layers.values()})
    table.add_row("base model", escape(str(adapter.base_model)))
    table.add_row("layers", str(len(adapter.layers)))
    table.add_row("modules", escape(", ".join(sorted({name.rsplit(".", 1)[-1] for name in adapter.layers}))))
    table.add_row("ranks", ", ".join(map(str, ranks)))
    table.add_row("parameters", f"{adapter.parameter_count:,} {str(adapter.dtype).removeprefix('torch.')}")
    table.add_row("fingerprint", adapter.fingerprint)
    return table


def _report_table(path: Path) -> Table:
    report = read_json(path, f"The report '{path}'")
    merged, stability = report.get("merge"), report.get("stability") or {}
    if not isinstance(merged, dict) or not isinstance(stability, dict):
        raise InputError(f"The report '{path}' says nothing of a merge; it is damaged, so remove it or merge again.")
    table = _table("How it was merged")
    for key, value in merged.items():
        if not isinstance(value, dict | list):
            table.add_row(escape(key), escape(str(value)))
    for key, value in stability.items():
        shown = f"{value:.4g}" if isinstance(value, int | float) else str(value)
        table.add_row(escape(f"split halves: {key}"), escape(shown))
    warnings = merged.get("warnings")
    for sentence in warnings if isinstance(warnings, list) else ():
        table.add_row("warning", escape(str(sentence)))
    return table


def _convergence(metadata: Mapping[str, Any], path: Path) -> str | None:
    try:
        return convergence_sentence(metadata)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise FisherError(
            f"'{path}' holds no readable record of when its collection stopped; it is damaged."
        ) from error


def _table(title: str) -> Table:
    return Table(title=escape(title), show_header=False)
