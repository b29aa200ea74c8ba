"""Refusing a command whose work cannot fit into memory, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from sstmerge.cli.named_paths import name_and_path

_IGNORED = "sstmerge.ignore_memory"


def ignore_memory(context: typer.Context, wanted: bool) -> None:
    """Remember that the user wants to go on anyway.

    Args:
        context: The command's context.
        wanted: Whether.
    """
    context.meta[_IGNORED] = wanted


def check_memory(context: typer.Context) -> None:
    """Refuse a command that needs more memory than there is, as far as its parameters tell.

    Args:
        context: The command's context.
    """
    given = context.params
    adapters = [*(given.get("utility") or []), *([given["safety"]] if given.get("safety") else [])]
    adapters += [name_and_path(text)[1] for text in given.get("adapter") or []]
    from sstmerge.pipeline.memory_estimate import estimate_collection, estimate_model, estimate_solving
    from sstmerge.pipeline.process_memory import available_bytes

    if given.get("gain") and given.get("cost"):
        estimate = estimate_solving([given["gain"], given["cost"]], adapters)
    elif given.get("base"):
        loading = {name: given[name] for name in ("dtype", "device", "quantization") if name in given}
        if given.get("structure") and given.get("module_share") is None:
            fishers = 1 if given.get("data") else 2
            estimate = estimate_collection(
                given["base"], adapters, given["structure"], rows=_rows(given), fishers=fishers, **loading
            )
        else:
            estimate = estimate_model(given["base"], adapters, **loading)
    else:
        return
    estimate.refuse_if_too_large(available_bytes(), ignore=bool(context.meta.get(_IGNORED)))


def check_sums(context: typer.Context, size: float) -> None:
    """Refuse sums that do not fit beside a model that is loaded already.

    Args:
        context: The command's context.
        size: Their bytes.
    """
    from sstmerge.pipeline.memory_estimate import Estimate
    from sstmerge.pipeline.process_memory import available_bytes

    estimate = Estimate({"partial sums of the sketch": size})
    estimate.refuse_if_too_large(available_bytes(), ignore=bool(context.meta.get(_IGNORED)))


def _rows(given: Mapping[str, Any]) -> int:
    """Return the number of scores that `global` keeps: one per sequence, draw of labels and reference point."""
    from sstmerge.pipeline.calibration import load_all
    from sstmerge.pipeline.memory_estimate import points_of

    rows = 0
    for role in ("harm", "benign", "data"):
        files = [file for file in given.get(role) or [] if Path(file).is_file()]
        count = len(load_all(files, split=given["split"], limit=given["limit"])) if files else 0
        sampled = role == "benign" or (role == "data" and given.get("labels") == "sampled")
        each = given["draws"] if sampled else 1
        if role == "benign" and given.get("refusal_weight"):
            each += 1
        rows += min(count, given.get("max_samples") or count) * each
    return rows * points_of(given["reference"])
