"""A run: the processes that share it, and the folder beside its output where it keeps what must not be lost."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from sstmerge.adapters import CoreSpace
from sstmerge.atomic import atomic_file
from sstmerge.errors import FisherError, InputError, Interrupted, OutputError
from sstmerge.fisher.checkpoint import DEFAULT_MINUTES, Checkpoint
from sstmerge.fisher.distributed import Ranks
from sstmerge.fisher.fingerprints import content_hash
from sstmerge.fisher.tensor_file import load_hashed, save_hashed

_LOCK = "lock"
_SPACE = "space-{}.safetensors"
# What a run folder may hold; nothing else in it is ever removed.
_OURS = re.compile(r"(start-\d+-process-\d+|space-[0-9a-f]+)\.safetensors|answers-[0-9a-f]+-\d+\.json|\..*\.tmp")


@dataclass(frozen=True)
class CheckpointOptions:
    """When a run saves what it has collected.

    Attributes:
        minutes: Minutes of collecting between two savings; None saves by batches alone.
        batches: Batches between two savings; None saves by time alone.
        restart: Throw away what an earlier run has left.
    """

    minutes: float | None = DEFAULT_MINUTES
    batches: int | None = None
    restart: bool = False

    def validate(self) -> None:
        """Check the numbers.

        Raises:
            InputError: If one is out of range.
        """
        if self.minutes is not None and not self.minutes >= 0:
            raise InputError(f"The minutes between two checkpoints must be a number >= 0, but are {self.minutes}.")
        if self.batches is not None and self.batches < 1:
            raise InputError(f"The batches between two checkpoints must be at least 1, but are {self.batches}.")


@dataclass(frozen=True)
class Run:
    """What the parts of a job share; the default is one process that keeps nothing.

    Attributes:
        ranks: The processes.
        folder: The run folder; None keeps nothing.
        options: When to save.
    """

    ranks: Ranks = field(default_factory=Ranks)
    folder: Path | None = None
    options: CheckpointOptions = CheckpointOptions()

    def checkpoint(self, name: str) -> Checkpoint | None:
        """Return the checkpoint of one of the run's collections.

        Args:
            name: Its name, a folder in the run folder.
        """
        if self.folder is None:
            return None
        return Checkpoint(self.folder / name, minutes=self.options.minutes, batches=self.options.batches)

    def same_space(self, space: CoreSpace) -> CoreSpace:
        """Return the space in the very bases of the first process, and of the first start of the run.

        Bases are singular vectors: another machine, or another number of threads, may find others.

        Args:
            space: A space.
        """
        if self.folder is None and self.ranks.size == 1:
            return space
        description, bases = space.basis_description(), space.basis_tensors()
        if self.folder is not None and self.ranks.first:
            path = self.folder / _SPACE.format(content_hash({}, description)[:16])
            if path.exists():
                bases = _kept_bases(path)
            else:
                with atomic_file(path) as temporary:
                    save_hashed(bases, temporary, {})
        return CoreSpace.from_basis(space.adapters, description, self.ranks.broadcast(bases))


@contextmanager
def opened_run(
    out: str | Path, *, ranks: Ranks | None = None, options: CheckpointOptions = CheckpointOptions()
) -> Iterator[Run]:
    """Open the run that writes `out`: its folder is `out` with `.checkpoint` behind it, and goes when the block ends well.

    Args:
        out: What the run writes.
        ranks: The processes; this one alone by default.
        options: When to save.

    Yields:
        The run.

    Raises:
        OutputError: If another run is writing `out`.
        Interrupted: If the block was interrupted; the message says how to go on.
    """
    options.validate()
    ranks = ranks or Ranks()
    folder = Path(f"{os.path.normpath(out)}.checkpoint")
    with _locked(folder, Path(out)) if ranks.first else nullcontext():
        if ranks.first and options.restart:
            _clear(folder)
        ranks.exchange("")
        try:
            yield Run(ranks, folder, options)
        except Interrupted as error:
            told = Interrupted(f"{error} {_advice(folder)}", signal=error.signal)
            told.reported = error.reported
            raise told from error
        ranks.exchange("")  # no process removes what another one still reads
        _clear(folder)


def _kept_bases(path: Path) -> dict[str, Tensor]:
    try:
        return load_hashed(path)[0]
    except ValueError as error:
        raise FisherError(
            f"The bases of the run in '{path}' are damaged: {error}. Start anew with --restart."
        ) from error


def _holds_work(folder: Path) -> bool:
    names = [path.name for path in _below(folder) if path.is_file()]
    return any(_OURS.fullmatch(name) and not name.startswith(("space-", ".")) for name in names)


def _advice(folder: Path) -> str:
    if _holds_work(folder):
        return f"What was collected is kept in '{folder}'; the same command goes on from there."
    return "Nothing was collected yet; the same command begins anew."


@contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    """Hold the folder's lock; the system releases it when a process dies, however it does."""
    descriptor = _lock(folder, out)
    try:
        for stale in out.parent.glob(f".{out.name}.*.tmp"):  # of a run that was killed while it wrote
            if stale.is_file():
                stale.unlink(missing_ok=True)
        yield
    finally:
        if not _holds_work(folder):
            _clear(folder)
        _remove_if_empty(folder)
        os.close(descriptor)


def _lock(folder: Path, out: Path) -> int:
    import fcntl  # not on Windows, where everything else runs

    path = folder / _LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # a run that ended has just removed the folder
            continue
        except OSError as error:
            raise OutputError(f"The folder '{folder}' cannot be made: {error.strerror}.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
            os.close(descriptor)
        except FileNotFoundError:  # the run that held the lock has removed it and ended
            os.close(descriptor)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise OutputError(
                f"Another run is writing '{out}': {holder} holds '{path}'. Wait for it, or choose another name."
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise OutputError(
                f"'{path}' cannot be locked: {error.strerror}. Write to a file system with locks, or do without "
                "checkpoints (--no-checkpoint)."
            ) from error


def _below(folder: Path) -> list[Path]:
    """Return all that lies in a folder, contents before what contains them; other processes may be removing it."""
    return [Path(at) / name for at, folders, files in os.walk(folder, topdown=False) for name in (*files, *folders)]


def _clear(folder: Path) -> None:
    """Remove all that runs have left in a folder, and nothing else."""
    for path in _below(folder):
        if path.is_dir():
            with suppress(OSError):  # something else is in it
                path.rmdir()
        elif _OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)
    if not (folder / _LOCK).exists():  # on the machines of other processes
        with suppress(OSError):
            folder.rmdir()


def _remove_if_empty(folder: Path) -> None:
    for path in _below(folder):
        if path.is_dir():
            with suppress(OSError):
                path.rmdir()
    if {path.name for path in folder.iterdir()} == {_LOCK}:
        (folder / _LOCK).unlink()
        with suppress(OSError):
            folder.rmdir()
