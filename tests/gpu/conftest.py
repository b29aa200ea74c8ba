"""The kernels on a real GPU: `pytest -m gpu tests/gpu`; elsewhere every test is skipped with the reason."""

from __future__ import annotations

import pytest

from sstmerge import ops


@pytest.fixture(params=["cuda_compiled", "cuda_cupy"])
def gpu_backend(request) -> str:
    """Name of a backend that runs kernels on this machine's GPU."""
    info = next(info for info in ops.backends() if info.name == request.param)
    if not info.available:
        pytest.skip(f"backend {info.name!r} is not available: {info.reason}")
    return info.name
