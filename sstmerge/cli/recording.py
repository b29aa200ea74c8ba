"""What goes around the work of a command: does it fit into memory, and the manifest (inputs before, outputs after)."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer

from sstmerge.cli.memory_check import check_memory
from sstmerge.cli.named_paths import name_and_path
from sstmerge.cli.reporting import log_event

# Parameters whose values are paths or hub ids, in the form NAME=PATH or not.
_NAMED_INPUTS = ("adapter", "fisher_file")
_INPUTS = (
    *("base", "utility", "safety", "harm", "benign", "gain", "cost", "data", "basis", "like", "config"),
    *("aligned", "harmful", "borderline", "utility_tasks"),
)


@contextmanager
def recorded(context: typer.Context, out: Path | None) -> Iterator[None]:
    """Refuse what cannot fit into memory, and write the manifest of what the block makes.

    Args:
        context: The command's context.
        out: The output; None where nothing is written.

    Yields:
        Nothing.
    """
    from sstmerge.pipeline.manifest import write_manifest

    check_memory(context)
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    log_event("started", command=sys.argv)
    inputs = {} if out is None else {path: _described(path) for path in _inputs(context.params)}
    yield
    if out is not None:
        manifest = write_manifest(
            out,
            command=["sstmerge", *sys.argv[1:]],
            parameters={name: _plain(value) for name, value in context.params.items()},
            inputs={path: _hub_commit(path) if files is None else files for path, files in inputs.items()},
            started=started,
            seconds=time.monotonic() - clock,
        )
        log_event("wrote", output=str(out), manifest=str(manifest))
    log_event("finished", seconds=time.monotonic() - clock, command=shlex.join(sys.argv[1:]))


def _inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Return the paths and hub ids that a command reads."""
    named = (name_and_path(item)[1] for name in _NAMED_INPUTS for item in _texts(parameters.get(name)))
    plain = (item.partition("::")[0] for name in _INPUTS for item in _texts(parameters.get(name)))  # FILE::SPLIT
    return list(dict.fromkeys((*named, *plain)))


def _texts(value: Any) -> list[str]:
    listed = value if isinstance(value, list | tuple) else [value]
    return [str(item) for item in listed if item is not None and str(item)]


def _described(path: str) -> Any:
    from sstmerge.pipeline.manifest import LARGEST_HASHED_INPUT, describe

    try:
        if not Path(path).exists():
            return None
    except (OSError, ValueError):  # no name that a file could have; the command says so
        return None
    return describe(path, largest=LARGEST_HASHED_INPUT, deep=False)


def _hub_commit(name: str) -> dict[str, str | None]:
    """Return which commit of a hub repository was used, as far as the cache knows."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = [try_to_load_from_cache(name, file) for file in ("config.json", "adapter_config.json")]
    except HFValidationError:
        return {"hub_commit": None}
    found = next((Path(file) for file in cached if isinstance(file, str)), None)
    return {"hub_commit": None if found is None else found.parent.name}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
