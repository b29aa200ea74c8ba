"""What a run says while it works: bars for people, or one JSON object per line for machines (`--log-json`)."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from sstmerge.pipeline.process_memory import peak_bytes, resident_bytes
from sstmerge.pipeline.progress import Progress as Report
from sstmerge.pipeline.progress import in_tokens

console = Console()
error_console = Console(stderr=True)
# Seconds between two lines about one phase.
_INTERVAL = 1.0
_SWITCHED_OFF = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


class JsonLog:
    """Events as JSON lines on stderr.

    Args:
        clock: Seconds, rising.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._phases: dict[str, tuple[float, int, float]] = {}  # began, done then, last line

    def event(self, name: str, **fields: Any) -> None:
        """Write one line.

        Args:
            name: What happened.
            fields: Further entries.
        """
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": name,
            **fields,
            **_own_process(),
            "memory_bytes": resident_bytes(),
            "peak_memory_bytes": peak_bytes(),
        }
        sys.stderr.write(json.dumps(line) + "\n")
        sys.stderr.flush()

    def progress(self, what: str, done: int, total: int) -> None:
        """Write a line about a phase, at most one per second besides its first and its last.

        Args:
            what: The phase.
            done: How much is done.
            total: How much there is.
        """
        now = self.clock()
        began, first, last = self._phases.setdefault(what, (now, done, -_INTERVAL))
        if now - last < _INTERVAL and done < total and last >= 0:
            return
        self._phases[what] = (began, first, now)
        phase, tokens = in_tokens(what)
        rate = (done - first) / (now - began) if now > began and done > first else None
        self.event(
            "progress",
            phase=phase,
            done=done,
            total=total,
            unit="tokens" if tokens else "items",
            tokens_per_second=rate if tokens else None,
            items_per_second=None if tokens else rate,
            elapsed_seconds=now - began,
            eta_seconds=(total - done) / rate if rate else None,
        )


def _own_process() -> dict[str, int]:
    """Return which process of several speaks; nothing where there is one."""
    return {"process": int(os.environ["RANK"])} if "RANK" in os.environ else {}


class RateColumn(ProgressColumn):
    """Tokens per second, or pieces of work per second."""

    def render(self, task: Task) -> Text:
        """Return the text of a bar."""
        speed = task.finished_speed or task.speed
        unit = "tokens/s" if in_tokens(task.description)[1] else "/s"
        return Text("" if not speed else f"{speed:,.0f} {unit}" if speed >= 10 else f"{speed:.2f} {unit}")


_json_log: JsonLog | None = None


def log_as_json(wanted: bool) -> None:
    """Switch to JSON lines, and keep other libraries from writing anything else to stderr; or back.

    Args:
        wanted: Whether lines are wanted.
    """
    global _json_log
    _json_log = JsonLog() if wanted else None
    if wanted:
        os.environ.update(_SWITCHED_OFF)
        logging.captureWarnings(True)
        logging.basicConfig(handlers=[_JsonHandler()], level=logging.WARNING, force=True)


def leave_speaking_to_the_first() -> None:
    """Keep this process's results and bars, also those of other libraries, from the terminal; errors and warnings stay."""
    from transformers.utils.logging import disable_progress_bar

    os.environ.update(_SWITCHED_OFF)
    disable_progress_bar()  # where transformers has read the environment already
    console.quiet = True


class _JsonHandler(logging.Handler):
    """Turns what other libraries log into events."""

    def emit(self, record: logging.LogRecord) -> None:
        if _json_log is not None:
            _json_log.event("log", level=record.levelname, logger=record.name, message=record.getMessage())


@contextmanager
def progress_bars() -> Iterator[Report]:
    """Show one bar per kind of work, or log it; yields a function of what is done, how much, and how much there is.

    Yields:
        The function.
    """
    if _json_log is not None:
        yield _json_log.progress
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=error_console, transient=False) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, completed=done)
            bars.update(tasks[what], completed=done, total=total)

        yield report


def warn(sentence: str) -> None:
    """Tell the user about something to look at.

    Args:
        sentence: The sentence.
    """
    if _json_log is not None:
        _json_log.event("warning", message=sentence)
    else:
        error_console.print(f"Warning: {escape(printable(sentence))}", highlight=False, soft_wrap=True)


def show_error(sentence: str) -> None:
    """Tell the user why a command ended.

    Args:
        sentence: The sentence.
    """
    if _json_log is not None:
        _json_log.event("error", message=sentence)
    else:
        error_console.print(f"[bold red]Error:[/] {escape(printable(sentence))}", highlight=False, soft_wrap=True)


def log_event(name: str, **fields: Any) -> None:
    """Write an event where JSON lines are wanted, and nothing otherwise.

    Args:
        name: What happened.
        fields: Further entries.
    """
    if _json_log is not None:
        _json_log.event(name, **fields)


def printable(text: str) -> str:
    """Return a text on one line, with escapes for what could steer a terminal: messages quote names from files.

    Args:
        text: The text.

    Returns:
        The text.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
