"""Running the command line in the test's own process."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any
from unittest import mock

from sstmerge.cli import main


def run_command(*arguments: str) -> tuple[int, str]:
    """Run the command line in this process; returns the exit code and what it wrote to stderr."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with (
        mock.patch.object(sys, "argv", ["sstmerge", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code or 0
    return code, err.getvalue()
