"""PEFT's own tests of add_weighted_adapter pass through the backend; they come with PEFT's source distribution."""

from __future__ import annotations

import re
import subprocess

import pytest
from run_peft_tests import download, run


@pytest.mark.slow
def test_pefts_own_tests_pass(tmp_path):
    try:
        archive = download(tmp_path)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"PEFT's source distribution could not be downloaded: {error}")
    finished = run(archive)
    assert finished.returncode == 0, finished.stdout[-4000:]
    counts = re.search(r"was called (\d+) times in (\d+) tests; (\d+) of those passed", finished.stdout)
    assert counts is not None
    calls, tests, passed = map(int, counts.groups())
    assert passed == tests >= 100
    assert calls >= 1000
