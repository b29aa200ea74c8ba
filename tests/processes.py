"""Processes for tests, forked from a server that has imported everything: they start in milliseconds and die for real."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

CONTEXT = multiprocessing.get_context("forkserver")


@cache
def _start_server() -> None:
    """Start the server; that of Python 3.11 finds what it preloads in its own path only (python/cpython#117378)."""
    CONTEXT.set_forkserver_preload(["collection_cases", "processes"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()


class Started:
    """A process that runs a function of `collection_cases`; what it returned or raised lands in a file."""

    def __init__(
        self, folder: Path, function: Callable[..., Any], *arguments: Any, environment: dict[str, str]
    ) -> None:
        _start_server()
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "outcome.json"
        self.log.unlink(missing_ok=True)
        self.process = CONTEXT.Process(target=_run, args=(self.log, environment, function, arguments))
        self.process.start()

    def kill(self, number: int) -> None:
        if self.process.is_alive():
            with suppress(ProcessLookupError):  # it ended just now; its parent is the server, which has waited for it
                os.kill(self.process.pid, number)

    def join(self, timeout: float = 90.0) -> dict[str, Any]:
        """Wait and return {"value"} or {"error", "message", "reported"}, with the exit code; {} if it was killed."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "the process hangs"
        outcome = json.loads(self.log.read_text()) if self.log.exists() else {}
        return outcome | {"exit": self.process.exitcode}


def start(folder: Path, function: Callable[..., Any], *arguments: Any) -> Started:
    """Start one process."""
    return Started(folder, function, *arguments, environment={})


def start_together(folder: Path, size: int, function: Callable[..., Any], *arguments: Any) -> tuple[list[Started], Any]:
    """Start processes that find each other as those of torchrun do; keep the second value as long as they run."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(size),
    }
    started = []
    for rank in range(size):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(Started(folder / f"process{rank}", function, *arguments, environment=environment))
    return started, store


def together(folder: Path, size: int, function: Callable[..., Any], *arguments: Any) -> list[dict[str, Any]]:
    """Start processes together and return their outcomes."""
    started, store = start_together(folder, size, function, *arguments)
    outcomes = [process.join() for process in started]
    del store
    return outcomes


def wait_until(condition: Callable[[], bool], timeout: float = 60.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.002)


def _run(log: Path, environment: dict[str, str], function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    os.environ.update(environment)
    code: int | str | None = 0
    with (log.parent / "output.txt").open("w") as output, redirect_stdout(output), redirect_stderr(output):
        try:
            outcome = {"value": function(*arguments)}
        except SystemExit as error:
            outcome, code = {}, error.code
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 (told to the test)
            traceback.print_exc()
            code = 1
            outcome = {
                "error": type(error).__name__,
                "message": str(error),
                "reported": getattr(error, "reported", False),
            }
    temporary = log.with_suffix(".tmp")
    temporary.write_text(json.dumps(outcome))
    temporary.replace(log)
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)
