"""Several processes: joining those that a launcher started, and starting some on this machine."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in torch's own list

from sstmerge.errors import InputError, Interrupted, PeerError, SSTMergeError
from sstmerge.fisher.distributed import SILENCE_SECONDS, ProcessGroup, Ranks
from sstmerge.fisher.interruption import interruptible

# How long the first processes wait for the last one to start.
_JOIN_MINUTES = 10
# How long a process may take to save its checkpoint after it was told to stop.
_GRACE_SECONDS = 120


@contextmanager
def joined_ranks(*, silence: float = SILENCE_SECONDS) -> Iterator[Ranks]:
    """Join the other processes of a launcher (torchrun, accelerate launch, `--launch`), if there are any.

    An error in one process ends all of them, and only the first to fail may report it: in the others the exception says
    so.

    Args:
        silence: Seconds after which a process without a sign of life is taken for dead.

    Yields:
        The processes.

    Raises:
        SSTMergeError: That of the block; in all processes but the first to fail, a `PeerError`.
        PeerError: If a process is missing, or failed.
        Interrupted: If the block was interrupted.
    """
    if not launched():
        with interruptible():
            yield Ranks()
        return
    _join()
    group = ProcessGroup(silence=silence)
    try:
        with interruptible():
            yield group
            group.close()
    except Interrupted as error:
        error.reported = not group.fail() or error.reported
        raise
    except PeerError as error:
        error.reported = not group.fail() or error.reported
        raise
    except SSTMergeError as error:
        if group.fail():
            raise
        raise PeerError(str(error), reported=True) from error
    except BaseException:
        group.fail()
        raise
    dist.destroy_process_group()


def launched() -> bool:
    """Return whether a launcher started this process together with others."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def own_device() -> str | None:
    """Return the GPU of this process among those of its machine; None where there is none, or no launcher."""
    if not launched() or not torch.cuda.is_available():
        return None
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def _join() -> None:
    if dist.is_initialized():
        return
    device = own_device()
    if device is not None:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "gloo" if device is None else "cpu:gloo,cuda:nccl", timeout=timedelta(minutes=_JOIN_MINUTES)
        )
    except (RuntimeError, ValueError) as error:
        raise PeerError(
            f"The {os.environ['WORLD_SIZE']} processes of this run did not come together at "
            f"{os.environ.get('MASTER_ADDR', '(no MASTER_ADDR)')}:{os.environ.get('MASTER_PORT', '(no MASTER_PORT)')}: "
            f"{str(error).splitlines()[0]}"
        ) from error


def launch_local(number: int, arguments: Sequence[str]) -> int:
    """Run the command line in several processes on this machine and wait for them.

    Signals are handed on; when one process fails, the others are stopped.

    Args:
        number: Number of processes.
        arguments: Arguments of `sstmerge`, without the flag that led here.

    Returns:
        The exit code: that of the process that failed first, or 128 more than the signal that stopped the run.

    Raises:
        InputError: If the number is below 1, or this process was itself started by a launcher.
        PeerError: If a process was killed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, start_processes

    if number < 1:
        raise InputError(f"--launch needs at least 1 process, but got {number}.")
    if "RANK" in os.environ:
        raise InputError("--launch starts processes itself; leave it out under torchrun or accelerate launch.")
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)  # we report ourselves
    # The store lives here, in the one process that outlives the others.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, (os.cpu_count() or 1) // number)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    context = start_processes(
        "sstmerge",
        sys.executable,
        dict.fromkeys(range(number), ("-m", "sstmerge", *arguments)),
        {rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)},
        DefaultLogsSpecs(),
    )
    try:
        result = context.wait(period=0.1)
    except SignalException as error:
        context.close(signal.Signals(error.sigval), timeout=_GRACE_SECONDS)
        return 128 + int(error.sigval)
    if result is None or not result.is_failed():
        return 0
    first = min(result.failures.values(), key=lambda failure: failure.timestamp)
    if first.exitcode < 0:
        raise PeerError(
            f"Process {first.local_rank} of {number} was killed by {signal.Signals(-first.exitcode).name}, and the others "
            "were stopped. Start the same command again; what was checkpointed is not lost."
        )
    return first.exitcode
