"""Inverses and solutions of batches, where torch's own race."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sstmerge import batched_lu

SEVERAL_THREADS = """
import torch
from sstmerge import batched_lu
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
for count, n in ((300, 64), (40, 65), (8, 256)):
    eye = torch.eye(n, dtype=torch.float64)
    matrices = torch.randn(count, n, n, generator=generator, dtype=torch.float64) + 3 * n**0.5 * eye
    inverse, info = batched_lu.inverse(matrices)
    assert not info.any()
    torch.testing.assert_close(inverse @ matrices, eye.expand(count, -1, -1), rtol=0, atol=1e-12)
    right = torch.randn(count, n, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(matrices @ batched_lu.solve(matrices, right), right, rtol=0, atol=1e-11)
"""


def test_batches_in_several_threads() -> None:
    # In a process of its own: torch's number of threads cannot be taken back, and the race of torch never returns.
    done = subprocess.run([sys.executable, "-c", SEVERAL_THREADS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "MKL ERROR" not in done.stdout + done.stderr


def test_singular_matrices_are_told_apart() -> None:
    matrices = torch.stack([torch.eye(3), torch.ones(3, 3), 2 * torch.eye(3)]).double()
    inverse, info = batched_lu.inverse(matrices)
    assert [bool(number) for number in info] == [False, True, False]
    torch.testing.assert_close(inverse[2], 0.5 * torch.eye(3, dtype=torch.float64))
    with pytest.raises(torch.linalg.LinAlgError):
        batched_lu.solve(matrices, torch.ones(3, 3, 1, dtype=torch.float64))


def test_layout_and_empty_batches() -> None:
    matrices = torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).mT
    inverse, _ = batched_lu.inverse(matrices)
    torch.testing.assert_close(inverse, torch.linalg.inv(matrices.contiguous()))
    assert batched_lu.inverse(matrices[:0])[0].shape == (0, 5, 5)
