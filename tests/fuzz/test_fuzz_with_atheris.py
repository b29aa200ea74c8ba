"""The coverage-guided harness runs where atheris is installed (the extra `fuzz`)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="the extra `fuzz` (atheris) is not installed")
def test_the_harness_runs():
    harness = Path(__file__).with_name("with_atheris.py")
    command = [sys.executable, str(harness), "test_prompt_files", "-runs=30"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done 30 runs" in done.stderr
