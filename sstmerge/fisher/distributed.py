"""Several processes that collect one Fisher: what they exchange, and how they notice that one of them is gone.

Every process goes through the same program with the same arguments and ends with the same Fisher. They meet only at the
beginning, where they make sure that they do the same work, and at the end, where the first one gathers all partial sums.
Tensors travel through the host's memory (gloo), whatever backend the process group has: it happens once, and the order of
additions is ours. Everything else goes through the process group's key-value store, so that waiting is never blind: each
process tells every second that it lives, and leaves a word when it fails.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from sstmerge.errors import FisherError, InputError, PeerError

# A process that has been silent for so long is taken for dead; it gives a sign of life every second.
SILENCE_SECONDS = 60.0
_BEAT_SECONDS = 1.0
_POLL_SECONDS = 0.02
_BYTES_PER_MESSAGE = 1 << 28
_serial_numbers = itertools.count()


class Ranks:
    """A single process, which has nobody to talk to; `ProcessGroup` is the same for several.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
    """

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def check(self) -> None:
        """Raise a `PeerError` if another process failed."""

    def exchange(self, text: str) -> list[str]:
        """Give every process the texts of all, in order; waits for all of them."""
        return [text]

    def gather(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Give the first process the CPU tensors of all, in order; the others get nothing."""
        return [dict(tensors)]

    def broadcast(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give every process the CPU tensors of the first one."""
        return dict(tensors)

    def counter(self) -> Callable[[int], int]:
        """Return a function that adds to a number which all processes share, and returns it."""
        own = 0

        def add(number: int) -> int:
            nonlocal own
            own += number
            return own

        return add

    def require_same(self, description: Mapping[str, object]) -> None:
        """Make sure that all processes were given the same work.

        Args:
            description: What decides the result, by name; JSON.

        Raises:
            InputError: If one of them differs; the message names the field.
        """
        texts = self.exchange(json.dumps(description))
        own = json.loads(texts[0])
        for rank, text in enumerate(texts):
            other = json.loads(text)
            differing = [name for name in own if own[name] != other.get(name)]
            if differing:
                raise InputError(
                    f"Process {rank} was given other work than process 0: {', '.join(differing)} differ. Start all "
                    "processes with the same command, files and library versions."
                )


class ProcessGroup(Ranks):
    """The processes of torch.distributed's default group, which must be initialised.

    All of them must make this object and call its methods in the same order.

    Args:
        silence: Seconds after which a silent process is taken for dead.
    """

    def __init__(self, *, silence: float = SILENCE_SECONDS) -> None:
        if not dist.is_initialized():
            raise InputError("There is no process group; call torch.distributed.init_process_group first.")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._silence = silence
        # The one store that every launcher provides; torch has no public name for it.
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.distributed_c10d.PrefixStore(f"sstmerge/{next(_serial_numbers)}", store)
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=max(silence, 1.0)))
        self._steps = itertools.count()
        self._closed = threading.Event()
        self._pulse = threading.Thread(target=self._beat, daemon=True)
        self._pulse.start()

    def close(self) -> None:
        """Stop giving signs of life."""
        self._closed.set()
        self._pulse.join()

    def check(self) -> None:  # noqa: D102 (inherited)
        with self._store_errors():
            failed = self._store.check(["failed"])
        if failed:
            raise PeerError("Another process failed.", reported=True)

    def fail(self) -> bool:
        """Tell all other processes to stop; return whether this one is the first to do so."""
        try:
            first: bool = self._store.add("failures", 1) == 1
            self._store.set("failed", "")
        except RuntimeError:  # the store is gone with the process that held it
            return True
        return first

    def exchange(self, text: str) -> list[str]:  # noqa: D102 (inherited)
        step = next(self._steps)
        with self._store_errors():
            self._store.set(f"{step}/{self.rank}", text)
        keys = [f"{step}/{rank}" for rank in range(self.size)]
        self._wait_for(keys)
        with self._store_errors():
            return [self._store.get(key).decode() for key in keys]

    def gather(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:  # noqa: D102 (inherited)
        headers = [json.loads(text) for text in self.exchange(_header(tensors))]
        with self._transfer_errors():
            if not self.first:
                for tensor in tensors.values():
                    for piece in _pieces(tensor):
                        dist.send(piece, dst=0, group=self._group)
                return []
            received = [dict(tensors)]
            for rank, header in enumerate(headers[1:], start=1):
                received.append(_filled(header, lambda piece, rank=rank: dist.recv(piece, src=rank, group=self._group)))  # type: ignore[misc]
        return received

    def broadcast(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: D102 (inherited)
        header = self.exchange(_header(tensors) if self.first else "")[0]
        with self._transfer_errors():
            if not self.first:
                return _filled(json.loads(header), lambda piece: dist.broadcast(piece, src=0, group=self._group))
            for tensor in tensors.values():
                for piece in _pieces(tensor):
                    dist.broadcast(piece, src=0, group=self._group)
        return dict(tensors)

    def counter(self) -> Callable[[int], int]:  # noqa: D102 (inherited)
        key = f"count/{next(self._steps)}"

        def add(number: int) -> int:
            with self._store_errors():
                total: int = self._store.add(key, number)
            return total

        return add

    def _beat(self) -> None:
        while not self._closed.wait(_BEAT_SECONDS):
            try:
                self._store.add(f"beat/{self.rank}", 1)
            except RuntimeError:
                return

    def _wait_for(self, keys: Sequence[str]) -> None:
        """Wait until all keys are there; fail when a process that owes one has failed or is silent."""
        beats: dict[int, int] = {}
        heard = dict.fromkeys(range(self.size), time.monotonic())
        next_look = time.monotonic() + _BEAT_SECONDS
        while True:
            self.check()
            with self._store_errors():
                if self._store.check(list(keys)):
                    return
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + _BEAT_SECONDS
                self._listen(keys, beats, heard)
            time.sleep(_POLL_SECONDS)

    def _listen(self, keys: Sequence[str], beats: dict[int, int], heard: dict[int, float]) -> None:
        now = time.monotonic()
        for rank, key in enumerate(keys):
            with self._store_errors():
                beat, arrived = self._store.add(f"beat/{rank}", 0), self._store.check([key])
            if arrived or beat != beats.get(rank):
                beats[rank], heard[rank] = beat, now
            elif now - heard[rank] > self._silence:
                raise PeerError(
                    f"Process {rank} of {self.size} has given no sign of life for {self._silence:g} s: it was killed, or "
                    "its machine is gone. Start the same command again; what was checkpointed is not lost."
                )

    @contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, PeerError):
                raise
            raise PeerError(
                "The process that holds the run together (the launcher, or process 0) is gone. Start the same command "
                "again; what was checkpointed is not lost."
            ) from error

    @contextmanager
    def _transfer_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.check()
            raise PeerError(
                f"A process died while partial sums were exchanged ({str(error).splitlines()[0]}). Start the same "
                "command again; what was checkpointed is not lost."
            ) from error


def _header(tensors: Mapping[str, Tensor]) -> str:
    return json.dumps([[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()])


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the bytes of a contiguous CPU tensor in messages of bounded size."""
    if tensor.numel():
        yield from tensor.contiguous().reshape(-1).view(torch.uint8).split(_BYTES_PER_MESSAGE)


def _filled(header: list[tuple[str, list[int], str]], receive: Callable[[Tensor], object]) -> dict[str, Tensor]:
    tensors = {}
    for name, shape, dtype_name in header:
        dtype = getattr(torch, dtype_name, None)
        if not isinstance(dtype, torch.dtype):
            raise FisherError(f"Another process announced the tensor '{name}' of the unknown dtype '{dtype_name}'.")
        tensors[name] = torch.empty(shape, dtype=dtype)
        for piece in _pieces(tensors[name]):
            receive(piece)
    return tensors
