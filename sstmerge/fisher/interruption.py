"""SIGINT and SIGTERM: as an exception, and held back where work must not break off in the middle."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sstmerge.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise `Interrupted` while the block runs.

    Yields:
        None.
    """

    def stop(number: int, _: FrameType | None) -> None:
        raise interrupted_by(number)

    with _handled_by(stop):
        yield


@contextmanager
def held_back() -> Iterator[Callable[[], int | None]]:
    """Only note SIGINT and SIGTERM while the block runs; what was noted is delivered when it ends.

    Yields:
        A function that returns the signal that came, or None.

    Raises:
        Interrupted: If the block raised it.
    """
    noted: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        noted.append(number)

    try:
        with _handled_by(note):
            yield lambda: noted[0] if noted else None
    except Interrupted:
        noted.clear()
        raise
    finally:
        if noted:
            signal.raise_signal(noted[0])


def interrupted_by(number: int) -> Interrupted:
    """Return the exception for a signal."""
    return Interrupted(f"The run was stopped by {signal.Signals(number).name}.", signal=number)


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    previous = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before)
