"""magnitude_prune, dare and ties on a GPU: bit for bit the reference, and the compiled code of the CPU."""

from __future__ import annotations

import pytest
import torch
from sparsify_checks import (
    DTYPES,
    assert_same,
    check_borders,
    check_dare,
    check_draw,
    check_not_finite,
    check_prune,
    check_rows,
    check_ties,
)

from sstmerge import ops
from sstmerge.ops import sparsify_kernels

pytestmark = pytest.mark.gpu


@pytest.fixture(params=[64, 65536])
def chunk(request, monkeypatch) -> int:
    """Entries that a block takes."""
    monkeypatch.setattr(sparsify_kernels, "CHUNK", request.param)
    return request.param


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(gpu_backend, dtype):
    for density in (0.01, 0.3, 1.0):
        check_prune(gpu_backend, dtype, density, device="cuda")
        check_prune(gpu_backend, dtype, density, "down", device="cuda")
        check_dare(gpu_backend, dtype, density, device="cuda")
        check_ties(gpu_backend, dtype, density, device="cuda")
        check_ties(gpu_backend, dtype, density, "frequency", tasks=4, device="cuda")
    for numel in (5, 8, 100):
        check_rows(gpu_backend, dtype, numel, device="cuda")
    check_not_finite(gpu_backend, dtype, device="cuda")
    check_borders(gpu_backend, dtype, device="cuda")
    check_draw(gpu_backend, dtype, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_tensors_equal_those_of_the_cpu(gpu_backend, dtype):
    generator = torch.Generator().manual_seed(1)
    tasks = [[torch.randn(n, generator=generator).to(dtype) for n in (3_000_001, 70_000)] for _ in range(2)]
    on_gpu = [[tensor.cuda() for tensor in task] for task in tasks]

    for op in (
        lambda values, **options: ops.magnitude_prune(values[0], 0.2, **options),
        lambda values, **options: ops.dare(values[0], 0.2, 11, **options),
        lambda values, **options: ops.ties(values, [1.0, 0.7], 0.2, **options),
    ):
        found = op(on_gpu, backend=gpu_backend)
        assert_same(found, op(tasks))
        again = op(on_gpu, backend=gpu_backend)
        assert_same(found, again)


def test_runs_on_the_current_stream_without_waiting(gpu_backend):
    values = torch.randn(4, 100_000, device="cuda")
    ops.ties([values, values], [1.0, 1.0], 0.5, backend=gpu_backend)  # compiles and loads
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            found = ops.ties([values, values], [1.0, 1.0], 0.5, backend=gpu_backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()

    assert torch.equal(found, ops.magnitude_prune(values, 0.5, backend=gpu_backend))
