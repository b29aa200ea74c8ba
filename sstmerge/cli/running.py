"""What long commands share: several processes, checkpoints, and how to go on after an interruption."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sstmerge.cli.app import fail_on
from sstmerge.cli.recording import recorded
from sstmerge.cli.reporting import leave_speaking_to_the_first, progress_bars

if TYPE_CHECKING:
    from sstmerge.pipeline.progress import Progress
    from sstmerge.pipeline.run import Run

# Set in processes that --launch started, which were given the same arguments.
_LAUNCHED = "SSTMERGE_LAUNCHED"

# The parameters of a command that have no effect unless it collects Fishers.
RUNNING_ONLY = ("launch", "checkpoint", "checkpoint_minutes", "checkpoint_batches", "restart")

Launch = Annotated[
    int | None, typer.Option("--launch", help="Start N processes on this machine that share the work, one per GPU.")
]
Checkpointing = Annotated[
    bool,
    typer.Option("--checkpoint/--no-checkpoint", help="Keep what is collected beside the output until it is done."),
]
CheckpointMinutes = Annotated[float, typer.Option("--checkpoint-minutes", help="Minutes between two checkpoints.")]
CheckpointBatches = Annotated[
    int | None, typer.Option("--checkpoint-batches", help="Save after every N batches too; by time alone by default.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Throw away the checkpoint of an earlier run.")]


def in_processes(number: int | None) -> None:
    """Hand a command over to several processes and end with their exit code, where that is asked for.

    Args:
        number: Number of processes; None goes on in this one.
    """
    if number is None or _LAUNCHED in os.environ:
        return
    from sstmerge.pipeline.launch import launch_local

    os.environ[_LAUNCHED] = "1"
    try:
        code = launch_local(number, sys.argv[1:])
    finally:
        del os.environ[_LAUNCHED]
    sys.exit(code)


@contextmanager
def running(context: typer.Context, out: Path) -> Iterator[tuple[Run, Progress]]:
    """Join the other processes, lock the output, write the manifest; only the first process speaks.

    Args:
        context: The command's context, with the options above.
        out: What is written.

    Yields:
        The run and where to report progress.
    """
    from sstmerge.pipeline.launch import joined_ranks
    from sstmerge.pipeline.progress import no_progress
    from sstmerge.pipeline.run import CheckpointOptions, Run, opened_run

    given: dict[str, Any] = context.params
    options = CheckpointOptions(given["checkpoint_minutes"], given["checkpoint_batches"], given["restart"])
    fail_on(options.restart and not given["checkpoint"], "--restart belongs to checkpoints; leave out --no-checkpoint.")
    with joined_ranks() as ranks, ExitStack() as stack:
        progress: Progress = no_progress
        if ranks.first:
            stack.enter_context(recorded(context, out))
            progress = stack.enter_context(progress_bars())
        else:
            leave_speaking_to_the_first()
        kept = given["checkpoint"]
        yield stack.enter_context(opened_run(out, ranks=ranks, options=options)) if kept else Run(ranks), progress
